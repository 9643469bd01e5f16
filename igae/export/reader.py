# SPDX-License-Identifier: Apache-2.0
"""Reading exports: the model, and of the scenes those that are asked for."""

import difflib
import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from igae.errors import redact
from igae.export.layout import (
    CONFIG,
    INDEX,
    MAX_JSON,
    SCENES,
    SHARED,
    Description,
    Shard,
    parse_description,
    parse_scenes,
)
from igae.models import IGAE, AutoencoderConfig, Views, load_autoencoder
from igae.scenes import PlanesConfig
from igae.storage import Missing, StoreError, TensorFile, join, read_whole

PLANES = "planes"
HIDDEN = 64
"""Hidden features of the decoding MLP."""
CHUNK = 32
"""Views that are rendered and decoded at a time."""


class Export:
    """An export that is there. The model and each scene are read when they are first asked for.

    Args:
        url: local folder, fsspec URL, or ``hf://user/name[@revision][/folder]`` of a hub repository.
        device: where the model and the planes that are read are put.
        renderer: the backend of :func:`igae.rendering.render`.

    Raises (all methods):
        ValueError: it is missing, incomplete, damaged or of another format; the sentence names the file.
    """

    def __init__(
        self,
        url: str,
        device: str | torch.device = "cpu",
        renderer: Literal["auto", "cuda", "torch"] = "torch",
    ) -> None:
        self.url, self.device, self.renderer = url, torch.device(device), renderer
        self.description = _describe(url)
        self._open: dict[str, TensorFile] = {}

    @cached_property
    def model(self) -> IGAE:
        """Autoencoder, decoding MLP and render options, in evaluation mode."""
        return load_model(self.url, self.renderer).to(self.device).eval()

    @cached_property
    def _shards(self) -> list[Shard]:
        data = _read(self.url, SCENES, self.description)
        return parse_scenes(data, self.description.scenes, redact(join(self.url, SCENES)))

    @cached_property
    def _places(self) -> dict[str, tuple[Shard, int]]:
        return {name: (shard, row) for shard in self._shards for row, name in enumerate(shard.scenes)}

    @property
    def names(self) -> list[str]:
        """Names of all scenes, in the order of the run."""
        return list(self._places)

    def rows(self, names: Sequence[str]) -> Tensor:
        """What files hold of scenes, in the order asked: [len(names), *row_shape] (see `igae.scenes.planes`). Of other
        scenes nothing is read."""
        places = [self._place(name) for name in names]
        files = {shard.name: self._file(shard) for shard, _ in places}  # of which the sizes are right
        out = torch.empty(len(names), *self.description.planes.row_shape)
        for name, file in files.items():
            chosen = [i for i, (shard, _) in enumerate(places) if shard.name == name]
            file.rows_into(PLANES, [places[i][1] for i in chosen], out, np.array(chosen, dtype=np.int64))
        return out.to(self.device)

    def scene(self, name: str) -> "Scene":
        """A scene by its name; a ValueError names the nearest where there is none."""
        return Scene(name, self.rows([name])[0], self.model)

    def _place(self, name: str) -> tuple[Shard, int]:
        if name not in self._places:
            near = difflib.get_close_matches(name, self._places, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{redact(self.url)} has no scene {name}{hint}")
        return self._places[name]

    def _file(self, shard: Shard) -> TensorFile:
        if shard.name not in self._open:
            file = TensorFile(join(self.url, shard.name))
            entry, shape = file.entries.get(PLANES), (len(shard.scenes), *self.description.planes.row_shape)
            if PLANES not in file.row_names() or not entry or (entry.shape, entry.dtype) != (shape, torch.float32):
                raise ValueError(f"{redact(file.url)} is damaged: it does not hold the planes of its scenes")
            self._open[shard.name] = file
        return self._open[shard.name]


@dataclass
class Scene:
    """A scene of an export."""

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
        """Normalized latents [B, c, h, w] in [-1, 1], depth [B, h, w] and opacity [B, h, w] of views.

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


def load_model(url: str, renderer: Literal["auto", "cuda", "torch"] = "torch") -> IGAE:
    """The model of an export, on the CPU: to render its scenes, or to fit new ones in its latent space.

    Raises:
        ValueError: as :class:`Export`.
    """
    described, where = _describe(url), redact(join(url, SHARED))
    tensors = TensorFile(join(url, SHARED), described.files[SHARED].stamp).tensors()
    # Before anything is built by igae.json's sizes.
    for name, size in sizes(described.planes).items():
        if name not in tensors or tensors[name].shape != size:
            raise ValueError(f"{where} is damaged: its {name} is not that of the planes in {INDEX}")
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        for name in described.autoencoder_files:
            (Path(folder) / name).write_bytes(_read(url, name, described))
        path = "identity" if described.autoencoder is None else folder
        try:
            autoencoder = load_autoencoder(AutoencoderConfig(path=path))
            model = IGAE(
                autoencoder,
                described.planes,
                described.render,
                described.image_size,
                described.background,
                renderer=renderer,
            )
        except ValueError as error:
            raise ValueError(f"the autoencoder of {redact(url)} can't be loaded: {error}") from error
    shapes = {name: tensor.shape for name, tensor in shared_tensors(model).items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise ValueError(f"{where} is damaged: it does not hold this model's tensors")
    model.load_state_dict(tensors, strict=False)
    return model


def load_settings(url: str) -> dict[str, Any]:
    """What a configuration says of the model of an export: its sections autoencoder, planes and render, as YAML has
    them. Raises as :class:`Export`."""
    described = _describe(url)
    parts = {"planes": described.planes, "render": described.render}
    sections = {name: TypeAdapter(type(part)).dump_python(part, mode="json") for name, part in parts.items()}
    if described.autoencoder is None:
        return {"autoencoder": {"path": "identity"}, **sections}
    create = json.loads(_read(url, "config.json", described))
    create = {key: value for key, value in create.items() if not key.startswith("_") or key == "_class_name"}
    scale = TensorFile(join(url, SHARED), described.files[SHARED].stamp).tensors()["autoencoder.scale"]
    return {"autoencoder": {"create": create, "scale": float(scale)}, **sections}


def load_config(url: str) -> str | None:
    """The configuration of the run that an export is of, as YAML, where there was one. Raises as :class:`Export`."""
    described = _describe(url)
    return _read(url, CONFIG, described).decode() if CONFIG in described.files else None


def is_export(url: str) -> bool:
    """Whether a path or URL is that of a complete export. Raises ValueError where that can't be found out."""
    where = redact(join(url, INDEX))
    try:
        read_whole(join(url, INDEX), where, MAX_JSON)
        return True
    except Missing:
        return False
    except StoreError as error:
        raise ValueError(str(error)) from None


def sizes(planes: PlanesConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the shared tensors that follow from the planes' sizes."""
    shape = (planes.base_planes, 3, planes.resolution, planes.resolution, planes.macro_features)
    return {"mlp.w1": (HIDDEN, planes.features), **({"base.planes": shape} if planes.base_planes else {})}


def shared_tensors(model: IGAE) -> dict[str, Tensor]:
    """The model's state but for the autoencoder's network, which diffusers has a format for."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("autoencoder.net.")}


def _describe(url: str) -> Description:
    where = redact(join(url, INDEX))
    try:
        return parse_description(read_whole(join(url, INDEX), where, MAX_JSON), where)
    except Missing:
        raise ValueError(f"{redact(url)} has no {INDEX}: give the folder of a complete export") from None
    except StoreError as error:
        raise ValueError(str(error)) from None


def _read(url: str, name: str, described: Description) -> bytes:
    """A file that igae.json lists, as it was written."""
    where, file = redact(join(url, name)), described.files[name]
    try:
        data = read_whole(join(url, name), where, file.bytes)
    except StoreError as error:
        raise ValueError(str(error)) from None
    if len(data) != file.bytes or zlib.crc32(data) != file.crc32:
        raise ValueError(f"{where} is damaged: its checksum differs")
    return data
