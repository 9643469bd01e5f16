# SPDX-License-Identifier: Apache-2.0
"""Renders as those of Zero-1-to-3 and Objaverse-XL: `000.png` with `000.npy` in each scene's folder.

The facts are those of `objaverse-rendering/scripts/blender_script.py` of github.com/cvlab-columbia/zero123: a matrix is
3 x 4, world to camera with Blender's camera axes (x right, y up, z backward), the inverse of the camera's
`matrix_world`; the lens has 35 mm on a sensor 32 mm wide; and objects are scaled so that the longest side of their
bounding box is 1, around the origin.
"""

import io
from collections.abc import Set

import numpy as np
import torch

from igae.data.cameras import opengl_to_opencv
from igae.data.sources.files import by_stem, check_poses, list_files, pair, read_all, to_rows, to_tensor
from igae.data.sources.scene import SUFFIXES, BadInput, View

UNIT_BOX = True
FOCAL = 35 / 32
"""In image widths. No file says it."""
HARMLESS = {"metadata.json"}
"""Files beside the views that Objaverse-XL's renders have: about the object's mesh."""
CAMERAS = (".npy", ".npz", ".json", ".txt", ".pkl")
"""Endings of files that may say other cameras than these."""


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with numbered images and numbered matrices."""
    numbered = [name.lower() for name in names if name.partition(".")[0].isdigit()]
    return any(name.endswith(".npy") for name in numbered) and any(name.endswith(SUFFIXES) for name in numbered)


def read(folder: str) -> list[View]:
    """The pairs of a number's image and matrix. `000_depth.png` and the like beside `000.png` are no views."""
    files = [file for file in list_files(folder) if "/" not in file]
    matrices = by_stem(file for file in files if file.lower().endswith(".npy") and file[:-4].isdigit())
    for file in files:
        if file.lower().endswith(CAMERAS) and file not in HARMLESS and file not in matrices.values():
            raise BadInput(f"{file} is none of Zero-1-to-3's files and may say other cameras: remove it")
    pairs = pair(by_stem(file for file in files if file.lower().endswith(SUFFIXES) and not _is_map(file)), matrices)
    cameras = [camera for _, camera in pairs]
    world2cam = torch.eye(4, dtype=torch.float64).repeat(len(pairs), 1, 1)
    for index, data in enumerate(read_all(folder, cameras)):
        world2cam[index, :3] = to_tensor(_array(data, cameras[index]), (3, 4), cameras[index])
    check_poses(world2cam, cameras)
    rows = to_rows(opengl_to_opencv(torch.linalg.inv(world2cam)))
    # Of any image: normalized by a width of 1, which has its shape as long as it is square.
    lens = (("fl_x", FOCAL), ("w", 1), ("h", 1))
    return [View(i, image, rows[i], lens, opengl=True) for i, (image, _) in enumerate(pairs)]


def _is_map(file: str) -> bool:
    number, mark, _ = file.partition("_")
    return bool(mark) and number.isdigit()


def _array(data: bytes, file: str) -> object:
    """Numbers of a .npy file; a pickle in it is never loaded."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header makes it raise anything
        raise BadInput(f"{file} is no readable .npy file of numbers: write it again") from error
    return array.tolist() if isinstance(array, np.ndarray) else None
