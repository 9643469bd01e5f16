# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels with NVRTC, at first use or ahead of time, and keeps the results on disk.

    igae kernels --arch 80 90

needs `pip install -e '.[cuda]'`, but neither a GPU nor a driver nor nvcc. A kernel is compiled for one variant (sizes
and conventions, see `Variant`); the command compiles those that its options name, and all kernels of layers and of rows
of planes. `IGAE_KERNEL_CACHE` is the folder of the results, by default `~/.cache/igae/kernels`.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from igae.errors import Parser
from igae.kernels import cached_cubin

Pass = Literal["forward", "backward"]

HIDDEN = 64
"""Hidden units of the MLP that the kernels know."""
SOURCES = Path(__file__).parent / "kernels"


class Variant(NamedTuple):
    """What a kernel is specialized for. A switch may be an integer."""

    features: int = 32
    colors: int = 16
    coarse: int = 48
    fine: int = 48
    eg3d: bool | int = False
    product: bool | int = False
    disparity: bool | int = False
    fp32: bool | int = False
    """Matrix products of float32 numbers (three TF32 ones for one), not of float16."""
    deterministic: bool | int = False
    side: int = 1
    """A pixel has side x side rays."""
    distortion: bool | int = False
    keep_features: bool | int = True
    """The backward pass gets the samples' features from the forward pass, else reads the planes again."""


MACROS = (
    "C", "OUT", "K", "KF", "EG3D", "PRODUCT", "DISPARITY", "FP32", "DETERMINISTIC", "SIDE", "DISTORTION",
    "KEEP_FEATURES",
)  # fmt: skip
"""Their names in the sources, in this order."""


class Shape(NamedTuple):
    """How a kernel is launched."""

    warps: int
    """In a block; each has a ray."""
    blocks: int
    """On a multiprocessor, at least: it bounds the registers."""
    shared: int
    """Bytes of dynamic shared memory of a block."""


def shape(kernel: Pass, variant: Variant, arch: int) -> Shape:
    """The launch of a kernel. Raises ValueError where the architecture has too little shared memory for the variant."""
    samples, chunks, tiles = variant.coarse + variant.fine, -(-variant.features // 16), -(-variant.colors // 8)
    pairs, words = -(-tiles // 2), 4 if variant.fp32 else 2  # 32-bit words of four numbers
    weights = words * (256 * chunks + 128 * tiles) + HIDDEN + 8 * tiles + HIDDEN + 4
    if kernel == "forward":
        floats = 2 * (samples + 2) + 3 + max(3 * (samples + 2), 192)
        per_warp = -(-floats // 4) * 4 + samples * 8 * tiles
    else:
        weights += words * 256 * (chunks + pairs)
        matrices = 2 * words * (4 * HIDDEN + 64 * chunks + 32 * pairs) + 8 * words
        per_warp = 4 * (samples + 2) + matrices + 72 * tiles + 72
        if variant.distortion:
            per_warp += -(-(samples + 2) // 4) * 4
        if variant.keep_features:
            per_warp += -(-samples // 16) * 4 + 64 * chunks * words
    limit = 1024 * {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(arch, 99)
    for warps in (4, 2, 1):
        shared = 4 * (weights + warps * per_warp)
        if shared <= limit:
            small = variant.features <= 32 and variant.colors <= 16 and not variant.fp32 and warps == 4
            fits, wanted = (limit + 1024) // (shared + 1024), 2
            if small:
                # As many as compilers have registers for (of few variants they spill some bytes, once a ray).
                wanted = 4 if kernel == "forward" else {80: 3, 87: 3, 90: 4}.get(arch, 2)
                if kernel == "backward" and variant.deterministic:
                    wanted = max(2, wanted - 1)
            return Shape(warps, min(fits, wanted), shared)
    raise ValueError(f"{variant} needs {shared} bytes of shared memory on sm_{arch}, which has {limit}")


def kept_size(variant: Variant) -> int:
    """Floats that the forward pass keeps of a ray for the backward pass."""
    samples, chunks, words = variant.coarse + variant.fine, -(-variant.features // 16), 4 if variant.fp32 else 2
    floats = 2 * samples + (-(-samples // 16) - 1) * variant.colors
    if not variant.keep_features:
        return -(-floats // 4) * 4
    return -(-(floats + -(-samples // 4)) // 4) * 4 + 4 * samples * chunks * words


def partial_size(variant: Variant) -> int:
    """Floats of all gradients of the MLP."""
    return HIDDEN * variant.features + HIDDEN + (1 + variant.colors) * (HIDDEN + 1)


def macros(kernel: Pass, variant: Variant, arch: int) -> dict[str, int]:
    """What a kernel's source is compiled with."""
    launch = shape(kernel, variant, arch)
    own = {"WARPS": launch.warps, f"{kernel.upper()}_BLOCKS": launch.blocks, "SHARED_BYTES": launch.shared}
    return {**dict(zip(MACROS, map(int, variant), strict=True)), **own}


def build_main(argv: list[str] | None = None, others: Sequence[tuple[Path, dict[str, int]]] = ()) -> None:
    """The command: compile variants into the cache, and other sources with their macros."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities: 80 86 89 90 100")
    parser.add_argument("--features", type=int, nargs="+", default=[32], help="features of a point in the planes")
    parser.add_argument("--colors", type=int, nargs="+", default=[16], help="channels of the image")
    parser.add_argument("--samples", type=int, nargs=2, default=[48, 48], metavar=("COARSE", "FINE"))
    parser.add_argument("--rays-per-pixel", type=int, default=1, help="along each side of a pixel")
    parser.add_argument("--precision", nargs="+", choices=["fp16", "fp32"], default=["fp16"])
    switches = ("eg3d", "product", "disparity", "deterministic", "distortion")
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true")
    args = parser.parse_args(argv)

    def build(source: Path, defines: dict[str, int], arch: int, what: str) -> None:
        start = time.perf_counter()
        code = cached_cubin(source, defines, arch)
        print(f"{source.stem} sm_{arch}{what}: {len(code)} bytes, {time.perf_counter() - start:.1f} s")

    for arch, features, colors, precision in itertools.product(args.arch, args.features, args.colors, args.precision):
        chosen = {"fp32": precision == "fp32", **{switch: getattr(args, switch) for switch in switches}}
        chosen["side"] = args.rays_per_pixel
        variant = Variant(features, colors, *args.samples, **chosen)
        for kernel in ("forward", "backward"):
            source = SOURCES / f"{kernel}.cu"
            build(source, macros(kernel, variant, arch), arch, f" {features} -> {colors} {precision}")
    for arch, (source, defines) in itertools.product(args.arch, others):
        build(source, defines, arch, "")


if __name__ == "__main__":
    build_main()
