# SPDX-License-Identifier: Apache-2.0
"""Folders of scenes that COLMAP reconstructed: `images/` and `sparse/0`, in text or binary.

MVImgNet's scenes have this layout, and those of MVImgNet2.0, with `masks/` (their README files on GitHub).
The facts are those of https://colmap.github.io/format.html. Poses are world-to-camera, with OpenCV's axes. The upper
left corner of an image is at (0, 0) and its first pixel's center at (0.5, 0.5), as everywhere in this package.

The two files that are needed are read here: pycolmap 4.2 takes a cut `cameras.bin` for whole, does not return
from a cut `points3D.bin`, and reads nothing but paths.
"""

import re
import struct
from collections.abc import Set
from typing import NamedTuple

import fsspec
import torch
from torch import Tensor

from igae.data.sources.files import list_files
from igae.data.sources.scene import BadInput, View
from igae.errors import redact
from igae.storage import file_system, read_input

UNIT_BOX = False
MODELS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fl_x fl_y cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2",
    "FULL_OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2 k3 k4 k5 k6",
}
"""Camera models that are OpenCV's pinhole with distortion: the names of their parameters; `f` is fl_x and fl_y."""
LENS = ("w", "h", "fl_x", "fl_y", "cx", "cy")
NUMBERS = (
    "SIMPLE_PINHOLE PINHOLE SIMPLE_RADIAL RADIAL OPENCV OPENCV_FISHEYE FULL_OPENCV FOV SIMPLE_RADIAL_FISHEYE "
    "RADIAL_FISHEYE THIN_PRISM_FISHEYE RAD_TAN_THIN_PRISM_FISHEYE SIMPLE_DIVISION DIVISION SIMPLE_FISHEYE FISHEYE EUCM "
    "EQUIRECTANGULAR"
).split()
"""Camera models by their number in binary files."""
RECONSTRUCTION = re.compile(r"((?:colmap/)?sparse(?:/[^/]+)?)/images\.(bin|txt)")


class _Camera(NamedTuple):
    lens: tuple[tuple[str, float | str], ...]
    distortion: tuple[tuple[str, float], ...]


class _Image(NamedTuple):
    """World-to-camera pose (quaternion w, x, y, z, then translation) and the camera's number."""

    pose: tuple[float, ...]
    camera: int


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with images beside what COLMAP made of them."""
    return "images" in names and ("sparse" in names or "colmap" in names)


def read(folder: str) -> list[View]:
    """The images of the largest reconstruction, in the order of their names; those that it lacks have no camera."""
    fs, path = file_system(folder)
    prefix = path.rstrip("/") + "/"
    files = set(list_files(folder))
    # Where a folder has both, the last one counts: images.bin, as for COLMAP.
    found = {match[1]: match[2] for name in sorted(files, reverse=True) if (match := RECONSTRUCTION.fullmatch(name))}
    if not found:
        raise BadInput(f"there is no sparse/0/images.bin or images.txt in {redact(folder)}: run COLMAP's mapper")
    read = {where: _read_images(fs, prefix, f"{where}/images.{suffix}") for where, suffix in sorted(found.items())}
    where = max(read, key=lambda where: len(read[where]))
    images = dict(sorted(read[where].items()))
    if not images:
        raise BadInput(f"{where} has no images: the scene is empty")
    cameras = _read_cameras(fs, prefix, f"{where}/cameras.{found[where]}")
    for name, image in images.items():
        if f"images/{name}" not in files:
            raise BadInput(f"images/{name} is missing: put the images that {where} was made of into images/")
        if image.camera not in cameras:
            raise BadInput(f"{where}: images/{name} has camera {image.camera}, which cameras.{found[where]} lacks")
    masks = _find_masks(list(images), files)
    rows = _cam2world(images, where).tolist()
    return [
        View(i, f"images/{name}", rows[i], lens, mask=masks.get(name), distortion=distortion)
        for i, (name, image) in enumerate(images.items())
        for lens, distortion in (cameras[image.camera],)
    ]


def _find_masks(images: list[str], files: Set[str]) -> dict[str, str]:
    """Image -> its mask: COLMAP's name for it (a.jpg.png), or that of the image (a.png)."""
    if not any(file.startswith("masks/") for file in files):
        return {}
    masks: dict[str, str] = {}
    for image in images:
        names = (f"masks/{image}.png", f"masks/{image.rpartition('.')[0]}.png")
        mask = next((name for name in names if name in files), None)
        if mask is None:
            raise BadInput(f"{names[0]} is missing: give a mask for every image, or remove masks/")
        masks[image] = mask
    return masks


