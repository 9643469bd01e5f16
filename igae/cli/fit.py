# SPDX-License-Identifier: Apache-2.0
"""Fit new scenes to a trained model: ``igae fit model=outputs/RUN data.root=SHARDS [key=value ...]``."""

from igae.cli import train
from igae.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of `igae train`: this is the same command with another default recipe."""
    train.run(train.parser(default="fit.yaml", prog="igae fit").parse_intermixed_args(argv))
    return 0
