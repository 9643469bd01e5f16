# SPDX-License-Identifier: Apache-2.0
"""Write a run's report, one HTML file: ``python -m igae.report RUN [--output FILE]``."""

import argparse
import sys
from pathlib import Path

from igae.errors import redact
from igae.viewer import write_report


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m igae.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, e.g. outputs/igae")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where to write it (default: RUN/report.html)")
    arguments = parser.parse_args(argv)
    try:
        path = write_report(arguments.run, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
