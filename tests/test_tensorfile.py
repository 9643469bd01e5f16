# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: what the safetensors library reads and writes, rows from byte ranges, damage."""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from igae.storage import DTYPES, LIMITS, Stamp, TensorFile, write_tensors


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
    else:
        yield f"memory:/{tmp_path}"


def of_dtype(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bits: infinities and NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def many() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {f"of {dtype}": of_dtype(dtype, 3, 5, seed=i) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {f"one {dtype}": of_dtype(dtype, seed=i) for i, dtype in enumerate(DTYPES.values())}
    return tensors | {
        "none": torch.zeros(0, 3, 2, dtype=torch.float64),
        "no row": torch.zeros(4, 0),
        "turned": torch.randn(5, 6).T,
        "part": torch.randn(9, 9)[2:5, ::2],
        "spread": torch.randn(1, 4).expand(6, 4),
        "trained": torch.randn(3, requires_grad=True),
        "größe/exp_avg": torch.randn(2, 2),
    }


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    rows = {"planes": torch.randn(7, 3, 2), "updated": torch.arange(7), "flags": torch.rand(7, 3) > 0.5}
    path = tmp_path / "file.safetensors"
    stamp = write_tensors(str(path), many(), rows)
    assert stamp.bytes == path.stat().st_size
    found = load_file(path)
    sums = {name: found.pop(f"{name}.crc32") for name in rows}
    assert bits(found) == bits(many() | rows)
    for name, tensor in rows.items():
        for row, value in zip(tensor, sums[name], strict=True):
            assert int.from_bytes(value.numpy().tobytes(), "little") == zlib.crc32(row.numpy().tobytes())
    with safe_open(path, "pt") as opened:  # it reads rows of its own, and needs elements in their places for it
        assert torch.equal(opened.get_slice("planes")[3:5], rows["planes"][3:5])
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert all(e["data_offsets"][0] % DTYPES[e["dtype"]].itemsize == 0 for e in header.values())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in many().items()}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    file = TensorFile(str(tmp_path / "file.safetensors"))
    assert bits(file.tensors()) == bits(tensors) and file.row_names() == []
    name = "of torch.bfloat16"
    assert file.entries[name].dtype == torch.bfloat16 and file.entries[name].shape == (3, 5)
    assert bits({"": rows_of(file, name, [2, 0])}) == bits({"": tensors[name][[2, 0]]})


def test_round_trip(folder: str) -> None:
    rows = {"planes": torch.randn(7, 3, 2), "empty": torch.zeros(7, 0)}
    stamp = write_tensors(f"{folder}/file", many(), rows)
    file = TensorFile(f"{folder}/file", stamp)
    assert bits(file.tensors()) == bits(many())
    assert sorted(file.row_names()) == ["empty", "planes"]
    assert torch.equal(rows_of(file, "planes", range(7)), rows["planes"]) and rows_of(file, "empty", [1, 2]).shape == (
        2,
        0,
    )
    empty = write_tensors(f"{folder}/empty", {}, {})
    assert TensorFile(f"{folder}/empty", empty).tensors() == {}


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=15))),
    st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60), st.integers(1, 3)),
    st.booleans(),
)
def test_rows_are_those_asked_for(
    dtype: str, row: list[int], taken: tuple[int, list[int]], sizes: tuple[int, int, int, int], remote: bool
) -> None:
    """Whatever the rows, and wherever pieces and requests are cut."""
    count, index = taken
    tensor = of_dtype(DTYPES[dtype], count, *row)
    parts = dict(zip(("chunk", "gap", "span", "requests"), sizes, strict=True))
    with mock.patch.multiple(LIMITS, **parts):
        url = "memory://rows/file" if remote else f"{tempfile.gettempdir()}/igae-rows-{os.getpid()}"
        try:
            stamp = write_tensors(url, {"other": torch.ones(3)}, {"rows": tensor})
            file = TensorFile(url, stamp)
            assert bits({"": rows_of(file, "rows", index)}) == bits({"": tensor[index]})
            assert bits(file.tensors()) == bits({"other": torch.ones(3)})
        finally:
            fs, path = fsspec.core.url_to_fs(url)
            fs.rm_file(path)


