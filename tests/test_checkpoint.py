# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: every bit comes back, and interrupted, damaged and failed writes cost at most one of them."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from igae import checkpoint
from igae.checkpoint import Checkpoint, Progress, folder_of, list_complete, load, save

FILES = {"shared.safetensors", "optimizer.safetensors", "scenes-00000.safetensors", "config.yaml", "state.json"}


def example(total: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(total)
    shared = {
        "net.weight": torch.randn(3, 4, 2, 2, generator=generator),
        "net.turned": torch.randn(5, 6, generator=generator).T,  # not contiguous
        "scale": torch.tensor(0.02),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "half": torch.randn(7, generator=generator).bfloat16(),
    }
    optimizer = {
        "net.weight/exp_avg": torch.randn(3, 4, 2, 2, generator=generator),
        "net.weight/step": torch.tensor(7.0),
    }
    scenes = {
        "ids": torch.tensor([4, 2, 9]),
        "planes": torch.randn(3, 3, 4, 4, 2, generator=generator).requires_grad_(),
        "learning_rates": torch.rand(5, dtype=torch.float64, generator=generator),
    }
    streams = {"views": {"epoch": 3, "position": total}, "photos": {"epoch": 0, "position": 1}}
    progress = Progress("joint", total - 1, total, skipped=2, skipped_in_a_row=1, data="ab12", streams=streams)
    return Checkpoint(progress, shared, optimizer, scenes, f"experiment: größe\nseed: {total}\n")


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def same(found: Checkpoint, expected: Checkpoint) -> bool:
    return (
        found.progress == expected.progress
        and found.config == expected.config
        and all(
            bits(getattr(found, part)) == bits(getattr(expected, part)) for part in ("shared", "optimizer", "scenes")
        )
    )


def sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path / "new" / "checkpoints", example(12), keep=3)
    assert folder == folder_of(tmp_path / "new" / "checkpoints", 12) and folder.name == "step-00000012"
    assert {path.name for path in folder.iterdir()} == FILES
    assert same(load(folder), example(12)) and not same(load(folder), example(13))


def test_nothing_to_save_is_saved_too(tmp_path: Path) -> None:
    empty = Checkpoint(Progress("warmup", 0, 0), {}, {}, {"planes": torch.zeros(0, 3, 2, 2, 1)}, "")
    assert same(load(save(tmp_path, empty, keep=2)), empty)


def test_the_last_ones_are_kept_in_order(tmp_path: Path) -> None:
    for total in (5, 40, 300, 1000, 20000):
        folder = save(tmp_path, example(total), keep=3)
        assert list_complete(tmp_path)[-1] == folder
    assert list_complete(tmp_path) == [folder_of(tmp_path, total) for total in (300, 1000, 20000)]
    assert names(tmp_path) == ["step-00000300", "step-00001000", "step-00020000"]
    assert same(load(folder_of(tmp_path, 300)), example(300))


def test_no_complete_checkpoint_is_written_over(tmp_path: Path) -> None:
    """Of one step there is one state, and at the end of a stage another, in a folder of its own."""
    first = save(tmp_path, example(5), keep=2)
    assert save(tmp_path, example(5), keep=2) == first and same(load(first), example(5))
    end = example(5)
    end.progress.finished = True
    assert same(load(save(tmp_path, end, keep=2)), end) and same(load(first), example(5))
    assert names(tmp_path) == ["step-00000005", "step-00000005-end"]
    assert list_complete(tmp_path)[-1].name == "step-00000005-end"


def test_the_newest_is_never_removed_in_favour_of_an_abandoned_future(tmp_path: Path) -> None:
    """A run that was taken back to an older checkpoint writes lower steps than those that are there."""
    for total in (200, 300):
        save(tmp_path, example(total), keep=2)
    folder = save(tmp_path, example(120), keep=2)
    assert same(load(folder), example(120))


