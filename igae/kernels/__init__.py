# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels: compiled with NVRTC, cached on disk, launched on PyTorch's current stream."""
