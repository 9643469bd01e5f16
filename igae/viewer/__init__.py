# SPDX-License-Identifier: Apache-2.0
"""Scenes in a browser (``igae view``), and the report of a run (``igae report``).

``subject`` is a model with its scenes, and follows a run; ``drawing`` makes pictures of it; ``cameras`` converts the
page's cameras and interpolates paths; ``session`` is one open page, ``server`` all of them; ``report`` is a page of
its own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
