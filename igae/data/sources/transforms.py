# SPDX-License-Identifier: Apache-2.0
"""Folders of scenes with a transforms file each, as nerfstudio, Blender's exporters and igae-data write them.

`transforms_opencv.json` has cameras in the OpenCV convention, `transforms.json` in that of OpenGL and Blender.
"""

import json
from collections.abc import Sequence, Set
from typing import Any

import fsspec
import torch
from torch import Tensor

from igae.data.cameras import RIGID_TOLERANCE, is_rigid, opengl_to_opencv
from igae.data.sources.scene import SUFFIXES, BadInput, View
from igae.errors import redact
from igae.storage import file_system

OPENCV, OPENGL = "transforms_opencv.json", "transforms.json"
LENS = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
PINHOLE = {"OPENCV", "PINHOLE", "SIMPLE_PINHOLE"}
UNIT_BOX = False


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with a transforms file."""
    return OPENGL in names or OPENCV in names


def read(folder: str) -> list[View]:
    """The frames of a transforms file."""
    fs, path = file_system(folder)
    name = _file_in(fs, path)
    if name is None:
        raise BadInput(f"there is no {OPENCV} or {OPENGL} in {redact(folder)}")
    try:
        content = json.loads(fs.cat_file(f"{path}/{name}"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name} is not readable JSON: {error}") from error
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {redact(str(error))}") from None
    return _read_frames(content, name)


def _file_in(fs: fsspec.AbstractFileSystem, folder: str) -> str | None:
    return next((name for name in (OPENCV, OPENGL) if fs.exists(f"{folder}/{name}")), None)


def _read_frames(content: Any, name: str) -> list[View]:
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise BadInput(f"{name} has no frames: the scene is empty")
    files: dict[str, int] = {}
    lenses: list[tuple[tuple[str, float | str], ...]] = []
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise BadInput(f"{name}: frame {index} is not an object")
        file = _image_file(frame.get("file_path"), f"{name}: frame {index}")
        if file in files:
            raise BadInput(f"{name}: frames {files[file]} and {index} are both {file}")
        files[file] = index
        lens = {**content, **frame}
        if lens.get("camera_model", "OPENCV") not in PINHOLE or any(lens.get(key) for key in DISTORTION):
            raise BadInput(f"{name}: frame {index} ({file}) has lens distortion: undistort the images first")
        values = ((key, lens[key]) for key in LENS if key in lens)
        lenses.append(tuple((key, value if isinstance(value, int | float) else repr(value)) for key, value in values))
    rows = _read_poses(frames, list(files), name)
    return [View(i, file, rows[i], lenses[i], opengl=name == OPENGL) for i, file in enumerate(files)]


def _read_poses(frames: Sequence[dict[str, Any]], files: Sequence[str], name: str) -> list[list[list[float]]]:
    poses = [frame.get("transform_matrix") for frame in frames]
    cam2world = _matrices(poses)
    if cam2world is None:
        index = next(i for i, pose in enumerate(poses) if _matrices([pose]) is None)
        raise BadInput(f"{name}: frame {index} ({files[index]}) has no transform_matrix of 4 x 4 numbers")
    for index in (~is_rigid(cam2world)).nonzero().flatten().tolist():
        finite = bool(cam2world[index].isfinite().all())
        what = f"is no rigid motion (within {RIGID_TOLERANCE:g})" if finite else "has NaN or infinite numbers"
        raise BadInput(f"{name}: the pose of frame {index} ({files[index]}) {what}")
    if name == OPENGL:
        cam2world = opengl_to_opencv(cam2world)
    rows: list[list[list[float]]] = (cam2world + 0.0).tolist()  # no negative zeros: both conventions give one text
    return rows


def _matrices(poses: Sequence[Any]) -> Tensor | None:
    try:
        matrices = torch.tensor(poses, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None
    return matrices if matrices.shape == (len(poses), 4, 4) else None


def _image_file(path: Any, where: str) -> str:
    if not isinstance(path, str) or not path.isprintable():
        raise BadInput(f"{where} has no file_path")
    parts = [part for part in path.split("/") if part != "."]
    if not path or path.startswith("/") or "\\" in path or ".." in parts or "" in parts:
        raise BadInput(f"{where}: file_path {path!r} does not stay in the scene's folder")
    # Blender's exporters leave the extension out.
    return "/".join(parts) + ("" if path.lower().endswith(SUFFIXES) else ".png")
