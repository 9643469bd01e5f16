# SPDX-License-Identifier: Apache-2.0
"""Settings of the scenes' planes."""

import math
from typing import Literal

from pydantic import Field, model_validator

from igae.config import Section

Tier = Literal["device", "host", "disk"]

MOST = 16384
"""Of texels and features: the number of bytes of planes then is one that torch can count to."""
MAX_NUMBERS = 1 << 32
"""Of a scene's planes, and of all base planes: 17 GB."""


class PlanesConfig(Section):
    resolution: int = Field(default=64, ge=2, le=MOST)
    """Texels along a side of a plane (R)."""
    features: int = Field(default=32, ge=1, le=MOST)
    """Features of a texel that the MLP reads (C): with base planes those of micro and macro planes together."""
    init_std: float = Field(default=0.1, ge=0)
    """Standard deviation of the normal noise that planes start from."""
    base_planes: int = Field(default=0, ge=0, le=MOST)
    """Base planes that all scenes share (M); with 0 each scene has planes of its own alone."""
    micro_features: int = Field(default=0, ge=0, le=MOST)
    """Features of a texel that are the scene's own; 0: a scene is its weights (and bias) alone."""
    macro_features: int = Field(default=0, ge=0, le=MOST)
    """Features of a texel that are a weighted sum of base planes."""
    fusion: Literal["concat", "sum"] = "concat"
    """Whether macro features come after the micro ones or are added to them."""
    bias: bool = False
    """Whether a scene has a number that is added to its macro features."""

    @model_validator(mode="after")
    def _check(self) -> "PlanesConfig":
        micro, macro, features = self.micro_features, self.macro_features, self.features
        of_scene, shared = 3 * self.resolution**2 * features, 3 * self.resolution**2 * macro * self.base_planes
        if max(of_scene, shared) > MAX_NUMBERS:
            raise ValueError(
                f"planes of {max(of_scene, shared)} numbers are more than {MAX_NUMBERS}: make them smaller"
            )
        if self.base_planes == 0:
            if micro or macro or self.bias or self.fusion != "concat":
                raise ValueError(
                    "micro_features, macro_features, fusion and bias are of scenes that share base planes: set "
                    "base_planes, or leave them out"
                )
        elif macro == 0:
            raise ValueError("base_planes are there but macro_features is 0: set it, or leave base_planes out")
        elif self.fusion == "concat" and micro + macro != features:
            raise ValueError(
                f"features is {features}, but micro_features and macro_features one after another are {micro + macro}: "
                f"set features={micro + macro}"
            )
        elif self.fusion == "sum" and not micro == macro == features:
            raise ValueError(
                f"fusion=sum adds {micro} micro_features to {macro} macro_features: set both to features, {features} "
                "(scenes without micro planes take fusion=concat)"
            )
        return self

    @property
    def micro_shape(self) -> tuple[int, ...]:
        return (3, self.resolution, self.resolution, self.micro_features)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a scene's row: [3, R, R, C] or, with base planes, [micro planes + weights + bias]."""
        if self.base_planes == 0:
            return (3, self.resolution, self.resolution, self.features)
        return (math.prod(self.micro_shape) + self.base_planes + self.bias,)


class StoredPlanesConfig(PlanesConfig):
    """What planes are, and where a rank has those of its scenes with their moments; the latter changes no result."""

    storage: Literal["auto", "device", "host", "disk"] = "auto"
    """Where planes and their moments are: in the memory of the GPU, in pinned memory of the machine, or in a file on a
    local disk; `auto`: the first of them that has room."""
    resident: int = Field(default=0, ge=0)
    """With host and disk, scenes of a rank that are on the GPU at a time; 0: what half of its free memory holds."""
    scratch: str | None = None
    """Folder on a disk of this machine for the file of `disk`, which has no name and ends with the process; $TMPDIR (or
    /tmp) if left out."""

    @property
    def of_model(self) -> PlanesConfig:
        """What planes are."""
        return PlanesConfig(**{name: getattr(self, name) for name in PlanesConfig.model_fields})


STORAGE = tuple(f"planes.{name}" for name in StoredPlanesConfig.model_fields if name not in PlanesConfig.model_fields)
"""Settings of where planes are."""
