# SPDX-License-Identifier: Apache-2.0
"""What lies between an autoencoder's convolutions, the total variation of planes and LPIPS's distance, as CUDA kernels
(kernels/layers.cu): each number is read and written as rarely as can be.

Images are [B, C, H, W] with channels last in memory (others are copied), bfloat16 or float32; weights and sums are
float32. The kernels run on the current stream and can be captured in a CUDA graph. Equal calls give equal bits.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igae.kernels import LIBRARIES, Library, pointer

SOURCE = Path(__file__).parent / "kernels" / "layers.cu"
VARIANTS = {torch.float32: {"HALF": 0}, torch.bfloat16: {"HALF": 1}}
KERNELS = [(SOURCE, variant) for variant in VARIANTS.values()]
"""What can be compiled ahead of time, with its macros."""
THREADS, MOST_CHANNELS, COEFFICIENTS = 256, 2048, 5
GEOMETRY = ((1, 1), (1, 1), (1, 1))
"""Padding, stride and dilation of a convolution."""
SHORTEST = 1e-10
"""Features of no more length have no direction."""
BLOCKS = 1056
"""About as many as an H200 runs at once."""
NAMES = "norm_sums norm_coefficients norm_apply norm_gradient_sums norm_gradient_means norm_gradient".split()
NAMES += "bias_sum fold_weights unfold_weights weave unweave variation variation_gradient".split()
NAMES += ["feature_distance", "feature_distance_gradient"]


class Params(ctypes.Structure):
    """The kernels' argument: `struct Params` in kernels/common.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x y skip out bias weight shift sums coefficients means".split()),
        *((name, ctypes.c_void_p) for name in ("gradients", "totals")),
        *((name, ctypes.c_int64) for name in "images pixels channels chunks height width groups".split()),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int),
    ]


@functools.cache
def _load(kind: type[Library], dtype: torch.dtype, device: torch.device) -> Library:
    """The kernels, compiled if need be. The device must be the current one."""
    return kind(SOURCE, VARIANTS[dtype], device, NAMES)


