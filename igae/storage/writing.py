# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file has its name only when all of it is there and on the disk."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from igae.errors import redact
from igae.storage.paths import file_system, reason

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEFTOVER = re.compile(r".+\.[0-9a-f]{12}\.partial")
STALE = 3600.0
"""Seconds after which, where a disk knows no locks, a file that was not written to is taken for what a kill left."""


@contextlib.contextmanager
def writes_to(where: str | Path) -> Iterator[None]:
    """Say of an error of the system which file or folder can't be written, and how full its disk is. Most such errors
    name no file, and one of a full disk never names the disk. The innermost block says it."""
    try:
        yield
    except OSError as error:
        other = error.filename is not None and not LEFTOVER.fullmatch(Path(error.filename).name)
        if error.errno is None or (other and error.errno not in FULL):
            raise
        raise OSError(f"{redact(str(where))} can't be written: {error.strerror}{_space(str(where))}") from error


def _space(where: str) -> str:
    """What is left on the disk of a path; nothing of one that can't be asked, or of a URL."""
    place = Path(where).absolute()
    with contextlib.suppress(OSError):
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / 1e6
        while not place.is_mount():
            place = place.parent
        return "" if "://" in where else f" ({free:.1f} MB are left on the disk at {place})"
    return ""


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to. It gets the name ``path``, with its bytes on the disk, if the block
    succeeds; otherwise it is removed, and what was at ``path`` stays."""
    staging = _staging(path)
    try:
        with writes_to(path), _locked(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)):
            yield staging
            sync(staging)
            os.replace(staging, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise


@contextlib.contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """An empty folder for what libraries write; its files then go to ``folder`` as those of :func:`staged` do.

    Raises:
        OSError: they can't be written, whatever class the library has for that.
    """
    temporary = _staging(folder)
    try:
        with writes_to(folder):
            make_folder(str(folder))
            temporary.mkdir()
            with _locked(os.open(temporary, os.O_RDONLY)):
                try:
                    yield temporary
                except Exception as error:
                    raise error if isinstance(error, OSError) else OSError(errno.EIO, reason(error)) from error
                for file in sorted(temporary.iterdir()):
                    with staged(folder / file.name) as staging:
                        os.replace(file, staging)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _staging(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Keep a file or folder locked, which says that its process lives, and close it."""
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(descriptor)


def remove_leftovers(folder: Path, below: bool = False) -> None:
    """Remove what :func:`staged` and :func:`staged_files` of processes that were killed have left in a folder. What a
    living process writes stays, and what can't be removed.

    Args:
        below: look into the folders below it too.
    """
    for place, folders, files in os.walk(folder):
        for name in filter(LEFTOVER.fullmatch, (*folders, *files)):
            with contextlib.suppress(OSError):
                _remove_leftover(Path(place, name))
        folders[:] = [name for name in folders if below and not LEFTOVER.fullmatch(name)]


def _remove_leftover(path: Path) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    # Locks of network disks are for those who may write; O_NONBLOCK: a pipe would be waited for.
    descriptor = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a disk without locks
            if time.time() - os.fstat(descriptor).st_mtime < STALE:
                return
        shutil.rmtree(path) if is_folder else path.unlink()
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_file(str(path), text.encode())


def write_file(url: str, data: bytes) -> None:
    """Write a small file at a path or URL: all of it or nothing, and on the disk when this returns."""
    fs, path = file_system(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with staged(Path(path)) as staging:
        staging.write_bytes(data)


def check_folder(folder: str) -> None:
    """Refuse a folder of this machine that can't be made or written to, before the work for what goes there.

    Raises:
        ValueError: the sentence names what is in the way.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{folder} can't be a folder, because {place} is a file: choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} can't be written, because {place} may not be: allow it, or choose another")


def make_folder(url: str) -> None:
    """Make a folder and those above it, where they are missing, with their names on the disk."""
    fs, path = file_system(url)
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(path, exist_ok=True)
        return
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    Path(path).mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync_folder(url: str) -> None:
    """Make sure that the names in a folder are on the disk; an object store sees to that itself."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        sync(Path(path))


def sync(path: Path) -> None:
    """Make sure that a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks' folders
            raise
    finally:
        os.close(descriptor)
