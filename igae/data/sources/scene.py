# SPDX-License-Identifier: Apache-2.0
"""What every input format gives: scenes by name, and of a scene its views with their cameras."""

import functools
from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from igae.data.cameras import normalized_intrinsics
from igae.data.config import Convention

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class BadInput(ValueError):
    """One sentence about a scene or natural image that cannot be packed; names in it may have any length."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence if len(sentence) <= 1000 else f"{sentence[:1000]}...")


class Normalization(NamedTuple):
    """A point x of the source's world is at `scale` * (x - (x, y, z)) in the packed scene's."""

    x: float
    y: float
    z: float
    scale: float


@dataclass(frozen=True)
class SceneRef:
    """Where a scene is, and how it is read.

    Attributes:
        folder: path or URL.
        format: key of `igae.data.formats()`.
        convention: of the matrices in its files; None: as its format has it.
        normalization: of its cameras; None: they stay as they are.
    """

    name: str
    category: str
    folder: str
    format: str
    convention: Convention | None = None
    normalization: Normalization | None = None


@dataclass(frozen=True)
class View:
    """A view: its index in the scene, its image (relative to the scene's folder) and its camera.

    Attributes:
        cam2world: 4 rows of 4, OpenCV.
        lens: names and values that `normalized_intrinsics` reads.
        heldout: whether the source holds it out; None: it does not say.
        opengl: the source's matrices have OpenGL's axes.
        mask: image (relative to the scene's folder) that is black beside the object; it becomes alpha.
        distortion: names (k1, k2, k3, k4, k5, k6, p1, p2) and values of OpenCV's model, where not zero.
    """

    index: int
    file: str
    cam2world: list[list[float]]
    lens: tuple[tuple[str, float | str], ...]
    heldout: bool | None = None
    opengl: bool = False
    mask: str | None = None
    distortion: tuple[tuple[str, float], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Its image, and its mask if it has one."""
        return (self.file, self.mask) if self.mask else (self.file,)

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


class SourceFormat(Protocol):
    """An input format: a module, or an object, with these names."""

    UNIT_BOX: bool
    """Its scenes are in the box of side 1 around the origin, so that their cameras stay as they are by default."""

    def is_scene(self, names: Set[str], above: Set[str]) -> bool:
        """Whether a folder is a scene, by the names of what is in it, and of what is in the folder above it."""
        ...

    def read(self, folder: str) -> list[View]:
        """The views of a scene, checked as far as that goes without their images.

        Raises:
            BadInput: what is wrong with it.
        """
        ...
