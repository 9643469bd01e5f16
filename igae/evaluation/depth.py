# SPDX-License-Identifier: Apache-2.0
"""Whether views of a scene agree about where its surfaces are."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igae.rendering import Cameras, pixel_rays

SOLID = 0.5
"""Opacity above which a pixel shows a surface."""
HIDDEN = 0.1
"""A point that is farther behind what a camera sees than this fraction of the box is hidden, not in the wrong place."""


class DepthMaps(NamedTuple):
    """B rendered views of one scene."""

    cameras: Cameras
    depth: Tensor
    """[B, h, w] distance from the camera along the ray, in the units of the cameras' positions."""
    opacity: Tensor
    """[B, h, w] in [0, 1]."""


def depth_errors(views: DepthMaps, others: DepthMaps, box: float) -> Tensor:
    """How far apart the surfaces that views see and those that a neighbor sees are, in percent of the box's side.

    A view's neighbor is the one of the others that looks in the most similar direction. Each point that the view sees
    is compared with the neighbor's depth, interpolated to the ray through this very point. Points that the neighbor
    does not see are left out: outside of its image, at the edge of a surface, or hidden.

    Args:
        views, others: of the same scene, B and N.
        box: side of the box, in the units of depths.

    Returns:
        Mean absolute difference of each view, float64 [n]; n <= B, as views without any such point are left out.
    """
    poses, lenses = others.cameras.cam2world.double(), others.cameras.intrinsics.double()
    forward = views.cameras.cam2world[:, None, :3, 2].double()
    nearest = (forward * poses[:, :3, 2]).sum(-1).argmax(1)
    origins, directions = pixel_rays(views.cameras, torch.float64)
    points = (origins + views.depth.double().reshape(-1, 1) * directions).reshape(len(nearest), -1, 3)
    points = (points - poses[nearest, None, :3, 3]) @ poses[nearest, :3, :3]  # in the neighbor's space
    places = points @ lenses[nearest].mT
    places = (places[..., :2] / places[..., 2:].clamp_min(1e-9 * box)).clamp(-1.0, 2.0)  # image: 0 to 1
    maps = torch.stack([others.depth, others.opacity > SOLID], 1).double()[nearest]
    depth, solid = F.grid_sample(maps, 2.0 * places[:, None] - 1.0, align_corners=False)[:, :, 0].unbind(1)
    behind = points.norm(dim=-1) - depth
    visible = (points[..., 2] > 0) & (solid > 1 - 1e-6) & (behind <= HIDDEN * box)  # solid: all four pixels
    counted = visible & (views.opacity.flatten(1) > SOLID)
    some = counted.any(1)
    means: Tensor = torch.where(counted, behind.abs(), 0.0).sum(1)[some] / counted.sum(1)[some]
    return means * (100.0 / box)
