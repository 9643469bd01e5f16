# SPDX-License-Identifier: Apache-2.0
"""Write the report of a run, or of several side by side, one HTML file: ``igae report RUN ... [--output FILE]``."""

from igae.errors import Parser, command, local_path
from igae.viewer import write_report


@command
def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong input."""
    parser = Parser(prog="igae report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=local_path, help="folder of a run, e.g. outputs/igae")
    default = "default: RUN/report.html, of several runs comparison.html beside the first"
    parser.add_argument("--output", metavar="FILE", type=local_path, help=f"where to write it ({default})")
    arguments = parser.parse_args(argv)
    path = write_report(arguments.runs, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
