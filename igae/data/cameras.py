# SPDX-License-Identifier: Apache-2.0
"""Cameras: conventions, intrinsics, checks and orbits.

Everywhere in this package a camera is a `cam2world` matrix [4, 4] in the OpenCV convention (x right, y down, z forward)
and `intrinsics` [3, 3] normalized by the image size: u = fx x/z + cx runs from 0 (left edge) to 1 (right edge), and v
likewise from the top edge to the bottom edge.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RIGID_TOLERANCE = 1e-3
"""Largest accepted entry of |R^T R - I|, of |det R - 1| and of the last row's distance from (0, 0, 0, 1)."""

LARGEST = 1e9
"""Largest absolute number of a camera, and the inverse of its smallest length: float32 has squares of them."""


def opengl_to_opencv(cam2world: Tensor) -> Tensor:
    """Turns cameras [..., 4, 4] of the OpenGL/Blender convention (y up, z backward) into OpenCV ones.

    The position stays, the camera's own y and z axes change their sign. The function is its own inverse.
    """
    return cam2world * cam2world.new_tensor([1.0, -1.0, -1.0, 1.0])


def is_rigid(cam2world: Tensor, tolerance: float = RIGID_TOLERANCE) -> Tensor:
    """Tells for cameras [..., 4, 4] whether each has numbers up to `LARGEST` and is a rigid motion; returns bool [...].

    Rigid: the rotation is orthonormal with determinant +1 and the last row is (0, 0, 0, 1), each within `tolerance`.
    """
    pose = cam2world.double()
    rotation = pose[..., :3, :3]
    unit = torch.eye(3, dtype=pose.dtype, device=pose.device)
    error = torch.stack(
        [
            (rotation.mT @ rotation - unit).abs().flatten(-2).amax(-1),
            (torch.linalg.det(rotation) - 1).abs(),
            (pose[..., 3, :] - pose.new_tensor([0.0, 0.0, 0.0, 1.0])).abs().amax(-1),
        ]
    ).amax(0)
    return (error <= tolerance) & has_numbers(pose)  # a comparison with NaN is false


def has_numbers(pose: Tensor) -> Tensor:
    """Tells of matrices [..., 4, 4] whether all numbers of each are finite and up to `LARGEST`; returns bool [...]."""
    return (pose.abs() <= LARGEST).flatten(-2).all(-1)


