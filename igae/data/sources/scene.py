# SPDX-License-Identifier: Apache-2.0
"""What every input format gives: scenes by name, and of a scene its views with their cameras."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from igae.data.cameras import normalized_intrinsics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class BadInput(ValueError):
    """One sentence about a scene or natural image that cannot be packed."""


@dataclass(frozen=True)
class SceneRef:
    """Where a scene is: `folder` is a path or URL, `format` a key of `igae.data.sources.FORMATS`."""

    name: str
    category: str
    folder: str
    format: str


@dataclass(frozen=True)
class View:
    """A view: its index in the scene, its image (relative to the scene's folder) and its camera.

    Attributes:
        cam2world: 4 rows of 4, OpenCV.
        lens: names and values that `normalized_intrinsics` reads.
    """

    index: int
    file: str
    cam2world: list[list[float]]
    lens: tuple[tuple[str, float | str], ...]

    def intrinsics(self, size: tuple[int, int]) -> list[list[float]]:
        """3 rows of 3, normalized; `size` is the (height, width) of the image file.

        Raises:
            BadInput: the lens is not complete, or is that of an image of another shape.
        """
        try:
            return _intrinsics(self.lens, size)
        except ValueError as error:
            raise BadInput(f"{self.file}: {error}") from error


@functools.lru_cache(maxsize=256)  # a scene's views have one lens as a rule
def _intrinsics(lens: tuple[tuple[str, float | str], ...], size: tuple[int, int]) -> list[list[float]]:
    rows: list[list[float]] = normalized_intrinsics(dict(lens), size).tolist()
    return rows


@dataclass(frozen=True)
class RawScene:
    """A scene with all its views; the first `heldout` of them are held out."""

    ref: SceneRef
    views: Sequence[View]

    @property
    def heldout(self) -> int:
        """A tenth of the views, at least one where there is more than one."""
        return max(len(self.views) // 10, 1) if len(self.views) > 1 else 0


@dataclass(frozen=True)
class Found:
    """Scenes of a data set: its name, and the names of the scenes in each category, which are folders."""

    dataset: str
    categories: Mapping[str, Sequence[str]]


class SourceFormat(Protocol):
    """An input format: a module of this folder with these two functions."""

    def find(self, root: str, folder: str) -> Found | None:
        """The scenes in `folder`, which is `root` or below it; None where `root` is not of this format.

        Raises:
            ValueError: it is, but is damaged.
        """
        ...

    def read(self, folder: str) -> list[View]:
        """The views of a scene, checked as far as that goes without their images.

        Raises:
            BadInput: what is wrong with it.
        """
        ...
