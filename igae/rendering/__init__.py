# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of tri-planes. This package imports nothing else of igae."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
