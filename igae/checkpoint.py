# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete, of files that anyone can read, and never half written.

A checkpoint is a folder ``step-00000123`` (``step-00000123-end`` at the end of a stage) of

* ``shared.safetensors``: weights and buffers of the shared module;
* ``optimizer.safetensors``: moments of its optimizer;
* ``scenes-00000.safetensors``: planes of a rank's scenes, their moments, and the scenes' global ids;
* ``config.yaml``: the resolved configuration;
* ``state.json``: where the run stands. It is written last, so a folder with it is complete.

All of it is written to a staging folder first, which is then renamed.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands: ``step`` steps of ``stage`` are done, ``total`` of all stages together."""

    stage: str
    step: int
    total: int
    finished: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    data: str = ""
    """Digest of the manifest's shards."""
    streams: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name of each stream -> its state."""
    format: int = FORMAT


@dataclass
class Checkpoint:
    progress: Progress
    shared: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scenes: dict[str, Tensor]
    config: str


def folder_of(root: Path, total: int, finished: bool = False) -> Path:
    """The folder of the checkpoint at a step of the whole run. The end of a stage has one of its own, so that none is
    ever written over."""
    return root / f"step-{total:08d}{'-end' if finished else ''}"


def list_complete(root: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in root.glob(f"step-*/{STATE}"))


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint below ``root`` and remove all but the newest ``keep``.

    Raises:
        ValueError: it can't be written (disk full, no permission); checkpoints that were there before are untouched.
    """
    final = folder_of(root, checkpoint.progress.total, checkpoint.progress.finished)
    if (final / STATE).exists():
        return final
    staging = root / f".staging-{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, tensors in (
            ("shared", checkpoint.shared),
            ("optimizer", checkpoint.optimizer),
            ("scenes-00000", checkpoint.scenes),
        ):
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                staging / f"{name}.safetensors",
            )
        (staging / "config.yaml").write_text(checkpoint.config)
        (staging / STATE).write_text(json.dumps(asdict(checkpoint.progress), indent=1))
        for path in (*staging.iterdir(), staging):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)  # what an interrupted removal left
        os.replace(staging, final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ValueError(f"the checkpoint {final} can't be written: {error}; earlier ones are untouched") from error
    others = [folder for folder in list_complete(root) if folder != final]
    for old in others[: -(keep - 1)]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    (folder / STATE).unlink(missing_ok=True)  # first, so that a half removed folder does not count as complete
    shutil.rmtree(folder)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: it is missing, incomplete, damaged or of another format; the sentence names the file.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder} is no complete checkpoint: it has no {STATE}")
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if state.get("format") != FORMAT:
            raise ValueError(f"its format is {state.get('format')}, and this version reads {FORMAT}")
        progress = Progress(**state)
        tensors = {}
        for name in ("shared", "optimizer", "scenes-00000"):
            path = folder / f"{name}.safetensors"
            tensors[name] = load_file(path)
        path = folder / "config.yaml"
        config = path.read_text()
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read ({error}): remove {folder} to go on from the one before") from error
    return Checkpoint(progress, tensors["shared"], tensors["optimizer"], tensors["scenes-00000"], config)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
