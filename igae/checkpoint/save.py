# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: all ranks at once, in the background if asked for."""

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from igae.checkpoint.format import (
    BEGUN,
    CONFIG,
    OPTIMIZER,
    SHARED,
    STATE,
    FileEntry,
    Progress,
    age,
    dump_state,
    folder_of,
    folders,
    list_complete,
    scenes_name,
)
from igae.checkpoint.load import check_scenes
from igae.errors import LostRank, redact
from igae.ranks import Channel, RefusedByAll, rank
from igae.storage import LIMITS, file_system, join, make_folder, reason, sync_folder, write_file, write_tensors

T = TypeVar("T")
Tensors = dict[str, Tensor]
Files = dict[str, Tensors]
"""Name of a file -> its tensors."""
log = logging.getLogger("igae")


class CheckpointWriter:
    """Writes the checkpoints of a run; one for each rank. :meth:`save` is for all ranks together.

    Args:
        root: path or URL of the checkpoints' folders; all ranks must see the same.
        keep: how many of the newest to keep.
        channel: for this writer alone.
        background: write in a thread while training goes on, from a copy in CPU memory.
        damaged: complete checkpoints that are none: one is replaced by that of the same step, and none counts as kept.
    """

    def __init__(
        self, root: str, keep: int, channel: Channel, background: bool = False, damaged: Collection[str] = ()
    ) -> None:
        self.root, self.keep, self.background, self.damaged = root, keep, background, set(damaged)
        self._channel = channel
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, progress: Progress, config: str, shared: Tensors | None, optimizer: Tensors | None, scenes: Tensors
    ) -> str:
        """Write a checkpoint, and remove all but the newest ``keep``. One that is already complete is kept.

        Args:
            progress: its number of ranks is set in the file.
            shared: weights and buffers; of rank 0 only.
            optimizer: Adam's moments as ``<parameter>/<moment>``; of rank 0 only.
            scenes: ``ids`` (int64 [N]) and tensors [N, ...] of this rank's scenes; names and shapes of rows are the
                same on all ranks.

        Returns:
            Its folder.

        Raises:
            ValueError: on all ranks alike, if one of them can't write its part, or the save before failed in the
                background. Checkpoints that were there before are untouched.
        """
        self.wait()
        folder = folder_of(self.root, progress.total, progress.finished)
        progress = replace(progress, consumed=dict(progress.consumed))  # training goes on counting in the original
        files = {scenes_name(rank()): scenes}
        if rank() == 0:
            files |= {SHARED: shared or {}, OPTIMIZER: optimizer or {}}
        if not self.background:
            self._save(folder, progress, config, lambda: files)
            return folder
        copies: Future[Files] = Future()
        try:
            copies.set_result({name: _copy(tensors) for name, tensors in files.items()})
        except Exception as error:  # all ranks must hear of it before one raises
            copies.set_exception(error)

        def run() -> None:
            try:
                self._save(folder, progress, config, copies.result)
            except Exception as error:
                self._error = error

        # It ends with the process: after a crash nobody may wait for ranks that have died.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        return folder

    def clean(self) -> None:
        """Remove what saves that were killed have left; for one rank, and while no other process writes there."""
        found, failure = _attempt(self._incomplete)
        if failure:
            log.warning("%s is not looked through for what kills have left: %s", redact(self.root), failure)
        for name in found or []:
            _try_to_remove(join(self.root, name))
        self._remove_old(None)

    def _incomplete(self) -> list[str]:
        """Names of folders that are no checkpoints, and no waves of a fit that will be one."""
        fs, root = file_system(self.root)
        names = folders(fs, root)
        return [name for name in names if not any(fs.exists(join(root, name, file)) for file in (STATE, BEGUN))]

    def wait(self) -> None:
        """Until the last save is complete. Nothing of this writer runs afterwards.

        Raises:
            ValueError: it failed, on this rank or another.
            LostRank: another rank does not answer any more.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    close = wait

    def _save(self, folder: str, progress: Progress, config: str, files: Callable[[], Files]) -> None:
        """All of a save, which fails on all ranks alike."""
        kind: type[Exception] = RefusedByAll
        try:
            failure = self._save_together(folder, progress, config, files)
        except Exception as error:  # of an exchange
            kind, failure = LostRank, f"rank {rank()} has lost another one, {reason(error)}"
        if failure:
            raise kind(f"the checkpoint {redact(folder)} can't be written: {failure}; earlier ones are untouched")

    def _save_together(self, folder: str, progress: Progress, config: str, files: Callable[[], Files]) -> str:
        """Write, step by step on all ranks; why it failed, the same on all ranks."""
        main = rank() == 0
        there, failure = self._step(lambda: main and self._prepare(folder))
        if any(there) or failure:
            return failure
        written, failure = self._step(lambda: write_files(folder, files()))
        if not failure:
            entries = {name: entry for part in written if part for name, entry in part.items()}
            complete = replace(progress, world=len(written))
            _, failure = self._step(lambda: mark_complete(folder, complete, config, entries) if main else None)
        if main and failure:
            _try_to_remove(folder)
        elif main:
            self._remove_old(folder)
        return failure

    def _step(self, action: Callable[[], T]) -> tuple[list[T | None], str]:
        """Do something on all ranks; what it returns on each, and why it failed on some, the same on all ranks."""
        outcomes = self._channel.gather(_attempt(action))
        failures = [f"rank {number}: {failure}" for number, (_, failure) in enumerate(outcomes) if failure]
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        return [result for result, _ in outcomes], failures[0] + others if failures else ""

    def _prepare(self, folder: str) -> bool:
        """On rank 0: whether the checkpoint is there already; what killed saves have left is removed."""
        fs, path = file_system(join(folder, STATE))
        fs.invalidate_cache()
        if fs.exists(path):
            if folder not in self.damaged:
                return True
            _remove(folder)
        self.damaged.discard(folder)  # what is written there now is whole, also where the damaged one was set aside
        for other in self._incomplete():
            if age(other) <= age(folder.rsplit("/", 1)[-1]):
                _try_to_remove(join(self.root, other))
        make_folder(folder)
        return False

    def _remove_old(self, written: str | None) -> None:
        """On rank 0: keep as many as are to be kept, and always the one just written: a run that was taken back to an
        older checkpoint writes lower steps than are there."""
        spared, more = {written, *self.damaged}, self.keep - (written is not None)
        others, failure = _attempt(lambda: [other for other in list_complete(self.root) if other not in spared])
        if failure:
            log.warning("old checkpoints in %s are kept: %s", redact(self.root), failure)
        for old in (others or [])[: -more or None]:
            _try_to_remove(old)


def _copy(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def mark_complete(folder: str, progress: Progress, config: str, files: dict[str, FileEntry]) -> None:
    """Make a folder with all files of all ranks a complete checkpoint, by writing its ``state.json``. For one rank.

    Args:
        files: those that were written, which must all be visible here.
    """
    fs, path = file_system(folder)
    deadline = time.monotonic() + LIMITS.visible_seconds
    while lost := _not_there(fs, path, files):
        if time.monotonic() > deadline:
            raise ValueError(f"{lost} is not there as it was written, and all nodes must share the folder")
        time.sleep(min(1.0, LIMITS.visible_seconds))
    check_scenes(folder, files)  # ranks that were started differently, of what no load could make sense
    text = config.encode()
    write_file(join(folder, CONFIG), text)
    state = dump_state(progress, {**files, CONFIG: FileEntry(len(text), zlib.crc32(text))})
    write_file(join(folder, STATE), state)


def write_files(folder: str, files: Files) -> dict[str, FileEntry]:
    """Write files of tensors. Those of scenes have ``ids`` and, with a checksum each, rows."""
    fs, path = file_system(folder)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(path, exist_ok=True)  # another rank has made it, on another node perhaps
    entries = {}
    for name, tensors in files.items():
        rows = {key: tensor for key, tensor in tensors.items() if "ids" in tensors and key != "ids"}
        whole = {key: tensor for key, tensor in tensors.items() if key not in rows}
        stamp = write_tensors(join(folder, name), whole, rows)
        entries[name] = FileEntry(stamp.bytes, stamp.crc32, len(tensors["ids"]) if "ids" in tensors else None)
    return entries


def _not_there(fs: Any, folder: str, files: dict[str, FileEntry]) -> str | None:
    """A file that this process does not see as it was written, if there is one."""
    fs.invalidate_cache()
    sizes = {str(item["name"]).rsplit("/", 1)[-1]: item["size"] for item in fs.ls(folder, detail=True)}
    return next((name for name, file in files.items() if sizes.get(name) != file.bytes), None)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """What an action returns, and why it failed: all ranks must hear of it before one raises."""
    try:
        return action(), ""
    except Exception as error:
        log.debug("a checkpoint can't be written", exc_info=True)
        return None, reason(error)


def _remove(folder: str) -> None:
    fs, path = file_system(folder)
    fs.invalidate_cache()
    if fs.exists(join(path, STATE)):
        fs.rm_file(join(path, STATE))  # first, so that a half removed folder does not count as complete
        sync_folder(folder)
    with suppress(FileNotFoundError):  # an object store has no folders, and nothing else was in it
        fs.rm(path, recursive=True)


def _try_to_remove(folder: str) -> None:
    _, failure = _attempt(lambda: _remove(folder))
    if failure:
        log.warning("%s can't be removed: %s", redact(folder), failure)