def normalized_intrinsics(camera: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """Reads the intrinsics of a transforms file.

    Args:
        camera: `fl_x` (`fl_y`, `cx`, `cy`) in pixels of an image of `w` x `h`, or `camera_angle_x` (`camera_angle_y`)
            in radians. Absent: `fl_y` and `camera_angle_y` follow from square pixels, the principal point is the
            center, `w` and `h` are those of the image.
        size: (height, width) of the image in pixels.

    Returns:
        [3, 3] float64, normalized by the image size.

    Raises:
        ValueError: a value is missing, not a number or out of range, or `w` x `h` has another shape than the image.
    """

    def number(key: str, default: float | None = None, positive: bool = False) -> float:
        value = camera.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise ValueError(f"{key} is {reprlib.repr(value)}, but has to be a finite number up to {LARGEST:g}")
        if positive and value < 1 / LARGEST:
            raise ValueError(f"{key} is {value!r}, but has to be positive, at least {1 / LARGEST:g}")
        return float(value)

    height, width = size
    w, h = number("w", width, positive=True), number("h", height, positive=True)
    if abs(w * height - h * width) > 0.01 * w * height:
        raise ValueError(f"the camera is for {w:g}x{h:g} (w x h), but the image is {width}x{height}")
    if "fl_x" in camera:
        fx = number("fl_x", positive=True)
        fy = number("fl_y", fx, positive=True)
    elif "camera_angle_x" in camera:
        fx = w / 2 / _tan_half(number("camera_angle_x", positive=True), "camera_angle_x")
        fy = fx
        if "camera_angle_y" in camera:
            fy = h / 2 / _tan_half(number("camera_angle_y", positive=True), "camera_angle_y")
    else:
        raise ValueError("there is neither fl_x nor camera_angle_x")
    cx, cy = number("cx", w / 2), number("cy", h / 2)
    return torch.tensor([[fx / w, 0.0, cx / w], [0.0, fy / h, cy / h], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _tan_half(angle: float, key: str) -> float:
    if angle >= math.pi:
        raise ValueError(f"{key} is {angle!r}, but has to be an angle below pi (radians)")
    return math.tan(angle / 2)


def orbit(
    frames: int,
    radius: float,
    elevation: float,
    up: Sequence[float] | Tensor = (0.0, 0.0, 1.0),
    center: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
) -> Tensor:
    """Cameras on a circle that look at its axis' point `center`.

    Args:
        frames: number of cameras n, at equal angles; the circle is closed, so the last is one step before the first.
        radius: distance of every camera from `center`.
        elevation: angle of the cameras above the plane through `center` orthogonal to `up`, in radians.
        up: the axis [3] of the orbit, of any length but zero; it points upwards in the images.
        center: the point [3] in the middle of the images.

    Returns:
        cam2world [n, 4, 4] float32, OpenCV.
    """
    axis = torch.as_tensor(up, dtype=torch.float64)
    if not axis.norm() > 0:
        raise ValueError(f"the up axis of an orbit is {axis.tolist()}, but needs a length")
    axis = axis / axis.norm()
    # The world axis least aligned with `up` gives a stable start of the circle.
    first = torch.zeros(3, dtype=torch.float64)
    first[axis.abs().argmin()] = 1.0
    first = first - (first @ axis) * axis
    first = first / first.norm()
    second = torch.linalg.cross(axis, first)

    angle = torch.arange(frames, dtype=torch.float64)[:, None] * (2 * math.pi / max(frames, 1))
    outward = angle.cos() * first + angle.sin() * second
    direction = math.cos(elevation) * outward + math.sin(elevation) * axis
    pose = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    # Right is the direction in which the angle grows: it stays defined when the cameras look along `up`.
    pose[:, :3, 0] = angle.cos() * second - angle.sin() * first
    pose[:, :3, 2] = -direction
    pose[:, :3, 1] = torch.linalg.cross(pose[:, :3, 2], pose[:, :3, 0])
    pose[:, :3, 3] = torch.as_tensor(center, dtype=torch.float64) + radius * direction
    return pose.float()


def up_of(cam2world: Tensor) -> Tensor:
    """The up axis of the world that cameras [N, 4, 4] are in: [3] float64, of length 1.

    Cameras without roll have all their x axes in the horizontal plane, whose normal is then the up axis. Where the x
    axes do not span just a plane (a single camera, cameras with roll) the mean upward direction of the images is taken.
    """
    pose = cam2world.detach().cpu().double()
    upward: Tensor = -pose[:, :3, 1].mean(0)
    right = pose[:, :3, 0]
    values, vectors = torch.linalg.eigh(right.mT @ right / len(pose))
    if upward.norm() < 1e-6:
        upward = -pose[0, :3, 1]
    # Plane or not: the share of the x axes outside the plane is small compared with the plane's lesser direction.
    if values[1] > 1e-3 and values[0] < 0.05 * values[1]:
        normal = vectors[:, 0]
        upward = normal if normal @ upward >= 0 else -normal
    return torch.nn.functional.normalize(upward, dim=0)


def orbit_like(cam2world: Tensor, frames: int) -> Tensor:
    """An orbit around the origin like given cameras [N, 4, 4]: their mean radius, mean elevation and :func:`up_of`.

    Returns:
        cam2world [frames, 4, 4] float32, OpenCV.
    """
    position, upward = cam2world[:, :3, 3].detach().cpu().double(), up_of(cam2world)
    radius = position.norm(dim=-1)
    sine = (position @ upward) / radius.clamp_min(1e-12)
    return orbit(frames, float(radius.mean()), float(sine.clamp(-1, 1).asin().mean()), upward)
