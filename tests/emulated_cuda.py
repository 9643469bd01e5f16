# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on a CPU: g++ compiles their sources with emulated_cuda.h in place of what NVRTC provides.

Emulated: the threads of a block, each run until it waits for others at a barrier, a shuffle, a vote or a product of
matrices, and each warp until it waits for other warps; shared memory, which holds NaN before it is written; products of
float16, and those that cut off operands to TF32's 10 bits; the few PTX instructions of `INSTRUCTIONS`; casts of NaN and
of large floats to int. Errors: a block that can't go on, a write just past the end of shared memory, an access that is
not aligned or where there is no memory, a trap.

Not emulated: anything at the same time, so no races (blocks run one after the other, and sums go to memory in that
order); masks of less than a warp; approximate functions (the C library's are taken); flushing of denormals; products
and sums that the compiler fuses; code for compute capabilities below 9.0; caches, conflicts of banks, registers,
spills, time. A barrier that is missing shows only if an order of threads and warps, of two, gives wrong numbers: not
where a shuffle or a vote that follows stands in for it. A wrong address in memory of someone else goes unnoticed.
"""

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from igae import kernels

ARCH = 90
HEADER = Path(__file__).with_name("emulated_cuda.h")

MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
COPY = "{.reg .u64 at; cvta.to.shared.u64 at, %0; cp.async.ca.shared.global [at], [%1], "
MMA_F16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
INSTRUCTIONS = {
    "": "",  # only a hint for the compiler
    "ex2.approx.ftz.f32 %0, %1;": "%0 = exp2f(%1)",
    "lg2.approx.ftz.f32 %0, %1;": "%0 = log2f(%1)",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = 1.f / (%1)",
    "cvt.rn.satfinite.f16x2.f32 %0, %1, %2;": "%0 = emulated::half2(%1, %2)",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "%0 = emulated::bfloat2(%1, %2)",
    "mul.rn.f16x2 %0, %1, %2;": "%0 = emulated::times(%1, %2)",
    MMA: "emulated::mma(%0, %1, %2, %3, %4, %5, %6, %7, %8, %9)",
    MMA_F16: "emulated::mma_f16(%0, %1, %2, %3, %4, %5, %6, %7, %8, %9)",
    f"{COPY}16;}}": "memcpy(%0, %1, 16)",
    f"{COPY}8;}}": "memcpy(%0, %1, 8)",
    "cp.async.wait_all;": "",
    "red.global.add.v4.f32 [%0], {%1, %2, %3, %4};": "emulated::add4(%0, %1, %2, %3, %4)",
}
"""PTX in asm statements, and C++ that does the same."""


def unavailable() -> str | None:
    """Why kernels can't be emulated here; None: they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator of CUDA kernels switches stacks in assembly for Linux on x86-64"
    return None if shutil.which("g++") else "the emulator of CUDA kernels needs g++"


def pieces(text: str, separator: str) -> list[str]:
    """Split at a character, but not in strings and brackets."""
    found, depth = [""], 0
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[^"]', text):
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if token == separator and depth == 0:
            found.append("")
        else:
            found[-1] += token
    return [piece.strip() for piece in found]


def translated(source: str) -> str:
    """A preprocessed kernel source as C++. Raises ValueError for PTX that is not in `INSTRUCTIONS`."""

    def emulation(statement: re.Match[str]) -> str:
        template, *operands = pieces(statement[1], ":")
        ptx = " ".join("".join(re.findall(r'"([^"]*)"', template)).split())
        if ptx not in INSTRUCTIONS:
            raise ValueError(f"the emulator does not know {ptx!r}: add it to INSTRUCTIONS in {Path(__file__).name}")
        given = [operand for group in operands[:2] for operand in pieces(group, ",") if operand]
        values = [operand[operand.index("(") + 1 : -1] for operand in given]
        return re.sub(r"%(\d)", lambda number: values[int(number[1])], INSTRUCTIONS[ptx]) + ";"

    text = re.sub(r'\basm\s*(?:volatile\s*)?\(((?:"[^"]*"|[^";])*)\);', emulation, source)
    if re.search(r"\b__?asm|\basm\b", text):
        raise ValueError("the emulator did not understand all asm statements of a kernel: see translated()")
    text = re.sub(r"(?<!\w)\(int\)", "(int)(emulated::Int)", text)
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *\2 = (\1 *)emulated::shared_memory;", text)
    return re.sub(r"\b__shared__\b", "static", text)


def entries(source: str) -> str:
    """A C function `emulate_<name>` for each kernel of a source."""
    names = re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(const Params ', source)
    return "".join(
        f'extern "C" const char *emulate_{name}(const Params *p, int blocks, int threads, long shared, int reverse) '
        f"{{ return emulated::launch<Params, {name}>(*p, blocks, threads, shared, reverse); }}\n"
        for name in names
    )


def compiled(source: Path, defines: dict[str, int], folder: Path) -> Path:
    """A shared library of a kernel's source, in a folder; one that is there already is taken.

    Raises:
        ValueError: with the sentence of `translated`.
        RuntimeError: g++ refused the source; its messages are in this one.
    """
    macros = [f"-D{name}={int(value)}" for name, value in defines.items()]
    text = run("g++", "-E", "-x", "c++", f"-D__CUDA_ARCH__={10 * ARCH}", *macros, str(source))
    text = f'#include "{HEADER}"\n{translated(text)}\n{entries(text)}'
    path = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.with_suffix(".cpp").write_text(text)
        # -O0 compiles in half the time and runs four times as long; <cmath> of C++17 takes twice as long as that of 14.
        options = ("-std=c++14", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC")
        # Conversions of float16 in hardware give the same bits; in software they are most of the time of a kernel.
        half = ["-mf16c"] if " f16c " in Path("/proc/cpuinfo").read_text() else []
        run("g++", *options, *half, str(path.with_suffix(".cpp")), "-o", str(path))
    return path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[:4000]}")
    return done.stdout


class Library(kernels.Library):
    """Loads kernels for tensors of the CPU, where `igae.kernels.LIBRARIES` has it under "cpu".

    Attributes:
        folder: of what is compiled.
        reverse: the last thread of a block runs first.
        launched: names of the kernels that ran.
    """

    folder: Path
    reverse = False
    launched: set[str] = set()

    def __init__(
        self, source: Path, defines: dict[str, int], device: torch.device, names: Sequence[str], shared: int = 0
    ) -> None:
        library, self._shared = ctypes.CDLL(str(compiled(source, defines, self.folder))), shared
        self._functions = {name: library[f"emulate_{name}"] for name in names}
        for function in self._functions.values():
            function.restype = ctypes.c_char_p
            function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int]

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    @staticmethod
    def architecture(device: torch.device) -> int:
        return ARCH

    def resident_blocks(self, name: str, threads: int) -> int:
        return 3

    def launch(self, name: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        """Raises RuntimeError with what went wrong in the kernel."""
        self.launched.add(name)
        failure = self._functions[name](ctypes.addressof(params), blocks, threads, self._shared, self.reverse)
        if failure is not None:
            raise RuntimeError(f"{name}: {failure.decode()}")
