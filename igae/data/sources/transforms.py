# SPDX-License-Identifier: Apache-2.0
"""Folders of scenes with a transforms file each, as nerfstudio, instant-ngp and igae-data write them.

`transforms_opencv.json` has cameras in the OpenCV convention, `transforms.json` in that of OpenGL and Blender.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from igae.data.sources.frames import OPENCV, Files, path_in_scene, read_json, read_views
from igae.data.sources.scene import BadInput, View
from igae.errors import redact
from igae.storage import file_system, join

OPENGL = "transforms.json"
SPLITS = ("train", "val", "test")
UNIT_BOX = False


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with a transforms file."""
    return OPENGL in names or OPENCV in names


def read(folder: str) -> list[View]:
    """The frames of a transforms file; `val_filenames` and `test_filenames` in it are held out."""
    fs, path = file_system(folder)
    name = next((name for name in (OPENCV, OPENGL) if fs.exists(join(path, name))), None)
    if name is None:
        raise BadInput(f"there is no {OPENCV} or {OPENGL} in {redact(folder)}")
    content, files = read_json(folder, name), Files(folder)
    views = read_views(content, name, files)
    lists = {split: content[f"{split}_filenames"] for split in SPLITS if f"{split}_filenames" in content}
    return _split(views, lists, name, files) if lists else views


def _split(views: Sequence[View], lists: dict[str, Any], name: str, files: Files) -> list[View]:
    """The views with what the file's lists say. As in nerfstudio a frame that is in no list is not used, but where
    there is only a list of training views, or none of these, the others are those of the other kind."""
    known = {view.file for view in views}
    chosen: dict[str, set[str]] = {}
    for split, listed in lists.items():
        what = f"{name}: {split}_filenames"
        if not isinstance(listed, list):
            raise BadInput(f"{what} is no list")
        chosen[split] = {path_in_scene(path, f"{what}:", files) for path in listed}
        if unknown := sorted(chosen[split] - known):
            raise BadInput(f"{what} has {unknown[0]}, which no frame has")
    heldout = chosen.get("val", set()) | chosen.get("test", set())
    training = chosen.get("train", set())
    if both := sorted(training & heldout):
        raise BadInput(f"{name}: {both[0]} is a training view and a held-out one in its lists of filenames")
    if "train" not in chosen:
        training = known - heldout
    elif set(chosen) == {"train"}:
        heldout = known - training
    kept = [view for view in views if view.file in training | heldout]
    return [replace(view, heldout=view.file in heldout) for view in kept]
