# SPDX-License-Identifier: Apache-2.0
"""`igae kernels`: compile the CUDA kernels ahead of time, also without a GPU."""

from igae.errors import command
from igae.models import KERNELS as LAYERS
from igae.rendering import build_main
from igae.scenes import KERNELS as ROWS


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    build_main(argv, [*LAYERS, *ROWS])
    return 0
