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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor

from igae.errors import redact

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

CHUNK = 64 << 20  # bytes that are on their way from device to file
# A request to an object store takes as long as some hundred kilobytes: gaps up to GAP are read through.
GAP, SPAN, REQUESTS = 256 << 10, 16 << 20, 8


class Stamp(NamedTuple):
    """What a file is recognized by: its size, and the CRC-32 of all of it but the tensors with sums of their own."""

    bytes: int
    crc32: int


class Entry(NamedTuple):
    """A tensor of a file: it has the bytes from ``begin`` to ``end`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write(url: str, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> Stamp:
    """Write a file; a local one is on the disk when this returns. Not more than 64 MiB (or a row) is copied at a time.

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
    head, size = _header(layout)
    crc = zlib.crc32(head)
    with _open(url) as file:
        file.write(head)
        for name, tensor in layout.items():
            first = 0
            for piece in _pieces(tensor):
                file.write(piece.reshape(-1).data)
                if name in rows:
                    found = np.array([zlib.crc32(row) for row in piece], "<u4")
                    sums[name + SUMS].numpy()[first : first + len(piece)] = found.view(np.uint8).reshape(-1, 4)
                    first += len(piece)
                else:
                    crc = zlib.crc32(piece.data, crc)
    return Stamp(len(head) + size, crc)


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
    step = max(1, CHUNK * len(tensor) // (tensor.numel() * tensor.element_size()))
    for start in range(0, len(tensor), step):
        part = tensor[start : start + step].cpu().contiguous()
        yield part.reshape(len(part), -1).view(torch.uint8).numpy()


@contextmanager
def _open(url: str) -> Iterator[Any]:
    fs, path = fsspec.core.url_to_fs(url)
    with fs.open(path, "wb") as file:
        yield file
        if isinstance(fs, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())


class TensorFile:
    """A file that is there; making it reads and checks the header, and nothing else is read before it is asked for.

    Args:
        stamp: what :func:`write` returned for it; checked where it is given.

    Raises (all methods):
        ValueError: it is missing, can't be read, or is damaged; the sentence names it.
    """

    def __init__(self, url: str, stamp: Stamp | None = None) -> None:
        self.url, self._stamp = url, stamp
        with self._naming():
            self._fs, self._path = fsspec.core.url_to_fs(url)
            size = self._fs.size(self._path)
            if stamp is not None and size != stamp.bytes:
                raise _Damaged(f"it has {size} bytes and had {stamp.bytes}")
            length = self._fs.cat_file(self._path, start=0, end=8) if size >= 8 else b""
            end = 8 + int.from_bytes(length, "little")
            if not 10 <= end <= min(size, MAX_HEADER + 8):
                raise _Damaged("its header has no possible length")
            text = self._fs.cat_file(self._path, start=8, end=end)
            self.entries = _parse(text, size - end)
        self._data = end
        self._crc = zlib.crc32(length + text)
        self._sums: dict[str, NDArray[Any]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that have no checksums for rows."""
        result = self._load([name for name in self.entries if not self._has_sums(name)])
        crc = self._crc
        for tensor in result.values():
            crc = zlib.crc32(_flat(tensor), crc)
        if self._stamp is not None and crc != self._stamp.crc32:
            with self._naming():
                raise _Damaged("its checksum differs")
        for name in [name for name in result if name.endswith(SUMS) and self._has_sums(name[: -len(SUMS)])]:
            self._sums[name] = _as_sums(result.pop(name))
        return result

    def row_names(self) -> list[str]:
        """Names of the tensors with checksums for rows."""
        return [name for name in self.entries if self._has_sums(name)]

    def rows(self, name: str, index: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Rows of a tensor [N, ...], in the order asked: [len(index), ...]."""
        entry = self.entries[name]
        out = torch.empty((len(index), *entry.shape[1:]), dtype=entry.dtype)
        self.rows_into(name, index, out, np.arange(len(index)))
        return out

    def rows_into(
        self, name: str, index: Sequence[int] | NDArray[np.int64], out: Tensor, places: NDArray[np.int64]
    ) -> None:
        """Write rows of a tensor into rows of another, which must be contiguous: ``out[places] = tensor[index]``."""
        entry = self.entries[name]
        taken = np.asarray(index, dtype=np.int64)
        assert entry.shape[1:] == out.shape[1:] and entry.dtype == out.dtype and len(taken) == len(places)
        if len(taken) and not 0 <= taken.min() <= taken.max() < entry.shape[0]:
            raise IndexError(f"{self.url}: {name} has {entry.shape[0]} rows")
        size = (entry.end - entry.begin) // max(1, entry.shape[0])
        if len(taken) == 0 or size == 0:
            return
        distinct, first, again = np.unique(taken, return_index=True, return_inverse=True)
        pairs = list(zip(distinct.tolist(), places[first].tolist(), strict=True))
        target = _flat(out)

        def cuts() -> Iterator[tuple[int, int, memoryview]]:
            for row, place in pairs:
                yield from _cut(entry.begin + row * size, target[place * size : (place + 1) * size])

        with self._naming():
            self._read(cuts())
        if self._has_sums(name):
            if name + SUMS not in self._sums:
                self._sums[name + SUMS] = _as_sums(self._load([name + SUMS])[name + SUMS])
            sums = self._sums[name + SUMS]
            for row, place in pairs:
                if zlib.crc32(target[place * size : (place + 1) * size]) != sums[row]:
                    with self._naming():
                        raise _Damaged(f"the checksum of row {row} of {name} differs")
        if len(distinct) < len(taken):
            out[torch.from_numpy(places)] = out[torch.from_numpy(places[first][again])]

    def _has_sums(self, name: str) -> bool:
        entry, sums = self.entries.get(name), self.entries.get(name + SUMS)
        if entry is None or sums is None or not entry.shape:
            return False
        return sums.dtype == torch.uint8 and sums.shape == (entry.shape[0], 4)

    def _load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, in the order of the file."""
        names = sorted(names, key=lambda name: self.entries[name][2:])
        result = {name: torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype) for name in names}
        with self._naming():
            self._read(cut for name in names for cut in _cut(self.entries[name].begin, _flat(result[name])))
        return result

    def _read(self, cuts: Iterable[tuple[int, int, memoryview]]) -> None:
        """Read pieces (begin, end, where to), in the order of the file. From a store neighbors come in one
        request, and a few requests run at the same time."""
        if isinstance(self._fs, LocalFileSystem):
            with open(self._path, "rb", buffering=0) as file:
                for begin, _, target in cuts:
                    file.seek(self._data + begin)
                    while len(target):
                        count = file.readinto(target)
                        if not count:
                            raise _Damaged("it ends too early")
                        target = target[count:]
            return
        spans: list[list[tuple[int, int, memoryview]]] = []
        for cut in cuts:
            if spans and cut[0] - spans[-1][-1][1] <= GAP and cut[1] - spans[-1][0][0] <= SPAN:
                spans[-1].append(cut)
                continue
            if len(spans) == REQUESTS:
                self._fetch(spans)
                spans = []
            spans.append([cut])
        if spans:
            self._fetch(spans)

    def _fetch(self, spans: list[list[tuple[int, int, memoryview]]]) -> None:
        starts, ends = [self._data + span[0][0] for span in spans], [self._data + span[-1][1] for span in spans]
        found = self._fs.cat_ranges([self._path] * len(spans), starts, ends, on_error="raise")
        for span, start, end, data in zip(spans, starts, ends, found, strict=True):
            if len(data) != end - start:
                raise _Damaged("it ends too early")
            view = memoryview(data)
            for begin, stop, target in span:
                target[:] = view[begin - span[0][0] : stop - span[0][0]]

    @contextmanager
    def _naming(self) -> Iterator[None]:
        where = redact(self.url)
        try:
            yield
        except _Damaged as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        except FileNotFoundError as error:
            raise ValueError(f"{where} is missing") from error
        except Exception as error:  # object stores have errors of their own
            text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ValueError(f"{where} can't be read: {redact(text)}") from error


class _Damaged(Exception):
    pass


def _flat(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the CPU, as they stand in memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _cut(begin: int, target: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """A run of bytes in pieces that a request may have."""
    for start in range(0, len(target), SPAN):
        part = target[start : start + SPAN]
        yield begin + start, begin + start + len(part), part


def _as_sums(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy().reshape(-1).view("<u4")


def _parse(text: bytes, size: int) -> dict[str, Entry]:
    """The entries of a header, in the order of the file. They must fill the data without gaps and overlaps."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise _Damaged("its header is no JSON") from None
    if not isinstance(table, dict):
        raise _Damaged("its header is no table")
    table.pop("__metadata__", None)
    entries = {name: _entry(name, item) for name, item in table.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise _Damaged(f"{name[:80]!r} begins at {entry.begin} and not at {end}")
        end = entry.end
    if end != size:
        raise _Damaged(f"its tensors have {end} bytes and its data {size}")
    return entries


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
    raise _Damaged(f"its header has a wrong entry {name[:80]!r}")
