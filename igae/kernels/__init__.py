# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels: compiled with NVRTC, cached on disk, launched on PyTorch's current stream."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
