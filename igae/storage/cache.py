# SPDX-License-Identifier: Apache-2.0
"""Copies of files on a local disk, so that a store is asked for each only once.

A copy is a whole file, named by its checksum: what is packed anew has another name, and runs share what they have in
common. It gets its name when all of it is there and has that checksum, so what a kill leaves behind is never taken for
a copy. Processes of one machine wait for each other's downloads. Where the disk knows no locks (some network disks)
they may download the same, each into a file of its own; the last to end gives the name.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from igae.storage.paths import StoreError, join
from igae.storage.reading import File
from igae.storage.writing import remove_leftovers, staged

BLOCK = 8 << 20


class Original(Protocol):
    """What is known of a file in the store."""

    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Cache:
    """Copies of the files of `root` in the folder `folder`, which is made.

    Raises:
        ValueError: `folder` is a URL, or cannot be made or written.
    """

    def __init__(self, folder: str, root: str) -> None:
        if "://" in folder:
            raise ValueError(f"data.cache {folder} has to be a folder of this machine")
        self.root = root
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ValueError(f"data.cache {folder} cannot be used: {error.strerror}") from None
        remove_leftovers(self.folder)

    def path(self, file: Original) -> Path:
        """Where the copy of a file is, or will be."""
        return self.folder / f"{file.sha256}.tar"

    def has(self, file: Original) -> bool:
        """Whether there is one, of the right size."""
        try:
            return self.path(file).stat().st_size == file.bytes
        except OSError:
            return False

    def check_space(self, files: Iterable[Original]) -> None:
        """Refuse (ValueError) files that the disk has no room for."""
        missing = sum(file.bytes for file in files if not self.has(file))
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise ValueError(
                f"data.cache {self.folder} has {free / 1e9:.1f} GB left and {missing / 1e9:.1f} GB of shards are to be "
                "kept there: make room, choose another folder, or leave data.cache out"
            )

    def get(self, file: Original, what: str) -> str:
        """The path of the copy; downloads the file if there is none. `what` stands for the file in messages.

        Raises:
            StoreError: the file cannot be read, has another size or checksum than the manifest says, or there is no
                room for it.
        """
        path = self.path(file)
        if not self.has(file):
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError, NotImplementedError):  # a disk without locks
                    stack.enter_context(FileLock(f"{path}.lock"))
                if not self.has(file):
                    self._download(file, what, path)
                with contextlib.suppress(OSError):  # whoever waits for this lock, or makes a new one, finds the copy
                    os.unlink(f"{path}.lock")
        return str(path)

    def _download(self, file: Original, what: str, path: Path) -> None:
        digest = hashlib.sha256()
        try:
            with File(join(self.root, file.name), what, file.bytes, digest) as source, staged(path) as staging:
                if source.size != file.bytes:
                    raise StoreError(f"{what} has {source.size} bytes, the manifest says {file.bytes}: copy it again")
                with open(staging, "wb") as target:
                    while data := source.read(BLOCK):
                        target.write(data)
                if digest.hexdigest() != file.sha256:
                    raise StoreError(f"{what} has another sha256 than the manifest says: copy or pack it again")
        except OSError as error:
            raise StoreError(
                f"{what} cannot be kept in data.cache {self.folder}: {error}; make room there, choose another "
                "folder, or leave data.cache out"
            ) from None