def _cam2world(images: dict[str, _Image], where: str) -> Tensor:
    """Cameras [V, 4, 4], float64."""
    poses = torch.tensor([image.pose for image in images.values()], dtype=torch.float64)
    length = poses[:, :4].norm(dim=1, keepdim=True)
    for index in (~(poses.isfinite().all(1) & (length[:, 0] > 0))).nonzero().flatten().tolist():
        raise BadInput(f"{where}: the pose of images/{list(images)[index]} has no finite numbers: run COLMAP's mapper")
    w, axis = (poses[:, :4] / length).split((1, 3), dim=1)
    # A unit quaternion turns x into x + 2 w (v x x) + 2 v x (v x x): here the world's axes, the rows of cam2world.
    axis = axis[:, None].expand(-1, 3, 3)
    across = torch.linalg.cross(axis, torch.eye(3, dtype=w.dtype).expand_as(axis))
    result = torch.eye(4, dtype=w.dtype).repeat(len(poses), 1, 1)
    result[:, :3, :3] += 2 * w[:, None] * across + 2 * torch.linalg.cross(axis, across)
    result[:, :3, 3] = -(result[:, :3, :3] @ poses[:, 4:, None])[..., 0]
    return result + 0.0


def _read_images(fs: fsspec.AbstractFileSystem, prefix: str, file: str) -> dict[str, _Image]:
    """Name -> image."""
    data = _content(fs, prefix, file)
    images: dict[str, _Image] = {}
    try:
        if file.endswith(".txt"):
            lines = iter(data.decode().splitlines())
            for line in lines:
                if line.strip() and not line.startswith("#"):
                    _, qw, qx, qy, qz, x, y, z, camera, name = line.split(maxsplit=9)
                    images[name.rstrip()] = _Image(tuple(map(float, (qw, qx, qy, qz, x, y, z))), int(camera))
                    next(lines, None)  # the points that it sees; often an empty line
            return images
        (count,), at = struct.unpack_from("<Q", data), 8
        for _ in range(count):
            _, *numbers, camera = struct.unpack_from("<I7dI", data, at)
            end = data.index(b"\0", at + 64)
            images[data[at + 64 : end].decode()] = _Image(tuple(numbers), camera)
            (points,) = struct.unpack_from("<Q", data, end + 1)
            at = end + 9 + 24 * points
        if at != len(data):
            raise ValueError("its length")
    except (ValueError, OverflowError, struct.error):
        raise BadInput(f"{file} is damaged: write it again with COLMAP") from None
    return images


def _read_cameras(fs: fsspec.AbstractFileSystem, prefix: str, file: str) -> dict[int, _Camera]:
    """Number -> camera."""
    data = _content(fs, prefix, file)
    cameras: dict[int, _Camera] = {}
    try:
        if file.endswith(".txt"):
            for line in data.decode().splitlines():
                if line.strip() and not line.startswith("#"):
                    number, model, *rest = line.split()
                    cameras[int(number)] = _camera(f"{file}: camera {number}", model, tuple(map(float, rest)))
            return cameras
        (count,), at = struct.unpack_from("<Q", data), 8
        for _ in range(count):
            number, kind, *size = struct.unpack_from("<IiQQ", data, at)
            model = NUMBERS[kind] if 0 <= kind < len(NUMBERS) else f"number {kind}"
            length = len(MODELS.get(model, "").split())
            values = struct.unpack_from(f"<{length}d", data, at + 24)
            cameras[number] = _camera(f"{file}: camera {number}", model, (*size, *values))
            at += 24 + 8 * length
    except BadInput:
        raise
    except (ValueError, OverflowError, struct.error):
        raise BadInput(f"{file} is damaged: write it again with COLMAP") from None
    return cameras


def _camera(where: str, model: str, parameters: tuple[float, ...]) -> _Camera:
    """A camera of a model, with width, height and the model's parameters."""
    if model not in MODELS:
        raise BadInput(
            f"{where} has the model {model}, which is not one of {', '.join(MODELS)}: undistort the images with "
            "colmap image_undistorter"
        )
    values = dict(zip(f"w h {MODELS[model]}".split(), parameters, strict=True))
    if "f" in values:
        values["fl_x"] = values["fl_y"] = values.pop("f")
    lens = tuple((key, value) for key, value in values.items() if key in LENS)
    return _Camera(lens, tuple((key, value) for key, value in values.items() if key not in LENS and value))


def _content(fs: fsspec.AbstractFileSystem, prefix: str, file: str) -> bytes:
    try:
        data: bytes = read_input(fs, prefix + file)
    except FileNotFoundError:
        raise BadInput(f"{file} is missing: write it again with COLMAP") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {redact(str(error))}") from None
    return data
