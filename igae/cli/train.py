# SPDX-License-Identifier: Apache-2.0
"""Train an IG-AE: ``accelerate launch train.py --config igae.yaml data.root=SHARDS [key=value ...]``."""

import argparse
import ctypes
import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from igae import config
from igae.errors import Parser, command, log_to_stderr, redact, say
from igae.ranks import check_rank_variables, rank, wait_asleep, world_size
from igae.training import Recipe


class _Parser(Parser):
    def format_help(self) -> str:
        """The options, then the recipes, and all settings with their defaults."""
        from igae.cli import reference

        recipes = [f"  {path.name:30} {_first_line(path)}" for path in sorted(config.shipped("configs").glob("*.yaml"))]
        keys = [f"  {key} = {default}" for key, default in reference.defaults(Recipe)]
        settings = "settings, explained in docs/configuration.md (`igae reference` prints that page):"
        return "\n".join([super().format_help(), "recipes:", *recipes, "", settings, *keys, ""])


def parser(default: str | None = None, prog: str | None = None) -> argparse.ArgumentParser:
    """Of the command's arguments.

    Args:
        default: the configuration where none is named.
    """
    made = _Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    made.add_argument("--config", required=default is None, default=default, help="a YAML file, or a recipe's name")
    made.add_argument("--stage", choices=["warmup", "joint"], help="run this stage only (default: what is still to do)")
    made.add_argument("--resume", default="auto", help="auto (default), strict, never, or the folder of a checkpoint")
    made.add_argument(
        "--extend", action="store_true", help="continue a finished run to the number of epochs that is given now"
    )
    made.add_argument("--print-config", action="store_true", help="print the resolved recipe and do nothing else")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.joint.batch_size=8")
    return made


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done (or stopped by SIGTERM after a checkpoint), 1 training failed, 2 wrong input."""
    run(parser().parse_intermixed_args(argv))
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Train, or fit, as the arguments say. What is wrong with them is told before anything slow is imported."""
    log_to_stderr()
    wait_asleep()
    # What concerns all ranks is logged once; warnings and errors by each.
    logging.getLogger("igae").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    check_rank_variables()
    recipe = config.load(Recipe, arguments.config, arguments.overrides, complete=_take_settings)
    if arguments.print_config:
        sys.stdout.write(redact(config.dump(recipe)))  # as in a run's config.yaml
        return
    if "://" in recipe.outputs:
        raise ValueError(
            f"outputs: {redact(recipe.outputs)} is a URL: give a folder on this machine (checkpoint.root may be a URL)"
        )
    if world_size() == 1:  # several ranks must hear of it together, once they have met
        _check_places(recipe)
    _end_with_the_launcher()
    # torch's own modules use names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    from igae.models import import_diffusers

    import_diffusers()
    from igae.training import Fit, Trainer

    started = (Fit if recipe.fits_in_waves else Trainer)(recipe, arguments.resume, arguments.extend)
    started.run(arguments.stage)
    started.engine.close()  # NCCL warns on each rank of a process group that is left open
    if rank() == 0:
        _tell_results(recipe, stopped=started.signals.received is not None)


def _check_places(recipe: Recipe) -> None:
    from igae.storage import check_folder

    root = recipe.data.root
    if "://" not in root and not (Path(root) / "manifest.json").is_file():
        where = redact(root) + ("" if Path(root).is_absolute() else f" of {Path.cwd()}")
        raise ValueError(f"no manifest.json in {where}: pack the data first with data_tools/pack_shards.py")
    check_folder(str(recipe.folder))


def _tell_results(recipe: Recipe, stopped: bool) -> None:
    """Write the report; say how good the run is, and what can be done with it."""
    from igae.evaluation import verdict
    from igae.storage import is_url
    from igae.training import read_metrics
    from igae.viewer import try_to_write

    folder, root, data = str(recipe.folder), recipe.checkpoint_root, recipe.data.root
    report = try_to_write(recipe.folder)
    stages = read_metrics(recipe.folder)
    said = [] if stopped or not stages else [verdict(list(stages.values())[-1], stages.get("warmup"))]
    said += [] if report is None else [f"report:    {report}"]
    if stages and not stopped:
        # What only a file names is not asked for.
        where, more = (root, ["--output", folder]) if is_url(root) else (folder, [])
        moved = [f"data.root={data}"] if is_url(data) else []
        commands = {
            "view": ["view", where, *moved],
            "evaluate": ["evaluate", "--checkpoint", where, *more, *moved],
            "export": ["export", where, f"exports/{recipe.experiment}", *moved],
        }
        said += [f"{name + ':':10} {shlex.join(['igae', *words])}" for name, words in commands.items()]
    say("\n".join(filter(None, said)))


def _take_settings(data: dict[str, Any]) -> None:
    if "model" in data and not data["model"] and "autoencoder" not in data:
        raise ValueError(
            "no model is given: say which run, checkpoint or export the scenes are fitted to, model=outputs/RUN"
        )
    if data.get("model") is not None:
        from igae.export import take_settings

        take_settings(data)


def _end_with_the_launcher() -> None:
    """Get a SIGTERM, which saves and ends, when `accelerate launch` dies: it passes no signal on."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
