# SPDX-License-Identifier: Apache-2.0
"""Where a scene's cameras are and what they look at: checks, and the move that brings what they look at into the box.

In the layout of igae-data cameras are 1.3 from the origin with a focal length of 1.09375 image widths: a view is 1.19
wide where the object is, and the box 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igae.data.cameras import opengl_to_opencv
from igae.data.config import Convention
from igae.data.sources.scene import BadInput, Normalization, View

VIEW_WIDTH = 1.3 / 1.09375
"""Width of a view at the origin in the layout of igae-data."""
FEWEST = 3
"""Views from which where their axes meet says something."""
ON_AXIS = 0.35
"""Distance from an axis, by the distance along it, at which a point is still looked at: about 20 degrees."""
LOOKING = 0.8
"""Share of a scene's views that look at the common point, at least."""
FIELD_OF_VIEW = (2.0, 170.0)
"""Degrees, smallest and largest."""
NARROW = 10.0
"""Degrees below which a field of view needs the image size that it was meant for."""
MEANING: dict[Convention, str] = {
    "opencv": "cam2world matrices with OpenCV's axes (y down, z forward)",
    "opengl": "cam2world matrices with OpenGL's axes (y up, z backward)",
    "opencv-world2cam": "world-to-camera matrices with OpenCV's axes",
    "opengl-world2cam": "world-to-camera matrices with OpenGL's axes",
}


@dataclass(frozen=True)
class Focus:
    """The point that is nearest to all optical axes, in least squares.

    Attributes:
        point: [3].
        depth: [V] distance of the point along each axis; negative behind the camera.
        offset: [V] its distance from each axis.
        spread: how far from parallel the axes are: the smallest eigenvalue of the mean of I - f f^T, at most 2/3.
    """

    point: Tensor
    depth: Tensor
    offset: Tensor
    spread: float

    @property
    def looking(self) -> float:
        """Share of the views in front of which the point is, near the axis."""
        seen = (self.depth > 0) & (self.offset < ON_AXIS * self.depth)
        return float(seen.double().mean())


def focus_of(cam2world: Tensor) -> Focus:
    """Where the axes of cameras [V, 4, 4] (OpenCV, float64) meet."""
    position, forward = cam2world[:, :3, 3], cam2world[:, :3, 2]
    across = torch.eye(3, dtype=cam2world.dtype) - forward[:, :, None] * forward[:, None]
    # Positions relative to their mean: far from the origin the sums would lose digits.
    middle = position.mean(0)
    total = across.mean(0)
    right = (across @ (position - middle)[:, :, None]).mean(0)[:, 0]
    point = middle + torch.linalg.lstsq(total[None], right[None, :, None], driver="gelsd").solution[0, :, 0]
    ray = point - position
    depth = (ray * forward).sum(-1)
    offset = (ray - depth[:, None] * forward).norm(dim=-1)
    return Focus(point, depth, offset, float(torch.linalg.eigvalsh(total)[0]))


def poses_of(views: Sequence[View]) -> Tensor:
    """Cameras [V, 4, 4] of views, float64."""
    return torch.tensor([view.cam2world for view in views], dtype=torch.float64)


def read_as(raw: Tensor, convention: Convention) -> Tensor:
    """OpenCV cam2world [V, 4, 4] of matrices in a convention."""
    cam2world = torch.linalg.inv(raw) if convention.endswith("world2cam") else raw
    return opengl_to_opencv(cam2world) if convention.startswith("opengl") else cam2world


def move(views: Sequence[View], convention: Convention | None, normalization: Normalization | None) -> Sequence[View]:
    """The views with their matrices read in another convention (None: as they are), and then moved."""
    if convention is None and normalization is None:
        return views
    poses = poses_of(views)
    if convention is not None:
        poses = read_as(opengl_to_opencv(poses) if views[0].opengl else poses, convention)
    if normalization is not None:
        *center, scale = normalization
        poses[:, :3, 3] = scale * (poses[:, :3, 3] - torch.tensor(center, dtype=poses.dtype))
    return [replace(view, cam2world=rows) for view, rows in zip(views, (poses + 0.0).tolist(), strict=True)]


def check_cameras(views: Sequence[View], size: tuple[int, int], one_place: bool = True) -> Focus | None:
    """Check what can be wrong with cameras that are possible each.

    Args:
        size: (height, width) of the images' files.
        one_place: the cameras must look at one place.

    Returns:
        Where their axes meet, if that was looked for.

    Raises:
        BadInput: with the likely cause, and what mends it.
    """
    lenses: dict[object, View] = {}
    for view in views:
        if lenses.setdefault(view.lens, view) is view:
            _check_lens(view, size)
    return _check_directions(views) if one_place and len(views) >= FEWEST else None


def _check_lens(view: View, size: tuple[int, int]) -> None:
    rows, lens, (height, width) = view.intrinsics(size), dict(view.lens), size
    stated = "w" in lens and "h" in lens
    hint = f"; is it that of an image of another size than {width}x{height}? give w and h" if not stated else ""
    for axis, name in enumerate("xy"):
        focal, center = rows[axis][axis], rows[axis][2]
        angle = math.degrees(2 * math.atan(0.5 / focal))
        if angle > FIELD_OF_VIEW[1]:
            raise BadInput(
                f"{view.file}: the field of view along {name} is {angle:.1f} degrees; is the focal length given in "
                "image widths instead of pixels?"
            )
        if angle < (FIELD_OF_VIEW[0] if stated or "fl_x" not in lens else NARROW):
            raise BadInput(f"{view.file}: the field of view along {name} is {angle:.1f} degrees{hint}")
        if not 0 < center < 1:
            raise BadInput(f"{view.file}: the principal point is outside of the image ({name}: {center:.2f}){hint}")


def _check_directions(views: Sequence[View]) -> Focus:
    poses = poses_of(views)
    focus = focus_of(poses)
    if focus.looking >= LOOKING or focus.spread < 1e-4:
        return focus
    raw = opengl_to_opencv(poses) if views[0].opengl else poses
    meant = {convention: focus_of(read_as(raw, convention)).looking for convention in MEANING}
    best = max(meant, key=lambda convention: meant[convention])
    share = f"{100 * (1 - focus.looking):.0f} % of the cameras don't look at what the others look at"
    if meant[best] > max(LOOKING, focus.looking):
        raise BadInput(f"{share}, but all do if these are {MEANING[best]}: pack with --convention {best}")
    raise BadInput(f"{share}, so there is no object in the middle: check the poses, or pack with --normalize none")


def normalization_of(views: Sequence[View], size: tuple[int, int], focus: Focus | None) -> Normalization | None:
    """The move that brings the point that all views look at to the origin, and the width of views there to that of
    igae-data's; None where their axes don't meet, or where it would change nothing.

    Args:
        size: (height, width) of the images' files.
        focus: as :func:`check_cameras` returns it.
    """
    if focus is None or focus.looking < LOOKING or focus.spread < 1e-4:
        return None
    focal = [max(rows[0][0], rows[1][1]) for rows in (view.intrinsics(size) for view in views)]
    widths = focus.depth / torch.tensor(focal, dtype=torch.float64)
    scale = VIEW_WIDTH / float(widths[focus.depth > 0].median())
    # Ten digits of the size of a view: the same on every machine, and in the manifest.
    digits = 10 + math.floor(math.log10(scale))
    x, y, z = (round(value, digits) for value in focus.point.tolist())
    return Normalization(x, y, z, float(f"{scale:.10g}"))
