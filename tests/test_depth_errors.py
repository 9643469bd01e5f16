# SPDX-License-Identifier: Apache-2.0
"""Depth consistency: scenes whose depth is known in closed form, and the definition, one pixel at a time."""

import math

import pytest
import torch
from torch import Tensor

from igae.data import orbit
from igae.evaluation.depth import DepthMaps, depth_errors
from igae.rendering import Cameras, pixel_rays

LENS = torch.tensor([[1.4, 0.0, 0.5], [0.0, 1.4, 0.5], [0.0, 0.0, 1.0]])
SKEWED = torch.tensor([[1.5, 0.1, 0.55], [0.0, 1.8, 0.45], [0.0, 0.0, 1.0]])
BOX = 2.0
RADIUS = 0.7  # of the sphere; a shadow of 10 % of the box is 0.2 deep


def cameras(poses: Tensor, lens: Tensor = LENS, size: tuple[int, int] = (64, 64)) -> Cameras:
    return Cameras(poses, lens.expand(len(poses), 3, 3), size)


def sphere(seen_by: Cameras, radius: float = RADIUS) -> DepthMaps:
    """Around the origin; where a ray misses it: behind it, and transparent."""
    origins, directions = pixel_rays(seen_by, torch.float64)
    middle = -(origins * directions).sum(-1)
    inside = radius**2 - (origins + middle[:, None] * directions).square().sum(-1)
    depth = torch.where(inside > 0, middle - inside.clamp_min(0).sqrt(), 2 * middle)
    shape = (-1, *seen_by.size)
    return DepthMaps(seen_by, depth.reshape(shape), (inside > 0).double().reshape(shape))


def plane(seen_by: Cameras) -> DepthMaps:
    """Slanted, through the origin."""
    normal = torch.tensor([0.2, -0.1, 1.0], dtype=torch.float64)
    origins, directions = pixel_rays(seen_by, torch.float64)
    depth = (-(origins @ normal) / (directions @ normal)).reshape(-1, *seen_by.size)
    assert (depth > 0).all()
    return DepthMaps(seen_by, depth, torch.ones_like(depth))


def shifted(maps: DepthMaps, by: float) -> DepthMaps:
    return maps._replace(depth=maps.depth + by)


def ring(first: float, count: int, elevation: float = 0.4) -> Tensor:
    """Poses every 30 degrees."""
    poses = orbit(360, 3.0, elevation)
    return poses[[round(first + 30 * i) % 360 for i in range(count)]]


def test_a_sphere_is_where_all_views_see_it() -> None:
    views, others = sphere(cameras(ring(10, 3))), sphere(cameras(ring(0, 3)))
    found = depth_errors(views, others, BOX)
    assert found.shape == (3,) and found.dtype == torch.float64
    assert found.max() < 0.06  # percent of the box; measured 0.049, from the interpolation and points hidden by little
    views, others = (sphere(cameras(poses, size=(512, 512))) for poses in (ring(10, 3), ring(0, 3)))
    assert depth_errors(views, others, BOX).max() < 0.015  # measured 0.011


@pytest.mark.parametrize(("lens", "size"), [(LENS, (64, 64)), (SKEWED, (24, 40))])
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.15, 0.9, -0.01, -0.15])
def test_a_shift_of_the_neighbor_is_measured(lens: Tensor, size: tuple[int, int], shift: float) -> None:
    """Of a plane, which all rays meet. Negative: the neighbor sees it nearer, by less than would hide the points."""
    poses = orbit(24, 3.0, 1.0)
    views, others = (plane(cameras(poses[which], lens, size)) for which in ([0, 5], [1, 6]))
    found = depth_errors(views, shifted(others, shift), BOX)
    assert found.tolist() == pytest.approx([100 * abs(shift) / BOX] * 2, abs=0.04)  # measured 0.02


