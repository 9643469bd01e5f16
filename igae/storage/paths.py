# SPDX-License-Identifier: Apache-2.0
"""Paths and URLs, the file systems they are on, limits of transfers, and errors in one sentence without credentials."""

import asyncio
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
from fsspec.implementations.local import LocalFileSystem

from igae.errors import redact

CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs"}
"""Packages that fsspec needs for some schemes."""


@dataclass
class Limits:
    """Bytes of a transfer and seconds of an attempt. :data:`LIMITS` are those in force."""

    attempts: int = 6
    first_wait: float = 1.0  # before the second attempt; doubles with each further one
    attempt_seconds: float = 60.0  # asynchronous file systems (S3, HTTP, GCS, Azure) only: others can't be interrupted
    total_seconds: float = 120.0
    lines: int = 6  # that tell of attempts that failed
    visible_seconds: float = 60.0  # until other nodes see a file: network file systems cache what does not exist
    claim_seconds: float = 1.0  # from writing to a folder that it is taken to reading who has it
    local_block: int = 1 << 20
    remote_block: int = 8 << 20  # object stores answer in tens of milliseconds: few large requests
    chunk: int = 64 << 20  # of a tensor that is being copied from its device to a file
    gap: int = 256 << 10  # between two rows that one request reads: a request takes as long as these bytes
    span: int = 16 << 20  # of one request for rows
    requests: int = 8  # at the same time


LIMITS = Limits()


class StoreError(ValueError):
    """A file can't be read: one sentence that names it, without credentials."""


class Missing(StoreError):
    """There is no such file."""


class Damaged(Exception):
    """A file does not hold what was written; :func:`named_errors` names it."""


def join(root: str, *parts: str) -> str:
    """Join a path or URL and names below it; the query of an HTTP URL, and the URL of an archive (zip://a::b.zip), stay
    at the end."""
    path, end = _parts(root)
    return "/".join([path[:-1] if path.endswith("://") else path.rstrip("/"), *parts]) + end


def split(url: str) -> tuple[str, str]:
    """The folder of a path or URL, and the name in it: what :func:`join` joins."""
    path, end = _parts(url)
    above, _, name = path.rstrip("/").rpartition("/")
    return above + ("/" if above.endswith(":/") else "") + end, name


def _parts(url: str) -> tuple[str, str]:
    """The path, and what comes after it."""
    if url.startswith(("http://", "https://")):
        path, mark, query = url.partition("?")
        return path, mark + query
    links = url.split("::")  # of a chain such as simplecache::zip://path::s3://...: the path is in the first with ://
    first = next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
    return "::".join(links[: first + 1]), "".join(f"::{link}" for link in links[first + 1 :])


def is_url(path: str) -> bool:
    """Whether reading it may ask another machine. Where a file of somebody else's names such a place, it is not asked
    unless the command names it too: the request would tell that machine who reads the file, and where."""
    return "://" in path or "::" in path


def own_file(folder: str, name: str) -> str:
    """The path or URL of a file in a folder that may be somebody else's: a run, a checkpoint or an export.

    Raises:
        StoreError: it is a link that leads out of the folder, or no file (a pipe would be waited for).
    """
    url = join(folder, name)
    fs, path = file_system(url, f"{redact(url)} cannot be read")
    if isinstance(fs, LocalFileSystem):
        real, root = os.path.realpath(path), os.path.realpath(path.removesuffix(name))
        cache, is_cached, _ = root.rpartition("/snapshots/")  # of the hub, where all files are links into blobs
        if not real.startswith((f"{root}/", f"{cache}/blobs/") if is_cached else f"{root}/"):
            raise StoreError(f"{redact(url)} is a link that leads out of its folder: put the file in its place")
        if os.path.exists(real) and not os.path.isfile(real):
            raise StoreError(f"{redact(url)} is no file: remove it, or put the file in its place")
    return url


def in_archive(url: str) -> str:
    """The URL of what is in a zip file; other paths and URLs as they are."""
    return f"zip://::{url}" if url.lower().endswith(".zip") and "::" not in url else url


def base_name(url: str) -> str:
    """The last name of a path or URL; of all that is in a zip file that of the file, without its extension."""
    name = file_system(url)[1].rstrip("/").rpartition("/")[2]
    return name or split(url.rpartition("::")[2])[1].rpartition(".")[0]


def file_system(url: str, failure: str | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Args:
        failure: begins the error's sentence; "URL cannot be used" if left out.

    Raises:
        StoreError: there is none, its client is not installed, or does not take these options.
    """
    try:
        if url.startswith("zip://"):
            inside, _, archive = url.partition("::")
            fs, path = fsspec.core.url_to_fs(archive)
            fs = _zip_file(archive, fs.ukey(path))
            return fs, fs._strip_protocol(inside)
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as error:
        client = CLIENTS.get(url.split("://")[0].split("::")[-1])
        hint = f"; pip install {client}" if client and isinstance(error, ImportError) else ""
        sentence = failure or f"{redact(url)} cannot be used"
        raise StoreError(f"{sentence}: {reason(error, with_class=True)}{hint}") from None
    return fs, path


@functools.lru_cache(maxsize=2)  # fsspec would read the archive's directory again for every file in it
def _zip_file(url: str, version: str) -> fsspec.AbstractFileSystem:
    """What is in a zip file; `version` changes with the file."""
    return fsspec.core.url_to_fs(f"zip://::{url}")[0]


@contextmanager
def named_errors(url: str, how: str = "read") -> Iterator[None]:
    """Turn every error into a ValueError that names a file: one sentence, without credentials.

    Args:
        how: what can't be done with it.
    """
    where = redact(url)
    try:
        yield
    except StoreError as error:  # has a name in it
        raise ValueError(str(error)) from None
    except Damaged as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    except FileNotFoundError as error:
        raise ValueError(f"{where} is missing") from error
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{where} can't be {how}: {reason(error)}") from error


def reason(error: Exception, with_class: bool = False) -> str:
    """Why something failed, in one line without credentials.

    Args:
        with_class: always begin with the error's class; else only where the text says little without it.
    """
    text = next(iter(redact(str(error)[:10_000]).strip().splitlines()), "")  # a server's answer may have any length
    if not text and isinstance(error, asyncio.TimeoutError | TimeoutError):
        text = "no answer in time"
    if not with_class and isinstance(error, OSError) and error.strerror:
        return redact(error.strerror + (f": {error.filename}" if error.filename else ""))
    text = text[:300] + ("..." if len(text) > 300 else "")
    if text and not with_class and isinstance(error, OSError | ValueError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
