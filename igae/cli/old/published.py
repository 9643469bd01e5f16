# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.published`, as in version 0.1."""

from igae.cli.published import main
from igae.errors import end

if __name__ == "__main__":
    end(main())
