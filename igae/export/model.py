# SPDX-License-Identifier: Apache-2.0
"""A trained model and its scenes, wherever they are from."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from igae.data import DataConfig, Manifest
from igae.errors import did_you_mean, redact
from igae.export.format import Moved
from igae.models import IGAE, AutoencoderConfig, Views
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig

FREE = {
    "autoencoder": ("latents",),
    "planes": ("init_std", "storage", "resident", "scratch"),
    "render": ("coarse_samples", "fine_samples"),
}
"""Sections of a configuration that a model determines -> what of them doesn't have to be as it was trained."""
CHUNK = 32
"""Views that are rendered and decoded at a time."""
log = logging.getLogger("igae")


class Trained(ABC):
    """A trained model and its scenes. Weights, and the planes of scenes, are read when they are first asked for.

    Attributes:
        where: path or URL of the checkpoint or export.
        planes, render: settings of the model, as :attr:`autoencoder`.
        background: RGB color in [0, 1] behind the objects.

    Raises (all methods):
        ValueError: it is missing or damaged, or what belongs to it can't be found.
    """

    where: str
    planes: PlanesConfig
    render: RenderOptions
    background: tuple[float, float, float]

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return redact(self.where)

    @property
    @abstractmethod
    def config(self) -> str | None:
        """Configuration of the run that it is of, as YAML, where there was one."""

    @property
    @abstractmethod
    def autoencoder(self) -> AutoencoderConfig:
        """Its settings."""

    @property
    def data(self) -> DataConfig | None:
        """Settings of the data that it was trained on; None where they are unknown."""
        return None

    @cached_property
    def manifest(self) -> Manifest | None:
        """That of :attr:`data`, if they are known."""
        return None

    @property
    def camera(self) -> tuple[float, float]:
        """Distance from the origin and normalized focal length of a typical view."""
        cameras = self.manifest.cameras if self.manifest else None
        return (cameras.mean_distance, cameras.mean_focal) if cameras else (1.3 * self.render.box, 1.1)

    @property
    @abstractmethod
    def _places(self) -> Mapping[str, Any]:
        """Name of each scene -> where it is."""

    @property
    def names(self) -> list[str]:
        """Names of all scenes, in the order of the run."""
        return list(self._places)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Planes of scenes, in the order asked: [len(names), *row_shape] (see `igae.scenes`). Of others nothing is
        read. A ValueError names the nearest where there is none of this name."""
        for name in names:
            if name not in self._places:
                hint = did_you_mean(name, self._places, 0.0)
                raise ValueError(f"{redact(self.where)} has no scene {name}{hint}")
        return self._read_rows(names)

    @abstractmethod
    def _read_rows(self, names: Sequence[str]) -> Tensor: ...

    @cached_property
    @abstractmethod
    def model(self) -> IGAE:
        """Autoencoder, decoding MLP and render options, in evaluation mode."""

    def scene(self, name: str) -> "Scene":
        """A scene by its name. Raises as :meth:`rows`."""
        return Scene(name, self.rows([name])[0], self.model)

    def state(self) -> dict[str, Tensor]:
        """The model's weights, by the names of its state."""
        return self.model.state_dict()

    def model_for(self, image_size: tuple[int, int], background: tuple[float, float, float]) -> IGAE:
        """The model for views of another size (height, width), or with another background color, than its own."""
        if (tuple(self.model.plain.shape[2:]), tuple(self.background)) == (tuple(image_size), tuple(background)):
            return self.model
        model = IGAE(self.model.autoencoder, self.planes, self.render, image_size, background)
        self.load_into(model)
        return model.eval()

    def complete(self, data: dict[str, Any]) -> None:
        """Add the model's settings to the keys and values of a configuration.

        Raises:
            ValueError: what the model determines has another value there.
        """
        for name, free in FREE.items():
            part, given = getattr(self, name), data.get(name) or {}
            wanted = TypeAdapter(type(part)).dump_python(part, mode="json")
            if not isinstance(given, dict):
                continue  # validation says what is wrong
            other = [key for key in given if key not in free and given[key] != wanted.get(key)]
            if other:
                raise ValueError(
                    f"{name}.{other[0]} is the model's ({redact(self.where)}): leave it out; of {name} only "
                    f"{', '.join(free)} can be set"
                )
            data[name] = {**wanted, **given}
        if isinstance(of_data := data.get("data"), dict):
            of_data.setdefault("background", list(self.background))

    def load_into(self, model: IGAE) -> None:
        """Put the weights into a model for views of perhaps another size or background color.

        Raises:
            ValueError: they are of another architecture.
        """
        weights = dict(self.state())
        trained = weights["background"].to(model.background)
        weights["background"] = model.background  # of the size of these views
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"model: {redact(self.where)} has weights of another model than its settings say "
                f"({str(error).splitlines()[-1].strip()})"
            ) from error
        model.refresh_background()
        # To the last bit as it was, where the views have the size and color that they had.
        if trained.shape == model.background.shape and torch.allclose(trained, model.background, rtol=0, atol=1e-3):
            model.background.copy_(trained)
        log.info("the model is %s", redact(self.where))


