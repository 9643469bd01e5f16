# SPDX-License-Identifier: Apache-2.0
"""Reading a file from its beginning to its end, in a folder or an object store.

Failures that may pass (server errors, timeouts, broken connections, answers of the wrong length) are tried again at the
same byte, so nothing is lost or doubled. Attempts and their time are bounded by ``LIMITS``. s3fs and botocore retry
some of these themselves, which is part of one attempt here; the HTTP client never does.
"""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from igae.errors import redact
from igae.storage.paths import LIMITS, Limits, Missing, StoreError, file_system, own_file, reason, split

MAX_SMALL = 1 << 20
"""Bytes of a small JSON file: most of them have some kB."""
MAX_LISTS, MAX_VALUES = 4_000_000, 24_000_000
"""Of a JSON file: its lists and maps, for each of which a parser takes up to 800 bytes, and its values. A manifest of a
million scenes has half of them."""
T = TypeVar("T")
log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # ranks that failed together must not come back together


class _WrongLength(OSError):
    pass


def of_length(number: int, data: bytes) -> bytes:
    """The answer to a request for so many bytes; an error that may pass where others came."""
    if len(data) != number:
        hint = ": does the server support range requests?" if len(data) > number else ""
        raise _WrongLength(f"{len(data)} bytes came instead of {number}{hint}")
    return data


class File:
    """A file that is read from its beginning to its end, one block ahead.

    Args:
        url: local path or fsspec URL.
        what: stands for the file in messages.
        size: its size in bytes, where the store knows none (some HTTP servers).
        digest: gets all bytes that are read or skipped, in blocks that may run ahead; all of them at the end.

    Attributes:
        size: as the store says, or the argument.

    Raises:
        Missing, StoreError: now or while reading. Missing files and refused access are not tried again.
    """

    def __init__(self, url: str, what: str, size: int | None = None, digest: Any = None) -> None:
        self.what = what
        self._digest = digest
        self._handle: BinaryIO | None = None
        self._fs, self._path = file_system(url, f"{what} cannot be read")
        self._hub = "hf" in self._fs.protocol
        self._local = isinstance(self._fs, LocalFileSystem)
        self.rewind()
        found = retry(self._find_size, what)
        found = size if found is None else found
        if found is None:
            raise StoreError(f"{what} cannot be read: the store does not say its size")
        self.size: int = found

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    @property
    def position(self) -> int:
        """Byte that is read next."""
        return self._start + self._at

    def read(self, number: int) -> bytes:
        """The next bytes: `number`, or what is left of the file."""
        parts = []
        while number and self.position < self.size:
            if self._at == len(self._block):
                self._load()
            parts.append(self._block[self._at : self._at + number])
            self._at += len(parts[-1])
            number -= len(parts[-1])
        return b"".join(parts)

    def skip(self, number: int) -> None:
        """Pass over the next bytes."""
        end = min(self.position + number, self.size)
        while self._start + len(self._block) < end:
            self._at = len(self._block)
            self._load()
        self._at = end - self._start

    def begin(self) -> None:
        """Fetch the first block before it is asked for."""
        if not self._block and self.size:
            self._load()

    def rewind(self) -> None:
        """Go back to the beginning."""
        self._block, self._start, self._at = b"", 0, 0

    def _load(self) -> None:
        start = self.position
        end = min(start + (LIMITS.local_block if self._local else LIMITS.remote_block), self.size)
        self._block = retry(lambda limit: self._fetch(start, end, limit), self.what)
        self._start, self._at = start, 0
        if self._digest is not None:
            self._digest.update(self._block)

    def _fetch(self, start: int, end: int, limit: float) -> bytes:
        if self._local:
            # One handle for the whole file: one that is replaced meanwhile is read to its end as it was.
            if self._handle is None:
                self._handle = open(self._path, "rb", buffering=0)
            data = os.pread(self._handle.fileno(), end - start, start)
        else:
            # The hub's client reads 5 MB more than it is asked for, unless it is told not to.
            options = {"cache_type": "none", "size": self.size} if self._hub else {}
            data = ask(self._fs, limit, "cat_file", self._path, start=start, end=end, **options)
        return of_length(end - start, data)

    def _find_size(self, limit: float) -> Any:
        # A listing may be older than the file. The hub's client lists the whole folder for each size, so its listing is
        # used as long as the file is in it.
        if self._hub:
            try:
                return ask(self._fs, limit, "info", self._path)["size"]
            except FileNotFoundError:
                pass
        self._fs.invalidate_cache(self._fs._parent(self._path))
        return ask(self._fs, limit, "info", self._path)["size"]


