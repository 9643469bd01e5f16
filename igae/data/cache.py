# SPDX-License-Identifier: Apache-2.0
"""Copies of shards on a local disk, so that a store is asked for each only once.

A copy is a whole shard, named by its checksum: what is packed anew has another name, and runs share what they have in
common. It gets its name when all of it is there and has that checksum, so what a kill leaves behind is never taken for
a shard. Processes of one machine wait for each other's downloads. Where the disk knows no locks (some network disks)
they may download the same, each into a file of its own; the last to end gives the name.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from igae.data.manifest import Shard
from igae.storage import File, StoreError, join

BLOCK = 8 << 20
STALE = 3600.0
"""Seconds after which a download that was not written to is taken for what a kill left: no try of a request takes
nearly as long."""


class Cache:
    """Copies of the shards of `root` in the folder `folder`, which is made.

    Raises:
        ValueError: `folder` is none, or cannot be made or written.
    """

    def __init__(self, folder: str, root: str) -> None:
        if "://" in folder:
            raise ValueError(f"data.cache {folder} has to be a folder of this machine")
        self.root = root
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ValueError(f"data.cache {folder} cannot be used: {error.strerror}") from None
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if time.time() - partial.stat().st_mtime > STALE:
                    partial.unlink()

    def path(self, shard: Shard) -> Path:
        """Where the copy of a shard is, or will be."""
        return self.folder / f"{shard.sha256}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether there is one, of the right size."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except OSError:
            return False

    def check_space(self, shards: Sequence[Shard]) -> None:
        """Refuses (ValueError) shards that the disk has no room for."""
        missing = sum(shard.bytes for shard in shards if not self.has(shard))
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise ValueError(
                f"data.cache {self.folder} has {free / 1e9:.1f} GB left and {missing / 1e9:.1f} GB of shards are to be "
                "kept there: make room, choose another folder, or leave data.cache out"
            )

    def get(self, shard: Shard, what: str) -> str:
        """The path of the copy; downloads the shard if there is none. `what` stands for the shard in messages.

        Raises:
            StoreError: the shard cannot be read, has another size or checksum than the manifest says, or there is no
                room for it.
        """
        path = self.path(shard)
        if not self.has(shard):
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError, NotImplementedError):  # a disk without locks
                    stack.enter_context(FileLock(f"{path}.lock"))
                if not self.has(shard):
                    self._download(shard, what, path)
                with contextlib.suppress(OSError):  # who waits for it, or makes it anew, finds the copy
                    os.unlink(f"{path}.lock")
        return str(path)

    def _download(self, shard: Shard, what: str, path: Path) -> None:
        digest = hashlib.sha256()
        partial = ""
        try:
            with File(join(self.root, shard.name), what, shard.bytes, digest) as source:
                if source.size != shard.bytes:
                    raise StoreError(f"{what} has {source.size} bytes, the manifest says {shard.bytes}: copy it again")
                handle, partial = tempfile.mkstemp(".partial", f"{shard.sha256}.", self.folder)
                with open(handle, "wb") as target:
                    while data := source.read(BLOCK):
                        target.write(data)
                    os.fchmod(handle, 0o644)  # a temporary file is its owner's alone
                    target.flush()
                    os.fsync(handle)  # the name must not outlive the content when the machine goes down
            if digest.hexdigest() != shard.sha256:
                raise StoreError(f"{what} has another sha256 than the manifest says: copy or pack it again")
            os.replace(partial, path)
        except OSError as error:
            raise StoreError(
                f"{what} cannot be kept in data.cache {self.folder}: {error.strerror}; make room there, choose another "
                "folder, or leave data.cache out"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)
