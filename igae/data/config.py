# SPDX-License-Identifier: Apache-2.0
"""Settings of the data, and of packing it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from igae.config import Section

Verify = Literal["off", "size", "sha256"]
Convention = Literal["opencv", "opengl", "opencv-world2cam", "opengl-world2cam"]
Normalize = Literal["auto", "cameras", "none"]
HeldOut = Literal["auto", "first", "every", "random", "listed"]
Fit = Literal["refuse", "crop", "pad"]


class DataConfig(Section):
    root: str
    """Folder or fsspec URL of shards that data_tools/pack_shards.py wrote."""
    categories: dict[str, tuple[int, int]] | None = None
    """Scenes to train, as ranges [start, stop) of categories, e.g. {objaverse: [0, 500]}; all if left out."""
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """RGB color in [0, 1] behind the objects; images with an alpha channel are composited over it. It can't
    change within a run, and a fit has its model's."""
    workers: int = Field(default=2, ge=0, le=1024)
    """Processes that decode images; 0 decodes in the training process."""
    shuffle: int = Field(default=2000, ge=0)
    """Images in the shuffle buffer."""
    verify: Verify = "size"
    """What of a shard is compared with the manifest before its first use; `sha256` reads it once more."""
    cache: str | None = None
    """Folder of this machine where copies of shards are kept, so that an object store is asked for each only once."""

    @field_validator("background")
    @classmethod
    def _is_a_color(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(0 <= channel <= 1 for channel in value):
            raise ValueError(f"{list(value)} is no RGB color: its channels must be in [0, 1]")
        return value


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how.

    Attributes:
        scenes: folder or URL of the scenes, in one of the formats of `igae.data.sources`; None: natural images only.
        subset: folder below `scenes` that has the scenes' folders (`square128`).
        categories: category -> [start, stop) in its list in dataset_map.json; None: all scenes.
        format: key of `igae.data.formats()`; None: by content.
        convention: of the scenes' matrices; None: as the format has it.
        normalize: `cameras`: what a scene's cameras look at comes into the box; `auto`: where the format does not say
            that it is there; `none`: cameras stay as they are, and need not look at one place.
        heldout: views that are held out, a tenth: the `first`, `every` so many in their order, `random` ones, or those
            that the source lists; `auto`: those that it lists, else the first of igae-data's layout, else every.
        images: folder or URL of natural images; None: scenes only.
        resize: side in pixels of the square that images of other sizes are brought to; None: image bytes are copied.
        fit: what `resize` does with views that are not square: they are refused, their largest centered square is cut
            out (`crop`), or they get a transparent border (`pad`).
        shard_size: bytes a shard should not exceed; a scene is never split.
        seed: of the order of views and natural images in the shards.
        workers: processes; 1 works in this one.
        skip_bad: leave bad scenes and natural images out instead of refusing.
        overwrite: replace what a manifest in the output describes.
    """

    scenes: str | None = None
    subset: str | None = None
    categories: Mapping[str, tuple[int, int]] | None = None
    format: str | None = None
    convention: Convention | None = None
    normalize: Normalize = "auto"
    heldout: HeldOut = "auto"
    images: str | None = None
    resize: int | None = None
    fit: Fit = "refuse"
    shard_size: int = 500_000_000
    seed: int = 0
    workers: int = 1
    skip_bad: bool = False
    overwrite: bool = False
