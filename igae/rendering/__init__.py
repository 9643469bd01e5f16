# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of tri-planes: by PyTorch, or by CUDA kernels that do the same."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
