# SPDX-License-Identifier: Apache-2.0
"""Commands whose disk is full: one sentence with the file and the disk, and nothing half written is left."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
from accelerate.state import AcceleratorState

import train
from igae.cli import evaluate, export, report
from igae.cli import pack as packing
from igae.data import Manifest, ShardReader
from igae.evaluation import save_png, write_video
from igae.storage import Cache
from igae.training import Tracker, TrackingConfig
from igae.training.run_folder import write_metrics

sys.path.insert(0, str(Path(__file__).parent.parent / "data_tools"))
import make_demo  # noqa: E402

QUICK = ["train.warmup.epochs=0", "train.joint.epochs=0.25", "evaluation.natural_images=0"]
NOISE = np.random.default_rng(0).integers(0, 255, (30, 256, 256, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    recipe = str(runs.recipe_file(folder, runs.packed_data(folder)))
    assert train.main(["--config", recipe, *QUICK]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def disk(small_disk: Path) -> Path:
    """A disk without any room."""
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    return small_disk


def use(folder: Path, *arguments: str) -> int:
    """Train, on another disk."""
    code = train.main(["--config", str(folder / "recipe.yaml"), *QUICK, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


def save(folder: Path, disk: Path) -> int:
    """Train, with checkpoints in a root that was taken before on another disk."""
    (disk / "c").mkdir()
    (disk.parent / "name").write_text("b")
    (disk / "c/experiment.txt").symlink_to(disk.parent / "name")
    return use(folder, f"checkpoint.root={disk}/c", "experiment=b")


def measure(run: Path, output: Path) -> int:
    code = evaluate.main(["--checkpoint", str(run), "--output", str(output), "evaluation.scenes=1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


def record(disk: Path) -> None:
    tracker = Tracker(disk, TrackingConfig())
    try:
        tracker.scalars(1, "joint", {"loss": 1.0})
    finally:
        tracker.close()


def cached(folder: Path, disk: Path) -> None:
    root = str(folder / "shards")
    cache = Cache(str(disk), root)
    ShardReader(root, cache=cache).open(Manifest.load(root).shards[0]).result()


def packed(folder: Path, disk: Path) -> int:
    scenes = ["--scenes", str(folder / "source" / "scenes"), "--subset", "square16"]
    return packing.main([*scenes, "--output", str(disk / "shards"), "--workers", "1"])


def demo(disk: Path, workers: int) -> int:
    few = ["--scenes", "2", "--views", "2", "--size", "64", "--natural-images", "0", "--supersample", "1"]
    return make_demo.main(["--output", str(disk / "demo"), *few, "--workers", str(workers)])


POINTS: dict[str, tuple[str, Callable[[Path, Path], int | None]]] = {
    "the run's folder": ("outputs/run/config.yaml", lambda made, disk: use(made, f"outputs={disk / 'outputs'}")),
    "root": ("c/experiment.txt", lambda made, disk: use(made, f"checkpoint.root={disk}/c", "experiment=b")),
    "checkpoint": ("c/step-00000002-end/s", lambda made, disk: save(made, disk)),
    "records": ("metrics.jsonl", lambda made, disk: record(disk)),
    "metrics": ("metrics.json", lambda made, disk: write_metrics(disk, "joint", {"step": 1})),
    "picture": ("a.png", lambda made, disk: save_png(disk / "a.png", NOISE[0])),
    "video": ("a.mp4", lambda made, disk: write_video(disk / "a.mp4", NOISE)),
    "autoencoder": ("ae", lambda made, disk: runs.create_autoencoder("AutoencoderKL").save(disk / "ae")),
    "packing": ("shards/scenes-00000.tar.partial", lambda made, disk: packed(made, disk)),
    "evaluation": ("evaluation.json", lambda made, disk: measure(made / "outputs/run", disk)),
    "report": ("r.html", lambda made, disk: report.main([str(made / "outputs/run"), "--output", str(disk / "r.html")])),
    "export": ("e", lambda made, disk: export.main([str(made / "outputs/run"), str(disk / "e")])),
    "demo": ("", lambda made, disk: demo(disk, 1)),
    "demo in processes": ("", lambda made, disk: demo(disk, 2)),
    "cache": ("", lambda made, disk: cached(made, disk)),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_sentence_names_file_and_disk(
    point: str, trained: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, act = POINTS[point]
    try:
        assert act(trained, disk) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]
    except (OSError, ValueError) as error:
        told = str(error)
    assert str(disk / file) in told and "No space left on device" in told, told
    assert f"(0.0 MB are left on the disk at {disk})" in told and "Errno" not in told and "\n" not in told, told
    left = [path for path in disk.rglob("*") if "part" in path.suffix or "tmp" in path.name]
    assert not left and (disk / "filler").exists(), left


def test_a_whole_disk_is_no_obstacle(trained: Path, tmp_path: Path) -> None:
    """What the others do where there is room: the points are real ones."""
    for point in ("metrics", "picture", "video", "autoencoder", "records"):
        file, act = POINTS[point]
        act(trained, tmp_path)
        assert (tmp_path / file).exists()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"joint": {"step": 1}}


def test_bytes_are_on_the_disk_before_they_have_a_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after a rename must not leave zeros of the right size. Of shards, notes say that they are there."""
    synced, named = set[int](), list[str]()
    fsync, renames = os.fsync, {name: getattr(os, name) for name in ("replace", "rename")}

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(name: str) -> Callable[[Path, Path], None]:
        def rename(source: Path, target: Path) -> None:

            if ".partial" not in str(target):
                assert os.stat(source).st_ino in synced, target
                named.append(Path(target).name)
            if ".done" in str(target):
                shards = [path for path in Path(target).parent.iterdir() if path.name.endswith(".tar.partial")]
                assert shards and all(path.stat().st_ino in synced for path in shards)
                named.append("note")
            renames[name](source, target)

        return rename

    monkeypatch.setattr(os, "fsync", note_sync)
    for name in renames:
        monkeypatch.setattr(os, name, check(name))
    for point in ("metrics", "picture", "video", "autoencoder"):
        POINTS[point][1](trained, tmp_path)
    assert packed(trained, tmp_path) == 0
    expected = ["metrics.json", "a.png", "a.mp4", "config.json", "diffusion_pytorch_model.safetensors", "note"]
    shards = ["heldout-00000.tar", "scenes-00000.tar", "manifest.json"]
    assert [name for name in named if name in expected] == expected and [n for n in named if n in shards] == shards
    assert {(tmp_path / "shards").stat().st_ino, tmp_path.stat().st_ino} <= synced
