# SPDX-License-Identifier: Apache-2.0
"""The trained modules: autoencoder, losses, and the module that puts them together with rendering."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
