# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are interrupted, damaged, forged or not written: they cost at most one, and say what is wrong."""

import errno
import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILES, at, complete, example, names, put, read_all, same, save, sentence
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from igae.checkpoint import CheckpointWriter, Progress, list_complete, load_checkpoint
from igae.ranks import Channel
from igae.storage import write_tensors


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill -9."""


WRITES = [
    (LocalFileOpener, "write"),
    (os, "fsync"),
    (os, "replace"),
    (os, "makedirs"),
]


def saved_and_killed(patch: pytest.MonkeyPatch, root: Path, calls: list[tuple[Any, str]], deadly: int) -> bool:
    """Save step 2 with a kill at one of these calls, counted from 1; False if there were not that many."""
    left = deadly

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    with patch.context() as context:
        for owner, name in calls:
            context.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save(root, example(2), keep=2)
        except Killed:
            pass
    return left <= 0


def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the calls that a write consists of: what was there is whole, and the next write goes through."""
    save(tmp_path, example(1), keep=2)
    deadly = 1
    while saved_and_killed(monkeypatch, tmp_path, WRITES, deadly):
        assert complete(tmp_path)[0] == "step-00000001" and same(at(tmp_path, 1), example(1))
        for folder in complete(tmp_path)[1:]:
            assert same(tmp_path / folder, example(2))
        save(tmp_path, example(2), keep=2)
        assert names(tmp_path) == ["step-00000001", "step-00000002"] and same(at(tmp_path, 2), example(2))
        shutil.rmtree(at(tmp_path, 2))
        deadly += 1
    # Two folders made, three headers and 17 tensors, five files and three times a folder synced, two files moved.
    assert deadly > 25


