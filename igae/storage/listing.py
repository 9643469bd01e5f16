# SPDX-License-Identifier: Apache-2.0
"""The files of folders and object stores, and what tells that one of them was changed."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from igae.storage.paths import LIMITS, file_system

TELLING = re.compile(r"etag|md5|sha|crc|digest|sum$|generation|version|modif|mtime|updated|blob_id", re.IGNORECASE)
"""What stores call a property of a file that is another one when its content is."""

NO_FILE = "is a pipe, a socket or a device: remove it"


class FileInfo(NamedTuple):
    """Bytes of a file, and a text that is another one when the file was changed, also in place."""

    size: int
    version: str


def list_files(url: str, wanted: Callable[[str], bool]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All files below a folder, and below the folders that links in it lead to; links in circles end.

    Args:
        wanted: whether a file counts, by its path.

    Returns:
        (sorted paths in the file system -> what the store tells of them, sentences about what can't be followed).
    """
    fs, root = file_system(url)
    problems: list[str] = []
    if isinstance(fs, LocalFileSystem):
        return {path: {} for path in sorted(filter(wanted, _walk(root, problems)))}, problems
    fs.invalidate_cache(root)
    return {path: info for path, info in sorted(fs.find(root, detail=True).items()) if wanted(path)}, problems


def find_files(url: str, wanted: Callable[[str], bool]) -> tuple[dict[str, FileInfo], list[str]]:
    """As :func:`list_files`, with paths relative to the folder, and with what tells whether a file was changed."""
    fs, root = file_system(url)
    found, problems = list_files(url, wanted)
    if isinstance(fs, LocalFileSystem):
        infos = [_local(path) or FileInfo(0, "") for path in found]
    else:
        with ThreadPoolExecutor(LIMITS.requests) as pool:
            infos = list(pool.map(lambda path: _remote(fs, path, found[path]), found))
    prefix = root.rstrip("/") + "/"
    return {path.removeprefix(prefix): info for path, info in zip(found, infos, strict=True)}, problems


def look_up(url: str, names: Collection[str]) -> dict[str, FileInfo]:
    """Those of some files in a folder that are there; links are followed."""
    fs, root = file_system(url)
    if isinstance(fs, LocalFileSystem):
        found = {name: _local(os.path.join(root, name)) for name in names}
        return {name: info for name, info in found.items() if info is not None}
    paths = {f"{root.rstrip('/')}/{name}" for name in names}
    return find_files(url, paths.__contains__)[0]


def read_input(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole file of others; OSError for a pipe or a device of this machine, which may never end."""
    if not isinstance(fs, LocalFileSystem):
        return bytes(fs.cat_file(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, NO_FILE, path)
        return file.read()


def _walk(root: str, problems: list[str]) -> Iterator[str]:
    """Paths of all files; `problems` gets what can't be followed."""

    def refuse(error: OSError) -> None:
        problems.append(f"the folder {error.filename} can't be read ({error.strerror}): allow it, or remove the folder")

    above = {root: frozenset([_identity(root)])}
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        seen = above.pop(folder)
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if (identity := _identity(path)) in seen:
                folders.remove(name)
            else:
                above[path] = seen | {identity}
        for path in (os.path.join(folder, name) for name in files):
            if os.path.islink(path) and not os.path.exists(path):
                problems.append(f"{path} is a link to {os.readlink(path)}, which can't be followed: mend or remove it")
            elif os.path.exists(path) and not os.path.isfile(path):
                problems.append(f"{path} {NO_FILE}")
            else:
                yield path


def _identity(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def _local(path: str) -> FileInfo | None:
    """A file of this machine; None where there is none. One that may not be looked at is told when it is read."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return FileInfo(0, "")
    if not stat.S_ISREG(found.st_mode):
        return None  # a pipe would be waited for
    return FileInfo(found.st_size, f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}")


def _remote(fs: fsspec.AbstractFileSystem, path: str, listed: dict[str, Any]) -> FileInfo:
    """A file of a store; its version is from the listing, or else from its own properties, or else from its content."""
    size = int(listed["size"] or 0)
    answers: list[Callable[[], dict[str, Any]]] = [
        lambda: listed,
        lambda: fs.info(path),
        lambda: {"mtime": fs.modified(path)},
        lambda: {"sha256": hashlib.sha256(fs.cat_file(path)).hexdigest()},
    ]
    for answer in answers:
        with suppress(Exception):  # of the store; a file that can't be read is told when it is packed
            told = {key: value for key, value in answer().items() if value and TELLING.search(key)}
            if told:
                return FileInfo(size, hashlib.sha256(repr((size, sorted(told.items()))).encode()).hexdigest())
    return FileInfo(size, "")
