# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into a device and launches them on PyTorch's current stream."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from igae.rendering import build

_POINTERS = (
    "planes w1 b1 w2 b2 cam2world intrinsics background noise_coarse noise_fine scene seed features depth opacity "
    "kept g_features g_depth g_opacity g_planes partial largest"
)
_INTEGERS = "rays height width resolution background_stride jitter measure partials"


class Params(ctypes.Structure):
    """The kernels' argument: `struct Params` in kernels/common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        ("seed_value", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in _INTEGERS.split()),
        *((name, ctypes.c_float) for name in ("near", "far", "box")),
    ]


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


class Loaded(Library):
    """A kernel of the renderer on one device."""

    def __init__(self, kernel: build.Kernel, variant: build.Variant, device: int) -> None:
        arch = architecture(device)
        self.warps, _, self._shared = build.shape(kernel, variant, arch)
        super().__init__(build.cubin(kernel, variant, arch), device)
        driver, handle = self._driver, self._kernel(f"render_{kernel}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(driver.cuKernelSetAttribute(attribute, self._shared, handle, driver.CUdevice(device)))
        self._function = self._check(driver.cuKernelGetFunction(handle))
        resident = self._check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, 32 * self.warps, self._shared)
        )
        self._blocks: int = resident * torch.cuda.get_device_properties(device).multi_processor_count

    def blocks(self, rays: int) -> int:
        """How many blocks a launch for so many rays has: no more than run at once."""
        return min(self._blocks, -(-rays // self.warps))

    def __call__(self, params: Params) -> None:
        self.launch(self._function, self.blocks(params.rays), 32 * self.warps, params, self._shared)


@functools.cache
def load(kernel: build.Kernel, variant: build.Variant, device: int) -> Loaded:
    """The kernel, compiled if need be. The device must be the current one."""
    return Loaded(kernel, variant, device)


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
