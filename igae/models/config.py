# SPDX-License-Identifier: Apache-2.0
"""Settings of the autoencoder and of the losses."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from igae.config import Section, plug_in


class AutoencoderConfig(Section):
    path: str | None = None
    """Hub id or folder of a diffusers autoencoder; `demo` is the small one that igae ships; `identity` makes RGB scenes
    (images are their own latents)."""
    subfolder: str | None = None
    """Folder of the autoencoder inside `path` (`vae` for whole pipelines)."""
    create: dict[str, Any] | None = None
    """Instead of `path`: the configuration of a diffusers autoencoder to train from scratch (`_class_name` names its
    class, AutoencoderKL by default, or one that an installed package has as an entry point of `igae.autoencoders`)."""
    latents: Literal["sample", "mean"] = "sample"
    """What training uses of the posterior; evaluation always uses its mean."""
    scale: float | Literal["auto"] = 0.02
    """s of the normalized latents tanh(s z). `auto` fits it once to the latents of the training views."""

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderConfig":
        if (self.path is None) == (self.create is None):
            raise ValueError("give either path or create, not both and not none")
        if isinstance(self.scale, float) and not 0 < self.scale < math.inf:
            raise ValueError("scale must be positive and finite, or auto")
        return self


class AugmentConfig(Section):
    """Views are moved at random before they are encoded, and their cameras with them, exactly. What comes into a view
    from beyond its border is filled with the background."""

    shift: int = Field(default=0, ge=0)
    """Pixels by which a view is shifted, at most, along x and along y."""
    zoom: float = Field(default=1.0, ge=1, le=4)
    """Factor by which a view is enlarged or made smaller around its principal point, at most."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Degrees by which a view is turned around its principal point, at most."""
    variants: int = Field(default=4, ge=1)
    """Where latents are encoded once: how many of each view are kept, each of a view moved otherwise."""

    @property
    def is_on(self) -> bool:
        return self.shift > 0 or self.zoom > 1 or self.rotate > 0


class LossWeights(Section):
    """Weights of the loss terms; a term of weight 0 is not computed."""

    RENAMED = {f"photo_{term}": f"natural_{term}" for term in ("ae", "lpips", "kl", "tv")}

    latent: float = Field(default=1.0, ge=0)
    """mse of rendered and encoded normalized latents."""
    rgb: float = Field(default=0.0, ge=0)
    """mse of decoded renders and views."""
    ae: float = Field(default=0.0, ge=0)
    """mse of autoencoded views and views."""
    natural_ae: float = Field(default=0.0, ge=0)
    """mse of autoencoded natural images and natural images."""
    natural_lpips: float = Field(default=0.0, ge=0)
    """LPIPS of autoencoded natural images and natural images."""
    natural_kl: float = Field(default=0.0, ge=0)
    """KL divergence of the natural images' posterior to N(0, 1)."""
    natural_tv: float = Field(default=0.0, ge=0)
    """Total variation of the natural images' latents."""
    planes_tv: float = Field(default=0.0, ge=0)
    """Total variation of the planes in the batch, as they are rendered, each counted as often as it has views there."""
    base_orthogonality: float = Field(default=0.0, ge=0)
    """Mean squared cosine between different base planes."""
    depth_tv: float = Field(default=0.0, ge=0)
    """Total variation of the rendered depth."""
    opacity: float = Field(default=0.0, ge=0)
    """Mean square of how far the rendered opacity is from the views' masks: their alpha or, without alpha, what differs
    from the background (a part of the view in its color counts as empty if it reaches the border)."""

    distortion: float = Field(default=0.0, ge=0)
    """How far apart along a ray its opacity is (Barron et al., Mip-NeRF 360, equation 15), in units of the box."""
    plugins: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Losses of views that installed packages have as entry points of `igae.losses`: their names and weights."""

    @field_validator("plugins")
    @classmethod
    def _are_installed(cls, plugins: dict[str, float]) -> dict[str, float]:
        for name, weight in plugins.items():
            if name in (*cls.model_fields, "total"):
                raise ValueError(f"{name} is the name of a loss of igae: give the package's another one")
            if weight > 0:
                plug_in("losses", name)
        return plugins

    def __getitem__(self, name: str) -> float:
        """The weight of a term."""
        weight: float = self.plugins[name] if name in self.plugins else getattr(self, name)
        return weight

    @property
    def of_plugins(self) -> float:
        """The weights of the losses of installed packages together."""
        return sum(self.plugins.values())

    @property
    def added(self) -> dict[str, Callable[..., Any]]:
        """The losses of installed packages that have a weight: functions of `LossInputs`."""
        return {name: plug_in("losses", name) for name, weight in self.plugins.items() if weight > 0}

    @property
    def decodes(self) -> bool:
        """Whether renders are decoded."""
        return self.rgb > 0 or any(getattr(loss, "needs_images", False) for loss in self.added.values())

    @property
    def needs_images(self) -> bool:
        """Whether scene views are needed as images: latents alone don't do."""
        return self.decodes or self.ae > 0
