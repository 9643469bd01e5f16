# SPDX-License-Identifier: Apache-2.0
"""`render`: checks the arguments and hands them to a backend."""

import functools
import logging
import math
from typing import Literal

import torch
from torch import Tensor

from igae.rendering.config import RenderOptions
from igae.rendering.cuda import render_cuda, unsupported
from igae.rendering.mlp import DecodingMLP
from igae.rendering.ray_marching import Rendered, render_torch
from igae.rendering.rays import Cameras

BACKENDS = {"torch": render_torch, "cuda": render_cuda}

log_once = functools.cache(logging.getLogger(__name__).info)


def render(
    planes: Tensor,
    mlp: DecodingMLP,
    cameras: Cameras,
    options: RenderOptions,
    *,
    background: Tensor,
    scene: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
    distortion: bool = False,
) -> Rendered:
    """Render B views of S tri-planes.

    Args:
        planes: [S, 3, R, R, C], float32, or float64 (torch backend). Axes: scene, plane, row,
            column, feature; of plane axes (a, b) the coordinate a runs along columns and b along rows.
        mlp: from C features to a density and c color channels.
        cameras: of the B views.
        options: samples, box and conventions.
        background: [c] or [h, w, c] in [0, 1].
        scene: int64 [B], the row of `planes` that each view shows; None: view b shows row b. Rows are not checked.
        seed: makes the samples' jitter, together with the ray's place in the batch: an integer, or a 0-d int64 tensor.
            None: every jitter is 1/2.
        backend: "auto" takes cuda where it can, and says in the log, once, which it took and why.
        distortion: whether to render that too.

    Gradients flow to planes, mlp and background; cameras and positions of samples get none. Under autocast only the
    MLP runs in the lower precision (torch backend), or nothing does (cuda backend: see RenderOptions.precision).

    Raises:
        ValueError: a shape, dtype or device that does not fit, which it names.
    """
    _check_shapes(planes, mlp, cameras, background)
    views = len(cameras.cam2world)
    if scene is None:
        if len(planes) != views:
            raise ValueError(f"planes hold {len(planes)} scenes for {views} views; give scene, their rows")
        scene = torch.arange(views, device=planes.device)
    elif scene.dtype != torch.int64 or scene.shape != (views,):
        raise ValueError(f"scene is {scene.dtype} {list(scene.shape)}; it must be torch.int64 [{views}]")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.ndim != 0):
        raise ValueError(f"seed is {seed.dtype} {list(seed.shape)}; it must be an integer or a torch.int64 [] tensor")
    tensors = {"cam2world": cameras.cam2world, "intrinsics": cameras.intrinsics}
    for name, tensor in (tensors | {"background": background, "scene": scene}).items():
        if tensor.device != planes.device:
            raise ValueError(f"{name} is on {tensor.device} and planes are on {planes.device}; move them together")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
    chosen = backend
    if backend == "auto":
        why = unsupported(planes, mlp, options, views * math.prod(cameras.size))
        chosen = "cuda" if why is None else "torch"
        if not torch.compiler.is_compiling():
            log_once(f"the renderer uses {chosen}: {why or 'the kernels support this'}")
    return BACKENDS[chosen](planes, mlp, cameras, options, background, scene, seed, distortion)


def _check_shapes(planes: Tensor, mlp: DecodingMLP, cameras: Cameras, background: Tensor) -> None:
    shape, (cam2world, intrinsics, size) = list(planes.shape), cameras
    if planes.ndim != 5 or shape[1] != 3 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"planes are {shape}; they must be [scenes, 3, R, R, C]")
    if planes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"planes are {planes.dtype}; they must be torch.float32 or torch.float64")
    if shape[4] != mlp.in_channels:
        raise ValueError(f"planes are {shape} with {shape[4]} features and the MLP takes {mlp.in_channels}")
    if cam2world.ndim != 3 or cam2world.shape[1:] != (4, 4) or cam2world.shape[0] == 0:
        raise ValueError(f"cam2world is {list(cam2world.shape)}; it must be [views, 4, 4]")
    if intrinsics.shape != (len(cam2world), 3, 3):
        raise ValueError(f"intrinsics are {list(intrinsics.shape)}; they must be [{len(cam2world)}, 3, 3]")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size}; it must be (height, width), both positive")
    if background.shape not in ((mlp.out_channels,), (*size, mlp.out_channels)):
        wanted = f"[{mlp.out_channels}] or {[*size, mlp.out_channels]}"
        raise ValueError(f"background is {list(background.shape)}; it must be {wanted}")
