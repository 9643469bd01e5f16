# SPDX-License-Identifier: Apache-2.0
"""Names of version 0.1, each in one line: `igae/__init__.py` makes them `igae.NAME` too."""
