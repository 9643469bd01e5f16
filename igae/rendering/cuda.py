# SPDX-License-Identifier: Apache-2.0
"""The renderer as two CUDA kernels, with the signature of `reference.render_torch`.

Operators `igae::render` and `igae::render_backward`: they run on the current stream, never wait for the device, can be
captured in a CUDA graph (after one call outside it, which compiles and loads the kernels) and are known to
torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

from igae.kernels import pointer, unavailable
from igae.rendering import build
from igae.rendering.config import RenderOptions
from igae.rendering.launch import Params, load
from igae.rendering.mlp import DecodingMLP
from igae.rendering.options import Rendered

PARTIALS = 32
"""Places to which a backward pass's blocks add gradients of the MLP: at one they would wait for each other."""

_HALF, _VALUE, _TENSOR, _NOISE = range(4)  # where the jitter comes from: the enumeration in common.cuh


def unsupported(planes: Tensor, mlp: torch.nn.Module, size: tuple[int, int], options: RenderOptions) -> str | None:
    """Why the kernels cannot do this, in a sentence; None: they can."""
    features, resolution = planes.shape[4], planes.shape[2]
    why = unavailable("planes", planes)
    if why is not None:
        return why
    if planes.dtype not in (torch.float32, torch.bfloat16):
        return f"planes are {planes.dtype}; the kernels take torch.float32 and torch.bfloat16"
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
    if resolution < 2 or 3 * resolution**2 * features >= 2**31:
        return f"planes have {resolution} texels a side; the kernels take 2 to what 2^31 numbers a scene allow"
    return None


def render_cuda(
    planes: Tensor,
    mlp: DecodingMLP,
    cam2world: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    options: RenderOptions,
    background: Tensor,
    scene: Tensor,
    seed: int | Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
) -> Rendered:
    """See `igae.rendering.render`, which checks the arguments. Results are float32, also of bfloat16 planes.

    Raises ValueError with the sentence of `unsupported`.
    """
    why = unsupported(planes, mlp, size, options)
    if why is not None:
        raise ValueError(f"backend is cuda, but {why}")
    deterministic = options.deterministic or torch.are_deterministic_algorithms_enabled()
    product = options.reduce == "product"
    # Products of planes have a range that float16 has not.
    variant = [
        planes.shape[4], mlp.out_channels, options.coarse_samples, options.fine_samples, options.axes == "eg3d",
        product, options.spacing == "disparity", planes.dtype == torch.bfloat16, options.precision == "fp32" or product,
        deterministic,
    ]  # fmt: skip
    numbers = not isinstance(options.near, str) and not isinstance(options.far, str)
    jitter = _NOISE if noise is not None else _HALF if seed is None else _TENSOR if isinstance(seed, Tensor) else _VALUE
    value = seed if isinstance(seed, int) else 0
    # Outside torch.compile the operator's own way through the dispatcher costs more than the kernels of a small batch.
    run: Any = torch.ops.igae.render if torch.compiler.is_compiling() else _Render.apply
    trained = (planes, mlp.w1, mlp.b1, mlp.w2, mlp.b2)
    features, depth, opacity, _ = run(
        planes.contiguous(),
        *(x.float().contiguous() for x in (mlp.w1, mlp.b1, mlp.w2, mlp.b2)),
        *(x.detach().float().contiguous() for x in (cam2world, intrinsics)),
        background.float().contiguous(),
        scene.contiguous(),
        seed if isinstance(seed, Tensor) else None,
        *(noise_part.float().contiguous() for noise_part in noise or ()),
        *([None] * (0 if noise is not None else 2)),
        (value + 2**63) % 2**64 - 2**63,
        jitter,
        *size,
        float(options.near) if numbers else -1.0,
        float(options.far) if numbers else -1.0,
        options.box,
        torch.is_grad_enabled() and any(x.requires_grad for x in trained),
        [int(entry) for entry in variant],
    )
    return Rendered(features, depth, opacity)


def _params(
    planes: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cam2world: Tensor, intrinsics: Tensor,
    background: Tensor, scene: Tensor, seed: Tensor | None, noise_coarse: Tensor | None, noise_fine: Tensor | None,
    seed_value: int, jitter: int, height: int, width: int, near: float, far: float, box: float,
) -> Params:  # fmt: skip
    params = Params(
        seed_value=seed_value % 2**64, jitter=jitter, rays=cam2world.shape[0] * height * width, height=height,
        width=width, resolution=planes.shape[2], near=near, far=far, box=box,
        background_stride=0 if background.ndim == 1 else background.shape[-1],
    )  # fmt: skip
    tensors = {
        "planes": planes, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "cam2world": cam2world, "intrinsics": intrinsics,
        "background": background, "scene": scene, "seed": seed, "noise_coarse": noise_coarse, "noise_fine": noise_fine,
    }  # fmt: skip
    for name, tensor in tensors.items():
        setattr(params, name, pointer(tensor))
    return params


def _forward(
    planes: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cam2world: Tensor, intrinsics: Tensor,
    background: Tensor, scene: Tensor, seed: Tensor | None, noise_coarse: Tensor | None, noise_fine: Tensor | None,
    seed_value: int, jitter: int, height: int, width: int, near: float, far: float, box: float, keep: bool,
    variant: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Images, and what the backward pass needs of each ray if ``keep``: see KEPT in kernels/common.cuh."""
    params = _params(
        planes, w1, b1, w2, b2, cam2world, intrinsics, background, scene, seed, noise_coarse, noise_fine, seed_value,
        jitter, height, width, near, far, box,
    )  # fmt: skip
    with torch.cuda.device(planes.device):
        kernel = load("forward", _variant(variant), planes.device.index)
        results = _empty_results(cam2world, height, width, variant, keep)
        params.features, params.depth, params.opacity, kept = map(pointer, results)
        params.kept = kept if keep else None
        kernel(params)
    return results


def _variant(entries: list[int]) -> build.Variant:
    features, colors, coarse, fine = entries[:4]
    return build.Variant(features, colors, coarse, fine, *map(bool, entries[4:]))


def _empty_results(
    cam2world: Tensor, height: int, width: int, variant: list[int], keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, specialized = (cam2world.shape[0], height, width), _variant(variant)
    rays = cam2world.shape[0] * height * width if keep else 0
    return (
        cam2world.new_empty((*images, specialized.colors)),
        cam2world.new_empty(images),
        cam2world.new_empty(images),
        cam2world.new_empty(rays, build.kept_size(specialized)),
    )


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(args[5], args[14], args[15], args[20], args[19])


def _gradients(
    g_features: Tensor | None, g_depth: Tensor | None, g_opacity: Tensor | None, kept: Tensor,
    planes: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cam2world: Tensor, intrinsics: Tensor,
    background: Tensor, scene: Tensor, seed: Tensor | None, noise_coarse: Tensor | None, noise_fine: Tensor | None,
    seed_value: int, jitter: int, height: int, width: int, near: float, far: float, box: float, variant: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of planes (float32) and of w1, b1, w2, b2, one after the other in one tensor."""
    params = _params(
        planes, w1, b1, w2, b2, cam2world, intrinsics, background, scene, seed, noise_coarse, noise_fine, seed_value,
        jitter, height, width, near, far, box,
    )  # fmt: skip
    given = [None if g is None else g.float().contiguous() for g in (g_features, g_depth, g_opacity)]
    params.g_features, params.g_depth, params.g_opacity = map(pointer, given)
    params.kept = pointer(kept)
    specialized = _variant(variant)
    with torch.cuda.device(planes.device):
        kernel = load("backward", specialized, planes.device.index)
        blocks = kernel.blocks(params.rays)
        params.partials = blocks if specialized.deterministic else min(blocks, PARTIALS)
        partial = w1.new_zeros(params.partials, build.partial_size(specialized))
        params.partial = pointer(partial)
        if not specialized.deterministic:
            g_planes = torch.zeros_like(planes, dtype=torch.float32)
            params.g_planes = pointer(g_planes)
            kernel(params)
            return g_planes, partial.sum(0)
        # Twice: first to find the largest addend, then to add up multiples of a unit that suits it, as integers.
        fixed, largest = torch.zeros_like(planes, dtype=torch.int64), scene.new_zeros((), dtype=torch.int32)
        params.g_planes, params.largest = pointer(fixed), pointer(largest)
        params.measure = 1
        kernel(params)
        params.measure = 0
        kernel(params)
        exponent = (largest >> 23) - 127
        unit = torch.where(exponent > 127, torch.nan, torch.exp2((exponent - 37).double()))
        return (fixed * unit).float(), partial.sum(0)


def _fake_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    planes, w1, variant = args[4], args[5], args[-1]
    return torch.empty_like(planes, dtype=torch.float32), w1.new_empty(build.partial_size(_variant(variant)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12], output[2], output[3])
    *ctx.rest, _, ctx.variant = inputs[12:]


def _backward(
    run: Any, ctx: Any, g_features: Tensor | None, g_depth: Tensor | None, g_opacity: Tensor | None, _: Tensor | None
) -> Any:
    *inputs, opacity, kept = ctx.saved_tensors
    _, w1, b1, w2, b2, _, _, background = inputs[:8]
    g_planes: Any = None
    g_mlp: Any = (None,) * 4
    if any(ctx.needs_input_grad[:5]):
        g_planes, flat = run(g_features, g_depth, g_opacity, kept, *inputs, *ctx.rest, ctx.variant)
        parts = flat.split([w1.numel(), b1.numel(), w2.numel(), b2.numel()])
        g_mlp = tuple(part.view_as(weight) for part, weight in zip(parts, (w1, b1, w2, b2), strict=True))
    g_background = None
    if ctx.needs_input_grad[7] and g_features is not None:
        share = 2 * (1 - opacity)[..., None] * g_features
        g_background = share.sum(0) if background.ndim == 3 else share.flatten(0, 2).sum(0)
    return (g_planes, *g_mlp, None, None, g_background, *(None,) * 13)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(_gradients, ctx, *grads)


_operator = torch.library.custom_op("igae::render", _forward, mutates_args=(), device_types="cuda")
_operator.register_fake(_fake_forward)
_operator_backward = torch.library.custom_op("igae::render_backward", _gradients, mutates_args=(), device_types="cuda")
_operator_backward.register_fake(_fake_gradients)
_operator.register_autograd(
    lambda ctx, *grads: _backward(torch.ops.igae.render_backward, ctx, *grads), setup_context=_setup_context
)
