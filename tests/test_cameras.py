# SPDX-License-Identifier: Apache-2.0
"""Cameras: closed forms and properties of conventions, intrinsics, checks and orbits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igae.data import is_rigid, normalized_intrinsics, opengl_to_opencv, orbit, orbit_like, up_of

VECTOR = st.tuples(*[st.floats(-2, 2)] * 3)


def random_pose(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    q = q * r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = q
    pose[:3, 3] = torch.randn(3, dtype=torch.float64, generator=generator)
    return pose


def test_opengl_to_opencv_looks_the_same_way():
    # An OpenGL camera with the identity pose looks along -z and has +y upwards.
    pose = opengl_to_opencv(torch.eye(4))
    assert pose[:3, :3].T.tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, -1]]  # right, down, forward
    some = random_pose(3)
    assert torch.equal(opengl_to_opencv(opengl_to_opencv(some)), some)
    assert torch.equal(opengl_to_opencv(some)[:3, 3], some[:3, 3])
    assert bool(is_rigid(opengl_to_opencv(some)))


@given(st.integers(0, 1000))
def test_rigid_accepts_rigid_and_refuses_the_rest(seed):
    pose = random_pose(seed)
    assert bool(is_rigid(pose)) and bool(is_rigid(pose.float()))
    flipped = pose.clone()
    flipped[:, 0] *= -1  # orthonormal, determinant -1
    scaled = pose.clone()
    scaled[:3, :3] *= 1.002
    sheared = pose.clone()
    sheared[:3, 0] += 0.01 * sheared[:3, 1]
    row = pose.clone()
    row[3, 0] = 0.01
    nan, inf = pose.clone(), pose.clone()
    nan[1, 1] = math.nan
    inf[0, 3] = math.inf
    bad = torch.stack([flipped, scaled, sheared, row, nan, inf])
    assert not is_rigid(bad).any()
    rounded = (pose * 1e4).round() / 1e4
    assert bool(is_rigid(rounded))


def test_intrinsics_closed_forms():
    got = normalized_intrinsics({"fl_x": 140, "fl_y": 70, "cx": 64, "cy": 16, "w": 128, "h": 64}, (64, 128))
    expected = [[140 / 128, 0, 0.5], [0, 70 / 64, 0.25], [0, 0, 1]]
    assert got.tolist() == expected and got.dtype == torch.float64
    # The image was resized, the file speaks of the original size.
    assert normalized_intrinsics({"fl_x": 280, "w": 256, "h": 256}, (128, 128))[0, 0] == 280 / 256
    # A field of view of 90 degrees: half the width at distance 1/2 of the width.
    blender = normalized_intrinsics({"camera_angle_x": math.pi / 2}, (50, 100))
    assert torch.allclose(blender.diagonal(), torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64), atol=1e-15)
    assert blender[:2, 2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("camera", "word"),
    [
        ({}, "fl_x nor camera_angle_x"),
        ({"fl_x": math.nan}, "fl_x"),
        ({"fl_x": -1.0}, "fl_x"),
        ({"fl_x": "12"}, "fl_x"),
        ({"fl_x": 10, "cx": None}, "cx"),
        ({"fl_x": 10, "w": 0, "h": 10}, "w is"),
        ({"fl_x": 10, "w": 200, "h": 100}, "200x100"),
        ({"camera_angle_x": 4.0}, "camera_angle_x"),
    ],
)
def test_bad_intrinsics_are_named(camera, word):
    with pytest.raises(ValueError, match=word):
        normalized_intrinsics(camera, (64, 64))


@settings(max_examples=50)
@given(st.integers(1, 30), st.floats(0.1, 10), st.floats(-1.57, 1.57), VECTOR, VECTOR)
def test_orbit_looks_at_its_center(frames, radius, elevation, up, center):
    axis = torch.tensor(up, dtype=torch.float64)
    if axis.norm() < 1e-3:
        return
    axis = axis / axis.norm()
    pose = orbit(frames, radius, elevation, up, center).double()
    middle = torch.tensor(center, dtype=torch.float64)
    assert pose.shape == (frames, 4, 4) and bool(is_rigid(pose, 1e-5).all())
    offset = pose[:, :3, 3] - middle
    # float32 of numbers up to 12: measured errors up to 4e-7 of the size
    assert torch.allclose(offset.norm(dim=-1), torch.full((frames,), radius, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(pose[:, :3, 2], -offset / radius, atol=3e-5)
    assert torch.allclose(offset @ axis / radius, torch.tensor(math.sin(elevation), dtype=torch.float64), atol=3e-5)
    assert (pose[:, :3, 1] @ axis <= 1e-5).all()  # image down is never world up
    assert torch.allclose(pose[:, :3, 0] @ axis, torch.zeros(frames, dtype=torch.float64), atol=1e-5)


def test_orbit_is_one_even_turn():
    pose = orbit(8, 2.0, 0.0)
    steps = pose[:, :3, 3].roll(-1, 0) - pose[:, :3, 3]
    assert torch.allclose(steps.norm(dim=-1), torch.full((8,), 4 * math.sin(math.pi / 8)), atol=1e-6)
    assert torch.allclose(pose[:, :3, 3].sum(0), torch.zeros(3), atol=1e-5)
    with pytest.raises(ValueError, match="up axis"):
        orbit(4, 1.0, 0.0, up=(0.0, 0.0, 0.0))


@settings(max_examples=30)
@given(st.integers(3, 40), st.floats(0.5, 3), st.floats(-1.2, 1.2), VECTOR)
def test_orbit_like_finds_the_orbit(views, radius, elevation, up):
    axis = torch.tensor(up)
    if axis.norm() < 1e-2:
        return
    axis = axis / axis.norm()
    like = orbit_like(orbit(views, radius, elevation, up), 16)
    assert like.shape == (16, 4, 4)
    assert torch.allclose(like[:, :3, 3].norm(dim=-1), torch.full((16,), radius), rtol=1e-4)
    assert torch.allclose(like[:, :3, 3] @ axis / radius, torch.full((16,), math.sin(elevation)), atol=1e-4)


def test_orbit_like_finds_up_in_a_one_sided_capture():
    # All cameras on one side and high up: the mean of their upward directions leans by far more than the tolerance.
    full = orbit(60, 1.5, 0.9, (0.0, 1.0, 0.0))
    side = full[:12]
    like = orbit_like(side, 4)
    up = -side[:, :3, 1].mean(0)
    assert (up / up.norm())[1] < 0.95
    assert torch.allclose(like[:, 1, 3] / 1.5, torch.full((4,), math.sin(0.9)), atol=1e-4)
    assert torch.allclose(up_of(side), torch.tensor([0.0, 1.0, 0.0]).double(), atol=1e-5)
    alone = orbit_like(side[:1], 4)
    assert bool(is_rigid(alone).all())
