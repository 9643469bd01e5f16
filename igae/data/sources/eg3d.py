# SPDX-License-Identifier: Apache-2.0
"""Data sets of EG3D: `dataset.json` with cameras of all images, in a folder or a zip file.

The facts are those of github.com/NVlabs/eg3d (`dataset_tool.py` and `dataset_preprocessing/`): `labels` has pairs of a
file and 25 numbers, which are 16 of a cam2world matrix with OpenCV's axes and 9 of intrinsics in image sizes. EG3D
itself knows no scenes. Here a folder of `dataset.json` is one; data sets of single images are refused.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from igae.data.sources.files import check_poses, list_files, pair, to_rows, to_tensor
from igae.data.sources.scene import SUFFIXES, BadInput, View
from igae.errors import redact
from igae.storage import file_system, join, read_input, split

UNIT_BOX = False
"""No file says the scale: ShapeNet's cars are in the box with cameras 1.3 away, faces are seen from 2.7 and around a
point 0.2 before the origin. So cameras are moved by what they look at, which changes those of cars by 6 %."""
FILE = "dataset.json"
CHUNK = 1000
"""Images that `dataset_tool.py` puts into a folder, whatever they show."""
SINGLE = (
    f"{FILE} is of single images, which show one thing each, or whose folders are no scenes (flat, one image a folder, "
    "or chunks of 1000): put the views of each scene into a folder of their own"
)

Labels = Mapping[str, Mapping[str, Any]]
"""Folder -> name of an image -> what the file says about it."""


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with images below that of `dataset.json`; or that folder with images, which is then refused."""
    return (FILE in above or FILE in names) and any(name.lower().endswith(SUFFIXES) for name in names)


def read(folder: str) -> list[View]:
    """The images of a folder."""
    files = list_files(folder)
    if FILE in files:
        raise BadInput(SINGLE)
    root, scene = split(folder)
    fs, path = file_system(join(root, FILE))
    labels = _read_labels(root, fs.ukey(path))
    if isinstance(labels, str):
        raise BadInput(labels)
    known = labels.get(scene, {})
    images = {file: file for file in files if file.lower().endswith(SUFFIXES)}
    pairs = pair(images, {name: f"the label of {scene}/{name} in {FILE}" for name in known})
    names = [label for _, label in pairs]
    numbers = torch.stack([to_tensor(known[image], (25,), label) for image, label in pairs])
    poses, lenses = numbers[:, :16].view(-1, 4, 4), numbers[:, 16:].view(-1, 3, 3)
    check_poses(poses, names)
    rows = to_rows(poses)
    return [View(i, image, rows[i], _lens(lenses[i], names[i])) for i, (image, _) in enumerate(pairs)]


def _lens(intrinsics: Tensor, label: str) -> tuple[tuple[str, float], ...]:
    """A lens of normalized intrinsics [3, 3]: those of an image with a side of 1."""
    (fx, _, cx), (_, fy, cy), _ = rows = intrinsics.tolist()
    if rows != [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] or not all(map(math.isfinite, (fx, fy, cx, cy))):
        raise BadInput(f"{label} does not end with the intrinsics fx 0 cx 0 fy cy 0 0 1: write it again")
    return (("fl_x", fx), ("fl_y", fy), ("cx", cx), ("cy", cy), ("w", 1), ("h", 1))


@functools.lru_cache(maxsize=2)  # it may have millions of numbers, and all scenes of a process ask for it
def _read_labels(root: str, version: str) -> Labels | str:
    """The labels in a folder, or what is wrong with them; `version` changes with the file."""
    fs, path = file_system(root)
    try:
        content = json.loads(read_input(fs, join(path, FILE)))
    except (ValueError, RecursionError) as error:
        return f"{FILE} is not readable JSON: {error}"
    except OSError as error:
        return f"{FILE} cannot be read: {redact(str(error))}"
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list) or not labels:
        return f"{FILE} has no labels, so no cameras: write it with EG3D's preprocessing"
    if unknown := content.keys() - {"labels"}:
        return f"{FILE} has unknown keys, which may change its cameras: {', '.join(sorted(unknown))}; remove them"
    found: dict[str, dict[str, Any]] = {}
    for index, label in enumerate(labels):
        if not isinstance(label, list) or len(label) != 2 or not isinstance(label[0], str):
            return f"{FILE}: label {index} is no pair of a file and 25 numbers: write it again"
        folder, _, name = label[0].removeprefix("./").rpartition("/")
        if name in found.setdefault(folder, {}):
            return f"{FILE} has two labels of {label[0]}: remove one of them"
        found[folder][name] = label[1]
    if "" in found or len(found) > 1 and all(len(names) == 1 for names in found.values()) or _is_chunked(found):
        return SINGLE
    present = {name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)}
    missing = [folder for folder in found if folder not in present]
    if missing:
        return (
            f"{FILE} has labels of {len(missing)} missing folder(s), first {missing[0]}: add them or remove the labels"
        )
    return found


def _is_chunked(labels: Labels) -> bool:
    """Whether image number n of the data set is in folder n // 1000, and some folder is full."""
    found = [(folder, re.fullmatch(r"img(\d{8})\.\w+", name)) for folder, names in labels.items() for name in names]
    by_number = all(match and folder == f"{int(match[1]) // CHUNK:05d}" for folder, match in found)
    return by_number and any(len(names) == CHUNK for names in labels.values())
