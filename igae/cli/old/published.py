# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.published`, as in version 0.1."""

import sys

from igae.export import main

if __name__ == "__main__":
    sys.exit(main())