@functools.cache
def _runs(kind: type[Library] | None, device: torch.device) -> bool:
    return kind is not None and kind.missing(device) is None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on a device."""
    return _runs(LIBRARIES.get(device.type), device)


def fits(x: Tensor, channels: int) -> bool:
    """Whether the kernels take numbers like x with so many channels. Inside torch.compile they take none."""
    known = x.dtype in VARIANTS and channels % 8 == 0 and channels <= MOST_CHANNELS
    return not torch.compiler.is_compiling() and known and runs_on(x.device)


class _Call:
    """Launches of kernels over images [B, ..., C], whose other dimensions are pixels."""

    def __init__(self, x: Tensor, images: int | None = None, **fields: Any) -> None:
        self.channels, self.images = x.shape[-1], images or len(x)
        self.pixels = x.numel() // self.images // self.channels
        rows = THREADS // (self.channels // 8)
        self.chunks = max(1, min(-(-BLOCKS // self.images), -(-self.pixels // (4 * rows))))
        self.x, self.params = x, Params(**fields)
        self.resize(self.images, self.pixels, self.channels)

    def resize(self, images: int, pixels: int, channels: int) -> None:
        params = self.params
        params.images, params.pixels, params.channels, params.chunks = images, pixels, channels, self.chunks

    def launch(self, name: str, blocks: int | None = None, threads: int = THREADS, **tensors: Tensor | None) -> None:
        for field, tensor in tensors.items():
            setattr(self.params, field, pointer(tensor))
        with torch.cuda.device_of(self.x):
            library = _load(LIBRARIES[self.x.device.type], self.x.dtype, self.x.device)
            library.launch(name, blocks or self.params.images * self.params.chunks, threads, self.params)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, weight: Tensor, shift: Tensor, groups: int, eps: float, silu: bool):  # type: ignore[no-untyped-def]
        call = _Call(x, groups=groups, eps=eps, silu=silu)
        count, channels, floats = call.images, call.channels, weight.new_empty
        coefficients, y = floats(count, COEFFICIENTS, channels), torch.empty_like(x)
        sums = floats(count, call.chunks, 2, channels)
        call.launch("norm_sums", x=x, sums=sums)
        call.launch(
            "norm_coefficients", count * groups, 32, coefficients=coefficients, bias=bias, weight=weight, shift=shift
        )
        call.launch("norm_apply", out=y)
        ctx.save_for_backward(x, weight, coefficients)
        ctx.settings = {"groups": groups, "eps": eps, "silu": silu}
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor, skip: Tensor | None):  # type: ignore[no-untyped-def]
        x, weight, coefficients = ctx.saved_tensors
        call, count = _Call(x, **ctx.settings), len(x)
        g, skip, dx = g.contiguous(), None if skip is None else skip.contiguous(), torch.empty_like(x)
        means, parts = weight.new_empty(count, 2, call.params.groups), weight.new_empty(count, 3, call.channels)
        sums = weight.new_empty(count, call.chunks, 2, call.channels)
        call.launch("norm_gradient_sums", x=x, y=g, coefficients=coefficients, sums=sums)
        call.launch("norm_gradient_means", count * call.params.groups, 32, weight=weight, means=means, gradients=parts)
        call.launch("norm_gradient", skip=skip, out=dx, totals=(totals := weight.new_empty(3, call.channels)))
        of_weight, of_shift, of_bias = totals
        return dx, of_bias if ctx.needs_input_grad[1] else None, of_weight, of_shift, None, None, None


class _BiasSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, y: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_x = x is not None
        _Call(y, images=1).launch("bias_sum", x=x, y=y, bias=bias, out=(out := torch.empty_like(y)))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        return g if ctx.has_x else None, g, _over_pixels(g) if ctx.needs_input_grad[2] else None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        outputs, *_, inputs = ctx.shape = weight.shape
        out = weight.new_empty(4 * outputs, 2, 2, inputs, dtype=dtype)
        call = _Call(out)
        call.resize(1, outputs, inputs)
        call.launch("fold_weights", -(-out.numel() // 8 // THREADS), weight=weight, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        g, gradient = g.contiguous(), torch.empty(ctx.shape, device=g.device)
        call = _Call(g)
        call.resize(1, ctx.shape[0], ctx.shape[-1])
        call.launch("unfold_weights", -(-gradient.numel() // 8 // THREADS), x=g, gradients=gradient)
        return gradient, None


class _Weave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        count, height, width, channels = x.shape
        ctx.shape = x.shape
        out = x.new_empty(count, 2 * height - 2, 2 * width - 2, channels // 4)
        _Call(out, height=height - 1, width=width - 1).launch("weave", x=x, bias=bias, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        g, out = g.contiguous(), g.new_empty(ctx.shape)
        _Call(out, height=ctx.shape[1] - 1, width=ctx.shape[2] - 1).launch("unweave", x=g, out=out)
        return out, _over_pixels(g) if ctx.needs_input_grad[1] else None


class _Variation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes: Tensor, weights: Tensor) -> Tensor:
        call = _Call(planes, height=planes.shape[1], width=planes.shape[2])
        call.launch("variation", x=planes, weight=weights, sums=(sums := planes.new_empty(len(planes), call.chunks)))
        ctx.save_for_backward(planes, weights)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        planes, weights = ctx.saved_tensors
        call = _Call(planes, height=planes.shape[1], width=planes.shape[2])
        call.launch("variation_gradient", x=planes, weight=weights, shift=g, out=(out := torch.empty_like(planes)))
        return out, None


class _FeatureDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        call = _Call(x, eps=SHORTEST)
        sums = weight.new_empty(len(x), call.chunks)
        call.launch("feature_distance", x=x, y=y, weight=weight, sums=sums)
        ctx.save_for_backward(x, y, weight)
        return sums.sum(1) / call.pixels

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, y, weight = ctx.saved_tensors
        call, out = _Call(x, eps=SHORTEST), torch.empty_like(x)
        call.launch("feature_distance_gradient", x=x, y=y, weight=weight, shift=g / call.pixels, out=out)
        return out, None, None


class _RectifiedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.cudnn_convolution_relu(x, weight, bias, *GEOMETRY, 1)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, weight, y = ctx.saved_tensors
        g = torch.ops.aten.threshold_backward(g, y, 0)
        settings = (None, *GEOMETRY, False, (0, 0), 1, (True, False, False))
        return torch.ops.aten.convolution_backward(g, x, weight, *settings)[0], None, None


def _over_pixels(g: Tensor) -> Tensor:
    """Sums [C], float32, over all else of g [..., C]."""
    g = g.reshape(-1, g.shape[-1])
    if g.dtype == torch.float32:
        return g.sum(0)
    return (g.new_ones(1, len(g)) @ g)[0].float()  # as fast as reading g; torch's sum takes twice as long


def _last(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, ..., C], contiguous."""
    return x.movedim(1, -1).contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def norm(x: Tensor, module: nn.GroupNorm, silu: bool = False, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Group normalization of x [B, C, ...] + bias [C], and SiLU of it; and x, for a sum with something of the result:
    then the gradients of both come in one pass."""
    y, same = _Norm.apply(
        _last(x), _float(bias), module.weight.float(), module.bias.float(), module.num_groups, module.eps, silu
    )  # type: ignore[no-untyped-call]
    return y.movedim(-1, 1), same.movedim(-1, 1)


def bias_sum(x: Tensor | None, y: Tensor, bias: Tensor | None) -> Tensor:
    """x + y + bias, of x (may be left out) and y [B, C, H, W] and bias [C]."""
    out: Tensor = _BiasSum.apply(None if x is None else _last(x.to(y.dtype)), _last(y), _float(bias))  # type: ignore[no-untyped-call]
    return out.movedim(-1, 1)


def fold(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`igae.models.layers.folded`; the result is of another dtype."""
    out: Tensor = _Fold.apply(_last(weight.float()), dtype)  # type: ignore[no-untyped-call]
    return out.movedim(-1, 1)


def weave(x: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`igae.models.layers.woven`; bias [C] is added."""
    out: Tensor = _Weave.apply(_last(x), _float(bias))  # type: ignore[no-untyped-call]
    return out.movedim(-1, 1)


def planes_variation(planes: Tensor, weights: Tensor) -> Tensor:
    """:func:`igae.models.losses.total_variation` of planes [S, 3, R, R, C], float32, whose scenes have weights [S]."""
    shares = (weights / planes.shape[1]).repeat_interleave(planes.shape[1])
    variation: Tensor = _Variation.apply(planes.contiguous().flatten(0, 1), shares)  # type: ignore[no-untyped-call]
    return variation


def feature_distance(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Of each image [B], float32, the mean over pixels of sum_c weight[c] (x_c / |x| - y_c / |y|)^2, for features x
    and y [B, C, H, W]. Only x gets a gradient, of 0 where |x| is 0."""
    distance: Tensor = _FeatureDistance.apply(_last(x), _last(y), weight)  # type: ignore[no-untyped-call]
    return distance


def rectified_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU of the convolution (padding 1) with constant weights [O, C, 3, 3] and bias [O] on a GPU, of their dtype."""
    y: Tensor = _RectifiedConvolution.apply(x.to(weight.dtype), weight, bias)  # type: ignore[no-untyped-call]
    return y
