# SPDX-License-Identifier: Apache-2.0
"""Loading trained models: runs, checkpoints and exports."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from igae import config
from igae.checkpoint import (
    LEARNING_RATES,
    Checkpoint,
    DamagedCheckpoint,
    is_complete,
    list_complete,
    load_checkpoint,
)
from igae.config import Section
from igae.data import DataConfig, Manifest
from igae.errors import COMMAND_LINE, Key, did_you_mean, origin_of, redact
from igae.evaluation import current_name
from igae.export.format import CONFIG
from igae.export.model import Content, Trained
from igae.export.reader import Export, check_planes, is_export
from igae.models import IGAE, AutoencoderConfig, load_autoencoder
from igae.rendering import RenderOptions
from igae.scenes import SceneStore, StoredPlanesConfig
from igae.storage import is_url, join, read_own

SECTIONS = ("autoencoder", "data", "planes", "render")
"""Sections of a run's configuration that matter to its model."""
log = logging.getLogger("igae")


def load_trained(where: str, overrides: Sequence[str] = ()) -> Trained:
    """A trained model and its scenes, which are read as they are asked for. It renders with what this machine has.

    Args:
        where: path or URL of a run's folder (its newest checkpoint that loads is taken), of a checkpoint or of an
            export; `hf://user/name` of a hub repository.
        overrides: ``key=value`` of SECTIONS, of what is elsewhere now than a run's configuration says (``data.root``,
            ``autoencoder.path``). Of an export ``data.root``, if its data are wanted.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    where = where.rstrip("/") or where
    if not is_export(where):
        return TrainedRun(_newest(find_checkpoints(where)), overrides)
    roots = [override.partition("=")[2] for override in overrides if override.startswith("data.root=")]
    if len(roots) < len(overrides):
        raise ValueError(f"{overrides[0]}: an export needs nothing else, leave it out (data.root alone can be given)")
    return Export(where, renderer="auto", data=roots[-1] if roots else None)


def find_model(where: str, whole: bool = True) -> str:
    """The path or URL of what :func:`load_trained` loads: an export, or a checkpoint. Raises ValueError as it does.

    Args:
        whole: make sure that the checkpoint loads; otherwise the newest is taken as it is.
    """
    where = where.rstrip("/") or where
    if is_export(where):
        return where
    found = find_checkpoints(where)
    return _newest(found).folder if whole else found[0]


def _newest(folders: list[str]) -> Checkpoint:
    """The first of some checkpoints that loads, but for the moments; those before it are told, and left as they are."""
    damaged = list[str]()
    for folder in folders:
        try:
            found = load_checkpoint(folder, moments=False)
        except DamagedCheckpoint as error:
            if len(folders) == 1:
                raise
            damaged.append(error.why)
            continue
        for why in damaged:
            log.warning("%s: %s is taken, without what was trained after it", why, redact(folder))
        return found
    raise ValueError(f"all {len(folders)} checkpoints are damaged, {damaged[0]}: fix one")


def data_root(data: DataConfig, origins: Mapping[Key, str]) -> str:
    """Where the data of saved settings are. A ValueError says what to give where only a file names a URL, or a path
    that was meant from another folder."""
    origin = origin_of(("data", "root"), origins, "")
    if is_url(data.root) and origin != COMMAND_LINE:
        raise ValueError(
            f"{origin} has its data at {redact(data.root)}, a URL that is not asked because a file names it: add "
            "data.root=URL"
        )
    if origin != COMMAND_LINE and not is_url(data.root) and not Path(data.root).exists() and data.root[:1] != "/":
        raise ValueError(
            f"{origin} has its data at {data.root}, relative to the folder that the run was started in, and they are "
            f"not in {Path.cwd()}: start from that folder, or say where they are, data.root=SHARDS"
        )
    return data.root


def find_checkpoints(where: str) -> list[str]:
    """The checkpoints that a path means: itself, or the complete ones of a run's or of a checkpoints folder, the newest
    first."""
    if is_complete(where):
        return [where]
    roots = [join(where, "checkpoints"), where]
    found = read_own(where, CONFIG)
    if found is not None:
        text = found.decode(errors="replace")
        settings = config.load(RunSettings, redact(join(where, CONFIG)), saved=text)
        elsewhere = str(settings.checkpoint.get("root") or "")
        if is_url(elsewhere):
            raise ValueError(
                f"{redact(join(where, CONFIG))} has its checkpoints at {redact(elsewhere)}, a URL that is not asked "
                f"because a file names it: give it in the place of {redact(where)}"
            )
        roots = [elsewhere] if elsewhere else roots
    for root in roots:
        if complete := list_complete(root):
            return complete[::-1]
    raise ValueError(
        f"{redact(where)} is neither a checkpoint nor the folder of a run that has one: give outputs/NAME, or "
        "a folder step-... of its checkpoints"
    )


def take_settings(data: dict[str, Any]) -> None:
    """Where the settings of a run name a ``model``, put the checkpoint or export in its place and add what it
    determines: autoencoder, planes, renderer and background.

    Raises:
        ValueError: there is no such model, or the settings have other values than it.
    """
    if not isinstance(data.get("model"), str):
        return
    try:
        trained = load_trained(data["model"])
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    data["model"] = trained.where
    color, given = list(trained.background), (data.get("data") or {}).get("background")
    if isinstance(given, list) and given != color:
        raise ValueError(
            f"data.background is {given} and the model was trained with {color} ({redact(trained.where)}): leave it "
            "out, and render views without alpha in front of that color"
        )
    trained.complete(data)


class RunSettings(Section):
    """What of a run's configuration its model depends on. The rest is not looked at."""

    model_config = ConfigDict(extra="ignore")

    experiment: str
    autoencoder: AutoencoderConfig
    data: DataConfig
    planes: StoredPlanesConfig = StoredPlanesConfig()
    render: RenderOptions = RenderOptions()
    train: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}


