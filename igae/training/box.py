# SPDX-License-Identifier: Apache-2.0
"""Whether what the views show is in the box that is rendered."""

import logging
from contextlib import closing
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from igae.data import ViewBatch
from igae.rendering import Cameras, box_range, pixel_rays
from igae.training.rank_data import RankData

VIEWS = 64
GRID = 32
"""Rays of a view are GRID x GRID."""
FEWEST, ENOUGH = 0.5, 0.9
"""Shares of the rays that meet the box: fewer are refused, or told."""
NEEDED = 0.98
"""Share of the rays that a box which would do meets."""
log = logging.getLogger("igae")


def check_box(box: float, data: RankData) -> None:
    """Look at some views of this rank's scenes, before anything is trained.

    Args:
        box: side of the cube around the origin.

    Raises:
        ValueError: most rays to what the views show miss the box.
    """
    if not data.owned:
        return
    here = replace(data, config=data.config.model_copy(update={"workers": 0}))
    count = min(VIEWS, int(data.owned.views.sum()))
    with closing(here.open_views(count, repeat=False)) as views:
        origins, directions = rays_to_objects(next(views))
    share = meeting(origins, directions, box)
    if not len(origins) or share >= ENOUGH:
        return
    sides = [box * 1.1**step for step in range(1, 80)]
    needed = next((side for side in sides if meeting(origins, directions, side) >= NEEDED), None)
    moved = any(scene.normalization for scene in data.scenes)
    ways = [] if moved else ["pack the scenes with --normalize cameras"]
    mend = ", or ".join([*ways, *([f"set render.box={needed:.2g}"] if needed else [])]) or "look at their cameras"
    text = f"{100 * share:.0f} % of the rays to what the views show meet the box of side {box:g} around the origin"
    if share < FEWEST:
        raise ValueError(f"only {text}: {mend}")
    log.warning("only %s; if objects are cut off, %s", text, mend)


def rays_to_objects(views: ViewBatch) -> tuple[Tensor, Tensor]:
    """Origins and directions [rays, 3] of rays to pixels that masks say are of an object; where masks say that all are,
    as in a photograph, of those to the middle of the view."""
    shown = F.adaptive_avg_pool2d(views.masks[:, None].float(), GRID)[:, 0] > 127.5
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[GRID // 4 : GRID - GRID // 4] = True
    full = shown.float().mean((1, 2), keepdim=True) > 0.9
    shown &= ~full | (inside[:, None] & inside)
    origins, directions = pixel_rays(Cameras(views.cam2world, views.intrinsics, (GRID, GRID)), torch.float32)
    chosen = shown.flatten()
    return origins[chosen], directions[chosen]


def meeting(origins: Tensor, directions: Tensor, box: float) -> float:
    """Share of the rays that meet a box."""
    near, far = box_range(origins, directions, box)
    return float((near < far).float().mean()) if len(near) else 1.0
