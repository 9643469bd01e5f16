# SPDX-License-Identifier: Apache-2.0
"""`igae demo`: what data_tools/make_demo.py does."""

from igae.cli.tools import run_tool


def main(argv: list[str] | None = None) -> int:
    """Returns the tool's exit code."""
    return run_tool("make_demo", argv)
