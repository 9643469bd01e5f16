# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML file that needs nothing else: no network, no other file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
