# SPDX-License-Identifier: Apache-2.0
"""Trackers: metrics.jsonl, TensorBoard read back, wandb run offline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igae.config import ConfigError, load
from igae.evaluation.pictures import write_video
from igae.tracking import Tracker, TrackingConfig

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    tracker = Tracker(run, TrackingConfig())
    tracker.scalars(1, "warmup", {"loss/total": 0.5, "skipped": 2})
    assert len(records(run)) == 1  # there at once, not when the run ends
    tracker.scalars(2, "joint", {"loss/total": float("nan"), "psnr": float("inf"), "n": np.float32(1.5)})
    tracker.config({"a": 1})
    tracker.images(2, {"views": PICTURE})
    tracker.close()
    first, second = records(run)
    assert list(first) == ["step", "stage", "time", "loss/total", "skipped"]
    assert (first["step"], first["stage"], first["loss/total"], first["skipped"]) == (1, "warmup", 0.5, 2)
    assert 1.7e9 < first["time"] <= second["time"]
    assert second["loss/total"] is None and second["psnr"] is None and second["n"] == 1.5
    assert [p.name for p in run.iterdir()] == ["metrics.jsonl"]


def test_resuming_drops_later_records(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig())
    for step in range(1, 8):
        tracker.scalars(step, "warmup", {"start": 1})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "stage": "war')  # killed here
    tracker = Tracker(tmp_path, TrackingConfig(), step=5)
    for step in range(6, 9):
        tracker.scalars(step, "warmup", {"start": 2})
    tracker.close()
    assert [(r["step"], r["start"]) for r in records(tmp_path)] == [(s, 1 if s < 6 else 2) for s in range(1, 9)]
    Tracker(tmp_path, TrackingConfig(), step=0).close()
    assert records(tmp_path) == []


def test_disabled_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(trackers=["tensorboard", "wandb"]), enabled=False)
    tracker.scalars(1, "warmup", {"a": 1.0})
    tracker.images(1, {"a": PICTURE})
    tracker.video(1, {"a": tmp_path / "none.mp4"})
    tracker.config({"a": 1})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_unknown_tracker(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("trackers: [tensorbord]")
    with pytest.raises(ConfigError, match=r"trackers\.0: got 'tensorbord'.*did you mean tensorboard\?"):
        load(TrackingConfig, tmp_path / "t.yaml")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith(f"torch.utils.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    with pytest.raises(
        ValueError, match=rf"^tracking\.trackers: {name} is not installed .*pip install 'igae\[tracking\]'"
    ):
        Tracker(tmp_path, TrackingConfig.model_validate({"trackers": [name]}))


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TrackingConfig(trackers=["tensorboard"])
    tracker = Tracker(tmp_path, settings)
    tracker.config({"train": {"batch_size": 12}})
    for step in (1, 2, 3):
        tracker.scalars(step, "warmup", {"loss": 1 / step})
    tracker.images(2, {"views": PICTURE})
    tracker.video(2, {"orbit/a": tmp_path / "a.mp4"})
    tracker.close()
    tracker = Tracker(tmp_path, settings, step=2)  # steps 3 and 4 again
    for step in (3, 4):
        tracker.scalars(step, "warmup", {"loss": 10.0 * step})
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("warmup/loss")]
    assert scalars == [(1, 1.0), (2, 0.5), (3, 30.0), (4, 40.0)]
    (image,) = events.Images("views")
    assert (image.step, image.height, image.width) == (2, 8, 6)
    texts = [events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("orbit/a", "config")]
    assert b"a.mp4" in texts[0] and b'"batch_size": 12' in texts[1]


WANDB_RUN = """
import sys
from pathlib import Path
import numpy as np
from igae.tracking import Tracker, TrackingConfig
run, step = Path(sys.argv[1]), int(sys.argv[2])
tracker = Tracker(run, TrackingConfig(trackers=["wandb"], project="tests"), step)
tracker.config({"train": {"batch_size": 12}, "step_of_start": step})
tracker.scalars(step + 1, "warmup", {"loss": 0.25})
tracker.images(step + 1, {"views": np.zeros((8, 6, 3), np.uint8)})
tracker.video(step + 1, {"orbit/a": run / "a.mp4"})
tracker.close()
"""


def test_wandb_offline(tmp_path: Path) -> None:
    """Two starts of one run in processes of their own, without account, network or home folder."""
    write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8))
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home"), "PATH": ""}
    root = Path(__file__).parent.parent
    for step in (0, 5):
        command = [sys.executable, "-c", WANDB_RUN, str(tmp_path), str(step)]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{identity}") for folder in folders)
    for folder in folders:
        assert len(list((folder / "files" / "media" / "images").glob("views*.png"))) == 1
        assert len(list((folder / "files" / "media" / "videos").rglob("*.mp4"))) == 1
        assert (folder / f"run-{identity}.wandb").stat().st_size > 0
        content = (folder / f"run-{identity}.wandb").read_bytes()
        assert b"warmup/loss" in content and b"batch_size" in content
    assert [r["step"] for r in records(tmp_path)] == [1, 6]