@dataclass
class Scene:
    """A scene of a trained model."""

    name: str
    row: Tensor = field(repr=False)
    """What the file holds of it: its planes or, where scenes share base planes, what is its own."""
    model: IGAE = field(repr=False)

    @property
    def planes(self) -> Tensor:
        """[3, R, R, C]."""
        with torch.no_grad():
            return self.model.planes_of(self.row[None])[0][0]

    @torch.no_grad()
    def render(self, cam2world: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized latents [B, c, h, w] in [-1, 1], depth and opacity [B, h g, w g] of views (g: `render.patch`).

        Args:
            cam2world: [B, 4, 4] or [4, 4], OpenCV cameras (x right, y down, z forward).
            intrinsics: [B, 3, 3] or [3, 3], divided by the image's width and height.
        """
        poses = torch.as_tensor(cam2world, dtype=torch.float32, device=self.row.device).reshape(-1, 4, 4)
        lenses = torch.as_tensor(intrinsics, dtype=torch.float32, device=self.row.device).reshape(-1, 3, 3)
        lenses = lenses.expand(len(poses), 3, 3)
        parts = []
        for pose, lens in zip(poses.split(CHUNK), lenses.split(CHUNK), strict=True):
            index = torch.zeros(len(pose), dtype=torch.int64, device=pose.device)
            parts.append(self.model.render(self.row[None], Views(index, pose, lens), None))
        latents, depth, opacity = zip(*parts, strict=True)
        return torch.cat(latents), torch.cat(depth), torch.cat(opacity)

    @torch.no_grad()
    def image(self, cam2world: Tensor, intrinsics: Tensor) -> Tensor:
        """RGB images uint8 [B, H, W, 3] of views; the arguments are those of :meth:`render`."""
        latents, _, _ = self.render(cam2world, intrinsics)
        autoencoder = self.model.autoencoder
        pictures = [autoencoder.decode(autoencoder.denormalize(part)) for part in latents.split(CHUNK)]
        return ((torch.cat(pictures) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@dataclass
class Content:
    """What an export is made of.

    Args:
        background: RGB color in [0, 1] behind the objects.
        scenes: names, all different.
        planes: what a scene's row is.
        rows: of the scenes from ``start`` to ``stop`` (exclusive), [stop - start, *row_shape] float32.
        source: where it comes from, as the card says it.
        config: the run's resolved configuration, YAML without credentials.
        metrics: measured on held-out views and natural images, by names of ``metrics.json``.
        camera: distance from the origin and normalized focal length of a typical view, for the card's example.
        normalizations: of the scenes that packing moved (see `igae.data.Scene`).
    """

    model: IGAE
    background: tuple[float, float, float]
    scenes: Sequence[str]
    planes: PlanesConfig
    rows: Callable[[int, int], Tensor] = field(repr=False)
    source: str
    config: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    camera: tuple[float, float] = (1.3, 1.1)
    normalizations: dict[str, Moved] = field(default_factory=dict)
