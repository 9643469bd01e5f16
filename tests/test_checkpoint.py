# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one rank: every bit comes back, the newest are kept, writing goes on in the background."""

import errno
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from checkpoints import FILES, IDS, State, at, bits, complete, example, names, put, same, save, sentence
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igae.checkpoint import CheckpointWriter, Progress, list_complete, load_checkpoint
from igae.ranks import Channel


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path / "new" / "checkpoints", example(12), keep=3)
    assert folder == tmp_path / "new" / "checkpoints" / "step-00000012"
    assert {path.name for path in folder.iterdir()} == FILES
    assert same(folder, example(12)) and not same(folder, example(13))
    assert list_complete(str(folder.parent)) == [str(folder)]


def test_nothing_to_save_is_saved_too(tmp_path: Path) -> None:
    scenes = {"ids": torch.zeros(0, dtype=torch.int64), "planes": torch.zeros(0, 3, 2, 2, 1)}
    empty = State(Progress("warmup", 0, 0), "", {}, {}, scenes)
    folder = save(tmp_path, empty, keep=2)
    assert same(folder, empty) and load_checkpoint(str(folder)).ids.tolist() == []


def test_what_state_json_says(tmp_path: Path) -> None:
    folder = save(tmp_path, State(**{**vars(example(7)), "progress": Progress("warmup", 7, 7, world=5)}), keep=2)
    state = json.loads((folder / "state.json").read_text())
    assert state["total"] == 7 and state["format"] == 2 and state["world"] == 1  # of the ranks that wrote it
    assert set(state["files"]) == FILES - {"state.json"}
    for name, file in state["files"].items():
        assert file["bytes"] == (folder / name).stat().st_size
        assert file["rows"] == (3 if name.startswith("scenes") else None)


def test_rows_in_any_order(tmp_path: Path) -> None:
    state = example(1)
    loaded = load_checkpoint(str(save(tmp_path, state, keep=2)))
    for ids in ([9, 4, 2], [2], [9, 9, 4], []):
        rows = loaded.rows(ids)
        places = [IDS.index(i) for i in ids]
        assert bits(rows) == bits({k: v[places] for k, v in state.scenes.items() if k != "ids"})


def test_missing_scenes_are_named(tmp_path: Path) -> None:
    loaded = load_checkpoint(str(save(tmp_path, example(1), keep=2)))
    for ids, shown in (([4, 77], "1 of 2 scenes (77)"), (range(3, 20), "15 of 17 scenes (3, 5, 6, 7, 8, ...)")):
        with pytest.raises(ValueError) as error:
            loaded.rows(ids)
        assert shown in sentence(error) and str(at(tmp_path, 1)) in sentence(error)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=9).flatmap(
        lambda ids: st.tuples(st.just(ids), st.lists(st.sampled_from(ids), max_size=12) if ids else st.just([]))
    )
)
def test_any_ids_and_any_choice(tmp_path: Path, case: tuple[list[int], list[int]]) -> None:
    ids, asked = case
    shutil.rmtree(tmp_path)
    planes = torch.arange(len(ids) * 2, dtype=torch.float64).reshape(-1, 2)
    scenes = {"ids": torch.tensor(ids, dtype=torch.int64), "planes": planes}
    loaded = load_checkpoint(str(save(tmp_path, State(Progress("joint", 1, 1), "", {}, {}, scenes), keep=2)))
    assert loaded.ids.tolist() == sorted(ids)
    assert torch.equal(loaded.rows(asked)["planes"], planes[[ids.index(i) for i in asked]])
    assert loaded.rows(asked)["planes"].shape == (len(asked), 2)


def test_the_last_ones_are_kept_in_order(tmp_path: Path) -> None:
    for total in (5, 40, 300, 1000, 20000):
        folder = save(tmp_path, example(total), keep=3)
        assert list_complete(str(tmp_path))[-1] == str(folder)
    assert complete(tmp_path) == names(tmp_path) == ["step-00000300", "step-00001000", "step-00020000"]
    assert same(at(tmp_path, 300), example(300))


def test_order_is_that_of_steps(tmp_path: Path) -> None:
    """Numbers of more digits, and the end of a stage after a plain checkpoint of the same step."""
    for total, finished in ((200_000_000, False), (99_999_999, True), (99_999_999, False), (3_000_000_000, False)):
        state = example(total)
        state.progress.finished = finished
        save(tmp_path, state, keep=9)
    steps = ["step-99999999", "step-99999999-end", "step-200000000", "step-3000000000"]
    assert complete(tmp_path) == steps


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_how_many_are_kept(keep: int, tmp_path: Path) -> None:
    for total in range(1, 6):
        save(tmp_path, example(total), keep)
    assert names(tmp_path) == [f"step-0000000{total}" for total in range(6 - keep, 6)]


def test_no_complete_checkpoint_is_written_over(tmp_path: Path) -> None:
    """Of one step there is one state, and at the end of a stage another, in a folder of its own."""
    first = save(tmp_path, example(5), keep=2)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(first.iterdir())]
    other = example(6)
    other.progress.total = 5
    assert save(tmp_path, other, keep=2) == first and same(first, example(5))
    assert before == [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(first.iterdir())]
    end = example(5)
    end.progress.finished = True
    assert same(save(tmp_path, end, keep=2), end) and same(first, example(5))
    assert complete(tmp_path) == names(tmp_path) == ["step-00000005", "step-00000005-end"]


def test_the_newest_is_never_removed_in_favor_of_an_abandoned_future(tmp_path: Path) -> None:
    """A run that was taken back to an older checkpoint writes lower steps than those that are there."""
    for total in (200, 300):
        save(tmp_path, example(total), keep=2)
    folder = save(tmp_path, example(120), keep=2)
    assert same(folder, example(120))


