# SPDX-License-Identifier: Apache-2.0
"""Records of a run: always metrics.jsonl, TensorBoard and wandb if the configuration names them."""

import importlib
import json
import logging
import math
import os
import re
import secrets
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from igae.storage import write_text, writes_to
from igae.training.recipe import TrackingConfig

RECENT = 60.0
"""Seconds of records that are sent to wandb again: its process writes and sends every 15, and dies with the run."""
UNREACHABLE = ("deadline exceeded", "timed out", "dial tcp")
"""In wandb's errors where no server answers, and not where one refuses."""
log = logging.getLogger("igae")


class Tracker:
    """Records a run in RUN/metrics.jsonl and in the trackers of its configuration.

    A line of metrics.jsonl is `{"step", "stage", "time", **values}`: steps count over all stages, time is in seconds
    since 1970, and what is not finite is null. Records of a later step than the one that a run resumes at are dropped,
    because the run makes them again. wandb can't drop them: there a step may be found twice.

    Args:
        run: the folder of the run; made if missing.
        step: the step that the run is at (0 for a new one).
        enabled: false on all ranks but one; every method does nothing then.

    Raises:
        ValueError: a tracker's package is missing, or wandb has no account.
    """

    def __init__(self, run: Path, settings: TrackingConfig, step: int = 0, *, enabled: bool = True) -> None:
        self._lines: IO[str] | None = None
        self._others: list[_TensorBoard | _Wandb] = []
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        modules = {name: _require(name) for name in settings.trackers}
        recent = _drop_after(run / "metrics.jsonl", step)
        self._lines = (run / "metrics.jsonl").open("a", encoding="utf-8")
        if "tensorboard" in modules:
            self._others.append(_TensorBoard(modules["tensorboard"], run / "tensorboard", step))
        if "wandb" in modules:
            self._others.append(_Wandb(modules["wandb"], run, settings, recent))

    def scalars(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Metrics by name."""
        if self._lines is not None:
            record: dict[str, Any] = {"step": step, "stage": stage, "time": round(time.time(), 3)}
            for name, value in values.items():
                assert name not in record, f"{name} is a field of every record"
                number = value if isinstance(value, int) else float(value)
                record[name] = number if math.isfinite(number) else None
            with writes_to(self._lines.name):
                self._lines.write(json.dumps(record, allow_nan=False) + "\n")
                self._lines.flush()
        for other in self._others:
            other.scalars(step, stage, values)

    def sync(self) -> None:
        """Make sure that the records of metrics.jsonl are on the disk."""
        if self._lines is not None:
            with writes_to(self._lines.name):
                os.fsync(self._lines.fileno())

    def images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures [H, W, 3] by name."""
        for other in self._others:
            other.images(step, images)

    def video(self, step: int, paths: Mapping[str, Path]) -> None:
        """mp4 files by name; those on the disk of another host are left out. TensorBoard, which plays no mp4, gets a
        GIF of half the frames."""
        for other in self._others:
            other.video(step, {name: path for name, path in paths.items() if path.is_file()})

    def config(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration as plain data (maps, lists, scalars)."""
        for other in self._others:
            other.config(values)

    def close(self) -> None:
        for opened in (self._lines, *self._others):
            if opened is not None:
                with writes_to(self._lines.name if self._lines else ""):
                    opened.close()
        self._lines, self._others = None, []


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records up to a step; returns those of them from the last RECENT seconds of the former start."""
    kept, last = [], 0.0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            last = max(last, record["time"])
            if record["step"] <= step:
                kept.append((line, record))
        except (ValueError, KeyError, TypeError):  # the run was killed while it wrote this line
            continue
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept if record["time"] > last - RECENT]


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, step: int) -> None:
        self._summary = module.summary.Summary
        # purge_step hides the records of a former start from this step on
        self._writer = module.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def video(self, step: int, paths: Mapping[str, Path]) -> None:
        for name, path in paths.items():
            try:
                gif = _gif(path)
            except (OSError, subprocess.SubprocessError) as error:
                log.warning("%s is not shown in TensorBoard: ffmpeg can't read it (%s)", path, error)
                continue
            width, height = struct.unpack_from("<HH", gif, 6)
            image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            self._writer.file_writer.add_summary(
                self._summary(value=[self._summary.Value(tag=name, image=image)]), step
            )

    def config(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2, default=str)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))  # a block of code

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self, module: Any, folder: Path, settings: TrackingConfig, recent: Sequence[Mapping[str, Any]]
    ) -> None:
        self._wandb = module
        self._run = self._start(folder, settings)
        # wandb drops what comes with a smaller step than before, which a resumed run does: the step is a plain value.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for record in recent:
            values = {k: v for k, v in record.items() if k not in ("step", "stage", "time") and v is not None}
            self.scalars(record["step"], record["stage"], values)

    def _start(self, folder: Path, settings: TrackingConfig) -> Any:
        """wandb's run, the same one at each start; an offline one where the server does not answer."""
        saved = folder / "wandb-id.txt"
        # Before wandb knows of it: a run that is killed now must not become two. A crash may have left nothing in it.
        if not (saved.exists() and re.fullmatch(rb"[\w-]+\s*", saved.read_bytes())):
            write_text(saved, secrets.token_hex(4) + "\n")
        place = {"project": settings.project, "entity": settings.entity, "name": folder.name, "dir": str(folder)}
        place["id"] = saved.read_text(encoding="utf-8").strip()
        # wandb's own are 90 s, and for ever. Versions that don't know of one ignore the variable.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "10")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        try:
            return self._wandb.init(**place, resume="allow")
        except self._wandb.Error as error:
            if not any(sign in str(error) for sign in UNREACHABLE):
                raise ValueError(
                    f"tracking.trackers: wandb cannot start ({error}): run `wandb login`, or set WANDB_MODE=offline"
                ) from None
            reason = " ".join(str(error).split())
        self._wandb.teardown()
        offline = self._wandb.init(**place, mode="offline")
        sent = Path(offline.dir).parent
        log.warning("wandb's server does not answer (%s): recorded offline, `wandb sync %s` sends it", reason, sent)
        return offline

    def scalars(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {"step": step})

    def images(self, step: int, images: Mapping[str, NDArray[np.uint8]]) -> None:
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()} | {"step": step})

    def video(self, step: int, paths: Mapping[str, Path]) -> None:
        videos = {name: self._wandb.Video(str(path), format="mp4") for name, path in paths.items()}
        self._run.log(videos | {"step": step})

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


def _gif(path: Path) -> bytes:
    """A video of 24 frames a second as one of 12 with 128 lines."""
    filters = "fps=12,scale=-2:128,split[a][b];[a]palettegen[p];[b][p]paletteuse"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path}", "-vf", filters]
    return subprocess.run([*command, "-f", "gif", "pipe:1"], check=True, capture_output=True, timeout=60).stdout


def _require(name: str) -> Any:
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise ValueError(
            f"tracking.trackers: {name} is not installed ({error}): pip install -e '.[tracking]', or remove it there"
        ) from None
