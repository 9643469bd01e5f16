#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`igae pack`, also in a source tree that is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("igae") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from igae.cli.pack import main  # noqa: E402
from igae.errors import end  # noqa: E402

if __name__ == "__main__":
    end(main())
