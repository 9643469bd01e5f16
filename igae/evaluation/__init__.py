# SPDX-License-Identifier: Apache-2.0
"""What a model is measured with and what one looks at."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
