# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.view`, as in version 0.1."""

import sys

from igae.cli.view import main

if __name__ == "__main__":
    sys.exit(main())
