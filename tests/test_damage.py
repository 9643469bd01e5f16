# SPDX-License-Identifier: Apache-2.0
"""Runs whose newest checkpoint is damaged resume from the one before, and say so."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import ranks
import runs
import torch
from accelerate.state import AcceleratorState

from igae import checkpoint, config
from igae.checkpoint import CheckpointWriter, DamagedCheckpoint
from igae.ranks import Channel
from igae.training import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")
QUICK = ["train.warmup.epochs=0", "train.joint.epochs=1", "checkpoint.every=3", "evaluation.natural_images=0"]
SAVED = ["step-00000003", "step-00000006", "step-00000008-end"]
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "zeros": lambda raw: bytes(len(raw)),
    "short": lambda raw: raw[: len(raw) // 2],
    "missing": lambda raw: None,
    "garbage": lambda raw: b"\xff\xfe{]" * 20,
}
FILES = ["shared.safetensors", "optimizer.safetensors", "scenes-00000.safetensors", "config.yaml", "state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe, of which one rank made a run."""
    folder = tmp_path_factory.mktemp("damage")
    recipe = runs.recipe_file(folder, runs.packed_data(folder))
    assert ranks.Ranks(runs.train, 1, str(recipe), *QUICK, log=str(folder / "log")).exit_codes(120) == [0]
    assert sorted(path.name for path in (folder / "outputs/run/checkpoints").iterdir()) == SAVED
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, at the place of its recipe's outputs."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return tmp_path / "outputs/run/checkpoints"


def settings(trained: Path, root: Path, *more: str) -> list[str]:
    return [*QUICK, f"outputs={root.parent.parent}", *more]


def resume(trained: Path, root: Path, how: str = "auto", *more: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config.load(Recipe, trained / "recipe.yaml", settings(trained, root, *more)), how)


def damage(file: Path, how: str) -> None:
    new = DAMAGES[how](file.read_bytes())
    file.unlink()
    if new is not None:
        file.write_bytes(new)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", DAMAGES)
