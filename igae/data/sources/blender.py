# SPDX-License-Identifier: Apache-2.0
"""Renders of Blender in the layout of NeRF-synthetic: `transforms_train.json`, `transforms_val.json` and
`transforms_test.json` in a scene's folder, each with `camera_angle_x` and frames, whose matrices have OpenGL's axes.

Views have the order of these files. Those of `train` are training views; those of `val` and `test` are held out, so
that figures compare with those of methods that are trained on `train` alone.
"""

from collections.abc import Set
from dataclasses import replace

from igae.data.sources.frames import Files, read_json, read_views
from igae.data.sources.scene import BadInput, View
from igae.errors import redact
from igae.storage import file_system, join

FILES = {split: f"transforms_{split}.json" for split in ("train", "val", "test")}
UNIT_BOX = False


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with a file for each split, or for one."""
    return not names.isdisjoint(FILES.values())


def read(folder: str) -> list[View]:
    """The frames of all splits. A view that `val` and `test` share is there once."""
    fs, path = file_system(folder)
    present = {split: name for split, name in FILES.items() if fs.exists(join(path, name))}
    if not present:
        raise BadInput(f"there is no {', '.join(FILES.values())} in {redact(folder)}")
    files = Files(folder)
    found: dict[str, tuple[str, View]] = {}
    for split, name in present.items():
        for view in read_views(read_json(folder, name), name, files):
            first, other = found.setdefault(view.file, (split, view))
            if first != split and "train" in (first, split):
                raise BadInput(f"{view.file} is in both {FILES[first]} and {name}")
            if other.cam2world != view.cam2world:
                raise BadInput(f"{view.file} has another pose in {name} than in {FILES[first]}")
    alone = len(present) == 1 and "train" in present  # nothing says what is held out
    return [
        replace(view, index=index, heldout=None if alone else split != "train")
        for index, (split, view) in enumerate(found.values())
    ]
