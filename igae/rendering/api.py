# SPDX-License-Identifier: Apache-2.0
"""`render`: checks the arguments and hands them to a backend."""

import logging
from typing import Literal

import torch
from torch import Tensor

from igae.rendering.config import RenderOptions
from igae.rendering.cuda import render_cuda, unsupported
from igae.rendering.mlp import DecodingMLP
from igae.rendering.options import Rendered
from igae.rendering.reference import render_torch

BACKENDS = {"torch": render_torch, "cuda": render_cuda}

_log = logging.getLogger(__name__)
_said: set[str] = set()


def render(
    planes: Tensor,
    mlp: DecodingMLP,
    cam2world: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    options: RenderOptions,
    *,
    background: Tensor,
    scene: Tensor | None = None,
    seed: int | Tensor | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Rendered:
    """Render B views of S tri-planes.

    Args:
        planes: [S, 3, R, R, C], float32, float64 (torch backend) or bfloat16 (cuda backend). Axes: scene, plane, row,
            column, feature; of plane axes (a, b) the coordinate a runs along columns and b along rows.
        mlp: from C features to a density and c color channels.
        cam2world: [B, 4, 4], OpenCV cameras (x right, y down, z forward).
        intrinsics: [B, 3, 3], normalized by the image's width and height.
        size: height and width of the images in pixels.
        options: samples, box and conventions.
        background: [c] or [h, w, c] in [0, 1].
        scene: int64 [B], the row of `planes` that each view shows; None: view b shows row b. Rows are not checked.
        seed: makes the samples' jitter, together with the ray's place in the batch: an integer, or a 0-d int64 tensor.
        noise: the jitter itself, [B * h * w, coarse_samples] and [B * h * w, fine_samples] in [0, 1). With neither
            seed nor noise every jitter is 1/2.
        backend: "auto" takes cuda where it can, and says in the log, once, which it took and why.

    Gradients flow to planes, mlp and background; cameras and positions of samples get none. Under autocast only the
    MLP runs in the lower precision (torch backend), or nothing does (cuda backend: see RenderOptions.precision).

    Raises:
        ValueError: a shape, dtype or device that does not fit, which it names.
    """
    _check(planes, mlp, cam2world, intrinsics, size, background)
    views = cam2world.shape[0]
    if scene is None:
        if planes.shape[0] != views:
            raise ValueError(f"planes hold {planes.shape[0]} scenes for {views} views; give scene, their rows")
        scene = torch.arange(views, device=planes.device)
    elif scene.dtype != torch.int64 or scene.shape != (views,):
        raise ValueError(f"scene is {scene.dtype} {list(scene.shape)}; it must be torch.int64 [{views}]")
    tensors = {"cam2world": cam2world, "intrinsics": intrinsics, "background": background, "scene": scene}
    if noise is not None:
        if seed is not None:
            raise ValueError("both seed and noise are given; give one of them")
        _check_noise(noise, views * size[0] * size[1], options)
        tensors |= {"noise[0]": noise[0], "noise[1]": noise[1]}
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.ndim != 0):
        raise ValueError(f"seed is {seed.dtype} {list(seed.shape)}; it must be an integer or a torch.int64 [] tensor")
    for name, tensor in tensors.items():
        if tensor.device != planes.device:
            raise ValueError(f"{name} is on {tensor.device} and planes are on {planes.device}; move them together")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
    chosen = backend
    if backend == "auto":
        why = unsupported(planes, mlp, size, options)
        chosen = "cuda" if why is None else "torch"
        message = f"the renderer uses {chosen}: {why or 'the kernels support this'}"
        if not torch.compiler.is_compiling() and message not in _said:
            _said.add(message)
            _log.info(message)
    if chosen == "torch" and planes.dtype == torch.bfloat16:
        raise ValueError("planes are torch.bfloat16, which only the cuda backend takes")
    return BACKENDS[chosen](planes, mlp, cam2world, intrinsics, size, options, background, scene, seed, noise)


def _check(
    planes: Tensor,
    mlp: DecodingMLP,
    cam2world: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    background: Tensor,
) -> None:
    shape = list(planes.shape)
    if planes.ndim != 5 or shape[1] != 3 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"planes are {shape}; they must be [scenes, 3, R, R, C]")
    if planes.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"planes are {planes.dtype}; they must be torch.float32, torch.float64 or torch.bfloat16")
    if shape[4] != mlp.in_channels:
        raise ValueError(f"planes are {shape} with {shape[4]} features and the MLP takes {mlp.in_channels}")
    if cam2world.ndim != 3 or cam2world.shape[1:] != (4, 4) or cam2world.shape[0] == 0:
        raise ValueError(f"cam2world is {list(cam2world.shape)}; it must be [views, 4, 4]")
    if intrinsics.shape != (cam2world.shape[0], 3, 3):
        raise ValueError(f"intrinsics are {list(intrinsics.shape)}; they must be [{cam2world.shape[0]}, 3, 3]")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size}; it must be (height, width), both positive")
    if background.shape not in ((mlp.out_channels,), (*size, mlp.out_channels)):
        wanted = f"[{mlp.out_channels}] or {[*size, mlp.out_channels]}"
        raise ValueError(f"background is {list(background.shape)}; it must be {wanted}")


def _check_noise(noise: tuple[Tensor, Tensor], rays: int, options: RenderOptions) -> None:
    for index, count in enumerate((options.coarse_samples, options.fine_samples)):
        if noise[index].shape != (rays, count):
            raise ValueError(f"noise[{index}] is {list(noise[index].shape)}; it must be [{rays}, {count}]")
