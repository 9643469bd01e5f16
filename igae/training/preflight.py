# SPDX-License-Identifier: Apache-2.0
"""What is made sure of before a run trains: that it is alone, fits the memory, and goes on from what it was."""

import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from igae import __version__, config
from igae.checkpoint import Checkpoint
from igae.errors import redact
from igae.ranks import Channel, rank, world_size
from igae.training.recipe import Recipe

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


def open_run(recipe: Recipe, folder: Path, channel: Channel, device: torch.device) -> IO[str] | None:
    """Make a run's folder, lock it and write its settings and what it runs on. Collective.

    Returns:
        The lock, on the first rank.

    Raises:
        ValueError: on all ranks alike, another process has the lock, or not all ranks see the folder.
    """
    lock, problem = None, None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_run(folder)
            (folder / "config.yaml").write_text(public_settings(recipe))
            (folder / "environment.json").write_text(json.dumps(environment(device), indent=1) + "\n")
        except (OSError, ValueError) as error:
            problem = str(error)
    if problem := channel.gather(problem)[0]:
        raise ValueError(problem)
    check_shared(folder, channel)
    return lock


def environment(device: torch.device) -> dict[str, str | int]:
    """What a run runs on, as it may be shown: versions, devices and their number, no names of hosts."""
    is_gpu = device.type == "cuda"
    return {
        "igae": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with what it was built for, which the package's own version may lack
        **{name: version(name) for name in ("accelerate", "diffusers")},
        **({"cuda": torch.version.cuda or ""} if is_gpu else {}),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {os.cpu_count()} cores",
        "ranks": world_size(),
        "system": platform.platform(),
    }


def check_shared(folder: Path, channel: Channel) -> None:
    """Refuse an output folder that not all ranks see: each would write into one of its own. Collective."""
    names = channel.gather(f".seen-{secrets.token_hex(8)}" if rank() == 0 else "")
    if len(names) == 1:
        return
    token = folder / names[0]
    if rank() == 0:
        token.touch()
    channel.barrier()
    deadline = time.monotonic() + 10  # network file systems show new files late
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host in channel.gather(None if token.exists() else socket.gethostname()) if host]
    if rank() == 0:
        token.unlink()
    if blind:
        raise ValueError(
            f"{blind[0]} does not see {folder.resolve()} of the first rank's machine: set outputs to a folder that all "
            "machines share"
        )


def public_settings(recipe: Recipe) -> str:
    """The resolved configuration as YAML, as it may be saved and shown: without credentials."""
    return redact(config.dump(recipe))


def check_changes(folder: str, loaded: Checkpoint, recipe: Recipe) -> None:
    """Refuse to go on with other values of what a run can't change; say what else has changed."""
    progress = loaded.progress
    fixed = ["seed", "model", "planes", "render", "autoencoder.create", "autoencoder.latents", "autoencoder.scale"]
    if not progress.finished:
        fixed += ["train.plane_optimizer", f"train.{progress.stage}.alternate"]
    compare_settings(folder, loaded.config, recipe, fixed)


def compare_settings(folder: str, settings: str, recipe: Recipe, fixed: list[str]) -> None:
    """Refuse other values of the ``fixed`` keys than in the settings that a folder was made with; log other changes."""
    before, now = _flat(yaml.safe_load(settings)), _flat(yaml.safe_load(public_settings(recipe)))
    changed = [key for key in now if key in before and before[key] != now[key]]
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


def check_memory(needed: int, device: torch.device, instead: str = "train fewer scenes (data.categories)") -> None:
    """Refuse planes and moments of ``needed`` bytes that the GPU has no room for, and say what to do ``instead``."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"the planes and their optimizer state need {needed / 2**30:.1f} GiB and {device} has "
            f"{free / 2**30:.1f} GiB free: lower planes.resolution or planes.features, or {instead}"
        )
