# SPDX-License-Identifier: Apache-2.0
"""Settings of the data."""

from typing import Literal

from pydantic import Field, field_validator

from igae.config import Section

Verify = Literal["off", "size", "sha256"]


class DataConfig(Section):
    root: str
    """Folder or fsspec URL of shards that data_tools/pack_shards.py wrote."""
    categories: dict[str, tuple[int, int]] | None = None
    """Scenes to train, as ranges [start, stop) of categories, e.g. {objaverse: [0, 500]}; all if left out."""
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """RGB color in [0, 1] behind the objects; images with an alpha channel are composited over it."""
    workers: int = Field(default=2, ge=0)
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
