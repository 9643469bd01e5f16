# SPDX-License-Identifier: Apache-2.0
"""What killed processes have left is removed by the next one that has the place, and by nobody while its writer lives;
two experiments do not take one root."""

import itertools
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import checkpoints
import pytest
import ranks
import runs
from scene_files import write_data

from igae import checkpoint, config
from igae.checkpoint import CheckpointWriter
from igae.data import PackOptions, pack
from igae.kernels import compile
from igae.ranks import Channel
from igae.storage import LIMITS, Cache, remove_leftovers, staged, staged_files, write_file
from igae.training import Recipe
from igae.training.run_folder import claim_root


def write_and_wait(folder: str) -> None:
    """Be in the middle of writing a file and a folder, for ever."""
    with staged(Path(folder) / "file.json") as file, staged_files(Path(folder) / "model") as files:
        file.write_text("{")
        (files / "weights").write_text("0")
        (Path(folder) / "ready").touch()
        signal.pause()


def begin(folder: Path) -> ranks.Ranks:
    folder.mkdir(exist_ok=True)
    writer = ranks.Ranks(write_and_wait, 1, str(folder))
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / "ready").unlink()
    return writer


def killed(folder: Path) -> list[str]:
    """Names of what a killed writer leaves."""
    writer = begin(folder)
    writer.processes[0].kill()
    assert writer.exit_codes() == [-9]
    return left(folder)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.partial"))


def test_of_the_dead_and_not_of_the_living(tmp_path: Path) -> None:
    assert [name.split(".")[0] for name in killed(tmp_path)] == ["file", "model"]
    dead = left(tmp_path)
    others = ["data.partial", "file.json.0123456789ab.part", "file.json.0123456789AB.partial", "0123456789ab.partial"]
    for name in others:
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.0123456789ab.partial")
    os.symlink(tmp_path / others[0], tmp_path / "link.0123456789ab.partial")
    writer = begin(tmp_path)
    alive = set(left(tmp_path)) - {*dead, *others, "pipe.0123456789ab.partial", "link.0123456789ab.partial"}
    assert len(alive) == 2
    remove_leftovers(tmp_path)
    kept = {*alive, *(name for name in others if name.endswith(".partial"))}
    assert kept <= set(left(tmp_path)) and not {*dead} & {*left(tmp_path)}
    assert (tmp_path / others[0]).exists()
    writer.processes[0].kill()
    writer.exit_codes()
    remove_leftovers(tmp_path)
    assert not alive & set(left(tmp_path))


def test_not_below_unless_asked(tmp_path: Path) -> None:
    assert killed(tmp_path / "pictures")
    remove_leftovers(tmp_path)
    assert left(tmp_path)
    remove_leftovers(tmp_path, below=True)
    assert not left(tmp_path)


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a file counts as left when nobody has written to it for an hour."""
    (name, folder) = killed(tmp_path)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    remove_leftovers(tmp_path)
    assert left(tmp_path) == [name, folder]
    for left_over in (name, folder):
        os.utime(tmp_path / left_over, (0, time.time() - 3700))
    remove_leftovers(tmp_path)
    assert not left(tmp_path)


def test_in_a_cache(tmp_path: Path) -> None:
    assert killed(tmp_path / "cache")
    Cache(str(tmp_path / "cache"), str(tmp_path))
    assert not left(tmp_path / "cache")


def test_in_a_folder_of_shards(tmp_path: Path) -> None:
    """Also shards that a stopped packing had and this one has not."""
    source, out = write_data(tmp_path / "source", images=2), tmp_path / "out"
    assert killed(out)
    for name in ("scenes-00017.tar.partial", "images-00004.tar.partial", "images-00004.tar.done.partial"):
        (out / name).touch()
    pack(str(out), PackOptions(images=str(source / "natural_images")))
    assert sorted(path.name for path in out.iterdir()) == ["images-00000.tar", "manifest.json", "model"]


def test_in_a_cache_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGAE_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(compile, "_fingerprint", lambda _: b"")
    monkeypatch.setattr(compile, "compile_source", lambda *_: (b"code", compile.Usage(1, 0)))
    for name, age in (("old.cubin.0123456789ab.part", 100), ("new.cubin.0123456789ab.part", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - age))
    assert compile.cached_cubin(tmp_path / "kernel.cu", {}, 80) == b"code"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin", ".part"]


def test_in_a_run(recipe_file: str, tmp_path: Path) -> None:
    """Files, and folders of checkpoints that are none; another run's waves stay."""
    run = tmp_path / "outputs/run"
    run.mkdir(parents=True)
    killed(run)
    killed(run / "pictures")
    for name in ("step-00000099", "step-00000002-end", "step-00000000-end"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "scenes-00000.safetensors").touch()
    (run / "checkpoints/step-00000000-end/begun.json").touch()
    (run / ".seen-0123456789abcdef").touch()
    settings = ["train.warmup.epochs=1", "train.joint.epochs=0", "evaluation.natural_images=0"]
    log = tmp_path / "log"
    assert ranks.Ranks(runs.train, 1, recipe_file, *settings, log=str(log)).exit_codes() == [0], log.read_text()
    assert not left(run) and not list(run.glob(".seen-*"))
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert saved == {"step-00000004", "step-00000008-end", "step-00000000-end"}
    assert len(checkpoint.list_complete(str(run / "checkpoints"))) == 2