def ask(fs: Any, limit: float, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of a file system returns, within so many seconds where it can be interrupted."""
    if isinstance(fs, AsyncFileSystem):
        return sync(fs.loop, getattr(fs, "_" + method), *arguments, timeout=limit, **options)
    return getattr(fs, method)(*arguments, **options)


def read_whole(url: str, what: str, limit: int) -> bytes:
    """Read a file of at most `limit` bytes; raises as `File` does. JSON has a bounded number of values, too."""
    with File(url, what) as file:
        if file.size > limit:
            raise StoreError(f"{what} has {file.size} bytes, more than the {limit} that it may have")
        data = file.read(file.size)
    if split(url)[1].endswith(".json"):
        try:
            _check_json(data)
        except ValueError as error:
            raise StoreError(f"{what} is damaged: {error}") from None
    return data


def read_own(folder: str, name: str, most: int = MAX_SMALL) -> bytes | None:
    """A file of at most ``most`` bytes in a folder that may be somebody else's (see :func:`own_file`); None where there
    is none. StoreError where it can't be read."""
    try:
        url = own_file(folder, name)
        return read_whole(url, redact(url), most)
    except Missing:
        return None


def _check_json(data: bytes) -> None:
    """Raises ValueError where parsing would take any amount of memory."""
    lists, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    # Of large files also in relation to their bytes: "[]," takes three, and a scene of a manifest a hundred.
    if lists > min(MAX_LISTS, 200_000 + len(data) // 64) or values > min(MAX_VALUES, 2_000_000 + len(data) // 8):
        raise ValueError(f"it has {lists} lists and maps and {values} values, more than a file of its size may have")


def parse_json(data: bytes, most: int = MAX_SMALL) -> Any:
    """What JSON of at most ``most`` bytes says. ValueError where it is none, or not of a size that igae writes."""
    if len(data) > most:
        raise ValueError(f"it has {len(data)} bytes, more than the {most} that it may have")
    try:
        _check_json(data)
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def retry(attempt: Callable[[float], T], what: str, clock: Any = time, limits: Limits = LIMITS) -> T:
    """Call `attempt`, which gets the seconds that it may take, until it succeeds or `limits` are reached.

    Args:
        what: stands for the file in messages.
        clock: has `monotonic` and `sleep`.

    Raises:
        Missing, StoreError: no further attempt is made.
    """
    end = clock.monotonic() + limits.total_seconds
    number = 0
    while True:
        number += 1
        try:
            return attempt(max(0.1, min(limits.attempt_seconds, end - clock.monotonic())))
        except Exception as error:
            # Nothing is raised "from" these errors: they are printed with it, and have URLs in their texts.
            cause = _underlying(error)
            why = str(cause) if isinstance(cause, _WrongLength) else reason(cause, with_class=True)
            if isinstance(cause, FileNotFoundError | NotADirectoryError):
                raise Missing(f"{what} is missing") from None
            if not _may_pass(cause):
                raise StoreError(f"{what} cannot be read: {why}") from None
        wait = limits.first_wait * 2 ** (number - 1) * _jitter.uniform(0.75, 1.25)
        if number >= limits.attempts or clock.monotonic() + wait >= end:
            raise StoreError(f"{what} cannot be read, it was tried {number} times: {why}")
        if number <= limits.lines:
            log.warning("%s: try %d of %d failed (%s), next in %.1f s", what, number, limits.attempts, why, wait)
        clock.sleep(wait)


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
    found: list[Any] = []
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        botocore = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        found += [botocore.get("HTTPStatusCode"), getattr(response, "status_code", None)]  # or requests and httpx
    # Not of the cause: there aiohttp has 400 for what it makes of a body that is too short.
    found.append(getattr(error, "status", None) or getattr(error, "code", None))
    return next((status for status in found if status and isinstance(status, int)), None)


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return False
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in (408, 425, 429)
    if isinstance(error, OSError | EOFError | asyncio.TimeoutError):
        return True
    # Clients have classes of their own for broken connections. What Python itself has is a mistake somewhere.
    name = type(error).__name__.lower()
    return type(error).__module__ != "builtins" and not any(word in name for word in ("credential", "validation"))
