# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.view`, as in version 0.1."""

from igae.cli.view import main
from igae.errors import end

if __name__ == "__main__":
    end(main())
