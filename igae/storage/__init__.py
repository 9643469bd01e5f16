# SPDX-License-Identifier: Apache-2.0
"""Files and object stores: paths and URLs, reads that are retried, tensor files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
