# SPDX-License-Identifier: Apache-2.0
"""Names and contents of a checkpoint's files."""

import json
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import fsspec
from pydantic import TypeAdapter, ValidationError

from igae.errors import redact
from igae.storage import join

FORMAT = 2
STATE, CONFIG = "state.json", "config.yaml"
SHARED, OPTIMIZER = "shared.safetensors", "optimizer.safetensors"
RATES = "planes/learning_rates"
"""The learning rates of the planes' optimizer, one for each step, among the tensors of OPTIMIZER."""
FOLDER = re.compile(r"step-(\d{8,})(-end)?")


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
    world: int = 1
    """Number of ranks that have written the checkpoint."""
    steps_per_epoch: int = 1
    consumed: dict[str, int] = field(default_factory=dict)
    """Name of each stream -> samples that a rank has taken of it in this stage."""
    format: int = FORMAT


@dataclass
class File:
    """A file of a checkpoint: its size, the checksum that its writer gave, and the number of its scenes, if any."""

    bytes: int
    crc32: int
    rows: int | None = None


_PROGRESS, _FILES = TypeAdapter(Progress), TypeAdapter(dict[str, File])


def scenes_name(number: int) -> str:
    """File of a rank's scenes."""
    return f"scenes-{number:05d}.safetensors"


def folder_of(root: str, total: int, finished: bool = False) -> str:
    """The folder of the checkpoint at a step of the whole run. The end of a stage has one of its own, so that none is
    ever written over."""
    return join(root, f"step-{total:08d}{'-end' if finished else ''}")


def age(name: str) -> tuple[int, bool]:
    """What the names of folders are ordered by."""
    match = FOLDER.fullmatch(name)
    assert match is not None
    return int(match[1]), match[2] is not None


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
    try:
        fs, path = fsspec.core.url_to_fs(root)
        return [join(root, name) for name in folders(fs, path) if fs.exists(join(path, name, STATE))]
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"the checkpoints at {redact(root)} can't be listed: {reason(error)}") from error


def is_complete(folder: str) -> bool:
    """Whether a path or URL is a complete checkpoint. Raises ValueError where that can't be found out."""
    try:
        fs, path = fsspec.core.url_to_fs(folder)
        return bool(fs.exists(join(path, STATE)))
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{redact(folder)} can't be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why something failed, in a line and without credentials."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    elif not text or not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__} {text}".strip()
    return redact(text)


def dump_state(progress: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    """What state.json says, with a checksum of its own."""
    state = {**progress, "files": files}
    return (json.dumps({**state, "crc32": _crc(state)}, indent=1) + "\n").encode()


def parse_state(data: bytes, where: str) -> tuple[Progress, dict[str, File]]:
    """Read back :func:`dump_state`. No name in it becomes a path: it must list the names that are expected.

    Raises:
        ValueError: damaged, or of another format.
    """
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is damaged: it is no JSON") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise ValueError(f"{where} can't be read: its format is {found!r}, and this version reads {FORMAT}")
    if state.pop("crc32", None) != _crc(state):
        raise ValueError(f"{where} is damaged: its checksum differs")
    try:
        files = _FILES.validate_python(state.pop("files", None))
        progress = _PROGRESS.validate_python(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    # The number of files first: a number of ranks can be anything.
    if len(files) != progress.world + 3 or set(files) != {SHARED, OPTIMIZER, CONFIG, *_scenes_names(progress)}:
        raise ValueError(f"{where} is damaged: it does not list the files of {progress.world} ranks")
    return progress, files


def _scenes_names(progress: Progress) -> list[str]:
    return [scenes_name(number) for number in range(progress.world)]


def _crc(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
