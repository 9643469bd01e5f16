# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file has its name only when all of it is there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to. It gets the name ``path`` if the block succeeds; otherwise it is
    removed, and what was at ``path`` stays."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield staging
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with staged(path) as staging:
        staging.write_text(text, encoding="utf-8")
