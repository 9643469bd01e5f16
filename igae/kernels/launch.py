# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into a device and launches them on PyTorch's current stream."""

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igae.kernels.compile import cached_cubin

INSTALLED = find_spec("cuda") is not None and find_spec("cuda.core") is not None
"""Whether cuda-core is, which compiles and launches kernels."""


class Library:
    """Kernels of a source file on one CUDA device, which must be the current one while they are loaded.

    Args:
        source: file with the kernels, each `extern "C"` with one struct as its argument.
        defines: macros.
        names: of the kernels.
        shared: bytes of dynamic shared memory that each block gets.
    """

    def __init__(
        self, source: Path, defines: dict[str, int], device: torch.device, names: Sequence[str], shared: int = 0
    ) -> None:
        from cuda.bindings import driver

        self._driver, self._shared = driver, shared
        self._processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        code = cached_cubin(source, defines, self.architecture(device))
        # Autograd's threads have no current context until the CUDA runtime has been used in them.
        self._context = self._check(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device.index)))
        self._check(driver.cuCtxSetCurrent(self._context))
        library = self._check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernels = {name: self._check(driver.cuLibraryGetKernel(library, name.encode())) for name in names}
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for kernel in kernels.values() if shared else ():
            self._check(driver.cuKernelSetAttribute(attribute, shared, kernel, driver.CUdevice(device.index)))
        self._functions = {name: self._check(driver.cuKernelGetFunction(kernel)) for name, kernel in kernels.items()}

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why kernels can't run on a device, in a sentence; None: they can."""
        if not INSTALLED:
            return "cuda-core is not installed (pip install -e '.[cuda]')"
        if torch.cuda.get_device_properties(device).major < 8:
            return "the GPU has a compute capability below 8.0"
        return None

    @staticmethod
    def architecture(device: torch.device) -> int:
        """Ten times the compute capability."""
        properties = torch.cuda.get_device_properties(device)
        return 10 * properties.major + properties.minor

    def resident_blocks(self, name: str, threads: int) -> int:
        """Blocks of so many threads that the device runs at once."""
        count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._functions[name], threads, self._shared)
        return int(self._check(count)) * self._processors

    def launch(self, name: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        self._check(self._driver.cuCtxSetCurrent(self._context))
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream().cuda_stream
        launch = (self._functions[name], blocks, 1, 1, threads, 1, 1, self._shared)
        self._check(self._driver.cuLaunchKernel(*launch, stream, ctypes.addressof(pointer), 0))

    @staticmethod
    def _check(result: tuple[Any, ...]) -> Any:
        """What a call of the driver returns besides its status; RuntimeError where it failed."""
        if int(result[0]) != 0:
            raise RuntimeError(f"a CUDA driver call failed: {result[0]}")
        return result[1] if len(result) > 1 else None


LIBRARIES = {"cuda": Library}
"""What kernels are loaded by, for each type of device. Tests put an emulator of kernels there for the CPU."""


def unavailable(what: str, tensor: Tensor) -> str | None:
    """Why no kernel can run where a tensor is, in a sentence; None: they can.

    Args:
        what: what the tensor is called there.
    """
    library = LIBRARIES.get(tensor.device.type)
    return f"{what} are on {tensor.device}" if library is None else library.missing(tensor.device)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's numbers; None of None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
