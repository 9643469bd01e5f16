# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model: ``igae evaluate CHECKPOINT|RUN|EXPORT [--scenes NAME ...] [key=value ...]``."""

import logging

from igae.errors import Parser, command, log_to_stderr
from igae.ranks import check_rank_variables, rank


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 evaluation failed, 2 wrong input."""
    parser = Parser(prog="igae evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", metavar="MODEL", help="the same, as an option")
    parser.add_argument("--scenes", nargs="+", default=[], metavar="NAME", help="default: as evaluation.scenes says")
    parser.add_argument("--output", metavar="FOLDER", help="of evaluation.json and evaluation.csv; default: RUN")
    what = "folder or URL of a run, a checkpoint or an export; then settings, e.g. data.root=SHARDS"
    parser.add_argument("overrides", nargs="*", metavar="MODEL|key=value", help=what)
    arguments = parser.parse_intermixed_args(argv)
    # --scenes takes all that follows it.
    names = [name for name in arguments.scenes if "=" not in name]
    overrides = arguments.overrides + [name for name in arguments.scenes if "=" in name]
    alone = [] if arguments.checkpoint else [word for word in overrides if "=" not in word][:1]
    where = arguments.checkpoint or next(iter(alone), None)
    if where is None:
        parser.error("which model? igae evaluate RUN (or a checkpoint, an export; folder or URL)")
    overrides = [word for word in overrides if word not in alone]
    log_to_stderr()
    check_rank_variables()
    logging.getLogger("igae").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    from igae.models import import_diffusers

    import_diffusers()
    from igae.cli.measuring import evaluate

    evaluate(where, names, overrides, arguments.output)
    return 0
