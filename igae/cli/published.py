# SPDX-License-Identifier: Apache-2.0
"""Import weights of the code that was published with the IG-AE paper: ``igae published FILE TARGET``."""

from igae.errors import Parser, command, local_path, redact, say
from igae.export import check_target, read_published, read_settings, write


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = Parser(prog="igae published", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", type=local_path, help="gvae_latest.pt")
    parser.add_argument("target", metavar="TARGET", help="as of igae export")
    parser.add_argument(
        "--config", type=local_path, help="the published code's config.yaml (default: the one beside FILE)"
    )
    parser.add_argument("--autoencoder", help="diffusers folder or hub id with the architecture of FILE's autoencoder")
    arguments = parser.parse_args(argv)
    beside = arguments.file.parent / "config.yaml"
    found = arguments.config or (beside if beside.is_file() else None)
    if found is None:
        say(f"no {beside}: rays are sampled as the published default configuration says")
    check_target(arguments.target)
    settings = {} if found is None else read_settings(found)
    description = write(read_published(arguments.file, settings, arguments.autoencoder), arguments.target)
    print(redact(f"{arguments.target}: {description.scenes} scenes"))
    return 0
