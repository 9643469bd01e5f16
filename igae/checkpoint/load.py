# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: all of what is shared, and of the scenes the rows that are asked for."""

import errno
import zlib
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igae.checkpoint.format import (
    CONFIG,
    MAX_STATE,
    OPTIMIZER,
    SHARED,
    STATE,
    FileEntry,
    Progress,
    parse_state,
    scenes_name,
)
from igae.errors import progress, redact
from igae.storage import Damaged, Missing, StoreError, TensorFile, join, named_errors, own_file, read_whole

RowType = tuple[torch.dtype, tuple[int, ...]]
Found = dict[str, tuple[TensorFile, dict[str, Tensor]]]
"""Name of a file -> the file, and its tensors but for the rows."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that does not hold what was written; ``why`` names the file, without advice."""

    def __init__(self, folder: str, why: str) -> None:
        super().__init__(redact(f"{why}: fix that, or remove {folder} to resume from the one before"))
        self.why = redact(why)


@dataclass
class Checkpoint:
    """A checkpoint that was read, but for the rows of its scenes."""

    progress: Progress
    config: str
    shared: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    folder: str
    _files: list[TensorFile] = field(repr=False)
    _ids_of_files: list[NDArray[np.int64]] = field(repr=False)

    def __post_init__(self) -> None:
        ids = np.concatenate(self._ids_of_files)
        order = np.argsort(ids, kind="stable")
        counts = [len(part) for part in self._ids_of_files]
        self._ids = ids[order]
        self._file = np.repeat(np.arange(len(counts)), counts)[order]
        self._row = np.concatenate([np.arange(count) for count in counts])[order]

    @property
    def ids(self) -> NDArray[np.int64]:
        """Ids of all scenes, ascending."""
        return self._ids

    def rows(self, ids: Sequence[int], names: Container[str] | None = None) -> dict[str, Tensor]:
        """The rows of some scenes, in the order asked: name -> [len(ids), ...]. Nothing else is read.

        Args:
            names: which tensors; all if left out.

        Raises:
            DamagedCheckpoint: as of :func:`load_checkpoint`.
            ValueError: scenes that are not there, or files that can't be read.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        missing = wanted[~np.isin(wanted, self._ids)]
        if len(missing):
            shown = ", ".join(map(str, missing[:5].tolist())) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{redact(self.folder)} has no rows for {len(missing)} of {len(wanted)} scenes ({shown}): "
                "train the scenes that it has, or use a new experiment=NAME"
            )
        where = np.searchsorted(self._ids, wanted)
        rows = {name: row for name, row in _row_types(self._files[0]).items() if names is None or name in names}
        result = {name: torch.empty((len(wanted), *shape), dtype=dtype) for name, (dtype, shape) in rows.items()}
        with advice(self.folder):
            for number in np.unique(self._file[where]):
                places = np.flatnonzero(self._file[where] == number)
                for name, out in result.items():
                    self._files[number].rows_into(name, self._row[where[places]], out, places)
        return result


def load_checkpoint(folder: str, *, moments: bool = True) -> Checkpoint:
    """Read a checkpoint, but for the rows of its scenes.

    Args:
        moments: read those of the optimizer too; without them ``optimizer`` is empty.

    Raises:
        DamagedCheckpoint: a file is damaged or missing; the sentence names it.
        ValueError: there is none, it can't be read, or is of another format.
    """
    progress, files, config = read_head(folder)

    names = [SHARED, *([OPTIMIZER] if moments else []), *map(scenes_name, range(progress.world))]
    with advice(folder):
        found = _read_files(folder, files, names)
        shared, optimizer = found.pop(SHARED)[1], found.pop(OPTIMIZER, (None, {}))[1]
        ids = check_scenes(folder, files, found)
        return Checkpoint(progress, config, shared, optimizer, folder, [file for file, _ in found.values()], ids)


def check_scenes(folder: str, files: dict[str, FileEntry], found: Found | None = None) -> list[NDArray[np.int64]]:
    """Refuse files of scenes in a folder that are of one checkpoint and don't belong together.

    Args:
        files: all of the checkpoint.
        found: those of scenes, where they are open already.

    Returns:
        The ids of the scenes in each.

    Raises:
        DamagedCheckpoint: two have the same scene.
        ValueError: rows of one are of other types than those of another.
    """
    if found is None:
        found = _read_files(folder, files, sorted(name for name, entry in files.items() if entry.rows is not None))
    for name, (file, tensors) in found.items():
        with named_errors(file.url):
            _check_scenes(file, tensors, files[name].rows, _row_types(next(iter(found.values()))[0]))
    ids = [tensors["ids"].numpy() for _, tensors in found.values()]
    every, counts = np.unique(np.concatenate(ids), return_counts=True)
    if len(twice := every[counts > 1]):
        raise DamagedCheckpoint(folder, f"{folder} is damaged: scene {twice[0]} is in it twice")
    return ids


def _read_files(folder: str, files: dict[str, FileEntry], names: list[str]) -> Found:
    """Open files and read all but their rows."""

    def read(name: str) -> tuple[TensorFile, dict[str, Tensor]]:
        file = TensorFile(own_file(folder, name), files[name])
        return file, file.tensors()

    with ThreadPoolExecutor(16) as pool:  # an object store takes its time for each file
        found = progress(f"reading {redact(folder)}", len(names), "files", pool.map(read, names))
        return dict(zip(names, found, strict=True))


def read_head(folder: str) -> tuple[Progress, dict[str, FileEntry], str]:
    """What state.json says, and the configuration. Raises as :func:`load_checkpoint` does."""
    try:
        state = _read(folder, STATE)
    except Missing:
        raise ValueError(f"{redact(folder)} has no {STATE}: give the folder of a complete checkpoint") from None
    except StoreError as error:
        raise ValueError(str(error)) from None
    with advice(folder):
        with named_errors(join(folder, STATE)):
            progress, files = parse_state(state)
        config = _read(folder, CONFIG)
        with named_errors(join(folder, CONFIG)):
            if FileEntry(len(config), zlib.crc32(config)) != files[CONFIG]:
                raise Damaged("its checksum differs")
            return progress, files, config.decode()


def _read(folder: str, name: str) -> bytes:
    url = own_file(folder, name)
    return read_whole(url, redact(url), MAX_STATE)


def _check_scenes(file: TensorFile, tensors: dict[str, Tensor], count: int | None, rows: dict[str, RowType]) -> None:
    """Refuse a file that does not hold ``count`` scenes, or rows of other types than ``rows``."""
    ids = tensors.get("ids", torch.empty(0))
    counts = {file.entries[name].shape[0] for name in file.row_names()} | {ids.numel()}
    if ids.dtype != torch.int64 or ids.ndim != 1 or counts != {count} or _row_types(file) != rows:
        raise Damaged(f"its tensors are not those of {count} scenes")


def _row_types(file: TensorFile) -> dict[str, RowType]:
    """Name of each tensor with rows -> type and shape of a row."""
    return {name: (file.entries[name].dtype, file.entries[name].shape[1:]) for name in file.row_names()}


@contextmanager
def advice(folder: str) -> Iterator[None]:
    """Tell damage from what could not be read, and what to do about it."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except ValueError as error:
        cause = error.__cause__  # of what could not be read, perhaps for now only, or for this user
        if isinstance(error, StoreError) and not isinstance(error, Missing):
            raise
        if cause and not isinstance(cause, FileNotFoundError) and getattr(cause, "errno", None) != errno.EIO:
            raise
        raise DamagedCheckpoint(folder, str(error)) from error
