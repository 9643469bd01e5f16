# SPDX-License-Identifier: Apache-2.0
"""Write a run's report, one HTML file: ``igae report RUN [--output FILE]``."""

from igae.errors import Parser, command, local_path
from igae.viewer import write_report


@command
def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong input."""
    parser = Parser(prog="igae report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=local_path, help="folder of a run, e.g. outputs/igae")
    parser.add_argument(
        "--output", metavar="FILE", type=local_path, help="where to write it (default: RUN/report.html)"
    )
    arguments = parser.parse_args(argv)
    path = write_report(arguments.run, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