def test_folders_without_a_state_do_not_count(tmp_path: Path) -> None:
    assert list_complete(str(tmp_path / "nowhere")) == []
    (tmp_path / "file").write_text("")
    assert list_complete(str(tmp_path / "file")) == list_complete(str(tmp_path / "file" / "below")) == []
    for total in (1, 2):
        save(tmp_path, example(total), keep=3)
    (at(tmp_path, 2) / "state.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-old" / "state.json").write_text("{}")
    assert complete(tmp_path) == ["step-00000001"]
    for folder in (at(tmp_path, 2), tmp_path / "nowhere"):
        with pytest.raises(ValueError) as error:
            load_checkpoint(str(folder))
        assert str(folder) in sentence(error) and "state.json" in sentence(error)


def test_leftovers_of_killed_saves(tmp_path: Path) -> None:
    """Older ones go; those of a run that was taken back may still be written by another, and stay."""
    save(tmp_path, example(3), keep=9)
    for name in ("step-00000001", "step-00000005", "step-00000005-end", "step-00000008"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenes-00007.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005" / "state.json.part").write_text("{}")
    (tmp_path / "step-00000004-mine").mkdir()
    end = example(5)
    end.progress.finished = True
    folder = save(tmp_path, end, keep=9)
    assert names(tmp_path) == ["step-00000003", "step-00000004-mine", "step-00000005-end", "step-00000008"]
    assert {path.name for path in folder.iterdir()} == FILES and same(folder, end)


def test_files_that_are_not_listed_do_not_count(tmp_path: Path) -> None:
    folder = save(tmp_path, example(1), keep=2)
    other = save(tmp_path / "other", example(2), keep=2)
    shutil.copy(other / "scenes-00000.safetensors", folder / "scenes-00001.safetensors")
    (folder / "scenes-00002.safetensors").write_bytes(b"half")
    assert same(folder, example(1))


class Gate:
    """Writing waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        real = LocalFileSystem.open

        def wait_and_open(*arguments: Any, **keywords: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return real(*arguments, **keywords)

        monkeypatch.setattr(LocalFileSystem, "open", wait_and_open)


def test_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns before anything is written; what training then changes is not in the file."""
    gate, state, maker = Gate(monkeypatch), example(2), CheckpointWriter(str(tmp_path), 2, Channel(), background=True)
    folder = put(maker, state)
    assert gate.reached.wait(60) and complete(tmp_path) == []
    with torch.no_grad():
        for tensor in (*state.shared.values(), *state.optimizer.values(), *state.scenes.values()):
            tensor.zero_()
    state.progress.step = 99
    state.progress.consumed["views"] = -1
    gate.opened.set()
    maker.wait()
    assert complete(tmp_path) == ["step-00000002"] and same(folder, example(2))
    maker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, maker = Gate(monkeypatch), CheckpointWriter(str(tmp_path), 2, Channel(), background=True)
    put(maker, example(1))
    assert gate.reached.wait(60)
    timer = threading.Timer(0.2, gate.opened.set)
    timer.start()
    put(maker, example(2))
    assert gate.opened.is_set() and "step-00000001" in complete(tmp_path)
    maker.close()
    assert same(at(tmp_path, 1), example(1)) and same(at(tmp_path, 2), example(2))


@pytest.mark.parametrize("where", ["save", "wait", "close"])
def test_errors_of_the_background_surface_once(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, example(1), keep=2)
    maker = CheckpointWriter(str(tmp_path), 2, Channel(), background=True)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "open", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        put(maker, example(2))
        with pytest.raises(ValueError) as error:
            {"save": lambda: put(maker, example(3)), "wait": maker.wait, "close": maker.close}[where]()
    assert str(at(tmp_path, 2)) in sentence(
        error
    ) and ".safetensors can't be written: Input/output error (" in sentence(error)
    assert names(tmp_path) == ["step-00000001"]  # the save that said so did not begin another
    put(maker, example(4))
    maker.close()
    assert same(at(tmp_path, 4), example(4))


def test_an_object_store() -> None:
    """No folders, no renaming."""
    fs, root = fsspec.filesystem("memory"), "memory://checkpoints/run"
    try:
        assert list_complete(root) == []
        for total in (1, 2, 3):
            maker = CheckpointWriter(root, 2, Channel())
            state = example(total)
            folder = maker.save(state.progress, state.config, state.shared, state.optimizer, state.scenes)
            assert folder == f"{root}/step-0000000{total}" and same(folder, state)
        assert list_complete(root) == [f"{root}/step-00000002", f"{root}/step-00000003"]
        assert {path.split("/")[3] for path in fs.find("/checkpoints/run")} == {"step-00000002", "step-00000003"}
        fs.rm_file("/checkpoints/run/step-00000003/state.json")
        fs.pipe_file("/checkpoints/run/step-00000003/scenes-00009.safetensors", b"stale")
        assert list_complete(root) == [f"{root}/step-00000002"]
        again = replace(example(3), config="again: 1\n")
        maker.save(again.progress, again.config, again.shared, again.optimizer, again.scenes)
        assert same(f"{root}/step-00000003", again)
        assert {path.rsplit("/", 1)[-1] for path in fs.find("/checkpoints/run/step-00000003")} == FILES
        fs.rm_file("/checkpoints/run/step-00000003/scenes-00000.safetensors")
        with pytest.raises(ValueError, match="step-00000003/scenes-00000.safetensors is missing"):
            load_checkpoint(f"{root}/step-00000003")
    finally:
        fs.rm("/checkpoints", recursive=True)
