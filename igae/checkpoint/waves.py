# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose scenes are finished wave after wave, each by any rank and perhaps after a restart."""

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from igae.checkpoint.format import BEGUN, OPTIMIZER, SHARED, FileEntry, Progress, is_complete, scenes_name, set_aside
from igae.checkpoint.load import DamagedCheckpoint, advice, read_head
from igae.checkpoint.save import Tensors, mark_complete, write_files
from igae.storage import (
    Damaged,
    TensorFile,
    file_system,
    join,
    make_folder,
    named_errors,
    remove_leftovers,
    sync_folder,
    write_file,
)

MARK = re.compile(r"scenes-(\d+)\.json")
_ENTRY, _BEGUN = TypeAdapter(FileEntry), TypeAdapter(tuple[str, str])
log = logging.getLogger("igae")


class WaveCheckpoint:
    """A folder that becomes a checkpoint when all of its waves are there.

    Wave number i is a file of scenes, ``scenes-0000i.safetensors``, and, written after it, ``scenes-0000i.json`` with
    its size and checksum: a wave with that is finished. ``begun.json`` says what the waves have in common. Methods are
    not collective.

    Raises (all methods):
        ValueError: the folder can't be read or written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with named_errors(folder):
            self._fs, self._path = file_system(folder)

    def begin(self, config: str, data: str) -> tuple[str, str]:
        """Start with these settings and data, or resume.

        Returns:
            The settings and the digest of the data that the folder was started with.
        """
        if is_complete(self.folder):
            progress, _, settings = read_head(self.folder)
            with named_errors(self.folder, "written"):
                self._remove_marks()  # where a kill came before
            return settings, progress.data
        with named_errors(self.folder, "written"):
            make_folder(self.folder)
            if isinstance(self._fs, LocalFileSystem):
                remove_leftovers(Path(self._path))
            if not self._fs.exists(join(self._path, BEGUN)):
                write_file(join(self.folder, BEGUN), json.dumps([config, data]).encode())
            data_of_begun = self._fs.cat_file(join(self._path, BEGUN))
        with named_errors(join(self.folder, BEGUN)):
            try:
                return _BEGUN.validate_json(data_of_begun)
            except ValidationError:
                raise Damaged("it is not what was written, remove the folder and fit again") from None

    def finished(self, mend: bool | None = None) -> dict[int, FileEntry]:
        """The waves that are there, by number.

        Args:
            mend: look into their files too. True: a damaged wave is none, and is told. False: it is refused.
        """
        if is_complete(self.folder):  # whose state.json says it: the marks go
            progress, files, _ = read_head(self.folder)
            return {number: files[scenes_name(number)] for number in range(progress.world)}
        with named_errors(self.folder):
            numbers = sorted(int(match[1]) for match in map(MARK.fullmatch, self._names()) if match)
        found: dict[int, FileEntry] = {}
        for number in numbers:
            try:
                found[number] = self._check(number, files=mend is not None)
            except DamagedCheckpoint as error:
                if not mend:
                    raise ValueError(f"{error.why}: remove {_mark(number)}, and its scenes are fitted again") from None
                set_aside(join(self.folder, scenes_name(number)))
                log.warning("%s: its scenes are fitted again", error.why)
        return found

    def _check(self, number: int, files: bool) -> FileEntry:
        """The entry of a wave, with ``files`` checked, but for the rows: who reads a row checks it."""
        mark = join(self.folder, _mark(number))
        with advice(self.folder):
            with named_errors(mark):
                try:
                    entry = _ENTRY.validate_json(self._fs.cat_file(join(self._path, _mark(number))))
                except ValidationError:
                    raise Damaged("it is not what was written") from None
            if files:
                TensorFile(join(self.folder, scenes_name(number)), entry).tensors()
        return entry

    def write(self, number: int, scenes: Tensors) -> None:
        """Write a wave: ``ids`` (int64 [N]) and tensors [N, ...] of its scenes, with the same names and shapes of rows
        in all waves."""
        with named_errors(self.folder, "written"):
            (entry,) = write_files(self.folder, {scenes_name(number): scenes}).values()
            sync_folder(self.folder)
            write_file(join(self.folder, _mark(number)), json.dumps(asdict(entry)).encode())

    def close(self, progress: Progress, config: str, shared: Tensors) -> None:
        """Make the checkpoint, of which all waves must be there; for one rank.

        Args:
            progress: its number of ranks is set to that of the waves.
            shared: weights and buffers of the shared module.
        """
        waves = self.finished()
        with named_errors(self.folder, "written"):
            files = {scenes_name(number): entry for number, entry in waves.items()}
            files |= write_files(self.folder, {SHARED: shared, OPTIMIZER: {}})
            mark_complete(self.folder, replace(progress, world=len(waves)), config, files)
            self._remove_marks()

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        return [str(path).rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)]

    def _remove_marks(self) -> None:
        for name in self._names():
            if MARK.fullmatch(name) or name == BEGUN:
                self._fs.rm_file(join(self._path, name))


def _mark(number: int) -> str:
    return scenes_name(number).replace(".safetensors", ".json")