def test_the_newest_that_is_whole(trained: Path, copy: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """Each file: it is named, its folder is renamed with all that is in it, and the one before is taken."""
    for file in FILES if how != "missing" else FILES[:-1]:  # without its state.json a folder is no checkpoint
        newest = copy / SAVED[-1]
        damage(newest / file, how)
        before = contents(newest)
        with pytest.raises(ValueError, match=r"\.safetensors|config\.yaml|state\.json") as error:
            resume(trained, copy, "strict")
        assert str(newest / file) in str(error.value) and sorted(path.name for path in copy.iterdir()) == SAVED
        caplog.clear()
        trainer = resume(trained, copy)
        assert (trainer.progress.total, trainer.progress.finished) == (6, False)
        aside = copy / f"{SAVED[-1]}-damaged"
        (told,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert str(newest / file) in told and str(aside) in told and str(copy / SAVED[1]) in told, told
        assert contents(aside) == before and checkpoint.list_complete(str(copy)) == [str(copy / n) for n in SAVED[:2]]
        shutil.rmtree(aside)
        shutil.copytree(trained / "outputs/run/checkpoints" / SAVED[-1], newest)


def test_several_and_all(trained: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where none is whole, nothing is renamed: the next start would else begin anew."""
    for name in SAVED[1:]:
        damage(copy / name / "shared.safetensors", "zeros")
    (copy / f"{SAVED[-1]}-damaged").mkdir()
    keep = copy.parent / "kept"
    shutil.copytree(copy, keep)
    assert resume(trained, copy).progress.total == 3
    assert {path.name for path in copy.iterdir()} == {
        SAVED[0],
        *(f"{name}-damaged" for name in SAVED[1:]),
        f"{SAVED[-1]}-damaged2",
    }
    damage(keep / SAVED[0] / "config.yaml", "short")
    shutil.rmtree(copy)
    keep.rename(copy)
    before = contents(copy)
    with pytest.raises(ValueError, match="all 3 checkpoints are damaged, .*shared.safetensors is damaged: .*NAME"):
        resume(trained, copy)
    assert contents(copy) == before


def test_a_file_that_may_be_read_later(trained: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not damaged: the run ends, and nothing is renamed."""
    state = copy / SAVED[-1] / "state.json"
    parsed = json.loads(state.read_text())
    state.write_text(json.dumps({**parsed, "format": 3}))
    with pytest.raises(ValueError, match="this version reads 2"):
        resume(trained, copy)
    assert sorted(path.name for path in copy.iterdir()) == SAVED


@pytest.mark.parametrize("change", [{"steps_per_epoch": 0}, {"step": -4}, {"consumed": {"views": -1}}, {"stage": "x"}])
def test_states_that_cannot_be(trained: Path, copy: Path, change: dict[str, object]) -> None:
    file = copy / SAVED[-1] / "state.json"
    state = json.loads(file.read_text()) | change
    del state["crc32"]
    file.write_text(json.dumps({**state, "crc32": zlib.crc32(json.dumps(state, sort_keys=True).encode())}))
    with pytest.raises(DamagedCheckpoint, match=f"state.json is damaged: {next(iter(change))}"):
        checkpoint.load_checkpoint(str(file.parent))
    assert resume(trained, copy).progress.step == 6


def test_two_ranks_take_the_same(trained: Path, copy: Path) -> None:
    """A row that one of them needs is damaged: both resume from the one before, and end."""
    file = copy / SAVED[-1] / "scenes-00000.safetensors"
    rows = checkpoint.load_checkpoint(str(file.parent)).rows([3])["planes"].numpy().tobytes()
    raw = bytearray(file.read_bytes())
    raw[raw.index(rows) + 5] ^= 1
    file.write_bytes(raw)
    damage(copy.parent / "metrics.json", "missing")
    (copy.parent / "metrics.json").write_bytes(b"")  # no reason to end a run
    log = copy.parent / "log"
    longer = settings(trained, copy, "train.joint.epochs=2", "checkpoint.every=100")
    arguments = [str(trained / "recipe.yaml"), *longer, "--extend"]
    assert ranks.Ranks(runs.train, 2, *arguments, log=str(log)).exit_codes(120) == [0, 0], log.read_text()
    text = log.read_text()
    assert text.count("row 3 of planes differs") == 1 and f"renamed to {file.parent}-damaged" in text
    assert f"resumes from step 6, {copy / SAVED[1]}" in text and "metrics.json is damaged" in text
    assert "joint" in json.loads((copy.parent / "metrics.json").read_text())


def test_in_an_object_store(trained: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is renamed there: it is skipped, and left."""
    damage(copy / SAVED[-1] / "optimizer.safetensors", "short")
    fs = fsspec.filesystem("memory")
    fs.put(str(copy), "/damage", recursive=True)
    trainer = resume(trained, copy, "auto", "checkpoint.root=memory://damage")
    assert trainer.progress.total == 6 and trainer.writer.damaged == {f"memory://damage/{SAVED[-1]}"}
    assert "optimizer.safetensors is damaged" in caplog.text and "(it stays where it is)" in caplog.text
    assert [Path(folder).name for folder in checkpoint.list_complete("memory://damage")] == SAVED
    fs.rm("/damage", recursive=True)


def test_one_that_stays(trained: Path, copy: Path) -> None:
    """It does not count as kept, and is replaced by that of the same step."""
    damaged = str(copy / SAVED[1])
    damage(Path(damaged) / "shared.safetensors", "zeros")
    shutil.rmtree(copy / SAVED[2])
    loaded = checkpoint.load_checkpoint(str(copy / SAVED[0]))
    scenes = {"ids": torch.tensor(sorted(loaded.ids)), **loaded.rows(sorted(loaded.ids))}
    writer = CheckpointWriter(str(copy), 2, Channel(), damaged=[damaged])
    for total in (5, 6):
        loaded.progress.total = total
        writer.save(loaded.progress, loaded.config, loaded.shared, loaded.optimizer, scenes)
        kept = [Path(folder).name for folder in checkpoint.list_complete(str(copy))]
        assert kept == [*(["step-00000003"] if total == 5 else []), "step-00000005", "step-00000006"]
    assert checkpoint.load_checkpoint(damaged).progress.total == 6


def test_a_root_of_another_experiment(trained: Path, copy: Path) -> None:
    root = f"checkpoint.root={copy}"
    with pytest.raises(ValueError, match=r"checkpoint\.root .* experiment run, this is other: .*/checkpoints/other"):
        resume(trained, copy, "auto", root, "experiment=other")
    assert resume(trained, copy, "auto", root).progress.finished
    # Branching off from one, into a folder of its own.
    elsewhere = f"checkpoint.root={copy.parent / 'mine'}"
    assert resume(trained, copy, str(copy / SAVED[0]), elsewhere, "experiment=other").progress.total == 3


def test_a_part_that_is_frozen_when_it_resumes(trained: Path, copy: Path) -> None:
    shutil.rmtree(copy / SAVED[2])
    (copy.parent / "metrics.json").unlink()
    frozen = ["train.joint.learning_rates.encoder=0", "train.joint.epochs=1.25"]
    trainer = resume(trained, copy, "auto", *frozen)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.progress.total == 6 and trainer.run()
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert trainer.progress.total == 10 and any("decoder" in name for name in moved)
    assert not any(".encoder." in name for name in moved)
