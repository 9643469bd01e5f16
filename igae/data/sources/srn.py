# SPDX-License-Identifier: Apache-2.0
"""Renders of ShapeNet as scene representation networks use them: `rgb/`, `pose/` and `intrinsics.txt` for each scene.

The facts are those of `util.py` of github.com/vsitzmann/scene-representation-networks: a pose has the 16 numbers of a
cam2world matrix with OpenCV's axes; the lines of `intrinsics.txt` are `f cx cy 0`, the center and the scale of a voxel
grid that no camera needs, `height width`, and, in some, whether the poses are world to camera instead. Images may have
another size: those of cars have 128 pixels a side, and their intrinsics are for 512. ShapeNet's objects have a diagonal
of 1 around the origin.
"""

import math
from collections.abc import Set

import torch

from igae.data.sources.files import by_stem, check_poses, list_files, pair, read_all, to_rows, to_tensor
from igae.data.sources.scene import SUFFIXES, BadInput, View

UNIT_BOX = True
IMAGES, POSES, INTRINSICS = "rgb", "pose", "intrinsics.txt"
LINES = ([4, 3, 1, 2], [4, 3, 1, 2, 1])
"""Numbers in each line of `intrinsics.txt`."""


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with two of the three: one that lacks the third is damaged."""
    return len(names & {IMAGES, POSES, INTRINSICS}) >= 2


def read(folder: str) -> list[View]:
    """The pairs of an image and a pose."""
    files = list_files(folder)
    images = [file for file in files if file.startswith(f"{IMAGES}/") and file.lower().endswith(SUFFIXES)]
    poses = [file for file in files if file.startswith(f"{POSES}/") and file.endswith(".txt")]
    pairs = pair(by_stem(images, f"{IMAGES}/"), by_stem(poses, f"{POSES}/"))
    names = [pose for _, pose in pairs]
    text, *texts = read_all(folder, [INTRINSICS, *names])
    lens, world2cam = _read_lens(text)
    matrices = torch.stack(
        [to_tensor(_numbers(text), (16,), name).view(4, 4) for text, name in zip(texts, names, strict=True)]
    )
    check_poses(matrices, names)
    rows = to_rows(torch.linalg.inv(matrices) if world2cam else matrices)
    return [View(i, image, rows[i], lens) for i, (image, _) in enumerate(pairs)]


def _read_lens(text: bytes) -> tuple[tuple[tuple[str, float], ...], bool]:
    """The lens, and whether the poses are world to camera."""
    lines = [_numbers(line) for line in text.splitlines() if line.strip()]
    if [len(line) for line in lines] not in LINES or not all(map(math.isfinite, sum(lines, []))):
        raise BadInput(
            f"{INTRINSICS} does not have the lines 'f cx cy 0', '0 0 0', '1', 'height width': write it again"
        )
    focal, cx, cy, zero = lines[0]
    height, width = lines[3]
    flag = lines[4][0] if len(lines) > 4 else 0
    if zero or flag not in (0, 1) or min(focal, height, width) <= 0:
        raise BadInput(
            f"{INTRINSICS} has to begin with 'f cx cy 0' and to give a positive focal length, height and width: mend it"
        )
    return (("fl_x", focal), ("cx", cx), ("cy", cy), ("w", width), ("h", height)), bool(flag)


def _numbers(text: bytes) -> list[float]:
    """The numbers in a text, none where there is anything else."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []
