# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: all of what is shared, and of the scenes the rows that are asked for."""

import zlib
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igae.checkpoint.layout import CONFIG, OPTIMIZER, SHARED, STATE, File, Progress, parse_state, reason, scenes_name
from igae.errors import redact
from igae.storage import Stamp, TensorFile, join


@dataclass
class Loaded:
    """A checkpoint that was read, but for the rows of its scenes."""

    progress: Progress
    config: str
    shared: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    _folder: str = field(repr=False)
    _files: list[TensorFile] = field(repr=False)
    _ids_of_files: list[NDArray[np.int64]] = field(repr=False)

    def __post_init__(self) -> None:
        parts = self._ids_of_files
        ids = np.concatenate(parts)
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        self._file = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
        self._row = np.concatenate([np.arange(len(part)) for part in parts])[order]
        twice = self._ids[1:][self._ids[1:] == self._ids[:-1]]
        if len(twice):
            raise ValueError(f"{self._folder} is damaged: scene {twice[0]} is in it twice")

    @property
    def ids(self) -> frozenset[int]:
        """Ids of all scenes."""
        return frozenset(self._ids.tolist())

    def rows(self, ids: Sequence[int], names: Container[str] | None = None) -> dict[str, Tensor]:
        """The rows of some scenes, in the order asked: name -> [len(ids), ...]. Nothing else is read.

        Args:
            names: which tensors; all if left out.

        Raises:
            ValueError: scenes that are not there, or damaged files.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        missing = wanted[~np.isin(wanted, self._ids)]
        if len(missing):
            shown = ", ".join(map(str, missing[:5].tolist())) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{redact(self._folder)} has no rows for {len(missing)} of {len(wanted)} scenes ({shown}): "
                "train the scenes that it has, or use a new experiment=NAME"
            )
        where = np.searchsorted(self._ids, wanted)
        entries = {n: self._files[0].entries[n] for n in self._files[0].row_names() if names is None or n in names}
        result = {n: torch.empty((len(wanted), *entry.shape[1:]), dtype=entry.dtype) for n, entry in entries.items()}
        for number in np.unique(self._file[where]):
            places = np.flatnonzero(self._file[where] == number)
            rows = self._row[where[places]]
            for name, out in result.items():
                with _advice(self._folder):
                    self._files[number].rows_into(name, rows, out, places)
        return result


def settings(folder: str) -> str:
    """The configuration that a checkpoint was made with, as YAML. Raises as :func:`load` does."""
    return head(folder)[2]


def load(folder: str, *, moments: bool = True) -> Loaded:
    """Read a checkpoint, but for the rows of its scenes.

    Args:
        moments: read those of the optimizer too; without them ``optimizer`` is empty.

    Raises:
        ValueError: it is missing, incomplete, damaged or of another format; the sentence names the file.
    """
    progress, files, config = head(folder)
    with _advice(folder):

        def read(name: str) -> tuple[TensorFile, dict[str, Tensor]]:
            file = TensorFile(join(folder, name), Stamp(files[name].bytes, files[name].crc32))
            return file, file.tensors()

        names = [SHARED, *([OPTIMIZER] if moments else []), *map(scenes_name, range(progress.world))]
        with ThreadPoolExecutor(16) as pool:  # an object store takes its time for each file
            found = dict(zip(names, pool.map(read, names), strict=True))
        scenes = [(name, *found[name]) for name in map(scenes_name, range(progress.world))]
        for name, file, tensors in scenes:
            ids = tensors.get("ids", torch.empty(0))
            counts = {file.entries[row].shape[0] for row in file.row_names()} | {ids.numel()}
            good = ids.dtype == torch.int64 and ids.ndim == 1 and counts == {files[name].rows}
            if not good or _shapes(file) != _shapes(scenes[0][1]):
                raise ValueError(f"{file.url} is damaged: its tensors are not those of {files[name].rows} scenes")
        return Loaded(
            progress,
            config,
            found[SHARED][1],
            found[OPTIMIZER][1] if moments else {},
            folder,
            [file for _, file, _ in scenes],
            [tensors["ids"].numpy() for _, _, tensors in scenes],
        )


def head(folder: str) -> tuple[Progress, dict[str, File], str]:
    """What state.json says, and the configuration."""
    try:
        state = _read(folder, STATE)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{redact(folder)} has no {STATE}: give the folder of a complete checkpoint") from None
    with _advice(folder):
        progress, files = parse_state(state, join(folder, STATE))
        try:
            config = _read(folder, CONFIG)
        except FileNotFoundError:
            raise ValueError(f"{join(folder, CONFIG)} is missing") from None
        if len(config) != files[CONFIG].bytes or zlib.crc32(config) != files[CONFIG].crc32:
            raise ValueError(f"{join(folder, CONFIG)} is damaged: its checksum differs")
        return progress, files, config.decode()


def _shapes(file: TensorFile) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name of each tensor with rows -> type and shape of a row."""
    return {name: (file.entries[name].dtype, file.entries[name].shape[1:]) for name in file.row_names()}


def _read(folder: str, name: str) -> bytes:
    where = join(folder, name)
    try:
        fs, path = fsspec.core.url_to_fs(where)
        fs.invalidate_cache()
        data: bytes = fs.cat_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{redact(where)} can't be read: {reason(error)}") from error
    return data


@contextmanager
def _advice(folder: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        text = f"{error}: put that right, or remove {folder} to resume from the one before"
        raise ValueError(redact(text)) from error