@pytest.mark.parametrize("deadly", ["before", "without a state", "half"])
def test_killed_while_an_old_one_is_removed(deadly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half removed is not complete, and the next save removes the rest."""

    def half(path: str, **_: object) -> None:
        (Path(path) / "shared.safetensors").unlink()
        raise Killed

    for total in (0, 1):
        save(tmp_path, example(total), keep=2)
    with monkeypatch.context() as patch:
        if deadly == "half":
            patch.setattr(shutil, "rmtree", half)
            with pytest.raises(Killed):
                save(tmp_path, example(2), keep=2)
        else:
            calls = [(os, "remove"), (shutil, "rmtree")]
            assert saved_and_killed(patch, tmp_path, calls, 1 if deadly == "before" else 2)
    assert names(tmp_path) == ["step-00000000", "step-00000001", "step-00000002"]
    assert complete(tmp_path) == names(tmp_path)[0 if deadly == "before" else 1 :]
    for folder in complete(tmp_path):
        read_all(tmp_path / folder)
    save(tmp_path, example(3), keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing", "garbage"])
@pytest.mark.parametrize("file", sorted(FILES))
def test_damaged_files_are_named(file: str, damage: str, tmp_path: Path) -> None:
    for total in (1, 2):
        save(tmp_path, example(total), keep=2)
    path = at(tmp_path, 2) / file
    raw = path.read_bytes()
    content = {"truncated": raw[: len(raw) // 2], "longer": raw + b"\0", "empty": b"", "garbage": b"\xff\xfe{]" * 20}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    with pytest.raises(ValueError) as error:
        read_all(at(tmp_path, 2))
    assert file in sentence(error) and str(at(tmp_path, 2)) in sentence(error)
    assert same(at(tmp_path, 1), example(1))


@pytest.mark.parametrize("file", sorted(FILES))
def test_flipped_bits_are_found(file: str, tmp_path: Path) -> None:
    """Wherever they are: in names and numbers, weights, ids and rows."""
    folder = save(tmp_path, example(2), keep=2)
    raw = (folder / file).read_bytes()
    for number, place in enumerate(range(0, len(raw), max(1, len(raw) // 60))):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << number % 8
        (folder / file).write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            read_all(folder)
        assert str(folder / file) in sentence(error)
    (folder / file).write_bytes(raw)
    assert same(folder, example(2))


@pytest.mark.parametrize("content", [{"format": 99}, {"format": 1, "stage": "joint"}, {}, [], 3, {"format": [2]}])
def test_states_of_another_format_are_refused(content: object, tmp_path: Path) -> None:
    folder = save(tmp_path, example(1), keep=2)
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(folder))
    assert str(folder / "state.json") in sentence(error) and "format" in sentence(error)


def signed(state: dict[str, Any]) -> str:
    """As somebody would write it who knows how."""
    return json.dumps({**state, "crc32": zlib.crc32(json.dumps(state, sort_keys=True).encode())})


@pytest.mark.parametrize(
    "change",
    [
        {"world": 10**15},
        {"world": -2},
        {"world": 2},
        {"world": "x"},
        {"step": "one"},
        {"consumed": [1]},
        {"files": None},
        {"files": {}},
        {"files": {"a": 3}},
        {"files": {"config.yaml": {"bytes": "many", "crc32": 1}}},
    ],
)
def test_states_that_make_no_sense_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path, example(1), keep=2)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    (folder / "state.json").write_text(signed(state))
    assert same(folder, example(1))
    (folder / "state.json").write_text(signed(state | change))
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(folder))
    assert str(folder / "state.json") in sentence(error) and "damaged" in sentence(error)


def test_streams_have_the_names_of_today(tmp_path: Path) -> None:
    """Version 0.1.0 called natural images photos."""
    folder = save(tmp_path, example(1), keep=2)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    (folder / "state.json").write_text(signed(state | {"consumed": {"views": 3, "photos": 5}}))
    assert load_checkpoint(str(folder)).progress.consumed == {"views": 3, "natural_images": 5}


@pytest.mark.parametrize("name", ["../scenes-00000.safetensors", "/etc/passwd", "scenes-00001.safetensors", "s3://b/c"])
def test_no_other_file_is_read(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, example(1), keep=2)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state["files"][name] = state["files"].pop("scenes-00000.safetensors")
    (folder / "state.json").write_text(signed(state))
    with pytest.raises(ValueError, match="does not list the files of 1 ranks"):
        load_checkpoint(str(folder))


def test_scenes_of_two_files_that_do_not_fit(tmp_path: Path) -> None:
    """Signed by somebody: the ids of one file in another, or other shapes."""
    folder = save(tmp_path, example(1), keep=2)
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state["world"] = 2
    ids = {"ids": torch.tensor([5, 4])}
    for rows, expected in (
        ({name: tensor[:2] for name, tensor in example(1).scenes.items() if name != "ids"}, "scene 4 is in it twice"),
        ({"planes": torch.ones(2, 3)}, "not those of 2 scenes"),
        ({}, "not those of 2 scenes"),
    ):
        stamp = write_tensors(str(folder / "scenes-00001.safetensors"), ids, rows)
        state["files"]["scenes-00001.safetensors"] = {"bytes": stamp.bytes, "crc32": stamp.crc32, "rows": 2}
        (folder / "state.json").write_text(signed(state))
        with pytest.raises(ValueError, match=expected):
            load_checkpoint(str(folder))


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    for total in (1, 2):
        save(tmp_path, example(total), keep=2)
    real, calls = LocalFileSystem.open, 0

    def full(self: LocalFileSystem, path: str, mode: str = "rb", **keywords: Any) -> Any:
        nonlocal calls
        calls += mode == "wb"
        if mode == "wb" and calls == part:
            Path(path).write_bytes(b"as much as fitted")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, path, mode, **keywords)

    monkeypatch.setattr(LocalFileSystem, "open", full)
    for total in (3, 4):
        calls = 0
        with pytest.raises(ValueError) as error:
            save(tmp_path, example(total), keep=2)
        folder = at(tmp_path, total)
        told = f"the checkpoint {folder} can't be written: rank 0: {folder}/"
        assert sentence(error).startswith(told) and sentence(error).endswith("; earlier ones are untouched")
        assert "can't be written: No space left on device (" in sentence(error).removeprefix(told)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        assert all(same(at(tmp_path, earlier), example(earlier)) for earlier in (1, 2))


@pytest.mark.parametrize("file", ["config.yaml", "state.json"])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    save(tmp_path, example(1), keep=2)
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError) as error:
        save(tmp_path, example(2), keep=2)
    assert f"rank 0: {at(tmp_path, 2) / file} can't be written: No space left on device (" in sentence(error)
    assert names(tmp_path) == ["step-00000001"] and same(at(tmp_path, 1), example(1))


@pytest.fixture
def small_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_the_system_refuses_to_grow(tmp_path: Path, small_files: None, background: bool) -> None:
    save(tmp_path, example(1), keep=2)
    large = example(2)
    large.scenes["planes"] = torch.zeros(3, 100_000)
    maker = CheckpointWriter(str(tmp_path), 2, Channel(), background)
    with pytest.raises(ValueError) as error:
        put(maker, large)
        maker.wait()
    assert str(at(tmp_path, 2)) in sentence(
        error
    ) and "scenes-00000.safetensors can't be written: File too large (" in sentence(error)
    assert names(tmp_path) == ["step-00000001"] and same(at(tmp_path, 1), example(1))


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as error:
        save(tmp_path / "file" / "checkpoints", example(1), keep=2)
    assert str(tmp_path / "file") in sentence(error)


def test_old_ones_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No reason to end a run: the new one is there."""
    for total in (1, 2):
        save(tmp_path, example(total), keep=2)

    def refuse(path: str, *arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", refuse)
        assert same(save(tmp_path, example(3), keep=2), example(3))
    assert "step-00000001 can't be removed: Permission denied" in caplog.text
    assert same(at(tmp_path, 2), example(2))
    save(tmp_path, example(4), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_halves_that_cannot_be_removed_go_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, and one that removes nothing: what is left is no checkpoint, and the next save removes it."""
    save(tmp_path, example(1), keep=2)

    def refuse(path: str, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(ValueError, match="No space left on device"):
            save(tmp_path, example(2), keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and complete(tmp_path) == names(tmp_path)[:1]
    save(tmp_path, example(3), keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_copy_that_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace")

    maker = CheckpointWriter(str(tmp_path), 2, Channel(), background=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", no_memory)
        put(maker, example(1))
    with pytest.raises(ValueError) as error:
        maker.wait()
    assert "can't allocate memory" in sentence(error) and names(tmp_path) == []


@pytest.mark.parametrize("root", ["nothing://bucket/run", "nothing://me:pass@bucket/run"])
def test_a_store_that_cannot_be_reached(root: str) -> None:
    maker = CheckpointWriter(root, 2, Channel())
    for action in (
        lambda: list_complete(root),
        lambda: load_checkpoint(f"{root}/step-00000001"),
        lambda: maker.save(Progress("joint", 1, 1), "", {}, {}, example(1).scenes),
    ):
        with pytest.raises(ValueError) as error:
            action()
        assert "://" in sentence(error) and "bucket/run" in sentence(error) and "pass@" not in sentence(error)
