# SPDX-License-Identifier: Apache-2.0
"""Renders as those of G-buffer Objaverse: `campos_512_v4/00000/00000.json` with `00000.png` in each scene's folder.

The folders are those of `dataset/gobjaverse/README.md` of github.com/modelscope/richdreamer. Its loaders (as in
`process_blender_dataset.py` there) make a cam2world of the columns x, y, z and origin as they stand where they need
OpenCV's camera axes, and negate y and z where they need OpenGL's; `depth_warp_example.py` multiplies with both in turn,
projects with a positive depth, and takes the object to be in the cube of side 1.
"""

import json
from collections.abc import Set
from typing import Any

import torch

from igae.data.sources.files import by_stem, check_poses, list_files, pair, read_all, to_rows, to_tensor
from igae.data.sources.scene import SUFFIXES, BadInput, View
from igae.storage import join

UNIT_BOX = True
VIEWS = "campos_512_v4"
COLUMNS = ("x", "y", "z", "origin")
ANGLES = {"x_fov": "camera_angle_x", "y_fov": "camera_angle_y"}
"""Fields of view in radians -> their names in a lens."""
HARMLESS = {"bbox", "max_depth"}
"""Other keys: about the object, and the scale of its depth."""


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with the folder of the views."""
    return VIEWS in names


def read(folder: str) -> list[View]:
    """The views: each has a folder, whose other files (albedo, normals, ...) begin with its name and `_`."""
    files = list_files(join(folder, VIEWS))
    images = by_stem(file for file in files if file.lower().endswith(SUFFIXES) and not _is_map(file))
    cameras = by_stem(file for file in files if file.endswith(".json"))
    for view in sorted({file.partition("/")[0] for file in files if "/" in file}):
        if f"{view}/{view}" not in images.keys() | cameras.keys():
            raise BadInput(f"{VIEWS}/{view} has neither {view}.json nor {view}.png: add them or remove the folder")
    pairs = [(f"{VIEWS}/{image}", f"{VIEWS}/{camera}") for image, camera in pair(images, cameras)]
    names = [camera for _, camera in pairs]
    contents = [_parse(data, name) for data, name in zip(read_all(folder, names), names, strict=True)]
    poses = torch.eye(4, dtype=torch.float64).repeat(len(pairs), 1, 1)
    for index, (content, name) in enumerate(zip(contents, names, strict=True)):
        poses[index, :3] = to_tensor([content[key] for key in COLUMNS], (4, 3), name).T
    check_poses(poses, names)
    lenses = [tuple((to, content[key]) for key, to in ANGLES.items() if key in content) for content in contents]
    return [View(i, pairs[i][0], rows, lenses[i]) for i, rows in enumerate(to_rows(poses))]


def _is_map(file: str) -> bool:
    view, _, name = file.partition("/")
    return name.startswith(f"{view}_")


def _parse(data: bytes, file: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not readable JSON: {error}") from error
    missing = [key for key in (*COLUMNS, "x_fov") if not isinstance(content, dict) or key not in content]
    if missing:
        raise BadInput(f"{file} lacks {', '.join(missing)}: download it again")
    for key in content:
        if key not in {*COLUMNS, *ANGLES, *HARMLESS}:
            raise BadInput(f"{file} has an unknown key {key!r}, which may change its camera: remove it if it does not")
    for key in ANGLES.keys() & content.keys():
        if isinstance(content[key], bool) or not isinstance(content[key], int | float):
            raise BadInput(f"{file}: {key} is no number: download it again")
    return dict(content)
