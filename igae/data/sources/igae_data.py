# SPDX-License-Identifier: Apache-2.0
"""The layout of igae-data: `dataset_map.json` (category -> scenes), and a transforms file in each scene."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from igae.data.sources.frames import OPENCV
from igae.data.sources.transforms import read as read
from igae.errors import redact
from igae.storage import base_name, file_system, join, named_errors, read_input

MAP = "dataset_map.json"
UNIT_BOX = True


@dataclass(frozen=True)
class Lists:
    """Name of a data set, and the names of the scenes in each category, which are folders."""

    dataset: str
    categories: Mapping[str, Sequence[str]]


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder with cameras in the OpenCV convention."""
    return OPENCV in names


def read_lists(root: str) -> Lists | None:
    """What the map in `root` lists, None where there is none. Its longest list names the data set if it has all scenes.

    Raises:
        ValueError: the map is damaged.
    """
    fs, path = file_system(root)
    file = join(path, MAP)
    with named_errors(root):
        if not fs.exists(file):
            return None
    lists = _read_map(read_input(fs, file), redact(join(root, MAP)))
    longest = max(lists, key=lambda key: len(lists[key]))
    if set(lists[longest]) >= {name for names in lists.values() for name in names}:
        return Lists(longest, {longest: lists[longest], **lists})
    return Lists(base_name(root), lists)


def _read_map(text: bytes, file: str) -> dict[str, list[str]]:
    try:
        lists = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f"{file} has to map category names to lists of scene names")
    for key, names in lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file}: {key!r} has to be a list of scene names")
    return lists
