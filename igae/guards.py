# SPDX-License-Identifier: Apache-2.0
"""What is made sure of before a run trains: that it is alone, fits the memory, and goes on from what it was."""

import fcntl
import logging
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from igae import config
from igae.checkpoint import Checkpoint
from igae.recipe import Recipe

log = logging.getLogger("igae")


def lock_run(folder: Path) -> IO[str]:
    """Keep a second process from writing into the same run. The lock ends with this process, however it ends."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is training in {folder}: end it, or use a new experiment=NAME") from None
    except OSError:
        pass  # a file system without locks
    return lock


def check_changes(folder: Path, loaded: Checkpoint, recipe: Recipe) -> None:
    """Refuse to go on with other values of what a run can't change; say what else has changed."""
    before, now = _flat(yaml.safe_load(loaded.config)), _flat(yaml.safe_load(config.dump(recipe)))
    changed = [key for key in now if key in before and before[key] != now[key]]
    progress = loaded.progress
    fixed = ["seed", "planes", "render", "autoencoder.create", "autoencoder.latents", "autoencoder.scale"]
    if not progress.finished:
        stage = f"train.{progress.stage}"
        fixed += ["train.plane_optimizer", *(f"{stage}.{key}" for key in ("batch_size", "photos", "alternate"))]
    refused = [key for key in changed if any(f"{key}.".startswith(f"{name}.") for name in fixed)]
    if refused:
        key = refused[0]
        raise ValueError(
            f"{key} was {before[key]} in {folder} and is {now[key]} now, which can't change within a run: use a new "
            "experiment=NAME"
        )
    for key in changed:
        if key.split(".")[0] in ("data", "train", "autoencoder"):
            log.warning("%s was %s before this restart and is %s now", key, before[key], now[key])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


def check_memory(needed: int, device: torch.device) -> None:
    """Refuse planes and moments of ``needed`` bytes that the GPU has no room for."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"the planes and their optimizer state need {needed / 2**30:.1f} GiB and {device} has "
            f"{free / 2**30:.1f} GiB free: lower planes.resolution or planes.features, or train fewer scenes "
            "(data.categories)"
        )
