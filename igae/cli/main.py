# SPDX-License-Identifier: Apache-2.0
"""The command `igae`: one name for all commands. Each is a module, imported when it is called."""

import importlib
import sys
from collections.abc import Callable

from igae import __version__
from igae.errors import command, did_you_mean, end, say
from igae.ranks import check_rank_variables, wait_asleep

COMMANDS = {
    "train": "train an autoencoder with its scenes, or resume a run",
    "fit": "fit new scenes to a trained model",
    "demo": "draw procedural objects to try everything with",
    "pack": "pack scenes and natural images into tar shards, or verify packed ones",
    "render": "render meshes into scenes",
    "evaluate": "measure a run, a checkpoint or an export",
    "export": "write a run as an export that others load",
    "published": "import the weights of the published IG-AE code as an export",
    "report": "write a run's report, one HTML file",
    "view": "look at scenes in the browser",
    "kernels": "compile the CUDA kernels ahead of time",
    "reference": "print all configuration keys as Markdown",
}
RANKED = ("train", "fit", "evaluate")
"""Commands that several processes run together."""
TOOLS = {"demo": "make_demo", "render": "render_objects"}
"""Commands that are scripts of data_tools/, which come with the package."""


@command  # for what happens while a command is imported, which takes seconds: Ctrl-C, or a library that is missing
def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"igae {__version__}")
        return 0
    if name not in COMMANDS:
        say(f"error: there is no command {name}{did_you_mean(name, COMMANDS)}; igae --help lists them")
        return 2
    sys.argv[0] = f"igae {name}"  # what usage texts call the program
    if name in TOOLS:
        from igae import config

        # There its neighbors are found, also by the processes that it starts.
        sys.path.insert(0, str(config.shipped("data_tools")))
    wait_asleep()
    if name in RANKED:
        check_rank_variables()
    module = importlib.import_module(TOOLS.get(name, f"igae.cli.{name}"))
    run: Callable[[list[str]], int] = module.main
    return run(arguments[1:])


def _help() -> str:
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    more = (
        "igae COMMAND --help says more. On several GPUs: accelerate launch --num_processes N train.py --config RECIPE"
    )
    return "\n".join(["usage: igae COMMAND ...", "", *lines, "", more])


def entry() -> None:
    """Of the console script: ends the process with the command's exit code."""
    end(main())


if __name__ == "__main__":
    entry()
