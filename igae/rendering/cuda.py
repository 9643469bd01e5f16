# SPDX-License-Identifier: Apache-2.0
"""The renderer as two CUDA kernels, with the signature of `ray_marching.render_torch`.

They run on the current stream, never wait for the device, can be captured in a CUDA graph (after one call outside it,
which compiles and loads them) and are known to torch.compile, as operators `igae::render` and `igae::render_backward`.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igae.kernels import LIBRARIES, Library, pointer, unavailable
from igae.rendering import build
from igae.rendering.config import RenderOptions
from igae.rendering.mlp import DecodingMLP
from igae.rendering.ray_marching import Rendered
from igae.rendering.rays import Cameras

PARTIALS = 32
"""Places to which a backward pass's blocks add gradients of the MLP: at one they would wait for each other."""

MOST_KEPT = 2 * 2**30
"""Bytes that a render keeps for its backward pass, at most, where it can do with less: see `Variant.keep_features`."""


class Params(ctypes.Structure):
    """The kernels' argument: `struct Params` in kernels/common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "planes w1 b1 w2 b2 cam2world intrinsics background scene seed".split()),
        *((name, ctypes.c_void_p) for name in "features depth opacity distortion kept".split()),
        *((name, ctypes.c_void_p) for name in "g_features g_depth g_opacity g_distortion".split()),
        *((name, ctypes.c_void_p) for name in "g_planes partial largest".split()),
        ("seed_value", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in "rays height width resolution background_stride jitter".split()),
        *((name, ctypes.c_int) for name in ("measure", "partials")),
        *((name, ctypes.c_float) for name in ("near", "far", "box")),
    ]


class Call(NamedTuple):
    """A render as the operators take it. Tensors are contiguous, and float32 but for scene and seed."""

    planes: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    background: Tensor
    scene: Tensor
    seed: Tensor | None
    seed_value: int | None
    """Of the jitter where `seed` is None; with neither every jitter is 1/2."""
    height: int
    width: int
    near: float
    far: float
    """Not above 0: rays are sampled where they are in the box."""
    box: float
    variant: list[int]
    keep: bool
    """Whether a backward pass will follow."""


TENSORS = 10
TYPES: Any = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", int | None: "int?", float: "float", list[int]: "int[]",
    bool: "bool",
}  # fmt: skip
SCHEMA = ", ".join(f"{TYPES[kind]} {name}" for name, kind in Call.__annotations__.items())


def unsupported(planes: Tensor, mlp: torch.nn.Module, options: RenderOptions, pixels: int = 1) -> str | None:
    """Why the kernels cannot do this for all views' pixels together, in a sentence; None: they can."""
    features, resolution = planes.shape[4], planes.shape[2]
    why = unavailable("planes", planes)
    if why is not None:
        return why
    if planes.dtype != torch.float32:
        return f"planes are {planes.dtype}; the kernels take torch.float32"
    if not isinstance(mlp, DecodingMLP) or type(mlp).forward is not DecodingMLP.forward or mlp.hidden != build.HIDDEN:
        return f"the kernels know only a DecodingMLP of {build.HIDDEN} hidden units"
    if mlp.w1.shape != (build.HIDDEN, features) or mlp.w1.device != planes.device:
        return f"mlp.w1 is {list(mlp.w1.shape)} on {mlp.w1.device}: not whole, or not where the planes are"
    if features % 8 or not 8 <= features <= 64:
        return f"planes have {features} features; the kernels take multiples of 8 up to 64"
    if not 1 <= mlp.out_channels <= 32:
        return f"the MLP has {mlp.out_channels} output channels; the kernels take up to 32"
    if options.coarse_samples > 128 or options.fine_samples > 128:
        return f"{options.coarse_samples} + {options.fine_samples} samples; the kernels take up to 128 + 128"
    if pixels * options.rays_per_pixel**2 >= 2**30:
        return f"there are {pixels * options.rays_per_pixel**2} rays; the kernels take fewer than 2^30 at a time"
    if resolution < 2 or 3 * resolution**2 * features >= 2**31:
        return f"planes have {resolution} texels a side; the kernels take 2 to what 2^31 numbers a scene allow"
    return None


