# SPDX-License-Identifier: Apache-2.0
"""Latent scenes: their tri-planes, owned by one rank each, and the optimizer of their rows."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
