# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: all ranks at once, in the background if asked for."""

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from igae.checkpoint.layout import (
    CONFIG,
    OPTIMIZER,
    SHARED,
    STATE,
    File,
    Progress,
    age,
    dump_state,
    folder_of,
    folders,
    list_complete,
    reason,
    scenes_name,
)
from igae.errors import LostRank, redact
from igae.ranks import Channel, rank
from igae.storage import join
from igae.storage import tensors as tensorfile

# Seconds after which a file that another node wrote must be seen: network file systems remember for a while what was
# not there.
PATIENCE = 60.0
T = TypeVar("T")
Tensors = dict[str, Tensor]
Files = dict[str, tuple[Tensors, Tensors]]
"""Name of a file -> its tensors, and those of them that are written row by row."""
log = logging.getLogger("igae")


class Writer:
    """Writes the checkpoints of a run; one for each rank. :meth:`save` is for all ranks together.

    Args:
        root: path or URL of the checkpoints' folders; all ranks must see the same.
        keep: how many of the newest to keep.
        channel: for this writer alone.
        background: write in a thread while training goes on, from a copy in CPU memory.
    """

    def __init__(self, root: str, keep: int, channel: Channel, background: bool = False) -> None:
        self.root, self.keep, self.background = root, keep, background
        self._channel = channel
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

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
        state = asdict(progress)  # a copy: training goes on counting in the original
        files: Files = {scenes_name(rank()): ({"ids": scenes["ids"]}, {k: v for k, v in scenes.items() if k != "ids"})}
        if rank() == 0:
            files |= {SHARED: (shared or {}, {}), OPTIMIZER: (optimizer or {}, {})}
        if not self.background:
            self._problem = self._commit(folder, state, config, files, None)
            self.wait()
            return folder
        copies, problem = _attempt(lambda: {name: (_copies(a), _copies(b)) for name, (a, b) in files.items()})

        def run() -> None:
            self._problem = self._commit(folder, state, config, copies or {}, problem)

        # It ends with the process: after a crash nobody may wait for ranks that have died.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
            ValueError: it failed, on this rank or another.
            LostRank: another rank does not answer any more.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def close(self) -> None:
        """:meth:`wait`. Nothing of this writer runs afterwards."""
        self.wait()

    def _commit(
        self, folder: str, state: dict[str, Any], config: str, files: Files, problem: str | None
    ) -> Exception | None:
        """All of a save; why it failed. ``problem`` is what has already failed on this rank."""
        failed: type[Exception] = ValueError
        try:
            failure = self._together(folder, state, config, files, problem)
        except Exception as error:  # of an exchange
            failed, failure = LostRank, f"rank {rank()} has lost another one, {reason(error)}"
        if not failure:
            return None
        return failed(f"the checkpoint {redact(folder)} can't be written: {failure}; earlier ones are untouched")

    def _together(
        self, folder: str, state: dict[str, Any], config: str, files: Files, problem: str | None
    ) -> str | None:
        main, nothing = rank() == 0, (None, None)
        there, failure = self._channel.gather(_attempt(lambda: self._begin(folder)) if main else nothing)[0]
        if there or failure:
            return failure and f"rank 0: {failure}"
        parts = self._channel.gather((None, problem) if problem else _attempt(lambda: _write_files(folder, files)))
        failures = {number: failure for number, (_, failure) in enumerate(parts) if failure}
        if not failures:
            listed = {name: file for part, _ in parts if part for name, file in part.items()}
            state = {**state, "world": len(parts)}
            end = _attempt(lambda: publish(folder, state, config, listed)) if main else nothing
            failures = {number: failure for number, (_, failure) in enumerate(self._channel.gather(end)) if failure}
        if main:
            self._tidy(folder, bool(failures))
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        return next((f"rank {number}: {failure}{others}" for number, failure in failures.items()), None)

    def _begin(self, folder: str) -> bool:
        """On rank 0: whether the checkpoint is there already; what killed saves have left is removed."""
        fs, root = fsspec.core.url_to_fs(self.root)
        name = folder.rsplit("/", 1)[-1]
        for other in folders(fs, root):
            complete = fs.exists(join(root, other, STATE))
            if other == name and complete:
                return True
            if other == name:
                _remove(fs, join(root, other))
            elif not complete and age(other) < age(name):
                _try_to_remove(fs, join(root, other))
        fs.makedirs(join(root, name), exist_ok=True)
        sync_folder(fs, root)
        return False

    def _tidy(self, folder: str, failed: bool) -> None:
        """On rank 0: remove what has failed, or what is more than is to be kept."""
        fs, path = fsspec.core.url_to_fs(folder)
        if failed:
            _try_to_remove(fs, path)
            return
        # Never the one just written: a run that was taken back to an older one writes lower steps than are there.
        others, problem = _attempt(lambda: [other for other in list_complete(self.root) if other != folder])
        if problem is not None:
            log.warning("old checkpoints in %s are kept: %s", redact(self.root), problem)
        for old in (others or [])[: -(self.keep - 1) or None]:
            _try_to_remove(fs, fsspec.core.url_to_fs(old)[1])


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What an action returns, and why it failed: all ranks must hear of it before one raises."""
    try:
        return action(), None
    except Exception as error:
        log.debug("a checkpoint can't be written", exc_info=True)
        return None, reason(error)


def _remove(fs: Any, folder: str) -> None:
    fs.invalidate_cache()
    if fs.exists(join(folder, STATE)):
        fs.rm_file(join(folder, STATE))  # first, so that a half removed folder does not count as complete
    try:
        fs.rm(folder, recursive=True)
    except FileNotFoundError:
        pass  # an object store has no folders, and nothing else was in it


def _try_to_remove(fs: Any, folder: str) -> None:
    _, problem = _attempt(lambda: _remove(fs, folder))
    if problem is not None:
        log.warning("%s can't be removed: %s", redact(folder), problem)


def _copies(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write_files(folder: str, files: Files) -> dict[str, File]:
    """This rank's files."""
    fs, path = fsspec.core.url_to_fs(folder)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(path, exist_ok=True)  # rank 0 has made it, on another node perhaps
    result = {}
    for name, (tensors, rows) in files.items():
        stamp = tensorfile.write(join(folder, name), tensors, rows)
        result[name] = File(stamp.bytes, stamp.crc32, len(tensors["ids"]) if name == scenes_name(rank()) else None)
    return result


