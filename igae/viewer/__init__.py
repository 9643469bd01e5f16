# SPDX-License-Identifier: Apache-2.0
"""Looking at scenes in a browser: ``python -m igae.view CHECKPOINT|RUN|EXPORT``.

``subject`` is what is looked at, and follows a run; ``drawing`` makes pictures of it; ``cameras`` has the way from the
page's cameras to the renderer's, and paths of them; ``session`` is one open page, ``server`` all of them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
