# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.evaluate`, as in version 0.1."""

import sys

from igae.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
