# SPDX-License-Identifier: Apache-2.0
"""The scripts of data_tools/, which come with the package."""

import importlib
import sys

from igae import config


def run_tool(name: str, argv: list[str] | None) -> int:
    """Run a script's `main` with some arguments; returns its exit code."""
    folder = str(config.shipped("data_tools"))
    if folder not in sys.path:
        sys.path.insert(0, folder)  # its neighbors, and the processes that it starts, find it there
    code: int = importlib.import_module(name).main(argv)
    return code
