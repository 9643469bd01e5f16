# SPDX-License-Identifier: Apache-2.0
"""Ray marching in plain PyTorch: the definition that the CUDA kernels have to reproduce.

Shapes: N rays, K coarse and K' fine samples on each, C features of a point, c color channels. `docs/rendering.md`
has the formulas.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from igae.rendering.config import RenderOptions
from igae.rendering.mlp import DecodingMLP
from igae.rendering.rays import Cameras, box_range, pixel_rays
from igae.rendering.rng import COARSE, FINE, uniform

PLANE_AXES = {"orthogonal": ((0, 1), (0, 2), (1, 2)), "eg3d": ((0, 1), (0, 2), (2, 0))}

LEAK = 1e-10
"""Added to the transmittance of every interval."""
FAINT = 1e-6
"""Opacity below which the depth fades to the end of the ray, instead of being a quotient of two vanishing sums."""


class Rendered(NamedTuple):
    """Images of B views, h x w pixels, c channels, in the dtype of the planes."""

    features: Tensor
    """[B, h, w, c] in [-1, 1], up to the 0.002 by which colors may overshoot."""
    depth: Tensor
    """[B, h, w] mean distance along the rays; the end of the ray's samples where there is nothing to see."""
    opacity: Tensor
    """[B, h, w] in [0, 1]."""
    distortion: Tensor | None = None
    """[B, h, w] how far from each other along the rays what is seen lies, in sides of the box; None: not asked for."""


def render_torch(
    planes: Tensor,
    mlp: DecodingMLP,
    cameras: Cameras,
    options: RenderOptions,
    background: Tensor,
    scene: Tensor,
    seed: int | Tensor | None,
    distortion: bool = False,
) -> Rendered:
    """See `igae.rendering.render`, which checks the arguments."""
    dtype, device = planes.dtype, planes.device
    shape = (len(cameras.cam2world), *cameras.size, options.rays_per_pixel**2)
    rays, scene_of_ray = math.prod(shape), scene.repeat_interleave(math.prod(shape[1:]))

    def jitter(stage: int, count: int) -> Tensor:
        if seed is None:
            return torch.full((rays, count), 0.5, dtype=dtype, device=device)
        return uniform(seed, stage, rays, count, device).to(dtype)

    def field(t: Tensor) -> tuple[Tensor, Tensor]:
        points = origins[:, None] + t[..., None] * directions[:, None]
        density, color = mlp(plane_features(planes, scene_of_ray, points, options))
        return density, color

    with torch.no_grad():
        origins, directions = pixel_rays(cameras, dtype, options.rays_per_pixel)
        if isinstance(options.near, str) or isinstance(options.far, str):
            near, far = box_range(origins, directions, options.box)
        else:
            near, far = (origins.new_full(origins.shape[:1], bound) for bound in (options.near, options.far))
        t = coarse_depths(near, far, jitter(COARSE, options.coarse_samples), options.spacing)
    density, color = field(t)
    if options.fine_samples > 0:
        with torch.no_grad():
            fine_t = importance_depths(t, interval_weights(t, density), jitter(FINE, options.fine_samples))
        fine_density, fine_color = field(fine_t)
        t = torch.cat((t, fine_t), 1)
        density, color = torch.cat((density, fine_density), 1), torch.cat((color, fine_color), 1)
    results = composite(t, density, color, distortion)
    seen, depth, opacity, *spread = (result.unflatten(0, shape).mean(3) for result in results if result is not None)
    features = 2 * (seen + (1 - opacity[..., None]) * background.to(dtype)) - 1
    return Rendered(features, depth, opacity, spread[0] / options.box if distortion else None)


def coarse_depths(near: Tensor, far: Tensor, jitter: Tensor, spacing: str) -> Tensor:
    """Distances [N, K], ascending, from near and far [N] and jitter [N, K] in [0, 1).

    Sample k lies between steps k and k + 1 of K - 1 steps from near to far, so the last one may lie behind far. In
    disparity it is kept at far: behind it the inverse could reach zero.
    """
    count = jitter.shape[1]
    step = (torch.arange(count, device=jitter.device) + jitter) / (count - 1)
    near, far = near[:, None], far[:, None]
    if spacing == "disparity":
        return 1 / (1 / near + step.clamp(max=1) * (1 / far - 1 / near))
    return near + step * (far - near)


