# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.published`, as in version 0.1."""

from igae.errors import end
from igae.export.published import main

if __name__ == "__main__":
    end(main())
