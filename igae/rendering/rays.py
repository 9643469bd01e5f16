# SPDX-License-Identifier: Apache-2.0
"""Rays through the pixels of pinhole cameras, and where they cross the box."""

from typing import NamedTuple

import torch
from torch import Tensor

NEAREST = 1e-3
"""Rays start at least this fraction of the box from their camera, which may stand in the box: 1/0 is no disparity."""


class Cameras(NamedTuple):
    """B pinhole cameras."""

    cam2world: Tensor
    """[B, 4, 4] from OpenCV camera space (x right, y down, z forward) to the world."""
    intrinsics: Tensor
    """[B, 3, 3] from camera space to the image, whose width and height are 1."""
    size: tuple[int, int]
    """Height and width of the images in pixels."""


def pixel_rays(cameras: Cameras, dtype: torch.dtype, side: int = 1) -> tuple[Tensor, Tensor]:
    """Rays through the centers of the side x side equal parts of each pixel.

    Origins and unit directions [B * h * w * side^2, 3] in world space: pixels row by row, and so the rays of each.
    """
    cam2world, intrinsics = cameras.cam2world.to(dtype), cameras.intrinsics.to(dtype)
    inside = (torch.arange(side, device=cam2world.device).to(dtype) + 0.5) / side
    v, u = (
        (torch.arange(count, device=cam2world.device).to(dtype)[:, None] + inside) / count for count in cameras.size
    )
    v, u = v[:, None, :, None], u[:, None, :]  # of [h, w, side, side]
    (fx, skew, cx), (_, fy, cy) = (intrinsics[:, row, :, None, None, None, None].unbind(1) for row in (0, 1))
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    # Written out instead of a matrix product, which autocast or TF32 would round.
    columns = cam2world[:, None, None, None, None, :3, :].unbind(-1)
    direction = columns[0] * x[..., None] + columns[1] * y[..., None] + columns[2]
    direction = direction / direction.norm(dim=-1, keepdim=True)
    return columns[3].expand_as(direction).reshape(-1, 3), direction.reshape(-1, 3)


def box_range(origins: Tensor, directions: Tensor, box: float) -> tuple[Tensor, Tensor]:
    """Distances [rays] at which rays enter and leave the cube [-box/2, box/2]^3 (slab method), both >= NEAREST * box.

    A ray that misses the cube, or whose origin has passed it, gets near = far = the distance at which it is closest to
    the center: samples without extent, hence no opacity.
    """
    tiny = torch.finfo(directions.dtype).tiny ** 0.5
    safe = torch.where(directions.abs() < tiny, torch.full_like(directions, tiny), directions)
    first, second = (-box / 2 - origins) / safe, (box / 2 - origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp(min=NEAREST * box)
    far = torch.maximum(first, second).amin(-1)
    closest = -(origins * directions).sum(-1).clamp(max=-NEAREST * box)
    hit = near < far
    return torch.where(hit, near, closest), torch.where(hit, far, closest)
