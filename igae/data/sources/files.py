# SPDX-License-Identifier: Apache-2.0
"""What formats with a camera for each image share: listing, reading and pairing a scene's files, checking poses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from igae.data.cameras import LARGEST, RIGID_TOLERANCE, has_numbers, is_rigid
from igae.data.sources.images import content_of, read_files
from igae.data.sources.scene import BadInput
from igae.storage import file_system
from igae.storage import list_files as list_with_links

NO_NUMBERS = f"has NaN or infinite numbers, or some beyond {LARGEST:g}"


def list_files(folder: str) -> list[str]:
    """All files below a folder and what links in it lead to, relative to it and sorted, but hidden ones (macOS leaves
    ._000.png)."""
    prefix = file_system(folder)[1].rstrip("/") + "/"
    found, _ = list_with_links(folder, lambda path: not path.rpartition("/")[2].startswith("."))
    return sorted(path.removeprefix(prefix) for path in found)


def read_all(folder: str, files: Sequence[str]) -> list[bytes]:
    """Contents of files in a folder, where an object store answers many at the same time.

    Raises:
        BadInput: one is missing or cannot be read.
    """
    found = zip(files, read_files((folder, file) for file in files), strict=True)
    return [content_of(content, file) for file, content in found]


def by_stem(files: Iterable[str], below: str = "") -> dict[str, str]:
    """Files by their paths without extension, and without the folder `below` (which ends in a slash).

    Raises:
        BadInput: two have the same.
    """
    found: dict[str, str] = {}
    for file in files:
        stem = file.removeprefix(below).rpartition(".")[0]
        if stem in found:
            raise BadInput(f"{found[stem]} and {file} are the same view: remove one of them")
        found[stem] = file
    return found


def pair(images: Mapping[str, str], cameras: Mapping[str, str]) -> list[tuple[str, str]]:
    """Images and cameras with the same key, in the order of the keys.

    Raises:
        BadInput: there are none, or one has no partner.
    """
    for key in sorted(images.keys() ^ cameras.keys()):
        if key in images:
            raise BadInput(f"{images[key]} has no camera: add the camera or remove the image")
        raise BadInput(f"{cameras[key]} has no image: add the image or remove the camera")
    if not images:
        raise BadInput("there are no views: the scene is empty")
    return [(images[key], cameras[key]) for key in sorted(images)]


def to_tensor(values: Any, shape: tuple[int, ...], file: str) -> Tensor:
    """Numbers from a file, float64 of a shape.

    Raises:
        BadInput: they are no numbers, or have another shape.
    """
    try:
        found = torch.tensor(values, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        found = torch.empty(0)
    if found.shape != shape:
        raise BadInput(f"{file} does not have {' x '.join(map(str, shape))} numbers: write it again")
    return found


def check_poses(poses: Tensor, files: Sequence[str]) -> None:
    """Check that matrices [V, 4, 4] from as many files are rigid motions.

    Raises:
        BadInput: one is not.
    """
    for index in (~is_rigid(poses)).nonzero().flatten().tolist():
        what = f"is no rigid motion (within {RIGID_TOLERANCE:g})" if has_numbers(poses[index]) else NO_NUMBERS
        raise BadInput(f"the pose in {files[index]} {what}: write it again without scale, or remove the view")


def to_rows(poses: Tensor) -> list[list[list[float]]]:
    """Matrices [V, 4, 4] as a `View` has them, without negative zeros: every way to a camera gives one text."""
    rows: list[list[list[float]]] = (poses + 0.0).tolist()
    return rows
