# SPDX-License-Identifier: Apache-2.0
"""Reading exports: the model, and of the scenes those that are asked for."""

import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from igae.data import DataConfig, Manifest
from igae.errors import did_you_mean, redact
from igae.export.format import (
    CONFIG,
    INDEX,
    MAX_SCENES,
    PLANES,
    SCENES,
    SHARED,
    WEIGHTS,
    SceneFile,
    parse_description,
    parse_scenes,
)
from igae.export.model import Trained
from igae.models import IGAE, AutoencoderConfig, load_autoencoder
from igae.scenes import PlanesConfig
from igae.storage import (
    MAX_SMALL,
    Stamp,
    TensorFile,
    join,
    named_errors,
    own_file,
    parse_json,
    read_own,
)

HIDDEN = 64
"""Hidden features of the decoding MLP."""


class Export(Trained):
    """An export that is there. The model and each scene are read when they are first asked for.

    Args:
        url: local folder, fsspec URL, or ``hf://user/name[@revision][/folder]`` of a hub repository.
        device: where the model and the planes that are read are put.
        renderer: the backend of :func:`igae.rendering.render`.
        data: folder or URL of the data that it was trained on, which it does not know itself.

    Raises (all methods):
        ValueError: it is missing, incomplete, damaged or of another format; the sentence names the file.
    """

    def __init__(
        self,
        url: str,
        device: str | torch.device = "cpu",
        renderer: Literal["auto", "cuda", "torch"] = "torch",
        data: str | None = None,
    ) -> None:
        self.where, self.device, self.renderer = url, torch.device(device), renderer
        index = read_own(url, INDEX)
        if index is None:
            raise ValueError(f"{redact(url)} has no {INDEX}: give the folder of a complete export")
        self.description = parse_description(index, redact(join(url, INDEX)))
        self.planes, self.render = self.description.planes, self.description.render
        self.background = self.description.background
        self._open: dict[str, TensorFile] = {}
        self._data = data

    @property
    def data(self) -> DataConfig | None:
        return None if self._data is None else DataConfig(root=self._data, background=self.background)

    @cached_property
    def manifest(self) -> Manifest | None:
        return None if self._data is None else Manifest.load(self._data)

    @cached_property
    def config(self) -> str | None:
        return self._read(CONFIG).decode() if CONFIG in self.description.files else None

    @cached_property
    def autoencoder(self) -> AutoencoderConfig:
        if self.description.autoencoder is None:
            return AutoencoderConfig(path="identity")
        data, tensors = self._read("config.json"), self._shared()
        with named_errors(join(self.where, "config.json")):
            create = parse_json(data)
            if not isinstance(create, dict) or not create:
                raise ValueError("it describes no autoencoder")
        create = {key: value for key, value in create.items() if not key.startswith("_") or key == "_class_name"}
        with named_errors(join(self.where, SHARED)):
            return AutoencoderConfig(create=create, scale=float(tensors["autoencoder.scale"]))

    @cached_property
    def model(self) -> IGAE:
        described, where, tensors = self.description, redact(join(self.where, SHARED)), self._shared()
        check_planes(described.planes, described.render.field, tensors, where, INDEX)
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            for name in described.autoencoder_files:
                (Path(folder) / name).write_bytes(self._read(name))
            path = "identity" if described.autoencoder is None else folder
            try:
                autoencoder = load_autoencoder(AutoencoderConfig(path=path))
                model = IGAE(autoencoder, self.planes, self.render, described.image_size, self.background)
            except ValueError as error:
                raise ValueError(f"the model of {self.title} can't be loaded: {error}") from error
        shapes = {name: tensor.shape for name, tensor in shared_tensors(model).items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ValueError(f"{where} is damaged: it does not hold this model's tensors")
        model.load_state_dict(tensors, strict=False)
        model.renderer = self.renderer
        return model.to(self.device).eval()

    def _read_rows(self, names: Sequence[str]) -> Tensor:
        places = [self._places[name] for name in names]
        files = {scenes.name: self._file(scenes) for scenes, _ in places}  # opening checks their sizes
        out = torch.empty(len(names), *self.planes.row_shape)
        for name, file in files.items():
            chosen = [i for i, (scenes, _) in enumerate(places) if scenes.name == name]
            file.rows_into(PLANES, [places[i][1] for i in chosen], out, np.array(chosen, dtype=np.int64))
        return out.to(self.device)

    def _shared(self) -> dict[str, Tensor]:
        """Tensors of igae.safetensors."""
        return TensorFile(own_file(self.where, SHARED), self.description.files[SHARED]).tensors()

    @cached_property
    def _places(self) -> dict[str, tuple[SceneFile, int]]:
        """Scene -> its file, and its row there."""
        files = parse_scenes(self._read(SCENES), self.description.scenes, redact(join(self.where, SCENES)))
        return {name: (file, row) for file in files for row, name in enumerate(file.scenes)}

    def normalization(self, scene: str) -> tuple[float, float, float, float]:
        """Where a scene's source is: (x, y, z, scale), so that its point p is at scale * (p - (x, y, z)) here."""
        if scene not in self._places:
            raise ValueError(f"{redact(self.where)} has no scene {scene}{did_you_mean(scene, self._places, 0.0)}")
        return self._places[scene][0].normalizations.get(scene, (0.0, 0.0, 0.0, 1.0))

    def _file(self, scenes: SceneFile) -> TensorFile:
        if scenes.name not in self._open:
            file = TensorFile(own_file(self.where, scenes.name))
            entry, shape = file.entries.get(PLANES), (len(scenes.scenes), *self.planes.row_shape)
            if PLANES not in file.row_names() or not entry or (entry.shape, entry.dtype) != (shape, torch.float32):
                raise ValueError(f"{redact(file.url)} is damaged: it does not hold the planes of its scenes")
            self._open[scenes.name] = file
        return self._open[scenes.name]

    def _read(self, name: str) -> bytes:
        """A file that igae.json lists, as it was written."""
        where, file = redact(join(self.where, name)), self.description.files[name]
        limits = {SCENES: MAX_SCENES, WEIGHTS: file.bytes}
        data = read_own(self.where, name, limits.get(name, MAX_SMALL))
        if data is None:
            raise ValueError(f"{where} is missing")
        if Stamp(len(data), zlib.crc32(data)) != file:
            raise ValueError(f"{where} is damaged: its checksum differs")
        return data


def load_model(url: str, renderer: Literal["auto", "cuda", "torch"] = "torch") -> IGAE:
    """The model of an export, on the CPU: to render its scenes, or to fit new ones in its latent space.

    Raises:
        ValueError: as :class:`Export`.
    """
    return Export(url, renderer=renderer).model


def is_export(url: str) -> bool:
    """Whether a path or URL is that of a complete export. Raises ValueError where that can't be found out."""
    return read_own(url, INDEX) is not None


def shared_tensors(model: IGAE) -> dict[str, Tensor]:
    """The model's state but for the autoencoder's network, which diffusers has a format for."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("autoencoder.net.")}


def check_planes(planes: PlanesConfig, field: str, tensors: Mapping[str, Tensor], where: str, settings: str) -> None:
    """Refuse shared tensors of other planes than some settings claim, before anything of their size is allocated."""
    shape = (planes.base_planes, 3, planes.resolution, planes.resolution, planes.macro_features)
    sizes = {"mlp.w1": (HIDDEN, planes.features)} if field == "mlp" else {}
    for name, size in {**sizes, **({"base.planes": shape} if shape[0] else {})}.items():
        if name not in tensors or tensors[name].shape != size:
            raise ValueError(f"{where} is damaged: its {name} is not that of the planes in {settings}")
