# SPDX-License-Identifier: Apache-2.0
"""Transforms files: JSON with `frames`, each with an image, a pose and, unless the file has it for all, a lens."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from igae.data.cameras import RIGID_TOLERANCE, has_numbers, is_rigid, opengl_to_opencv
from igae.data.sources.files import NO_NUMBERS, list_files, to_rows
from igae.data.sources.scene import SUFFIXES, BadInput, View
from igae.errors import redact
from igae.storage import file_system, join, parse_json, read_input

OPENCV = "transforms_opencv.json"
MAX_JSON = 64 << 20
"""Bytes of a transforms file: those of ten thousand views take a tenth."""
FOCAL = ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y")
CENTER = ("cx", "cy")
SIZE = ("w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
PERSPECTIVE = {"PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV", "PERSPECTIVE"}
OF_LENSES = {*FOCAL, *CENTER, *SIZE, *DISTORTION}
READ = {*OF_LENSES, "camera_model", "is_fisheye", "frames", "file_path", "transform_matrix"}
READ |= {"mask_path", "train_filenames", "val_filenames", "test_filenames"}
HARMLESS = {
    # nerfstudio and the tools that write for it; the poses have the applied transform and scale already
    *("applied_transform", "applied_scale", "orientation_override", "ply_file_path", "sparse_pcd_path"),
    *("colmap_im_id", "depth_file_path", "normal_file_path", "semantics_file_path", "timestamp", "blur_score"),
    # instant-ngp: where its own grid is, and depth
    *("aabb", "aabb_scale", "scale", "offset", "up", "sharpness", "depth_path", "normal_path"),
    *("enable_depth_loading", "integer_depth_scale", "n_extra_learnable_dims", "render_aabb"),
    # Blender's exporters, and renderers of objects
    *("rotation", "depth", "azimuth", "elevation", "radius", "distance", "cam_dis", "near", "far", "mesh"),
    *("mesh_to_world", "scene_box", "scene_scale", "bbox", "radian"),
    # names and notes
    *("id", "name", "scene", "scene_id", "scene_name", "object_id", "image_id", "camera_id", "cam_id", "frame_id"),
    *("frame_index", "index", "image_name", "dataset", "comment", "comments", "description", "license", "author"),
    *("date", "version", "generator", "software"),
}
"""Keys that say nothing about the lens, the pose or the pixels of a view."""


class Files:
    """The files of a scene's folder, listed when it is first asked for."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._names: dict[str, list[str]] | None = None

    def resolve(self, name: str) -> str:
        """A name as it is, or, where it has no extension of an image, with that of the file that is there, or .png."""
        if name.lower().endswith(SUFFIXES):
            return name
        if self._names is None:
            self._names = {}
            for file in list_files(self._folder):
                for key in {file, file.rpartition(".")[0]}:
                    self._names.setdefault(key, []).append(file)
        there = self._names.get(name, [])
        for end in ("", *SUFFIXES):
            if found := next((file for file in there if file.lower() == (name + end).lower()), None):
                return found
        return name + ".png"  # Blender's exporters leave the extension out


def read_json(folder: str, name: str) -> Any:
    """The content of a JSON file in a folder."""
    fs, path = file_system(folder)
    try:
        return parse_json(read_input(fs, join(path, name)), MAX_JSON)
    except ValueError as error:
        raise BadInput(f"{name} is not readable JSON: {error}") from error
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {redact(str(error))}") from None


def read_views(content: Any, name: str, files: Files) -> list[View]:
    """The frames of a transforms file's content; their matrices have OpenGL's axes but in `transforms_opencv.json`.

    Raises:
        BadInput: what is wrong with it.
    """
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise BadInput(f"{name} has no frames: the scene is empty")
    opengl = name != OPENCV
    if opengl:
        _check_keys(content, name)
    indices: dict[str, int] = {}
    for index, frame in enumerate(frames):
        where = f"{name}: frame {index}"
        if not isinstance(frame, dict):
            raise BadInput(f"{where} is not an object")
        file = path_in_scene(frame.get("file_path"), f"{where}: file_path", files)
        if file in indices:
            raise BadInput(f"{name}: frames {indices[file]} and {index} are both {file}")
        indices[file] = index
        if opengl:
            _check_keys(frame, f"{where} ({file})")
        _check_model(frame, content, f"{where} ({file})")
    rows = _read_poses(frames, list(indices), name)
    masks = _read_masks(frames, name, files)
    shared = _lens({}, content), _distortion({}, content, name)  # of frames that have none of their own
    lenses = [
        shared
        if frame.keys().isdisjoint(OF_LENSES)
        else (_lens(frame, content), _distortion(frame, content, f"{name}: frame {i} ({file})"))
        for i, (frame, file) in enumerate(zip(frames, indices, strict=True))
    ]
    return [
        View(i, file, rows[i], lens, opengl=opengl, mask=masks[i], distortion=distortion)
        for i, (file, (lens, distortion)) in enumerate(zip(indices, lenses, strict=True))
    ]


