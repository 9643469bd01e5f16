# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file has its name only when all of it is there."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from igae.storage.paths import file_system


@contextlib.contextmanager
def staged(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write a file to. It gets the name ``path`` if the block succeeds (``durable``: with its
    bytes on the disk); otherwise it is removed, and what was at ``path`` stays."""
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield staging
        if durable:
            _sync(staging)
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with staged(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_file(url: str, data: bytes) -> None:
    """Write a small file at a path or URL: all of it or nothing, and on the disk when this returns."""
    fs, path = file_system(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with staged(Path(path), durable=True) as staging:
        staging.write_bytes(data)
    sync_folder(str(Path(path).parent))


def sync_folder(url: str) -> None:
    """Make sure that the names in a folder are on the disk; an object store sees to that itself."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
