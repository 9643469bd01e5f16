# SPDX-License-Identifier: Apache-2.0
"""Settings of evaluation during training."""

from pydantic import Field

from igae.config import Section


class EvaluationConfig(Section):
    RENAMED = {"photos": "natural_images"}

    every: int = Field(default=0, ge=0)
    """Steps between evaluations inside a stage; each stage ends with one in any case."""
    scenes: int | None = Field(default=32, ge=1)
    """Number of scenes, spread evenly over all; all if null."""
    views: int = Field(default=4, ge=1)
    """Held-out views, and as many training views, of each of these scenes."""
    natural_images: int = Field(default=64, ge=0)
    """Number of natural images that the autoencoder is measured on."""
    pictures: int = Field(default=4, ge=0)
    """Scenes in the picture grids: views, and channels of their latents."""
    orbits: int = Field(default=4, ge=0)
    """Scenes with an orbit video at the end of the last stage."""
    orbit_frames: int = Field(default=48, ge=2, le=3600)
