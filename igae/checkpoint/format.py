# SPDX-License-Identifier: Apache-2.0
"""Names and contents of a checkpoint's files."""

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, TypeAdapter, ValidationError

from igae.storage import Damaged, Stamp, file_system, join, named_errors, parse_json, reason

FORMAT = 2
STATE, CONFIG = "state.json", "config.yaml"
BEGUN = "begun.json"
"""In a folder that becomes a checkpoint when all waves of a fit are there."""
SHARED, OPTIMIZER = "shared.safetensors", "optimizer.safetensors"
MAX_STATE = 64 << 20
"""Bytes of state.json: some hundred for each rank, or for each wave of a fit."""
LEARNING_RATES = "planes/learning_rates"
"""The learning rates of the planes' optimizer, one for each step, among the tensors of OPTIMIZER."""
FOLDER = re.compile(r"step-\d{8,}(-end)?")
Count = Annotated[int, Field(ge=0, lt=1 << 60)]
Positive = Annotated[int, Field(ge=1, lt=1 << 60)]
RENAMED_STREAMS = {"photos": "natural_images"}
"""Names of streams that version 0.1.0 wrote."""


@dataclass
class Progress:
    """Where a run stands: ``step`` steps of ``stage`` are done, ``total`` of all stages together."""

    stage: Literal["warmup", "joint"]
    step: Count
    total: Count
    finished: bool = False
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    data: str = ""
    """Digest of the manifest's shards."""
    world: Positive = 1
    """Number of ranks that have written the checkpoint."""
    steps_per_epoch: Positive = 1
    consumed: dict[str, Count] = field(default_factory=dict)
    """Name of each stream -> samples that a rank has taken of it in this stage."""
    format: int = FORMAT


@dataclass(frozen=True)
class FileEntry(Stamp):
    """A file of a checkpoint: its stamp, and the number of its scenes, if any."""

    rows: Count | None = None


_PROGRESS, _FILES = TypeAdapter(Progress), TypeAdapter(dict[str, FileEntry])


def scenes_name(number: int) -> str:
    """File of a rank's scenes."""
    return f"scenes-{number:05d}.safetensors"


def folder_of(root: str, total: int, finished: bool = False) -> str:
    """The folder of the checkpoint at a step of the whole run; the end of a stage has one of its own."""
    return join(root, f"step-{total:08d}{'-end' if finished else ''}")


def age(name: str) -> tuple[int, bool]:
    """What the names of folders are ordered by."""
    return int(name.split("-")[1]), name.endswith("-end")


def folders(fs: Any, root: str) -> list[str]:
    """Names of all folders of checkpoints in a folder, oldest first, complete or not."""
    fs.invalidate_cache()  # listings are remembered, and other processes write too
    try:
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((name for name in names if FOLDER.fullmatch(name)), key=age)


def list_complete(root: str) -> list[str]:
    """Complete checkpoints below a path or URL, oldest first; none where there is no such folder.

    Raises:
        ValueError: it can't be listed.
    """
    with named_errors(root, "listed"):
        fs, path = file_system(root)
        return [join(root, name) for name in folders(fs, path) if fs.exists(join(path, name, STATE))]


def set_aside(folder: str) -> str:
    """Rename a damaged checkpoint, so that it is none; nothing of it is removed. An object store has no renaming: there
    it stays. Returns what was done."""
    fs, path = file_system(folder)
    if not isinstance(fs, LocalFileSystem):
        return "it stays where it is"
    names = (f"{path}-damaged{number}" for number in ("", *range(2, 100)))
    target = next(name for name in names if not os.path.lexists(name))
    try:
        os.rename(path, target)
    except OSError as error:
        return f"it stays where it is ({reason(error)})"
    return f"it was renamed to {target}"


def is_complete(folder: str) -> bool:
    """Whether a path or URL is a complete checkpoint. Raises ValueError where that can't be found out."""
    with named_errors(folder):
        fs, path = file_system(join(folder, STATE))
        return bool(fs.exists(path))


def dump_state(progress: Progress, files: dict[str, FileEntry]) -> bytes:
    """What state.json says, with a checksum of its own."""
    state = {**asdict(progress), "files": {name: asdict(file) for name, file in sorted(files.items())}}
    return (json.dumps({**state, "crc32": _crc(state)}, indent=1) + "\n").encode()


def parse_state(data: bytes) -> tuple[Progress, dict[str, FileEntry]]:
    """Read back :func:`dump_state`. No name in it becomes a path: it must list the names that are expected.

    Raises:
        Damaged: it was changed.
        ValueError: another format.
    """
    try:
        state = parse_json(data, MAX_STATE)
    except ValueError:
        raise Damaged("it is no JSON") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"its format is {found!r}, and this version reads {FORMAT}")
    try:
        if state.pop("crc32", None) != _crc(state):
            raise Damaged("its checksum differs")
        files = _FILES.validate_python(state.pop("files", None))
        progress = _PROGRESS.validate_python(state)
    except RecursionError:
        raise Damaged("it is nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    # The number of files first: a number of ranks can be anything.
    world = progress.world
    if len(files) != world + 3 or set(files) != {SHARED, OPTIMIZER, CONFIG, *map(scenes_name, range(world))}:
        raise Damaged(f"it does not list the files of {world} ranks")
    progress.consumed = {RENAMED_STREAMS.get(name, name): count for name, count in progress.consumed.items()}
    return progress, files


def _crc(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