class TrainedRun(Trained):
    """A checkpoint of a run, with the data that it was trained on.

    Args:
        loaded: the checkpoint, without the optimizer's moments.
        overrides: as of :func:`load_trained`.
    """

    def __init__(self, loaded: Checkpoint, overrides: Sequence[str] = ()) -> None:
        for key in (override.partition("=")[0] for override in overrides):
            if (section := key.partition(".")[0]) not in SECTIONS:
                hint = did_you_mean(section, SECTIONS)
                raise ValueError(f"{key}: only {', '.join(SECTIONS)} matter to a trained model{hint}")
        self.loaded, self.where, self._text = loaded, loaded.folder, loaded.config
        self.settings = config.load(RunSettings, redact(join(self.where, CONFIG)), overrides, saved=self._text)
        self.planes, self.render = self.settings.planes.of_model, self.settings.render
        self.background = self.settings.data.background

    @property
    def title(self) -> str:
        return f"{self.settings.experiment}, step {self.loaded.progress.total}"

    @property
    def config(self) -> str:
        return self._text

    @property
    def autoencoder(self) -> AutoencoderConfig:
        return self.settings.autoencoder

    @property
    def data(self) -> DataConfig:
        root = data_root(self.settings.data, self.settings.origins)
        return self.settings.data.model_copy(update={"root": root})

    @cached_property
    def manifest(self) -> Manifest:
        root = self.data.root
        manifest = Manifest.load(root)
        categories = self.settings.data.categories
        same = manifest.digest == self.loaded.progress.data
        if not same or not np.array_equal(self.loaded.ids, manifest.select(categories, self.settings.origins).ids):
            raise ValueError(
                f"{redact(self.where)} was trained on other scenes than those at {redact(root)}: say where they are, "
                "data.root=..."
            )
        return manifest

    @cached_property
    def _places(self) -> dict[str, int]:
        scenes = self.manifest.select(self.settings.data.categories)
        return dict(zip(scenes.names, scenes.ids.tolist(), strict=True))

    def _read_rows(self, names: Sequence[str]) -> Tensor:
        ids = [self._places[name] for name in names]
        lazy = self.settings.train.get("plane_optimizer") == "lazy"  # of 0.1.0: nothing was deferred
        if self.loaded.progress.finished or lazy:
            return self.loaded.rows(ids, {"planes"})["planes"]
        # In the middle of a stage, scenes that recent steps did not visit still have updates pending.
        store, saved = SceneStore(self.planes, ids, None, torch.device("cpu")), self._with_moments
        store.start_optimizer("torch")
        store.load_state_dict({**saved.rows(ids), "learning_rates": saved.optimizer[LEARNING_RATES]})
        return store.read(ids)

    @cached_property
    def _with_moments(self) -> Checkpoint:
        log.warning(
            "%s is in the middle of a stage: its planes are finished as an evaluation would", redact(self.where)
        )
        return load_checkpoint(self.where)

    def state(self) -> dict[str, Tensor]:
        return self.loaded.shared

    @cached_property
    def model(self) -> IGAE:
        check_planes(self.planes, self.render.field, self.state(), redact(self.where), CONFIG)
        autoencoder = load_autoencoder(self.autoencoder)
        model = IGAE(autoencoder, self.planes, self.render, self.manifest.image_size, self.background)
        try:
            model.load_state_dict(self.state())
        except RuntimeError as error:
            raise ValueError(
                f"{redact(self.where)} has weights of another autoencoder or MLP than its configuration says "
                f"({str(error).splitlines()[-1].strip()}): name the right one, autoencoder.path=..."
            ) from error
        return model.eval()

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the run's metrics.json that are of this checkpoint."""
        progress, run = self.loaded.progress, self.where.rpartition("/")[0].rpartition("/")[0]
        data = read_own(run, "metrics.json") if progress.finished else None
        try:
            stages = {} if data is None else TypeAdapter(dict[str, dict[str, float]]).validate_json(data)
        except ValidationError:
            log.warning("the metrics of %s are left out: metrics.json is damaged", redact(self.where))
            return {}
        fitted = progress.total == 0  # scenes that were fitted to a model
        metrics = stages.get("fit" if fitted else progress.stage, {})
        if not fitted and metrics.get("step") != progress.total:
            return {}
        return {current_name(name): value for name, value in metrics.items()}


def read_run(where: str, overrides: Sequence[str] = ()) -> Content:
    """What an export of a run or a checkpoint is made of. Arguments and errors are those of :func:`load_trained`."""
    run = TrainedRun(_newest(find_checkpoints(where.rstrip("/") or where)), overrides)
    progress, names = run.loaded.progress, run.names
    return Content(
        run.model,
        run.background,
        names,
        run.planes,
        lambda start, stop: run.rows(names[start:stop]),
        f"From run `{run.settings.experiment}`, step {progress.total} ({progress.stage}).",
        run.config,
        run.metrics,
        run.camera,
        {scene.name: scene.normalization for scene in run.manifest.scenes if scene.normalization},
    )
