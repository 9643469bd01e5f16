# SPDX-License-Identifier: Apache-2.0
"""Train an IG-AE: ``accelerate launch train.py --config igae.yaml data.root=SHARDS [key=value ...]``."""

import argparse
import ctypes
import logging
import os
import signal
import sys
import traceback
import warnings

from igae.errors import log_to_stderr, say


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
    log_to_stderr()
    # What goes for all ranks is said once; warnings and errors by each.
    logging.getLogger("igae").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # torch's own modules use names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    _end_with_the_launcher()
    try:
        from igae import config
        from igae import ranks as distributed
        from igae.export import take_settings
        from igae.training.fit import Fit
        from igae.training.recipe import Recipe
        from igae.training.trainer import Trainer
        from igae.viewer.report.page import try_to_write

        try:
            recipe = config.load(Recipe, arguments.config, arguments.overrides, complete=take_settings)
            run = (Fit if recipe.fits_in_waves else Trainer)(recipe, arguments.resume)
            run.run(arguments.stage)
            if distributed.rank() == 0:
                try_to_write(run.folder)
        except RuntimeError as error:
            if (sentence := distributed.in_one_sentence(error)) is None:
                raise
            say(f"error: {sentence}")
            return 1
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_the_launcher() -> None:
    """Get a SIGTERM, which saves and ends, when `accelerate launch` dies: it passes no signal on."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        say(traceback.format_exc())
        code = 1
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # exit handlers would wait for ranks that don't answer any more
    sys.exit(code)
