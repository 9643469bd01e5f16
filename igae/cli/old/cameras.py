# SPDX-License-Identifier: Apache-2.0
"""`igae.cameras`, as model cards of version 0.1 import it."""

from igae.data import orbit

__all__ = ["orbit"]
