# SPDX-License-Identifier: Apache-2.0
"""`igae render`: what data_tools/render_objects.py does."""

from igae.cli.tools import run_tool


def main(argv: list[str] | None = None) -> int:
    """Returns the tool's exit code."""
    return run_tool("render_objects", argv)
