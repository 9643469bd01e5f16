# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose scenes are written wave after wave: complete when all are there, and damage is named."""

from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

from igae.checkpoint import (
    Progress,
    WaveCheckpoint,
    folder_of,
    is_complete,
    list_complete,
    load_checkpoint,
)
from igae.storage import LIMITS, file_system, write_file

SHARED = {"weight": torch.arange(6.0).view(2, 3)}
CONFIG = "experiment: größe\n"


def scenes(*ids: int) -> dict[str, Tensor]:
    return {"ids": torch.tensor(ids), "planes": torch.stack([torch.full((5,), float(i)) for i in ids])}


def progress() -> Progress:
    return Progress("joint", 0, 0, finished=True, data="ab12")


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "checkpoints")
    fs = fsspec.filesystem("memory")
    if fs.exists("/waves"):
        fs.rm("/waves", recursive=True)
    return "memory://waves/checkpoints"


def test_parts_become_a_checkpoint(root: str) -> None:
    waves = WaveCheckpoint(folder_of(root, 0, True))
    assert waves.begin(CONFIG, "ab12") == (CONFIG, "ab12") and waves.finished() == {}
    waves.write(1, scenes(4))
    waves.write(0, scenes(7, 2))
    again = WaveCheckpoint(folder_of(root, 0, True))
    assert again.begin("other: 1\n", "cd34") == (CONFIG, "ab12"), "the settings of the first start count"
    assert {number: file.rows for number, file in again.finished().items()} == {0: 2, 1: 1}
    assert list_complete(root) == [] and not is_complete(again.folder)
    again.write(2, scenes(9))
    again.close(progress(), CONFIG, SHARED)
    assert list_complete(root) == [again.folder] and is_complete(again.folder)
    loaded = load_checkpoint(again.folder)
    assert loaded.ids.tolist() == [2, 4, 7, 9] and torch.equal(loaded.shared["weight"], SHARED["weight"])
    assert torch.equal(loaded.rows([9, 2, 4])["planes"][:, 0], torch.tensor([9.0, 2, 4]))
    assert (loaded.config, loaded.progress.world, loaded.progress.data) == (CONFIG, 3, "ab12")
    assert loaded.optimizer == {} and [again.finished()[number].rows for number in range(3)] == [2, 1, 1]
    # A kill came before the marks were removed.
    write_file(f"{again.folder}/begun.json", b"[]")
    write_file(f"{again.folder}/scenes-00001.json", b"{}")
    assert WaveCheckpoint(again.folder).begin("other: 1\n", "cd34") == (CONFIG, "ab12")
    fs, path = file_system(again.folder)
    names = {name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)}
    assert len(names) == 7 and not {"begun.json", "scenes-00001.json"} & names


def test_a_wave_without_its_mark_is_not_finished(tmp_path: Path) -> None:
    waves = WaveCheckpoint(str(tmp_path))
    waves.begin(CONFIG, "ab12")
    waves.write(0, scenes(1))
    (tmp_path / "scenes-00000.json").unlink()  # killed just before
    assert waves.finished() == {}
    waves.write(0, scenes(1, 2))
    assert waves.finished()[0].rows == 2


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "visible_seconds", 0.0)
    waves = WaveCheckpoint(str(tmp_path))
    waves.begin(CONFIG, "ab12")
    waves.write(0, scenes(1))
    mark = tmp_path / "scenes-00000.json"
    good = mark.read_text()
    mark.write_text(good[:10])
    with pytest.raises(ValueError, match=r"scenes-00000\.json is damaged: .*: remove scenes-00000\.json") as error:
        waves.finished()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    mark.write_text(good)
    file = tmp_path / "scenes-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"scenes-00000\.safetensors is not there as it was written"):
        waves.close(progress(), CONFIG, SHARED)
    assert not is_complete(waves.folder)


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    waves = WaveCheckpoint(str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(ValueError, match="can't be written"):
        waves.begin(CONFIG, "ab12")
    with pytest.raises(ValueError, match="can't be written"):
        waves.write(0, scenes(1))


@pytest.mark.parametrize("damage", ["zeros", "short", "missing", "mark"])
def test_a_damaged_wave_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    waves = WaveCheckpoint(str(tmp_path))
    waves.begin(CONFIG, "ab12")
    for number in (0, 1):
        waves.write(number, scenes(number))
    file = tmp_path / ("scenes-00001.json" if damage == "mark" else "scenes-00001.safetensors")
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] if damage == "short" else bytes(len(raw)))
    if damage == "missing":
        file.unlink()
    with pytest.raises(ValueError, match=f"{file} .*: remove scenes-00001.json, and its scenes are fitted again"):
        waves.finished(mend=False)
    assert not caplog.text and set(waves.finished(mend=True)) == {0}
    assert str(file) in caplog.text and "its scenes are fitted again" in caplog.text
    assert (tmp_path / "scenes-00001.safetensors-damaged").exists() == (damage != "missing")
    waves.write(1, scenes(1))
    assert set(waves.finished(mend=True)) == {0, 1}
    waves.close(progress(), CONFIG, SHARED)
    assert load_checkpoint(waves.folder).ids.tolist() == [0, 1]
