# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into a device and launches them on PyTorch's current stream."""

import ctypes
import functools

import torch

from igae.kernels import Library, architecture
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
