# SPDX-License-Identifier: Apache-2.0
"""Loads compiled kernels into a device and launches them on PyTorch's current stream."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igae.kernels.compile import cached_cubin

INSTALLED = find_spec("cuda") is not None and find_spec("cuda.core") is not None
"""Whether cuda-core is, which compiles and launches kernels."""


class Library:
    """The kernels of a source file on one CUDA device, which must be the current one while it is loaded.

    Args:
        source: file with kernels, each `extern "C"` with one struct as its argument.
        defines: macros.
    """

    def __init__(self, source: Path, defines: dict[str, int], device: torch.device) -> None:
        from cuda.bindings import driver

        self.driver, self.device = driver, driver.CUdevice(device.index)
        self.processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        # Autograd's threads have no current context until the CUDA runtime has been used in them.
        self.context = self.check(driver.cuDevicePrimaryCtxRetain(self.device))
        self.check(driver.cuCtxSetCurrent(self.context))
        code = cached_cubin(source, defines, self.architecture(device))
        self._handle = self.check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why kernels can't run on a device, in a sentence; None: they can."""
        if not INSTALLED:
            return "cuda-core is not installed (pip install igae[cuda])"
        if torch.cuda.get_device_properties(device).major < 8:
            return "the GPU has a compute capability below 8.0"
        return None

    @staticmethod
    def architecture(device: torch.device) -> int:
        """Ten times the compute capability."""
        properties = torch.cuda.get_device_properties(device)
        return 10 * properties.major + properties.minor

    def kernel(self, name: str, shared: int = 0) -> "Kernel":
        """A kernel by its name, with the bytes of dynamic shared memory that each of its blocks gets."""
        return Kernel(self, self.check(self.driver.cuLibraryGetKernel(self._handle, name.encode())), shared)

    @staticmethod
    def check(result: tuple[Any, ...]) -> Any:
        """What a call of the driver returns besides its status; RuntimeError where it failed."""
        if int(result[0]) != 0:
            raise RuntimeError(f"a CUDA driver call failed: {result[0]}")
        return result[1] if len(result) > 1 else None


class Kernel:
    """See :meth:`Library.kernel`."""

    def __init__(self, library: Library, handle: Any, shared: int) -> None:
        self._library, self._shared, driver = library, shared, library.driver
        if shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            library.check(driver.cuKernelSetAttribute(attribute, shared, handle, library.device))
        self._function = library.check(driver.cuKernelGetFunction(handle))

    def resident_blocks(self, threads: int) -> int:
        """Blocks of so many threads that the device runs at once."""
        count = self._library.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, self._shared)
        return int(self._library.check(count)) * self._library.processors

    def launch(self, blocks: int, threads: int, params: ctypes.Structure) -> None:
        library = self._library
        library.check(library.driver.cuCtxSetCurrent(library.context))
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream().cuda_stream
        launch = (self._function, blocks, 1, 1, threads, 1, 1, self._shared)
        library.check(library.driver.cuLaunchKernel(*launch, stream, ctypes.addressof(pointer), 0))


LIBRARIES = {"cuda": Library}
"""What kernels are loaded by, for each type of device. Tests put an emulator of kernels there for the CPU."""


def unavailable(what: str, tensor: Tensor) -> str | None:
    """Why no kernel can run where a tensor is, in a sentence; None: they can.

    Args:
        what: what the tensor is called there.
    """
    library = LIBRARIES.get(tensor.device.type)
    return f"{what} are on {tensor.device}, not on a CUDA device" if library is None else library.missing(tensor.device)


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's numbers; None of None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
