# SPDX-License-Identifier: Apache-2.0
"""Train an IG-AE: ``accelerate launch train.py --config igae.yaml data.root=SHARDS [key=value ...]``."""

import argparse
import logging
import sys


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done (or stopped by SIGTERM after a checkpoint), 1 training failed, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", required=True, help="a YAML file: a path, or a name in configs/")
    parser.add_argument(
        "--stage", choices=["warmup", "joint"], help="run this stage only (default: what is still to do)"
    )
    parser.add_argument("--resume", default="auto", help="auto (default), never, or the folder of a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.joint.batch_size=8")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("igae").setLevel(logging.INFO)

    from igae import config
    from igae.recipe import Recipe
    from igae.trainer import Trainer, TrainingError

    try:
        recipe = config.load(Recipe, arguments.config, arguments.overrides)
        Trainer(recipe, arguments.resume).run(arguments.stage)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