def test_checkpoints_that_should_have_been_removed(tmp_path: Path) -> None:
    """A kill came before. Damaged ones that can't be set aside stay, and don't count as kept."""
    for total in (1, 2, 3, 4):
        checkpoints.save(tmp_path, checkpoints.example(total), keep=9)
    newest = str(checkpoints.at(tmp_path, 4))
    CheckpointWriter(str(tmp_path), 2, Channel(), damaged=[newest]).clean()
    assert checkpoints.names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    CheckpointWriter(str(tmp_path), 1, Channel()).clean()
    assert checkpoints.names(tmp_path) == ["step-00000004"]


def test_two_experiments_at_the_same_moment(recipe_file: str, tmp_path: Path) -> None:
    """With one root: one of them trains, the other is told."""
    root, logs = tmp_path / "root", [tmp_path / "a.log", tmp_path / "b.log"]
    settings = [
        "train.warmup.epochs=1",
        "train.joint.epochs=0",
        "evaluation.natural_images=0",
        f"checkpoint.root={root}",
    ]
    started = [
        ranks.Ranks(runs.train, 1, recipe_file, f"experiment={log.stem}", *settings, log=str(log)) for log in logs
    ]
    codes = [run.exit_codes()[0] for run in started]
    assert sorted(map(str, codes)) == ["0", "2"], [log.read_text() for log in logs]
    refused = logs[codes.index(2)]
    told = [line for line in refused.read_text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and str(root) in told[0] and f"checkpoint.root={root}/{refused.stem}" in told[0]


def claim(recipe: Recipe, refused: list[str]) -> None:
    try:
        with claim_root(recipe):
            pass
    except ValueError as error:
        refused.append(str(error))


def test_two_experiments_in_an_object_store(recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "claim_seconds", 0.2)
    for number in itertools.count():
        root = f"memory://claimed-{number}"
        pair = [
            config.load(Recipe, recipe_file, [f"experiment={name}", f"checkpoint.root={root}"]) for name in ("a", "b")
        ]
        refused: list[str] = []
        threads = [threading.Thread(target=claim, args=(recipe, refused)) for recipe in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1 and f"{root} is that of experiment" in refused[0] and "experiment.txt" in refused[0]
        if number == 3:
            break
    # The one that has it has it again, and the other is refused at once.
    winner = next(recipe for recipe in pair if f"this is {recipe.experiment}" not in refused[0])
    began = time.monotonic()
    with claim_root(winner):
        pass
    for recipe in pair:
        claim(recipe, refused)
    assert len(refused) == 2 and time.monotonic() - began < 0.2
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    write_file(f"{root}/experiment.txt", b"")  # not a name: whose is it?
    claim(winner, refused)
    assert len(refused) == 3
