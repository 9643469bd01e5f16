# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file has its name only when all of it is there and on the disk."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from igae.errors import redact
from igae.storage.paths import file_system, reason

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writes_to(where: str | Path) -> Iterator[None]:
    """Say of an error of the system which file or folder can't be written, and how full its disk is. Most such errors
    name no file, and one of a full disk never names the disk. The innermost block says it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in FULL):
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
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with writes_to(path):
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
    with writes_to(folder):
        make_folder(str(folder))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial") as temporary:
            try:
                yield Path(temporary)
            except Exception as error:
                raise error if isinstance(error, OSError) else OSError(errno.EIO, reason(error)) from error
            for file in sorted(Path(temporary).iterdir()):
                with staged(folder / file.name) as staging:
                    os.replace(file, staging)


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
