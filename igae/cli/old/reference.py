# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.reference`, as in version 0.1."""

from igae.cli.reference import main

if __name__ == "__main__":
    main()
