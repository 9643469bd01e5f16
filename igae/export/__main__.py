# SPDX-License-Identifier: Apache-2.0
"""`python -m igae.export`."""

from igae.cli.export import main
from igae.errors import end

if __name__ == "__main__":
    end(main(None))
