# SPDX-License-Identifier: Apache-2.0
"""Export a run: ``igae export RUN TARGET [key=value ...]``."""

from igae.errors import Parser, command, counted, log_to_stderr, redact
from igae.ranks import use_share


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = Parser(prog="igae export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder or URL of a run, or of one of its checkpoints")
    parser.add_argument(
        "target", metavar="TARGET", help="empty or new folder, fsspec URL, or hf://user/name[@revision][/folder]"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. data.root=SHARDS, where they moved"
    )
    arguments = parser.parse_args(argv)
    log_to_stderr()
    from igae.models import import_diffusers

    import_diffusers()
    from igae.export import check_target, read_run, write

    use_share()
    check_target(arguments.target)
    description = write(read_run(arguments.run, arguments.overrides), arguments.target)
    size = sum(file.bytes for file in description.files.values()) / 1e6
    print(
        redact(f"{arguments.target}: {counted(description.scenes, 'scene')}, and {size:.1f} MB of model and settings")
    )
    return 0
