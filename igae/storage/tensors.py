# SPDX-License-Identifier: Apache-2.0
"""Files of named tensors in the safetensors format: written as a stream, read by byte ranges, at any fsspec URL.

A file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, first byte and end among the
data) and the tensors' bytes one after another, all little-endian. Any safetensors reader can open it.

Every byte is under a CRC-32. A tensor that is read row by row has one for each row, in a tensor ``<name>.crc32`` (uint8
[N, 4]) at the end of the file. One more, which the writer hands out, covers all the rest.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from igae.errors import progress, redact
from igae.storage.paths import LIMITS, Damaged, file_system, named_errors
from igae.storage.reading import ask, of_length, parse_json, retry
from igae.storage.writing import writes_to

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUMS = ".crc32"
MAX_HEADER = 100_000_000  # the library's own limit
Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Stamp:
    """What a file is recognized by: its size and its CRC-32, but for tensors with sums of their own."""

    bytes: int
    crc32: int


class Entry(NamedTuple):
    """A tensor of a file: it has the bytes from ``begin`` to ``end`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(url: str, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> Stamp:
    """Write a file; a local one is on the disk when this returns. At most ``LIMITS.chunk`` bytes (or a row) are copied
    at a time.

    Args:
        tensors: of any device and shape.
        rows: more tensors, [N, ...], with a checksum for each row.

    Raises:
        OSError: it can't be written (object stores have errors of their own). What was written is left there.
        ValueError: a dtype that the format has no name for.
    """
    rows = rows or {}
    everything = {**tensors, **rows}
    sums = {name + SUMS: torch.zeros(len(tensor), 4, dtype=torch.uint8) for name, tensor in rows.items()}
    assert len(everything) == len(tensors) + len(rows) and not any(name.endswith(SUMS) for name in everything)
    # Large elements first: each tensor then begins at a multiple of its element size.
    order = sorted(everything, key=lambda name: (-everything[name].element_size(), name))
    layout = {name: everything[name] for name in order} | sums  # the sums last: they are known last
    header, size = _header(layout)
    crc = zlib.crc32(header)
    fs, path = file_system(url)
    bar = progress(f"writing {redact(url)}", size, "B", unit_scale=True)
    with bar, writes_to(url), fs.open(path, "wb") as file:
        file.write(header)
        for name, tensor in layout.items():
            first = 0
            for piece in _pieces(tensor):
                file.write(piece.reshape(-1).data)
                bar.update(piece.nbytes)
                if name in rows:
                    _as_sums(sums[name + SUMS])[first : first + len(piece)] = [zlib.crc32(row) for row in piece]
                    first += len(piece)
                else:
                    crc = zlib.crc32(piece.data, crc)
        if isinstance(fs, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())
    return Stamp(len(header) + size, crc)


def _header(layout: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The bytes before the data, and the number of bytes of the data."""
    table, end = {}, 0
    for name, tensor in layout.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is of {tensor.dtype}, which has no name in safetensors files: convert it first")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _pieces(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, some rows at a time: [rows, bytes of a row]."""
    tensor = tensor.detach().unsqueeze(0) if tensor.ndim == 0 else tensor.detach()
    if tensor.numel() == 0:
        return
    step = max(1, LIMITS.chunk * len(tensor) // (tensor.numel() * tensor.element_size()))
    for part in tensor.split(step):
        yield part.cpu().contiguous().reshape(len(part), -1).view(torch.uint8).numpy()


class TensorFile:
    """A file that is there; making it reads and checks the header, and nothing else is read before it is asked for.

    Args:
        stamp: what :func:`write_tensors` returned for it; checked where it is given.

    Attributes:
        entries: name -> :class:`Entry`, in the order of the file.

    Raises (all methods):
        ValueError: it is missing, can't be read, or is damaged; the sentence names it.
    """

    def __init__(self, url: str, stamp: Stamp | None = None) -> None:
        self.url, self._stamp = url, stamp
        with named_errors(url):
            self._fs, self._path = file_system(url)
            size = retry(lambda limit: ask(self._fs, limit, "size", self._path), redact(url))
            if stamp is not None and size != stamp.bytes:
                raise Damaged(f"it has {size} bytes and had {stamp.bytes}")
            length = self._fetch([0], [8])[0] if size >= 8 else b""
            self._data = 8 + int.from_bytes(length, "little")
            if not 10 <= self._data <= min(size, MAX_HEADER + 8):
                raise Damaged("its header has no possible length")
            header = self._fetch([8], [self._data])[0]
            self.entries = _parse(header, size - self._data)
        self._crc = zlib.crc32(length + header)
        self._sums: dict[str, NDArray[Any]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that have no checksums for rows."""
        result = self._load([name for name in self.entries if not self._has_sums(name)])
        crc = self._crc
        for tensor in result.values():
            crc = zlib.crc32(_flat(tensor), crc)
        with named_errors(self.url):
            if self._stamp is not None and crc != self._stamp.crc32:
                raise Damaged("its checksum differs")
        for name in self.row_names():
            if name + SUMS in result:
                self._sums[name] = _as_sums(result.pop(name + SUMS))
        return result

    def row_names(self) -> list[str]:
        """Names of the tensors with checksums for rows."""
        return [name for name in self.entries if self._has_sums(name)]

    def rows_into(self, name: str, index: Indices, out: Tensor, places: NDArray[np.int64]) -> None:
        """Write rows of a tensor into rows of another, which must be contiguous: ``out[places] = tensor[index]``."""
        entry = self.entries[name]
        taken = np.asarray(index, dtype=np.int64)
        assert entry.shape[1:] == out.shape[1:] and entry.dtype == out.dtype and len(taken) == len(places)
        if len(taken) and not 0 <= taken.min() <= taken.max() < entry.shape[0]:
            raise IndexError(f"{self.url}: {name} has {entry.shape[0]} rows")
        if len(taken) == 0 or out.numel() == 0:
            return
        target, size = _flat(out), (entry.end - entry.begin) // entry.shape[0]
        order = np.argsort(taken, kind="stable")  # as they are in the file
        pairs = zip(taken[order].tolist(), places[order].tolist(), strict=True)
        found = [(row, target[place * size : (place + 1) * size]) for row, place in pairs]
        self._read([(entry.begin + row * size, data) for row, data in found])
        if self._has_sums(name):
            if name not in self._sums:
                self._sums[name] = _as_sums(self._load([name + SUMS])[name + SUMS])
            with named_errors(self.url):
                for row, data in found:
                    if zlib.crc32(data) != self._sums[name][row]:
                        raise Damaged(f"the checksum of row {row} of {name} differs")

    def _has_sums(self, name: str) -> bool:
        entry, sums = self.entries[name], self.entries.get(name + SUMS)
        return bool(entry.shape and sums and sums[:2] == (torch.uint8, (entry.shape[0], 4)))

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        """Whole tensors; ``names`` are in the order of the file."""
        result = {name: torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype) for name in names}
        self._read([(self.entries[name].begin, _flat(tensor)) for name, tensor in result.items()])
        return result

    def _read(self, wanted: list[tuple[int, memoryview]]) -> None:
        """Read runs of bytes (begin, where to), in the order of the file."""
        with named_errors(self.url):
            if not isinstance(self._fs, LocalFileSystem):
                self._read_ranges(wanted)
                return
            with open(self._path, "rb") as file:
                for begin, target in wanted:
                    file.seek(self._data + begin)
                    if file.readinto(target) != len(target):
                        raise Damaged("it ends too early")

    def _read_ranges(self, wanted: list[tuple[int, memoryview]]) -> None:
        """Neighbors come in one request of at most ``LIMITS.span`` bytes, and a few requests run at the same time."""
        step = LIMITS.span
        cuts = [(begin + i, target[i : i + step]) for begin, target in wanted for i in range(0, len(target), step)]
        spans: list[list[tuple[int, memoryview]]] = []
        start = end = 0
        for begin, target in cuts:
            near = start <= begin <= end + LIMITS.gap and begin + len(target) <= start + LIMITS.span
            if spans and near:
                spans[-1].append((begin, target))
                end = max(end, begin + len(target))
            else:
                spans.append([(begin, target)])
                start, end = begin, begin + len(target)
        for number in range(0, len(spans), LIMITS.requests):
            self._read_spans(spans[number : number + LIMITS.requests])

    def _read_spans(self, spans: list[list[tuple[int, memoryview]]]) -> None:
        starts = [self._data + span[0][0] for span in spans]
        ends = [self._data + max(begin + len(target) for begin, target in span) for span in spans]
        for span, start, data in zip(spans, starts, self._fetch(starts, ends), strict=True):
            for begin, target in span:
                offset = self._data + begin - start
                target[:] = memoryview(data)[offset : offset + len(target)]

    def _fetch(self, starts: list[int], ends: list[int]) -> list[bytes]:
        def fetch(limit: float) -> list[bytes]:
            found = ask(self._fs, limit, "cat_ranges", [self._path] * len(starts), starts, ends, on_error="raise")
            return [of_length(end - start, data) for start, end, data in zip(starts, ends, found, strict=True)]

        return retry(fetch, redact(self.url))


def _flat(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the CPU, as they stand in memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _as_sums(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy().reshape(-1).view("<u4")


def _parse(header: bytes, size: int) -> dict[str, Entry]:
    """The entries of a header, in the order of the file. They must fill the data without gaps and overlaps."""
    try:
        table = dict(parse_json(header, MAX_HEADER))
    except (TypeError, ValueError):
        raise Damaged("its header is no JSON table") from None
    table.pop("__metadata__", None)
    entries = sorted(((name, _entry(name, item)) for name, item in table.items()), key=lambda item: item[1][2:])
    end = 0
    for name, entry in entries:
        if entry.begin != end:
            raise Damaged(f"{name[:80]!r} begins at {entry.begin} and not at {end}")
        end = entry.end
    if end != size:
        raise Damaged(f"its tensors have {end} bytes and its data {size}")
    return dict(entries)


def _entry(name: str, item: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
        numbers = [*shape, begin, end]
        good = len(numbers) <= 64 and all(type(number) is int and 0 <= number < 1 << 60 for number in numbers)
        # Dimensions of an empty tensor too must be such that torch can multiply them.
        good = good and math.prod(max(1, number) for number in shape) * dtype.itemsize < 1 << 60
        if good and end - begin == math.prod(shape) * dtype.itemsize:
            return Entry(dtype, shape, begin, end)
    except (KeyError, TypeError, ValueError):
        pass
    raise Damaged(f"its header has a wrong entry {name[:80]!r}")
