# SPDX-License-Identifier: Apache-2.0
"""Reading bytes from folders and object stores. Manifests and shards are read here and nowhere else.

What may pass (server errors, timeouts, connections that break, answers of the wrong length) is tried again at the same
byte, so nothing is lost or doubled. Tries and their time are bounded. s3fs and botocore try again by themselves for
some of these, which is part of one try here; the HTTP client never does.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from igae.errors import redact

log = logging.getLogger(__name__)

CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs"}
"""Packages that fsspec needs for some schemes."""
ATTEMPTS = 6
FIRST_WAIT = 1.0
"""Seconds before the second try; they double with each further one."""
ATTEMPT_SECONDS = 60.0
"""Longest time of a try. Only asynchronous file systems (S3, HTTP, GCS, Azure) can be told to give up; others have
timeouts of their own, or none."""
TOTAL_SECONDS = 120.0
LOCAL_BLOCK = 1 << 20
REMOTE_BLOCK = 8 << 20
"""Bytes of a request. Object stores answer one in tens of milliseconds: few large ones."""

T = TypeVar("T")
_jitter = random.SystemRandom()  # ranks that failed together must not come back together


class StoreError(Exception):
    """A file cannot be read: one sentence, without credentials."""


class Missing(StoreError):
    """There is no such file."""


class _WrongLength(OSError):
    pass


class File:
    """A file that is read from its beginning to its end.

    Args:
        url: local path or fsspec URL.
        what: stands for the file in messages.
        size: its size in bytes, where the store knows none (some HTTP servers).
        digest: gets all bytes that are read or skipped, in blocks that may run ahead; all of them at the end.

    Attributes:
        size: as the store says, or the argument.
        position: byte that is read next.

    Raises:
        Missing, StoreError: now or while reading. Missing files and refused access are not tried again.
    """

    def __init__(self, url: str, what: str, size: int | None = None, digest: Any = None) -> None:
        self.what = what
        self._digest = digest
        self._handle: BinaryIO | None = None
        self._block, self._start, self._at = b"", 0, 0
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except Exception as error:  # a client that is not installed, or does not take these options
            raise StoreError(f"{what} cannot be read: {_reason(error)}{_todo(url, error)}") from None
        self._hub = "hf" in self._fs.protocol
        self._step = LOCAL_BLOCK if isinstance(self._fs, LocalFileSystem) else REMOTE_BLOCK
        found = self._try(self._find_size)
        if found is None:
            found = size
        if found is None:
            raise StoreError(f"{what} cannot be read: the store does not say its size")
        self.size = found

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    @property
    def position(self) -> int:
        return self._start + self._at

    def read(self, number: int) -> bytes:
        """The next bytes: `number`, or what is left of the file."""
        data = self._block[self._at : self._at + number]
        self._at += len(data)
        if len(data) == number:
            return data
        parts, missing = [data], number - len(data)
        while missing and self.position < self.size:
            self._load()
            parts.append(self._block[:missing])
            self._at = len(parts[-1])
            missing -= self._at
        return b"".join(parts)

    def skip(self, number: int) -> None:
        """Passes over the next bytes."""
        end = min(self.position + number, self.size)
        while self._start + len(self._block) < end:
            self._at = len(self._block)
            self._load()
        self._at = end - self._start

    def begin(self) -> None:
        """Fetches the first block, before it is asked for."""
        if not self._block and self.size:
            self._load()

    def rewind(self) -> None:
        """Goes back to the beginning."""
        self._block, self._start, self._at = b"", 0, 0

    def _load(self) -> None:
        start = self.position
        end = min(start + self._step, self.size)
        self._block, self._at = self._try(lambda limit: self._fetch(start, end, limit)), 0
        self._start = start
        if self._digest is not None:
            self._digest.update(self._block)

    def _fetch(self, start: int, end: int, limit: float) -> bytes:
        if isinstance(self._fs, LocalFileSystem):
            # One handle for the whole file: one that is replaced meanwhile is read to its end as it was.
            if self._handle is None:
                self._handle = open(self._path, "rb", buffering=0)
            data = os.pread(self._handle.fileno(), end - start, start)
        else:
            # The hub's client reads 5 MB more than it is asked for, unless it is told not to.
            options = {"cache_type": "none", "size": self.size} if self._hub else {}
            data = self._call(limit, "cat_file", start=start, end=end, **options)
        if len(data) != end - start:
            hint = ": does the server support range requests?" if len(data) > end - start else ""
            raise _WrongLength(f"{len(data)} bytes came instead of {end - start}{hint}")
        return data

    def _find_size(self, limit: float) -> int | None:
        try:
            if not self._hub:
                self._fs.invalidate_cache(self._fs._parent(self._path))  # a listing may be older than the file
            size = self._call(limit, "info")["size"]
        except FileNotFoundError:
            if not self._hub:
                raise
            # The hub's client lists the whole folder to find a size: once is enough, if the file is in the list.
            self._fs.invalidate_cache(self._fs._parent(self._path))
            size = self._call(limit, "info")["size"]
        return None if size is None else int(size)

    def _call(self, limit: float, method: str, **options: Any) -> Any:
        if isinstance(self._fs, AsyncFileSystem):
            return sync(self._fs.loop, getattr(self._fs, "_" + method), self._path, timeout=limit, **options)
        return getattr(self._fs, method)(self._path, **options)

    def _try(self, attempt: Callable[[float], T]) -> T:
        """Calls `attempt`, which gets the seconds that it may take, until it succeeds."""
        end = time.monotonic() + TOTAL_SECONDS
        number = 0
        while True:
            number += 1
            try:
                return attempt(max(0.1, min(ATTEMPT_SECONDS, end - time.monotonic())))
            except Exception as error:
                # Nothing is raised "from" these errors: they are printed with it, and have URLs in their texts.
                error = _underlying(error)
                reason = _reason(error)
                if isinstance(error, FileNotFoundError | NotADirectoryError):
                    raise Missing(f"{self.what} is missing") from None
                if not _may_pass(error):
                    raise StoreError(f"{self.what} cannot be read: {reason}") from None
            wait = FIRST_WAIT * 2 ** (number - 1) * _jitter.uniform(0.75, 1.25)
            if number >= ATTEMPTS or time.monotonic() + wait >= end:
                raise StoreError(f"{self.what} cannot be read, it was tried {number} times: {reason}")
            log.warning("%s: try %d of %d failed (%s), next in %.1f s", self.what, number, ATTEMPTS, reason, wait)
            time.sleep(wait)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        ValueError: there is none, its client is not installed, or does not take these options.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as error:
        raise ValueError(f"{redact(url)} cannot be used: {_reason(error)}{_todo(url, error)}") from None
    return fs, path


def _todo(url: str, error: Exception) -> str:
    client = CLIENTS.get(url.split("://")[0].split("::")[-1])
    return f"; pip install {client}" if client and isinstance(error, ImportError) else ""


def read_whole(url: str, what: str, limit: int) -> bytes:
    """Reads a file of at most `limit` bytes; raises as `File` does."""
    with File(url, what) as file:
        if file.size > limit:
            raise StoreError(f"{what} has {file.size} bytes, more than the {limit} that it may have")
        return file.read(file.size)


def _underlying(error: Exception) -> Exception:
    """fsspec's HTTP client calls every failure of a request for the size a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        status = _status(cause)
        if status != 404 and (status or _may_pass(cause)):
            return cause
    return error


def _status(error: Exception) -> int | None:
    """HTTP status that an error of aiohttp (`status`), gcsfs (`code`), a model hub or, as its cause, s3fs tells."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)  # of botocore
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
        if isinstance(status := getattr(response, "status_code", None), int):  # of requests and httpx
            return status
    # Not of the cause: there aiohttp has 400 for what it makes of a body that is too short.
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _may_pass(error: Exception) -> bool:
    """Whether it may be otherwise the next time."""
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return True
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return False
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in (408, 425, 429)
    if isinstance(error, OSError | EOFError):
        return True
    # Clients have classes of their own for broken connections. What Python itself has is a mistake somewhere.
    name = type(error).__name__.lower()
    return type(error).__module__ != "builtins" and not any(word in name for word in ("credential", "validation"))


def _reason(error: Exception) -> str:
    if isinstance(error, _WrongLength):
        return str(error)
    text = " ".join(redact(str(error)[:10_000]).split())  # what a server says may have any length
    if not text and isinstance(error, asyncio.TimeoutError | TimeoutError):
        text = "no answer in time"
    if len(text) > 300:
        text = text[:300] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