def test_rows_that_are_not_there(folder: str) -> None:
    file = TensorFile(f"{folder}/file", write_tensors(f"{folder}/file", {}, {"rows": torch.ones(3, 2)}))
    for index in ([3], [-1], [0, 10**12]):
        with pytest.raises(IndexError):
            rows_of(file, "rows", index)


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of a large file: few bytes; neighbors: one request; rows a little apart: one request too."""
    rows = {"planes": torch.randn(1000, 10_000), "updated": torch.arange(1000)}  # 40 MB
    stamp = write_tensors("memory://needed/file", {"ids": torch.arange(1000)}, rows)
    requests: list[int] = []
    real = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int = 0, end: int | None = None, **keywords: Any) -> bytes:
        data: bytes = real(self, path, start, end, **keywords)
        requests.append(len(data))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    file = TensorFile("memory://needed/file", stamp)
    assert torch.equal(file.tensors()["ids"], torch.arange(1000)) and sum(requests) < 20_000
    for index, count, size in (
        ([1, 900, 500], 3, 3 * 40_000),
        ([10, 13, 11, 12], 1, 4 * 40_000),
        ([20, 25], 1, 6 * 40_000),  # 160 kB apart
        ([20, 30], 2, 2 * 40_000),  # 360 kB
        (range(1000), -(-1000 // (LIMITS.span // 40_000)), 40_000_000),
    ):
        requests.clear()
        assert torch.equal(rows_of(file, "planes", index), rows["planes"][list(index)])
        assert len(requests) == count and sum(requests) == size
    requests.clear()
    assert torch.equal(rows_of(file, "updated", range(0, 1000, 7)), rows["updated"][::7])
    assert len(requests) == 1


def test_written_as_a_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No piece is larger than the limit, nor is what is copied to make it contiguous."""
    monkeypatch.setattr(LIMITS, "chunk", 1000)
    sizes: list[int] = []
    real = Tensor.contiguous

    def contiguous(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return real(tensor)

    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    tensors = {"turned": torch.randn(40, 300).T, "long": torch.randn(5000)}
    write_tensors(str(tmp_path / "file"), tensors, {"rows": torch.randn(50, 70)})
    assert max(sizes) <= 1000 and sum(sizes) >= 48_000 + 20_000 + 14_000
    monkeypatch.undo()
    assert bits(TensorFile(str(tmp_path / "file")).tensors()) == bits(tensors)


def test_a_local_file_is_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    stamp = write_tensors(str(tmp_path / "file"), {"a": torch.ones(1000)})
    assert synced == [stamp.bytes]  # all of it, not what a buffer had let go by then


def test_types_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights is of torch.complex64"):
        write_tensors(str(tmp_path / "file"), {"weights": torch.ones(2, dtype=torch.complex64)})
    assert not (tmp_path / "file").exists()


def rows_of(file: TensorFile, name: str, index: Any) -> Tensor:
    """Rows of a tensor, in the order asked."""
    entry = file.entries[name]
    out = torch.empty((len(index), *entry.shape[1:]), dtype=entry.dtype)
    file.rows_into(name, index, out, np.arange(len(index)))
    return out


def read_all(url: str, stamp: Stamp | None) -> dict[str, Tensor]:
    file = TensorFile(url, stamp)
    result = file.tensors()
    return result | {name: rows_of(file, name, range(file.entries[name].shape[0])) for name in file.row_names()}


def named(error: pytest.ExceptionInfo[ValueError], url: str) -> bool:
    return type(error.value) is ValueError and url in str(error.value) and "\n" not in str(error.value)


def test_every_flipped_bit_is_found() -> None:
    url, fs = "memory://flipped/file", fsspec.filesystem("memory")
    stamp = write_tensors(url, {"ids": torch.tensor([4, 2, 9]), "b": torch.tensor(True)}, {"rows": torch.randn(3, 4)})
    whole = bytearray(fs.cat_file("/flipped/file"))
    good = read_all(url, stamp)
    for place in range(len(whole)):
        for bit in range(8):
            damaged = whole.copy()
            damaged[place] ^= 1 << bit
            fs.pipe_file("/flipped/file", bytes(damaged))
            with pytest.raises(ValueError) as error:
                read_all(url, stamp)
            assert named(error, url)
    fs.pipe_file("/flipped/file", bytes(whole))
    assert bits(read_all(url, stamp)) == bits(good)


def test_a_damaged_row_is_no_obstacle_to_others(folder: str) -> None:
    rows = torch.arange(30, dtype=torch.float32).reshape(10, 3)
    stamp = write_tensors(f"{folder}/file", {}, {"rows": rows})
    fs, path = fsspec.core.url_to_fs(f"{folder}/file")
    raw = bytearray(fs.cat_file(path))
    raw[raw.index(rows[4].numpy().tobytes())] ^= 1
    fs.pipe_file(path, bytes(raw))
    file = TensorFile(f"{folder}/file", stamp)
    assert torch.equal(rows_of(file, "rows", [3, 5, 9]), rows[[3, 5, 9]])
    with pytest.raises(ValueError, match="is damaged: the checksum of row 4 of rows differs"):
        rows_of(file, "rows", [5, 4])


def test_truncated_and_missing_files(folder: str) -> None:
    url = f"{folder}/file"
    stamp = write_tensors(url, {"ids": torch.arange(3)}, {"rows": torch.randn(3, 4)})
    fs, path = fsspec.core.url_to_fs(url)
    whole = fs.cat_file(path)
    for length in range(len(whole)):
        fs.pipe_file(path, whole[:length])
        for given_stamp in (stamp, None):
            with pytest.raises(ValueError) as error:
                read_all(url, given_stamp)
            assert named(error, url)
    fs.pipe_file(path, whole)
    file = TensorFile(url, stamp)
    fs.pipe_file(path, whole[: len(whole) // 2])  # after it was opened
    with pytest.raises(ValueError) as error:
        rows_of(file, "rows", [0, 1, 2])
    assert named(error, url)
    fs.rm_file(path)
    with pytest.raises(ValueError, match="is missing"):
        TensorFile(url, stamp)


def header(**entries: object) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "no JSON": b"{" * 40,
    "deep": b"[" * 100_000,
    "no text": b"\xff" * 40,
    "a list": b"[1, 2, 3]" + b" " * 20,
    "a number": b"12345678901234567890",
    "no table": header(a=3),
    "nothing": header(a={}),
    "unknown type": header(a=entry(dtype="F31")),
    "type of no type": header(a=entry(dtype=["F32"])),
    "no list": header(a=entry(shape=2)),
    "negative": header(a=entry(shape=[-2])),
    "two negatives": header(a=entry(shape=[-2, -1])),
    "no whole number": header(a=entry(shape=[2.0])),
    "true": header(a=entry(shape=[2, True])),
    "text": header(a=entry(shape=["2"])),
    "larger than its bytes": header(a=entry(shape=[1 << 40])),
    "larger than all": header(a=entry(shape=[1 << 40], end=4 << 40)),
    "wraps around": header(a=entry(shape=[1 << 32, 1 << 32, 4], end=0), b=entry()),
    "empty and huge": header(a=entry(shape=[0, 1 << 59, 1 << 59], end=0), b=entry()),
    "many dimensions": header(a=entry(shape=[1] * 100 + [2])),
    "long number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,8]}}',
    "backwards": header(a=entry(shape=[0], begin=8, end=8), b=entry(begin=8, end=0)),
    "overlap": header(a=entry(), b=entry(begin=4, end=12)),
    "twice": header(a=entry(), b=entry()),
    "gap": header(a=entry(shape=[1], end=4), b=entry(shape=[0], begin=8, end=8)),
    "outside": header(a=entry(begin=8, end=16)),
    "too little": header(a=entry(shape=[1], end=4)),
    "three offsets": header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}),
    "no offsets": header(a={"dtype": "F32", "shape": [2]}),
    "same name": b'{"a":' + header(**entry()) + b',"a":' + header(**entry(shape=[1], begin=8, end=12)) + b"}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(HOSTILE[what]).to_bytes(8, "little") + HOSTILE[what] + bytes(8))
    with pytest.raises(ValueError) as error:
        TensorFile(str(path))
    assert named(error, str(path)) and len(str(error.value)) < 400


def test_the_frame_of_the_hostile_headers_is_good(tmp_path: Path) -> None:
    good = header(a=entry(), b=entry(shape=[0, 3], begin=8, end=8), __metadata__={"format": "pt"})
    (tmp_path / "file").write_bytes(len(good).to_bytes(8, "little") + good + bytes(8))
    found = TensorFile(str(tmp_path / "file")).tensors()
    assert bits(found) == bits({"a": torch.zeros(2), "b": torch.zeros(0, 3)})


@pytest.mark.parametrize("length", [0, 1, 100, 1 << 20, 100_000_001, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_hostile_lengths(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before they are read: also where a file is as large as it says (here one with a hole)."""
    path = tmp_path / "file"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 50)
    if length == 100_000_001:
        os.truncate(path, length + 100)
    real = fsspec.AbstractFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **keywords: Any) -> bytes:
        assert end is not None and start is not None and end - start <= 8
        return bytes(real(self, path, start, end, **keywords))

    monkeypatch.setattr(fsspec.AbstractFileSystem, "cat_file", cat_file)
    with pytest.raises(ValueError, match="header has no possible length"):
        TensorFile(str(path))


@example(b"", [(66, 32)])  # sums of a tensor that has another name
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_give_a_sentence_or_tensors(noise: bytes, changes: list[tuple[int, int]]) -> None:
    """Without a stamp, as another reader would take them. Nothing but ValueError ever comes out."""
    fs = fsspec.filesystem("memory")
    url = "memory://noise/file"
    write_tensors(url, {"ids": torch.tensor([4, 2])}, {"rows": torch.ones(2, 3)})
    raw = bytearray(fs.cat_file("/noise/file"))
    for place, value in changes:
        raw[place % len(raw)] = value
    for data in (bytes(raw), noise, len(noise).to_bytes(8, "little") + noise, bytes(raw) + noise):
        fs.pipe_file("/noise/file", data)
        try:
            read_all(url, None)
        except ValueError as error:
            assert url in str(error)