def render_cuda(
    planes: Tensor,
    mlp: DecodingMLP,
    cameras: Cameras,
    options: RenderOptions,
    background: Tensor,
    scene: Tensor,
    seed: int | Tensor | None,
    distortion: bool = False,
) -> Rendered:
    """See `igae.rendering.render`, which checks the arguments. Raises ValueError with the sentence of `unsupported`."""
    pixels = len(cameras.cam2world) * math.prod(cameras.size)
    why = unsupported(planes, mlp, options, pixels)
    if why is not None:
        raise ValueError(f"backend is cuda, but {why}")
    deterministic = options.deterministic or torch.are_deterministic_algorithms_enabled()
    product = options.reduce == "product"
    # Products of planes have a range that float16 has not.
    variant = build.Variant(
        planes.shape[4], mlp.out_channels, options.coarse_samples, options.fine_samples, options.axes == "eg3d",
        product, options.spacing == "disparity", options.precision == "fp32" or product, deterministic,
        options.rays_per_pixel, distortion,
    )  # fmt: skip
    trained = (planes, mlp.w1, mlp.b1, mlp.w2, mlp.b2)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in trained)
    kept = 4 * build.kept_size(variant) * pixels * variant.side**2
    variant = variant._replace(keep_features=not keep or kept <= MOST_KEPT)
    numbers = not isinstance(options.near, str) and not isinstance(options.far, str)
    call = Call(
        planes=planes.contiguous(),
        w1=mlp.w1.float().contiguous(),
        b1=mlp.b1.float().contiguous(),
        w2=mlp.w2.float().contiguous(),
        b2=mlp.b2.float().contiguous(),
        cam2world=cameras.cam2world.detach().float().contiguous(),
        intrinsics=cameras.intrinsics.detach().float().contiguous(),
        background=background.float().contiguous(),
        scene=scene.contiguous(),
        seed=seed if isinstance(seed, Tensor) else None,
        seed_value=(seed + 2**63) % 2**64 - 2**63 if isinstance(seed, int) else None,
        height=cameras.size[0],
        width=cameras.size[1],
        near=float(options.near) if numbers else -1.0,
        far=float(options.far) if numbers else -1.0,
        box=options.box,
        variant=[int(entry) for entry in variant],
        keep=keep,
    )
    # Outside torch.compile the operator's own way through the dispatcher costs more than the kernels of a small batch.
    run: Any = torch.ops.igae.render if torch.compiler.is_compiling() else _Render.apply
    features, depth, opacity, spread, _ = run(*call)
    return Rendered(features, depth, opacity, spread if distortion else None)


@functools.cache
def _load(
    kind: type[Library], name: build.Pass, variant: build.Variant, device: torch.device
) -> tuple[Library, int, int]:
    """A kernel, compiled if need be, the warps of its blocks, and how many blocks the device, which must be the current
    one, runs at once."""
    arch, entry = kind.architecture(device), f"render_{name}"
    warps, _, shared = build.shape(name, variant, arch)
    library = kind(build.SOURCES / f"{name}.cu", build.macros(name, variant, arch), device, (entry,), shared)
    return library, warps, library.resident_blocks(entry, 32 * warps)


