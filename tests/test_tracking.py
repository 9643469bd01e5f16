# SPDX-License-Identifier: Apache-2.0
"""Trackers: metrics.jsonl, TensorBoard read back, wandb offline and with a server."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from ranks import free_port
from wandb_server import Server

from igae.config import ConfigError, load
from igae.evaluation import write_video
from igae.training import Tracker, TrackingConfig

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
        ValueError, match=rf"^tracking\.trackers: {name} is not installed .*pip install -e '\.\[tracking\]'"
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
    frames = np.zeros((12, 32, 96, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 8 * i : 8 * i + 8] = [250, 60, 20]
    write_video(tmp_path / "a.mp4", frames)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = ("a.mp4", "broken.mp4", "missing.mp4")
    tracker.video(2, {f"orbit/{name[0]}": tmp_path / name for name in names})
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
    assert events.Tags()["images"] == ["views", "orbit/a"]
    (orbit,) = events.Images("orbit/a")
    assert (orbit.step, orbit.width, orbit.height) == (2, 384, 128)
    with PIL.Image.open(io.BytesIO(orbit.encoded_image_string), formats=["GIF"]) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (6, (384, 128), 80)  # hundredths, of 1/12 s
        places = []
        for i in range(gif.n_frames):
            gif.seek(i)
            red = np.asarray(gif.convert("RGB"))[64, :, 0] > 128
            places.append(red.nonzero()[0].mean() / 4)
    # Frames two by two, the bar in each where it was (which one of a pair is shown is ffmpeg's).
    assert np.abs(np.array(places) - (16 * np.arange(6) + 8)).max() < 8.5, places
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b'"batch_size": 12' in config


WANDB_RUN = """
import logging, os, signal, sys, time
from pathlib import Path
import numpy as np
logging.basicConfig(format="%(message)s")
from igae.training import Tracker, TrackingConfig
run, start, end, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tracker = Tracker(run, TrackingConfig(trackers=["wandb"], project="tests"), start)
print("started", flush=True)
tracker.config({"train": {"batch_size": 12}, "step_of_start": start})
for step in range(start + 1, end + 1):
    tracker.scalars(step, "warmup", {"loss": 0.5**step, "lr/planes": 1e-3 * step, "bad": float("nan")})
if last == "killed":
    time.sleep(0.5)  # wandb's process has taken what was logged
    os.kill(os.getpid(), signal.SIGKILL)
tracker.images(end, {"views": np.zeros((8, 6, 3), np.uint8)})
tracker.video(end, {"orbit/a": run / "a.mp4", "orbit/of another host": run / "missing.mp4"})
if last == "server away":
    input()
began = time.monotonic()
tracker.close()
print(time.monotonic() - began)
"""
KEY = "a" * 40


def wandb_environment(home: Path, **settings: str) -> dict[str, str]:
    return {"WANDB_SILENT": "true", "HOME": str(home), "PATH": "", "WANDB_ERROR_REPORTING": "false", **settings}


def start_wandb(run: Path, start: int, end: int, last: str, **settings: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WANDB_RUN, str(run), str(start), str(end), last],
        env=wandb_environment(run / "home", **settings),
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def wandb_run(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8))
    return tmp_path


def logged(server: Server, run: Path) -> list[tuple[int, float, float]]:
    """What reached the server of the run: step, loss and learning rate."""
    identity = (run / "wandb-id.txt").read_text().strip()
    assert list(server.runs) == [identity]
    lines = [line for line in server.history(identity) if "warmup/loss" in line]
    return [(line["step"], line["warmup/loss"], line["warmup/lr/planes"]) for line in lines]


def expected(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["lr/planes"]) for r in records(run)]


def test_wandb_offline_loses_nothing_when_it_is_killed(wandb_run: Path) -> None:
    """Without account, network or home folder: a start that is killed, one that goes on from an earlier step, and both
    sent by `wandb sync`, folder by folder: it sends no more of a run after a file that a kill has cut off."""
    wandb_run.mkdir(exist_ok=True)
    (wandb_run / "wandb-id.txt").write_bytes(b"")  # as a crash may leave it: no reason not to start
    killed = start_wandb(wandb_run, 0, 150, "killed", WANDB_MODE="offline")
    assert killed.wait(60) == -9
    resumed = start_wandb(wandb_run, 140, 160, "closed", WANDB_MODE="offline")
    assert resumed.wait(60) == 0, resumed.communicate()
    assert [step for step, _, _ in expected(wandb_run)] == list(range(1, 161))
    folders = sorted((wandb_run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    server = Server()
    try:
        account = wandb_environment(wandb_run / "home", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        for folder in folders:
            command = [sys.executable, "-m", "wandb", "sync", str(folder)]
            subprocess.run(command, env=account, check=False, capture_output=True, timeout=60)
    finally:
        server.close()
    found = logged(server, wandb_run)
    assert set(found) == set(expected(wandb_run))
    (identity,) = server.runs
    assert all(folder.name.endswith(f"-{identity}") for folder in folders)
    media = [path for path in server.files if "/media/" in path]
    assert sum("views" in path for path in media) == 1 and sum(path.endswith(".mp4") for path in media) == 1
    assert b"batch_size" in server.files[f"/{identity}/config.yaml"]


def test_wandb_goes_on_with_the_same_run_and_does_not_wait_for_a_server_that_is_gone(wandb_run: Path) -> None:
    server = Server()
    settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    try:
        killed = start_wandb(wandb_run, 0, 40, "killed", **settings)
        assert killed.wait(60) == -9
        resumed = start_wandb(wandb_run, 30, 50, "closed", **settings)
        assert resumed.wait(60) == 0, resumed.communicate()
        assert set(logged(server, wandb_run)) == set(expected(wandb_run))
        left = start_wandb(wandb_run, 50, 60, "server away", WANDB_FINISH_TIMEOUT="1", **settings)
        assert left.stdout is not None and left.stdout.readline() == "started\n"
    finally:
        server.close()
    out, err = left.communicate("\n", timeout=60)
    assert left.returncode == 0, err
    assert float(out) < 20
    assert [step for step, _, _ in expected(wandb_run)] == list(range(1, 61))


def test_wandb_without_its_server_records_offline_and_without_account_is_an_error(wandb_run: Path) -> None:
    settings = {"WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "1", "WANDB_INIT_TIMEOUT": "1"}
    run = start_wandb(wandb_run, 0, 3, "closed", WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}", **settings)
    refused = start_wandb(wandb_run / "refused", 0, 1, "closed", WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    (folder,) = (wandb_run / "wandb").glob("offline-run-*")
    assert "connection refused" in err and f"`wandb sync {folder}` sends it" in err
    assert (folder / f"run-{(wandb_run / 'wandb-id.txt').read_text().strip()}.wandb").stat().st_size > 1000
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 1 and "run `wandb login`, or set WANDB_MODE=offline" in err
