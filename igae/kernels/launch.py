# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into a device and launches them on PyTorch's current stream."""

import ctypes
import importlib.util
from typing import Any

import torch
from torch import Tensor


def _installed() -> bool:
    try:
        return importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        return False


INSTALLED = _installed()


def unavailable(what: str, tensor: Tensor) -> str | None:
    """Why no kernel can run where a tensor, which `what` stands for, is; None: they can."""
    if tensor.device.type != "cuda":
        return f"{what} are on {tensor.device}, not on a CUDA device"
    if not INSTALLED:
        return "cuda-core is not installed (pip install igae[cuda])"
    if torch.cuda.get_device_properties(tensor.device).major < 8:
        return "the GPU has a compute capability below 8.0"
    return None


def architecture(device: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


class Library:
    """A cubin on one device."""

    def __init__(self, code: bytes, device: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        # Autograd's threads have no current context until the CUDA runtime has been used in them.
        self._context = self._check(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))
        self._check(driver.cuCtxSetCurrent(self._context))
        self._library = self._check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))

    def _check(self, result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise RuntimeError(f"a CUDA driver call failed: {result[0]}")
        return result[1] if len(result) > 1 else None

    def _kernel(self, name: str) -> Any:
        return self._check(self._driver.cuLibraryGetKernel(self._library, name.encode()))

    def function(self, name: str) -> Any:
        """What `launch` takes, for an `extern "C"` kernel with one argument."""
        return self._check(self._driver.cuKernelGetFunction(self._kernel(name)))

    def launch(self, function: Any, blocks: int, threads: int, params: ctypes.Structure, shared: int = 0) -> None:
        self._check(self._driver.cuCtxSetCurrent(self._context))
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream().cuda_stream
        launch = (function, blocks, 1, 1, threads, 1, 1, shared)
        self._check(self._driver.cuLaunchKernel(*launch, stream, ctypes.addressof(pointer), 0))


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
