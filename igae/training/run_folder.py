# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its lock, its settings, what it runs on, its metrics."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from igae import __version__, config
from igae.errors import redact, sections_at
from igae.evaluation import current_name
from igae.ranks import Channel, RefusedByAll, world_size
from igae.storage import (
    LIMITS,
    file_system,
    join,
    make_folder,
    named_errors,
    remove_leftovers,
    write_file,
    write_text,
    writes_to,
)
from igae.training.recipe import Recipe

METRICS, ENVIRONMENT, CHANGES, SEEN = "metrics.json", "environment.json", "changes.json", ".seen-"
CLAIM = "experiment.txt"
"""In a ``checkpoint.root``: the name of the experiment that has it."""
_METRICS = TypeAdapter(dict[str, dict[str, int | float]])
log = logging.getLogger("igae")


def lock_run(folder: Path, remedy: str = "end it, or use a new experiment=NAME") -> IO[str]:
    """Keep a second process from training in the same folder. The lock ends with this process, however it ends."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise ValueError(f"another process is training in {folder}: {remedy}") from None
    except OSError:
        pass  # a file system without locks
    return lock


def claim_root(recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """Keep two experiments from using one ``checkpoint.root``, also when they start at the same moment: it has the name
    of the first, and a folder of this machine is locked.

    Raises:
        ValueError: it is another's.
    """
    root, held = recipe.checkpoint.root or "", contextlib.ExitStack()
    own = f"a folder of its own, such as checkpoint.root={redact(join(root, recipe.experiment))}"
    fs, path = file_system(root)
    is_local = isinstance(fs, LocalFileSystem)
    if is_local:
        make_folder(path)
        held.enter_context(lock_run(Path(path), f"end it, or give each experiment {own}"))
    with contextlib.nullcontext() if is_local else named_errors(join(root, CLAIM), "written"):
        fs.invalidate_cache()
        if not fs.exists(join(path, CLAIM)):
            write_file(join(root, CLAIM), recipe.experiment.encode())
            # Who has looked before that writes too, and the last one has it.
            time.sleep(0 if is_local else LIMITS.claim_seconds)
        name = fs.cat_file(join(path, CLAIM)).decode(errors="replace")
    if name != recipe.experiment:
        held.close()
        raise ValueError(
            f"checkpoint.root {redact(root)} is that of experiment {name[:80]}, this is {recipe.experiment}: give each "
            f"{own}, or remove {CLAIM} there"
        )
    return held


@contextlib.contextmanager
def open_run(recipe: Recipe, channel: Channel) -> Iterator[None]:
    """Make a run's folder, and keep it locked. Collective.

    Raises:
        ValueError: on all ranks alike, another process has the lock, or not all ranks see the folder.
    """
    held, folder = contextlib.ExitStack(), recipe.folder

    def begin() -> None:
        make_folder(str(folder))
        held.enter_context(lock_run(folder))
        if recipe.checkpoint.root:
            held.enter_context(claim_root(recipe))
        remove_leftovers(folder, below=True)
        for seen in folder.glob(f"{SEEN}*"):
            seen.unlink(missing_ok=True)

    with held:
        channel.on_first_rank(begin)
        if world_size() > 1:
            check_shared(folder, channel)
        with writes_to(folder):  # what has no better place to say it: trackers
            yield


def write_settings(recipe: Recipe) -> None:
    """Write a run's settings into its folder: when nothing refuses them any more."""
    write_text(recipe.folder / "config.yaml", public_settings(recipe))
    changes = {key: [redact(config.shown(value)) for value in both] for key, both in recipe.changes.items()}
    text = json.dumps({"recipe": redact(recipe.source), "changes": changes}, indent=1)
    write_text(recipe.folder / CHANGES, text + "\n")


def check_shared(folder: Path, channel: Channel) -> None:
    """Refuse an output folder that not all ranks see: each would write into one of its own. Collective."""
    token = folder / f"{SEEN}{channel.on_first_rank(lambda: secrets.token_hex(8))}"
    channel.on_first_rank(token.touch)
    deadline = time.monotonic() + 10  # network file systems show new files late
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host in channel.gather(None if token.exists() else socket.gethostname()) if host]
    channel.on_first_rank(token.unlink)
    if blind:
        raise RefusedByAll(
            f"{blind[0]} does not see {folder.resolve()} of the first rank's machine: set outputs to a folder that all "
            "machines share"
        )


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


def public_settings(recipe: Recipe) -> str:
    """The resolved configuration as YAML, as it may be saved and shown: without credentials."""
    return redact(config.dump(recipe))


def flat(tree: Any, key: tuple[str, ...] = ()) -> dict[str, Any]:
    """Saved settings by dotted keys, with the names that keys have now."""
    if not isinstance(tree, dict):
        return {".".join(key): tree}
    kinds = sections_at(Recipe, key)
    renamed: dict[str, str] = {old: new for kind in kinds for old, new in getattr(kind, "RENAMED", {}).items()}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, (*key, renamed.get(str(name), str(name)))).items()}


def read_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics at the end of each stage that is finished, by their present names."""
    path = folder / METRICS
    try:
        stages = _METRICS.validate_json(path.read_bytes()) if path.is_file() else {}
    except ValidationError:  # results are made again from the checkpoint, or are a record only
        log.warning("%s is damaged, what it said is left out", path)
        stages = {}
    return {stage: {current_name(name): value for name, value in found.items()} for stage, found in stages.items()}


def write_metrics(folder: Path, stage: str, metrics: dict[str, float]) -> None:
    """Add those of a stage."""
    write_text(folder / METRICS, json.dumps(read_metrics(folder) | {stage: metrics}, indent=1) + "\n")
