# SPDX-License-Identifier: Apache-2.0
"""Views moved in their image plane, each with its exact camera."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igae.models.config import AugmentConfig
from igae.models.views import Views
from igae.rendering import uniform

AUGMENT = 0x61756766
"""Stage tag of the random numbers, as those in igae/rendering/rng.py."""
NUMBERS = 4
"""Random numbers a view takes."""


def augment(views: Views, config: AugmentConfig, background: Tensor, numbers: Tensor) -> Views:
    """Shift, zoom and turn views with images, and their cameras.

    A pixel p of a view sees the direction K^-1 p. The new view has K' = K with a focal length z times as long and a
    shifted principal point, and its camera is turned around its axis by R: it sees along K'^-1 p' what the old one
    saw at K R^-1 K'^-1 p', which is an affine map of p'. Shifts are whole pixels, so they alone resample nothing.

    Args:
        background: uint8 [3], fills what comes from beyond the border, which masks count as empty.
        numbers: [B, 4] in [0, 1), which decide all.
    """
    assert views.images is not None
    height, width = views.images.shape[2:]
    shift = ((2 * numbers[:, :2] - 1) * (config.shift + 0.5)).round().clamp(-config.shift, config.shift)
    zoom = torch.exp((2 * numbers[:, 2] - 1) * math.log(config.zoom))
    angle = (2 * numbers[:, 3] - 1) * math.radians(config.rotate)
    old, intrinsics = views.intrinsics, views.intrinsics.clone()
    intrinsics[:, :2, :2] *= zoom[:, None, None]
    intrinsics[:, 0, 2] += shift[:, 0] / width
    intrinsics[:, 1, 2] += shift[:, 1] / height
    cos, sin = angle.cos(), angle.sin()
    # The linear part, K R^-1 K^-1 / z, written out: a matrix product might be rounded to TF32.
    fx, skew, fy = old[:, 0, 0], old[:, 0, 1], old[:, 1, 1]
    right = torch.stack([fx * cos - skew * sin, -fy * sin], 1) / fx[:, None]
    down = (torch.stack([fx * sin + skew * cos, fy * cos], 1) - right * skew[:, None]) / fy[:, None]
    u = (torch.arange(width, device=angle.device) + 0.5) / width - intrinsics[:, 0, 2:]
    v = (torch.arange(height, device=angle.device) + 0.5) / height - intrinsics[:, 1, 2:]
    at = right[:, None, None] * u[:, None, :, None] + down[:, None, None] * v[:, :, None, None]
    at = at / zoom.view(-1, 1, 1, 1) + old[:, None, None, :2, 2]
    fill = torch.cat([background, background.new_zeros(1)]).view(1, 4, 1, 1).float()
    masks = views.images[:, 0] if views.masks is None else views.masks
    given = torch.cat([views.images, masks[:, None]], 1).float() - fill
    moved = F.grid_sample(given, 2 * at - 1, mode="bicubic", align_corners=False) + fill
    moved = moved.round().clamp(0, 255).to(torch.uint8)
    x, y, *others = views.cam2world.unbind(2)
    turned = torch.stack([x * cos[:, None] - y * sin[:, None], x * sin[:, None] + y * cos[:, None], *others], 2)
    return replace(
        views,
        images=moved[:, :3],
        masks=None if views.masks is None else moved[:, 3],
        cam2world=turned,
        intrinsics=intrinsics,
    )


def augment_numbers(seed: int | Tensor, views: int, device: torch.device) -> Tensor:
    """Random numbers [views, 4] of a batch, as a pure function of its seed."""
    return uniform(seed, AUGMENT, views, NUMBERS, device)