def _prepare(name: build.Pass, call: Call) -> tuple[Params, int, Callable[[], None]]:
    """The argument of a kernel, but for what it writes; the number of its blocks; what launches it."""
    variant, pixels = build.Variant(*call.variant), len(call.cam2world) * call.height * call.width
    params = Params(
        seed_value=(call.seed_value or 0) % 2**64,
        jitter=2 if call.seed is not None else int(call.seed_value is not None),  # the enumeration in common.cuh
        rays=pixels * variant.side**2,
        height=call.height,
        width=call.width,
        resolution=call.planes.shape[2],
        background_stride=0 if call.background.ndim == 1 else call.background.shape[-1],
        near=call.near,
        far=call.far,
        box=call.box,
    )
    tensors: Any = call[:TENSORS]
    for field, tensor in zip(Call._fields, tensors, strict=False):
        setattr(params, field, pointer(tensor))
    device = call.planes.device
    library, warps, resident = _load(LIBRARIES[device.type], name, variant, device)
    # Forward, a warp has a pixel, backward a ray.
    blocks = min(resident, -(-(pixels if name == "forward" else params.rays) // warps))
    return params, blocks, lambda: library.launch(f"render_{name}", blocks, 32 * warps, params)


def _empty_results(call: Call) -> tuple[Tensor, ...]:
    images, variant = (call.cam2world.shape[0], call.height, call.width), build.Variant(*call.variant)
    rays = math.prod(images) * variant.side**2 if call.keep else 0
    new = call.cam2world.new_empty
    spread = new(images if variant.distortion else 0)
    return new((*images, variant.colors)), new(images), new(images), spread, new(rays, build.kept_size(variant))


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    """Images, that of distortion empty if it is not asked for, and what the backward pass needs of each ray if `keep`:
    see KEPT in kernels/common.cuh."""
    call = Call(*flat)
    with torch.cuda.device_of(call.planes):
        params, _, launch = _prepare("forward", call)
        results = _empty_results(call)
        params.features, params.depth, params.opacity, params.distortion, kept = map(pointer, results)
        params.kept = kept if call.keep else None
        launch()
    return results


def _gradients(
    g_features: Tensor | None,
    g_depth: Tensor | None,
    g_opacity: Tensor | None,
    g_distortion: Tensor | None,
    kept: Tensor,
    *flat: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of planes and of w1, b1, w2, b2, one after the other in one tensor."""
    call = Call(*flat)
    planes, variant = call.planes, build.Variant(*call.variant)
    given = [None if g is None else g.float().contiguous() for g in (g_features, g_depth, g_opacity, g_distortion)]
    with torch.cuda.device_of(planes):
        params, blocks, launch = _prepare("backward", call)
        params.g_features, params.g_depth, params.g_opacity, params.g_distortion = map(pointer, given)
        params.kept = pointer(kept)
        params.partials = blocks if variant.deterministic else min(blocks, PARTIALS)
        partial = call.w1.new_zeros(params.partials, build.partial_size(variant))
        params.partial = pointer(partial)
        if not variant.deterministic:
            g_planes = torch.zeros_like(planes)
            params.g_planes = pointer(g_planes)
            launch()
            return g_planes, partial.sum(0)
        # Twice: first to find the largest addend, then to add up multiples of a unit that suits it, as integers.
        fixed, largest = torch.zeros_like(planes, dtype=torch.int64), call.scene.new_zeros((), dtype=torch.int32)
        params.g_planes, params.largest = pointer(fixed), pointer(largest)
        for params.measure in (1, 0):
            launch()
        exponent = (largest >> 23) - 127
        unit = torch.where(exponent > 127, torch.nan, torch.exp2((exponent - 37).double()))
        return (fixed * unit).float(), partial.sum(0)


def _fake_gradients(*flat: Any) -> tuple[Tensor, Tensor]:
    call = Call(*flat[-len(Call._fields) :])
    size = build.partial_size(build.Variant(*call.variant))
    return torch.empty_like(call.planes), call.w1.new_empty(size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, _, opacity, _, kept = output
    ctx.save_for_backward(*inputs[:TENSORS], opacity, kept)
    ctx.numbers = inputs[TENSORS:]


def _backward(run: Any, ctx: Any, *grads: Tensor | None) -> Any:
    g_features = grads[0]
    *inputs, opacity, kept = ctx.saved_tensors
    weights, background = inputs[1:5], inputs[7]
    g_planes: Any = None
    g_mlp: Any = (None,) * 4
    if any(ctx.needs_input_grad[:5]):
        g_planes, flat = run(*grads[:-1], kept, *inputs, *ctx.numbers)
        parts = flat.split([weight.numel() for weight in weights])
        g_mlp = tuple(part.view_as(weight) for part, weight in zip(parts, weights, strict=True))
    g_background = None
    if ctx.needs_input_grad[7] and g_features is not None:
        share = 2 * (1 - opacity)[..., None] * g_features
        g_background = share.sum(0) if background.ndim == 3 else share.flatten(0, 2).sum(0)
    return (g_planes, *g_mlp, None, None, g_background, *(None,) * (len(Call._fields) - 8))


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(_gradients, ctx, *grads)


_operator_backward = torch.library.custom_op(
    "igae::render_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor? g_features, Tensor? g_depth, Tensor? g_opacity, Tensor? g_distortion, Tensor kept, {SCHEMA})"
    " -> (Tensor, Tensor)",
)
_operator_backward.register_fake(_fake_gradients)
_operator = torch.library.custom_op(
    "igae::render", _forward, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operator.register_fake(lambda *flat: _empty_results(Call(*flat)))
_operator.register_autograd(
    lambda ctx, *grads: _backward(torch.ops.igae.render_backward, ctx, *grads), setup_context=_setup_context
)