def test_hidden_points_and_those_without_a_surface_are_left_out() -> None:
    poses = orbit(24, 3.0, 1.0)
    views, others = plane(cameras(poses[:2])), plane(cameras(poses[1:3]))
    assert depth_errors(views, shifted(others, -0.25), BOX).shape == (0,)  # 12.5 % behind what the neighbor sees
    empty = others._replace(opacity=torch.full_like(others.opacity, 0.5))
    assert depth_errors(views, empty, BOX).shape == (0,)
    assert depth_errors(views._replace(opacity=0.5 * views.opacity), others, BOX).shape == (0,)
    away = torch.eye(4).repeat(2, 1, 1)
    away[:, 2, 3] = 10.0  # behind the plane and looking away
    assert depth_errors(views, plane(cameras(poses[1:3]))._replace(cameras=cameras(away)), BOX).shape == (0,)
    # One view has a surface, the other none.
    one = views._replace(opacity=views.opacity * torch.tensor([0.0, 1.0])[:, None, None])
    assert depth_errors(one, shifted(others, 0.1), BOX).tolist() == pytest.approx([5.0], abs=0.02)


def test_the_neighbor_is_the_one_of_the_nearest_direction() -> None:
    views, others = sphere(cameras(ring(0, 1))), sphere(cameras(ring(0, 12)[[3, 1, 6, 10]]))
    moved = others.depth + torch.tensor([0.4, 0.1, 0.5, 0.6])[:, None, None]
    (found,) = depth_errors(views, others._replace(depth=moved), BOX).tolist()
    assert found == pytest.approx(5.0, abs=0.1)  # measured 5.07; 30 degrees away; the others are 60 or more


def slowly(views: DepthMaps, others: DepthMaps, box: float) -> list[float]:
    """The definition, with loops."""
    found = []
    height, width = views.cameras.size
    for view in range(len(views.depth)):
        forward = views.cameras.cam2world[view, :3, 2].tolist()
        cosines = [
            sum(a * b for a, b in zip(forward, pose[:3, 2].tolist(), strict=True)) for pose in others.cameras.cam2world
        ]
        n = cosines.index(max(cosines))
        pose, lens = (part[n].double() for part in others.cameras[:2])
        directions = pixel_rays(views.cameras, torch.float64)[1].reshape(-1, height, width, 3)
        values = []
        for i in range(height):
            for j in range(width):
                if views.opacity[view, i, j] <= 0.5:
                    continue
                origin = views.cameras.cam2world[view, :3, 3].double()
                point = origin + float(views.depth[view, i, j]) * directions[view, i, j]
                x, y, z = torch.linalg.solve(pose[:3, :3], point - pose[:3, 3]).tolist()
                if z <= 0:
                    continue
                u, v, _ = (lens @ torch.tensor([x / z, y / z, 1.0], dtype=torch.float64)).tolist()
                column, row = u * width - 0.5, v * height - 0.5
                left, top = math.floor(column), math.floor(row)
                if left < 0 or top < 0 or left + 1 >= width or top + 1 >= height:
                    continue
                if not (others.opacity[n, top : top + 2, left : left + 2] > 0.5).all():
                    continue
                (a, b), (c, d) = others.depth[n, top : top + 2, left : left + 2].tolist()
                right, down = column - left, row - top
                seen = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
                difference = math.sqrt(x * x + y * y + z * z) - seen
                if difference <= 0.1 * box:
                    values.append(abs(difference))
        found += [100 / box * sum(values) / len(values)] if values else []
    return found


def test_the_definition() -> None:
    """Noisy depth and opacity, so that every condition decides about some pixels."""
    torch.manual_seed(0)
    maps = []
    for poses in (ring(11, 5, 0.7), ring(0, 5, 0.3)):
        maps.append(sphere(cameras(poses, SKEWED, (12, 18))))
        noise = 0.3 * torch.randn(maps[-1].depth.shape)
        opacity = maps[-1].opacity * (0.3 + torch.rand(noise.shape)).clamp_max(1.0)
        opacity[3] *= 0.0 if len(maps) == 1 else 1.0
        maps[-1] = DepthMaps(maps[-1].cameras, (maps[-1].depth + noise).float(), opacity.float())
    expected = slowly(maps[0], maps[1], BOX)
    assert len(expected) == 4 and min(expected) > 1
    assert depth_errors(maps[0], maps[1], BOX).tolist() == pytest.approx(expected, rel=1e-5)  # measured 8e-7