def publish(folder: str, state: dict[str, Any], config: str, files: dict[str, File]) -> None:
    """On rank 0: make a checkpoint of the files that all ranks have written."""
    fs, path = fsspec.core.url_to_fs(folder)
    deadline = time.monotonic() + PATIENCE
    while lost := _not_there(fs, path, files):
        if time.monotonic() > deadline:
            raise ValueError(f"{lost} is not there as it was written, and all nodes must share the folder")
        time.sleep(min(1.0, PATIENCE))
    text = config.encode()
    put(fs, join(path, CONFIG), text)
    sync_folder(fs, path)
    listed = {**files, CONFIG: File(len(text), zlib.crc32(text))}
    put(fs, join(path, STATE), dump_state(state, {name: asdict(file) for name, file in sorted(listed.items())}))
    sync_folder(fs, path)


def _not_there(fs: Any, folder: str, files: dict[str, File]) -> str | None:
    """A file that this process does not see as it was written, if there is one."""
    fs.invalidate_cache()
    sizes = {str(item["name"]).rsplit("/", 1)[-1]: item["size"] for item in fs.ls(folder, detail=True)}
    return next((name for name, file in files.items() if sizes.get(name) != file.bytes), None)


def put(fs: Any, path: str, data: bytes) -> None:
    """Write a small file, all of it or nothing."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with open(path + ".part", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def sync_folder(fs: Any, path: str) -> None:
    """Make sure that the names in a local folder are on the disk."""
    if isinstance(fs, LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
