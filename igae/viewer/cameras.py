# SPDX-License-Identifier: Apache-2.0
"""Cameras of the page, and camera paths: their file, and the cameras in between."""

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from igae.data import is_rigid, normalized_intrinsics

MAX_CAMERAS = 10_000


@dataclass(frozen=True)
class Camera:
    """``cam2world`` [4, 4], OpenCV (x right, y down, z forward), and ``intrinsics`` [3, 3], normalized by the image
    size; both float64."""

    cam2world: Tensor
    intrinsics: Tensor


def rotation_of(wxyz: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of quaternions [..., 4] (w, x, y, z) of any length but zero; float64."""
    from viser.transforms import SO3

    return torch.from_numpy(SO3(wxyz.numpy()).as_matrix())


def quaternion_of(rotation: Tensor) -> Tensor:
    """Unit quaternions [..., 4] of rotations [..., 3, 3], of either sign; float64."""
    from viser.transforms import SO3

    return torch.from_numpy(SO3.from_matrix(rotation.numpy()).wxyz)


def pose_of(rotation: Tensor, position: Tensor) -> Tensor:
    """cam2world [..., 4, 4] of rotations [..., 3, 3] and positions [..., 3]."""
    pose = torch.eye(4, dtype=rotation.dtype).repeat(*rotation.shape[:-2], 1, 1)
    pose[..., :3, :3], pose[..., :3, 3] = rotation, position
    return pose


def lens_of(angle: float, size: tuple[int, int]) -> Tensor:
    """Intrinsics [3, 3] of images of ``size`` (height, width) with square pixels and a vertical angle of view in
    degrees."""
    focal = 0.5 / math.tan(math.radians(angle) / 2)
    rows = [[focal * size[0] / size[1], 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64)


def angle_of(focal: float, size: tuple[int, int]) -> float:
    """Vertical angle of view in degrees of images with a focal length normalized by their width."""
    return 2 * math.degrees(math.atan(0.5 * size[0] / size[1] / focal))


def orbit_from(camera: Camera, frames: int, up: Tensor, center: Tensor) -> list[Camera]:
    """A camera turned once around the axis ``up`` [3] (of any length but zero) through ``center`` [3], from where it
    is, by equal angles; the last is one step before the first."""
    angle = torch.arange(frames, dtype=torch.float64)[:, None] * (math.pi / frames)
    turn = rotation_of(torch.cat([angle.cos(), angle.sin() * (up / up.norm())], 1))
    rotation, position = camera.cam2world[:3, :3], camera.cam2world[:3, 3]
    poses = pose_of(turn @ rotation, center + turn @ (position - center))
    return [Camera(pose, camera.intrinsics) for pose in poses]


def between(path: list[Camera], frames: int) -> list[Camera]:
    """A smooth path through cameras, the same time from each to the next.

    Interpolated, by Catmull-Rom splines, are quaternions, intrinsics, and the positions' directions and distances from
    the origin, where the object is (a straight line would come closer to it).

    Args:
        path: one or more cameras. The first and last are the first and last of the result.
        frames: cameras of the result, two or more.
    """
    turns = quaternion_of(torch.stack([camera.cam2world[:3, :3] for camera in path]))
    for i in range(1, len(turns)):
        if turns[i] @ turns[i - 1] < 0:  # the same rotation, the short way round
            turns[i] = -turns[i]
    positions = torch.stack([camera.cam2world[:3, 3] for camera in path])
    lenses = torch.stack([camera.intrinsics for camera in path])
    distances = positions.norm(dim=1, keepdim=True)
    knots = torch.cat([turns, positions / distances.clamp_min(1e-12), distances, lenses.flatten(1)], 1)
    if len(knots) == 1:
        knots = knots.repeat(2, 1)
    slopes = torch.gradient(knots, dim=0)[0]
    time = torch.linspace(0, len(knots) - 1, frames, dtype=torch.float64)
    start = time.floor().long().clamp(max=len(knots) - 2)
    t, rise = (time - start)[:, None], knots[start + 1] - knots[start]
    m, n = slopes[start], slopes[start + 1]
    found = knots[start] + t * (m + t * (3 * rise - 2 * m - n + t * (m + n - 2 * rise)))
    places = found[:, 4:7] / found[:, 4:7].norm(dim=1, keepdim=True).clamp_min(1e-12) * found[:, 7:8]
    poses = pose_of(rotation_of(found[:, :4]), places)
    return [Camera(pose, lens.view(3, 3)) for pose, lens in zip(poses, found[:, 8:], strict=True)]


def dump_path(path: list[Camera], size: tuple[int, int]) -> bytes:
    """A path as JSON, in the layout of the data's ``transforms_opencv.json``: ``w`` and ``h`` of the images, and for
    each of the ``frames`` ``transform_matrix`` (cam2world, OpenCV) and ``fl_x``, ``fl_y``, ``cx``, ``cy`` in pixels."""
    height, width = size
    frames = []
    for camera in path:
        (fx, _, cx), (_, fy, cy), _ = camera.intrinsics.tolist()
        lens = {"fl_x": fx * width, "fl_y": fy * height, "cx": cx * width, "cy": cy * height}
        frames.append({**lens, "transform_matrix": camera.cam2world.tolist()})
    return (json.dumps({"w": width, "h": height, "frames": frames}, indent=1) + "\n").encode()


def parse_path(data: bytes, size: tuple[int, int]) -> list[Camera]:
    """Read back :func:`dump_path`; what all frames share may also stand beside ``frames``, as in the data.

    Raises:
        ValueError: it is no such file; the sentence says what is wrong.
    """
    try:
        tree = json.loads(data)
        frames = tree["frames"]
        if not isinstance(frames, list) or not 0 < len(frames) <= MAX_CAMERAS:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("this is no camera path: give a JSON file as this page saves it") from None
    path = []
    for number, frame in enumerate(frames, 1):
        try:
            intrinsics = normalized_intrinsics({**tree, **frame}, size)
            pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
            if pose.shape != (4, 4) or not is_rigid(pose):
                raise ValueError("transform_matrix is no rigid motion [4, 4]")
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise ValueError(f"camera {number} of the path can't be read: {error}") from None
        path.append(Camera(pose, intrinsics))
    return path