def test_folders_without_a_state_do_not_count(tmp_path: Path) -> None:
    assert list_complete(tmp_path / "nowhere") == []
    for total in (1, 2):
        save(tmp_path, example(total), keep=3)
    (folder_of(tmp_path, 2) / "state.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    assert list_complete(tmp_path) == [folder_of(tmp_path, 1)]
    with pytest.raises(ValueError) as error:
        load(folder_of(tmp_path, 2))
    assert str(folder_of(tmp_path, 2)) in sentence(error) and "state.json" in sentence(error)
    with pytest.raises(ValueError):
        load(tmp_path / "nowhere")


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill -9."""


def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the calls that a write consists of: what was there is whole, and the next write goes through."""
    save(tmp_path, example(1), keep=2)
    steps = [(checkpoint, "save_file"), (checkpoint, "_sync"), (os, "replace"), (os, "rename"), (Path, "write_text")]

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    for deadly in range(1, 40):
        left = deadly
        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(tmp_path, example(2), keep=2)
            except Killed:
                pass
        complete = list_complete(tmp_path)
        assert complete[0] == folder_of(tmp_path, 1) and same(load(complete[0]), example(1))
        for folder in complete[1:]:
            assert same(load(folder), example(2))
        if left > 0:
            break  # it came to its end
        save(tmp_path, example(2), keep=2)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        shutil.rmtree(folder_of(tmp_path, 2))
    assert left > 0 and deadly > 12  # five files written and synced, a folder moved and synced


def test_killed_while_the_same_step_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half removed is not complete."""
    save(tmp_path, example(1), keep=2)
    save(tmp_path, example(2), keep=2)

    def half(path: Path, *arguments: Any, **keywords: Any) -> None:
        if path == folder_of(tmp_path, 2):
            (path / "shared.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path, *arguments, **keywords)

    remove = shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", half)
    try:
        save(tmp_path, example(2), keep=2)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    for folder in list_complete(tmp_path):
        load(folder)
    assert same(load(folder_of(tmp_path, 1)), example(1))


def test_a_stale_staging_folder_is_no_obstacle(tmp_path: Path) -> None:
    save(tmp_path, example(1), keep=2)
    staging = tmp_path / ".staging-step-00000002"
    staging.mkdir()
    (staging / "shared.safetensors").write_bytes(b"half")
    (staging / "state.json").write_text("{}")
    assert list_complete(tmp_path) == [folder_of(tmp_path, 1)]
    assert same(load(save(tmp_path, example(2), keep=2)), example(2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
@pytest.mark.parametrize("file", sorted(FILES))
def test_damaged_files_are_named(file: str, damage: str, tmp_path: Path) -> None:
    for total in (1, 2):
        save(tmp_path, example(total), keep=2)
    path = folder_of(tmp_path, 2) / file
    if damage == "missing":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "garbage": b"\xff\xfe{]" * 20}[damage])
    if file == "config.yaml" and damage != "missing":
        return  # text that this module does not read into
    with pytest.raises(ValueError) as error:
        load(folder_of(tmp_path, 2))
    assert file in sentence(error) and str(folder_of(tmp_path, 2)) in sentence(error)
    assert same(load(folder_of(tmp_path, 1)), example(1))


@pytest.mark.parametrize(
    "content", [{"format": 99}, {}, [], {"format": 1}, {"format": 1, "stage": "joint", "step": 1, "total": 2, "new": 3}]
)
def test_states_of_another_format_are_refused(content: object, tmp_path: Path) -> None:
    folder = save(tmp_path, example(1), keep=2)
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert str(folder) in sentence(error)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    for total in (1, 2):
        save(tmp_path, example(total), keep=2)
    real, calls = checkpoint.save_file, 0

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == part:
            path.write_bytes(b"as much as fitted")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    for total in (3, 4):
        calls = 0
        with pytest.raises(ValueError) as error:
            save(tmp_path, example(total), keep=2)
        assert "No space left" in sentence(error) and str(folder_of(tmp_path, total)) in sentence(error)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        assert all(same(load(folder_of(tmp_path, earlier)), example(earlier)) for earlier in (1, 2))


def test_a_file_that_the_system_refuses_to_grow(tmp_path: Path) -> None:
    save(tmp_path, example(1), keep=2)
    large = example(2)
    large.scenes["planes"] = torch.zeros(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(ValueError) as error:
            save(tmp_path, large, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder_of(tmp_path, 2)) in sentence(error)
    assert names(tmp_path) == ["step-00000001"] and same(load(folder_of(tmp_path, 1)), example(1))


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as error:
        save(tmp_path / "file" / "checkpoints", example(1), keep=2)
    assert str(tmp_path / "file") in sentence(error)
