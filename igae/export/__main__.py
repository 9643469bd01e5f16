# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.export`."""

import sys

from igae.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
