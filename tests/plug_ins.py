# SPDX-License-Identifier: Apache-2.0
"""Packages with entry points, installed for a while."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igae import config
from igae.data import formats


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """What is installed in a folder is there, and afterwards it is not."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        forget()
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            places = getattr(sys.modules[name], "__path__", [getattr(sys.modules[name], "__file__", "")])
            if any(str(place).startswith(str(folder)) for place in places):
                del sys.modules[name]
        forget()


def forget() -> None:
    """A process looks once."""
    importlib.invalidate_caches()
    config.plug_in.cache_clear()
    formats.cache_clear()


def registered(folder: Path, package: str, group: str, **points: str) -> None:
    """What an installed package leaves of its entry points."""
    info = folder / f"{package}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[igae.{group}]", *lines, ""]))