def plane_features(planes: Tensor, scene_of_ray: Tensor, points: Tensor, options: RenderOptions) -> Tensor:
    """Features [N, K, C] of points [N, K, 3], from planes [S, 3, R, R, C] of the scenes scene_of_ray [N].

    Bilinear with half-pixel centers and zeros outside. One weighted sum over table rows instead of grid_sample: it
    reads the planes as they lie in memory, needs no copy of a scene for each of its views, and its gradient is faster.
    """
    resolution, channels = planes.shape[2], planes.shape[4]
    with torch.no_grad():
        q = points * (2 / options.box)
        uv = torch.stack([torch.stack((q[..., a], q[..., b]), -1) for a, b in PLANE_AXES[options.axes]], -2)
        pixel = (uv + 1) * (resolution / 2) - 0.5
        first = pixel.floor()
        fraction = pixel - first
        corner = torch.stack((first, first + 1), -1)  # [N, K, plane, axis, low | high]
        weight = torch.stack((1 - fraction, fraction), -1) * ((corner >= 0) & (corner < resolution))
        # Clamped again as integers: positions of broken planes are NaN, which must give NaN and not a wild read.
        corner = corner.clamp(0, resolution - 1).long().clamp_(0, resolution - 1)
        plane = scene_of_ray[:, None, None] * 3 + torch.arange(3, device=planes.device)
        row = plane[..., None] * resolution + corner[..., 1, :]
        index = row[..., :, None] * resolution + corner[..., 0, None, :]  # [N, K, plane, v, u]
        weight = weight[..., 1, :, None] * weight[..., 0, None, :]
        taps = 12 if options.reduce == "sum" else 4
    table = planes.reshape(-1, channels)
    read = weighted_rows(table, index.view(-1, taps), weight.view(-1, taps))
    if options.reduce == "product":
        xy, xz, last = read.view(-1, 3, channels).unbind(1)
        read = xy * xz * last
    return read.view(*points.shape[:2], channels)


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums [M, C] of rows of a table [T, C]: of those at index [M, n], times weight [M, n], which gets no gradient."""
    if table.device.type == "cpu":
        sums: Tensor = _WeightedRows.apply(table, index, weight)  # type: ignore[no-untyped-call]
        return sums
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


class _WeightedRows(torch.autograd.Function):
    """embedding_bag with a gradient for CPUs, the same to the last bit. torch's own sorts the index first, which takes
    most of its time; a product with a sparse matrix takes the entries as they come."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        point = torch.arange(len(index))[:, None].expand_as(index)
        places = torch.stack((index.flatten(), point.flatten()))
        size = (ctx.rows, len(index))
        taps = torch.sparse_coo_tensor(places, weight.flatten(), size, check_invariants=False)
        return torch.sparse.mm(taps, gradient), None, None


def interval_weights(t: Tensor, density: Tensor) -> Tensor:
    """Weights [N, K - 1] of the intervals between sorted samples, from distances and raw densities [N, K]."""
    optical_depth = F.softplus((density[:, 1:] + density[:, :-1]) / 2 - 1) * t.diff(dim=1)
    # The product of 1 - alpha + LEAK over the intervals in front, as a sum of logarithms: the gradient of cumprod makes
    # the host wait for the GPU.
    leak = torch.full_like(optical_depth[:, :1], math.log(LEAK))
    passed = torch.logaddexp(-optical_depth, leak)[:, :-1].cumsum(1)
    return -torch.expm1(-optical_depth) * F.pad(passed, (1, 0)).exp()


def distortion_of(t: Tensor, w: Tensor) -> Tensor:
    """sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3 [N], of weights w [N, K - 1], middles m, lengths d of intervals.

    These lie between sorted samples t [N, K], whose unit is that of the result.
    """
    # Two middles are as far apart as the steps from each one to the next between them: a step counts for all in front
    # of it and all behind it.
    front = w.cumsum(1)
    steps = (t[:, 2:] - t[:, :-2]) * front[:, :-1] * (front[:, -1:] - front[:, :-1])
    return steps.sum(1) + (w.square() * t.diff(dim=1)).sum(1) / 3


def composite(
    t: Tensor, density: Tensor, color: Tensor, distortion: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Samples in any order ([N, K], [N, K], [N, K, c]) -> sum of w * color [N, c], depth, opacity, distortion [N]."""
    t, order = t.sort(dim=1, stable=True)
    w = interval_weights(t, density.gather(1, order))
    opacity = w.sum(1)
    # The mean over an interval's ends, weighted, is half the interval's weight for each end.
    sample_weight = (F.pad(w, (0, 1)) + F.pad(w, (1, 0))) / 2
    end = t[:, -1]
    depth = end + (sample_weight * (t - end[:, None])).sum(1) / opacity.clamp(min=FAINT)
    depth = torch.minimum(torch.maximum(depth, t[:, 0]), end)
    spread = distortion_of(t, w) if distortion else None
    # Weights go back to the samples' own order, which is cheaper than bringing the colors into theirs.
    sample_weight = torch.zeros_like(sample_weight).scatter(1, order, sample_weight)
    return (sample_weight[..., None] * color).sum(1), depth, opacity, spread


def importance_probabilities(weights: Tensor) -> Tensor:
    """Probabilities [N, K - 1] of drawing from each interval: its weight, spread to its neighbors, and a floor."""
    padded = F.pad(weights, (1, 1))
    pair = torch.maximum(padded[:, 1:], padded[:, :-1])
    smooth = (pair[:, 1:] + pair[:, :-1]) / 2 + 0.01
    return smooth / smooth.sum(1, keepdim=True)


def importance_depths(t: Tensor, weights: Tensor, jitter: Tensor) -> Tensor:
    """K' stratified distances [N, K'] by the inverse CDF, from sorted t [N, K], weights [N, K - 1], jitter [N, K']."""
    count = jitter.shape[1]
    u = (torch.arange(count, device=t.device) + jitter) / count
    probability = importance_probabilities(weights)
    upper = probability.cumsum(1)
    # Rounding may leave the last bound below a draw.
    interval = torch.searchsorted(upper, u, right=True).clamp(max=weights.shape[1] - 1)
    lower = F.pad(upper, (1, 0)).gather(1, interval)
    fraction = ((u - lower) / probability.gather(1, interval)).clamp(0, 1)
    return torch.lerp(t.gather(1, interval), t.gather(1, interval + 1), fraction)
