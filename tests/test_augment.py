# SPDX-License-Identifier: Apache-2.0
"""Augmented views: what the new camera sees, whole-pixel shifts, masks, and their random numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from igae.models import AugmentConfig, Views, augment, augment_numbers

H, W = 48, 64
FILL = torch.tensor([255, 0, 9], dtype=torch.uint8)


def views(count: int, images: Tensor, masks: Tensor | None = None) -> Views:
    """Cameras in general position: not square, with skew, principal point off the middle, any pose."""
    generator = torch.Generator().manual_seed(3)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, :3, :3] = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
    pose[:, :3, 3] = torch.randn(count, 3, generator=generator)
    intrinsics = torch.tensor([[1.1, 0.03, 0.48], [0, 1.4, 0.53], [0, 0, 1]]).repeat(count, 1, 1)
    return Views(torch.arange(count), pose, intrinsics, images, masks=masks)


def numbers(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))


def noise(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, H, W), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def project(cam2world: Tensor, intrinsics: Tensor, point: Tensor) -> Tensor:
    """Where a camera sees a point, in pixels: float64, from the definition."""
    seen = torch.linalg.inv(cam2world.double()) @ torch.cat([point.double(), torch.ones(1, dtype=torch.float64)])
    pixel = intrinsics.double() @ seen[:3]
    return pixel[:2] / pixel[2] * torch.tensor([W, H])


def test_shifts_are_whole_pixels_and_the_border_is_filled() -> None:
    images, drawn = noise(8), numbers(8)
    given_views = views(8, images, images[:, 1])
    moved = augment(given_views, AugmentConfig(shift=5), FILL, drawn)
    assert moved.images is not None and moved.masks is not None
    assert torch.equal(moved.cam2world, given_views.cam2world)
    shifts = ((moved.intrinsics - given_views.intrinsics)[:, :2, 2] * torch.tensor([W, H])).round().long()
    assert shifts.abs().max() == 5 and len(shifts.unique()) > 4
    for image, mask, now, now_mask, (x, y) in zip(
        images, images[:, 1], moved.images, moved.masks, shifts.tolist(), strict=True
    ):
        wide = FILL.view(3, 1, 1).expand(3, H + 20, W + 20).clone()
        wide[:, 10 : 10 + H, 10 : 10 + W] = image
        assert torch.equal(now, wide[:, 10 - y : 10 - y + H, 10 - x : 10 - x + W])
        empty = torch.zeros(H + 20, W + 20, dtype=torch.uint8)
        empty[10 : 10 + H, 10 : 10 + W] = mask
        assert torch.equal(now_mask, empty[10 - y : 10 - y + H, 10 - x : 10 - x + W])


@given(st.floats(0, 0.9999))
def test_every_shift_is_as_likely_as_the_others(number: float) -> None:
    drawn = torch.full((1, 4), number)
    moved = augment(views(1, noise(1)), AugmentConfig(shift=2), FILL, drawn)
    shift = (moved.intrinsics - views(1, noise(1)).intrinsics)[0, 0, 2].item() * W
    assert round(shift) == min(math.floor(float(drawn[0, 0]) * 5), 4) - 2 or (number * 5) % 1 < 1e-5


@pytest.mark.parametrize(
    "config",
    [AugmentConfig(zoom=1.4), AugmentConfig(rotate=180), AugmentConfig(shift=4, zoom=1.3, rotate=40)],
    ids=["zoom", "rotate", "all"],
)
def test_a_point_is_where_the_new_camera_sees_it(config: AugmentConfig) -> None:
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    for seed in range(6):
        before = views(1, noise(1))
        point = before.cam2world[0, :3, 3] + before.cam2world[0, :3, :3] @ torch.tensor([0.07, -0.05, 1.3])
        at = project(before.cam2world[0], before.intrinsics[0], point)
        blob = (255 * torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 18)).round().to(torch.uint8)
        before.images = blob.expand(1, 3, H, W)
        after = augment(before, config, torch.zeros(3, dtype=torch.uint8), numbers(1, seed))
        assert after.images is not None
        weight = after.images[0, 0].double() / after.images[0, 0].sum()
        found = torch.stack([(weight * x).sum(), (weight * y).sum()])
        expected = project(after.cam2world[0], after.intrinsics[0], point)
        assert (expected - at).abs().max() > 0.05  # it has moved
        assert (found - expected).abs().max() < 0.02, seed  # pixels; measured 0.008
        assert torch.allclose(after.cam2world[0, :3, :3].T @ after.cam2world[0, :3, :3], torch.eye(3), atol=1e-6)
        assert torch.equal(after.cam2world[:, :, 2:], before.cam2world[:, :, 2:])


def test_nothing_moves_where_all_is_off() -> None:
    before = views(2, noise(2))
    after = augment(before, AugmentConfig(), FILL, numbers(2))
    assert not AugmentConfig().is_on
    assert after.images is not None and torch.equal(after.images, noise(2))
    assert torch.equal(after.cam2world, before.cam2world) and torch.equal(after.intrinsics, before.intrinsics)
    assert after.masks is None


def test_numbers_depend_on_the_seed_and_the_place_alone() -> None:
    device = torch.device("cpu")
    found = augment_numbers(12, 6, device)
    assert found.shape == (6, 4) and 0 <= found.min() and found.max() < 1
    assert torch.equal(found, augment_numbers(torch.tensor(12), 6, device))
    assert torch.equal(found[:3], augment_numbers(12, 3, device))
    assert not torch.equal(found, augment_numbers(13, 6, device))
    many = augment_numbers(1, 20_000, device)
    assert many.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.01)  # measured 0.003
    assert torch.corrcoef(many.T).sub(torch.eye(4)).abs().max() < 0.03  # measured 0.013