def path_in_scene(path: Any, what: str, files: Files) -> str:
    """Path of an image, relative to the scene's folder."""
    if not isinstance(path, str) or not path or not path.isprintable():
        shown = repr(path) if isinstance(path, str) else reprlib.repr(path)
        raise BadInput(f"{what} {shown} is no path of an image" if path is not None else f"{what} is missing")
    if "\\" in path:
        raise BadInput(f"{what} {path!r} has backslashes: write it with /, relative to the scene's folder")
    outside = f"{what} {path!r} does not stay in the scene's folder: "
    if path.startswith("/") or "://" in path or re.match("[A-Za-z]:", path):
        raise BadInput(outside + "make it relative to that folder instead of absolute")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise BadInput(outside + "move or link the images into it, and name them relative to it")
    return files.resolve("/".join(parts))


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in READ and key not in HARMLESS:
            raise BadInput(
                f"{where} has {key!r}, which is not known here and could change what a camera or a pixel means; "
                "remove it if it does not"
            )


def _check_model(frame: Mapping[str, Any], content: Mapping[str, Any], where: str) -> None:
    model = frame.get("camera_model", content.get("camera_model", "OPENCV"))
    if frame.get("is_fisheye", content.get("is_fisheye", False)):
        model = "a fisheye (is_fisheye)"
    elif isinstance(model, str) and model in PERSPECTIVE:
        return
    elif not isinstance(model, str):
        model = reprlib.repr(model)
    raise BadInput(
        f"{where}: the camera_model is {model}, not a perspective one: undistort the images first "
        "(colmap image_undistorter)"
    )


def _nearest(keys: Sequence[str], *levels: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some keys that belong together, from the first level that has any of them."""
    for level in levels:
        if found := {key: level[key] for key in keys if key in level}:
            return found
    return {}


def _lens(frame: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[tuple[str, float | str], ...]:
    size, center = _nearest(SIZE, frame, content), _nearest(CENTER, frame, content)
    focal = _nearest(FOCAL, frame, content)
    own_angle = any(key in frame for key in FOCAL) and "fl_x" not in frame
    if own_angle and "fl_x" in content and not size and not any(key in frame for key in CENTER):
        center = {}  # in pixels of an image whose size nobody says: it goes with the focal length that is not used
    lens = {**focal, **center, **size}
    return tuple((key, value if isinstance(value, int | float) else reprlib.repr(value)) for key, value in lens.items())


def _distortion(frame: Mapping[str, Any], content: Mapping[str, Any], where: str) -> tuple[tuple[str, float], ...]:
    values = _nearest(DISTORTION, frame, content)
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise BadInput(f"{where}: the distortion {key} is {reprlib.repr(value)}, but has to be a number")
    return tuple((key, float(value)) for key, value in values.items() if value)


def _read_masks(frames: Sequence[Mapping[str, Any]], name: str, files: Files) -> list[str | None]:
    masks = [
        None
        if frame.get("mask_path") is None
        else path_in_scene(frame["mask_path"], f"{name}: frame {index}: mask_path", files)
        for index, frame in enumerate(frames)
    ]
    if any(masks) and not all(masks):
        index = masks.index(None)
        raise BadInput(f"{name}: frame {index} has no mask_path, but others have: give all frames a mask, or none")
    return masks


def _read_poses(frames: Sequence[Mapping[str, Any]], files: Sequence[str], name: str) -> list[list[list[float]]]:
    poses = [frame.get("transform_matrix") for frame in frames]
    poses = [[*pose, [0, 0, 0, 1]] if isinstance(pose, list) and len(pose) == 3 else pose for pose in poses]
    cam2world = _matrices(poses)
    if cam2world is None:
        index = next(i for i, pose in enumerate(poses) if _matrices([pose]) is None)
        words = any(isinstance(value, str) for value in _values(poses[index]))
        why = "; its numbers are strings" if words else ""
        raise BadInput(f"{name}: frame {index} ({files[index]}) has no transform_matrix of 4 x 4 numbers{why}")
    for index in (~is_rigid(cam2world)).nonzero().flatten().tolist():
        raise BadInput(f"{name}: the pose of frame {index} ({files[index]}) {_why_not_rigid(cam2world[index])}")
    if name != OPENCV:
        cam2world = opengl_to_opencv(cam2world)
    return to_rows(cam2world)


def _values(pose: Any) -> list[Any]:
    return [value for row in pose if isinstance(row, list) for value in row] if isinstance(pose, list) else []


def _matrices(poses: Sequence[Any]) -> Tensor | None:
    try:
        matrices = torch.tensor(poses, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None
    return matrices if matrices.shape == (len(poses), 4, 4) else None


def _why_not_rigid(pose: Tensor) -> str:
    """What a matrix [4, 4] is instead of a rigid motion, with the likely cause."""
    if not has_numbers(pose):
        return NO_NUMBERS
    what = f"is no rigid motion (within {RIGID_TOLERANCE:g})"
    if bool(is_rigid(pose.T)):
        return f"{what}: the matrix is transposed"
    scale = float(torch.linalg.det(pose[:3, :3]).abs()) ** (1 / 3)
    for factor in (scale, -scale) if scale > 0 else ():
        candidate = pose.clone()
        candidate[:3, :3] /= factor
        if bool(is_rigid(candidate)):
            if factor < 0:
                return f"{what}: it mirrors, so an axis has the wrong sign or two are swapped"
            return f"{what}: its rotation is scaled by {scale:.4g}, so divide the first three columns by that"
    return f"{what}: its axes are not perpendicular or not of length 1, so make the rotation orthonormal"
