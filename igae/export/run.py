# SPDX-License-Identifier: Apache-2.0
"""From a run or one of its checkpoints to what an export is made of."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igae import checkpoint, config
from igae.checkpoint import CONFIG, LEARNING_RATES, Checkpoint
from igae.data import Manifest, Scene
from igae.errors import redact
from igae.export.layout import MAX_JSON
from igae.export.writer import Content
from igae.models import IGAE
from igae.scenes import SceneStore
from igae.storage import Missing, StoreError, join, read_whole
from igae.training import Recipe

log = logging.getLogger("igae")


@dataclass
class Run:
    """A checkpoint together with the configuration and the data that it was trained with."""

    folder: str
    loaded: Checkpoint
    recipe: Recipe
    manifest: Manifest
    scenes: list[Scene]

    def rows(self, ids: list[int]) -> Tensor:
        """Planes of some scenes (rows, see `igae.scenes.planes`), as an evaluation has them. Nothing else is read."""
        store = SceneStore(self.recipe.planes, ids, None, torch.device("cpu"))
        if self.loaded.progress.finished:
            store.load_state_dict(self.loaded.rows(ids, {"planes"}))
            return store.rows
        # In the middle of a stage updates of rows are still deferred.
        store.start_optimizer(self.recipe.train.plane_optimizer, "torch")
        store.load_state_dict({**self.loaded.rows(ids), "learning_rates": self.loaded.optimizer[LEARNING_RATES]})
        return store.read(ids)


def open_run(run: str, overrides: Sequence[str] = ()) -> Run:
    """The newest complete checkpoint of a run, or the one that is named. Planes are read as they are asked for.

    Args:
        run: path or URL of a run's folder, of its checkpoints, or of one checkpoint.
        overrides: ``key=value``, of what is elsewhere now than the saved configuration says (``data.root``,
            ``autoencoder.path``).

    Raises:
        ValueError: there is no checkpoint, it is damaged, or what it was trained on can't be found.
    """
    folder = find_checkpoint(run)
    loaded = checkpoint.load_checkpoint(folder, moments=False)
    if not loaded.progress.finished:
        loaded = checkpoint.load_checkpoint(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        path.write_text(loaded.config)
        recipe = config.load(Recipe, path, overrides)
    manifest = Manifest.load(recipe.data.root)
    scenes = manifest.select(recipe.data.categories)
    where, root = redact(folder), redact(recipe.data.root)
    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    if digest != loaded.progress.data or loaded.ids != frozenset(scene.id for scene in scenes):
        raise ValueError(f"{where} was trained on other scenes than those at {root}: say where they are, data.root=...")
    if not loaded.progress.finished:
        log.warning("%s is in the middle of a stage: its planes are finished as an evaluation would", where)
    return Run(folder, loaded, recipe, manifest, scenes)


def load_run(run: Run) -> IGAE:
    """The model of a run, on the CPU.

    Raises:
        ValueError: its autoencoder can't be found or is another one.
    """
    model = IGAE.from_recipe(run.recipe, run.manifest.image_size, losses=False)
    try:
        model.load_state_dict(run.loaded.shared)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{redact(run.folder)} has weights of another autoencoder or MLP than its configuration says "
            f"({last}): name the right one, autoencoder.path=..."
        ) from error
    return model


def read_run(where: str, overrides: Sequence[str] = ()) -> Content:
    """What an export of a run is made of. The arguments and errors are those of :func:`open_run` and
    :func:`load_run`."""
    run = open_run(where, overrides)
    progress, recipe, manifest = run.loaded.progress, run.recipe, run.manifest
    ids = [scene.id for scene in run.scenes]
    return Content(
        load_run(run),
        recipe.data.background,
        [scene.name for scene in run.scenes],
        recipe.planes,
        lambda start, stop: run.rows(ids[start:stop]),
        f"From run `{recipe.experiment}`, step {progress.total} ({progress.stage}).",
        run.loaded.config,
        _figures(run.folder, run.loaded),
        (manifest.cameras.mean_distance, manifest.cameras.mean_focal) if manifest.cameras else (1.3, 1.1),
    )


def find_checkpoint(run: str) -> str:
    """The checkpoint that a run's folder (its newest complete one), that of its checkpoints or its own stands for.

    Raises:
        ValueError: there is none.
    """
    run = run.rstrip("/") or run
    if checkpoint.is_complete(run):
        return run
    roots = [join(run, "checkpoints"), run]
    settings = _read(join(run, CONFIG))
    if settings is not None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / CONFIG
            path.write_bytes(settings)
            elsewhere = config.load(Recipe, path).checkpoint.root
        roots = [elsewhere] if elsewhere else roots
    for root in roots:
        if complete := checkpoint.list_complete(root):
            return complete[-1]
    raise ValueError(
        f"{redact(run)} is neither a checkpoint nor the folder of a run that has one: give outputs/NAME, or "
        "a folder step-... of its checkpoints"
    )


def _figures(folder: str, loaded: Checkpoint) -> dict[str, float]:
    """The figures of the run's metrics.json that are of this checkpoint."""
    progress = loaded.progress
    data = _read(join(folder.rpartition("/")[0].rpartition("/")[0], "metrics.json")) if progress.finished else None
    try:
        stages: Any = json.loads(data) if data is not None else {}
        figures = stages.get(progress.stage, {})
        if progress.total == 0:  # scenes that were fitted to a model
            figures = stages.get("fit", {})
        elif figures.get("step") != progress.total:
            return {}
        return {str(name): float(value) for name, value in figures.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        log.warning("the figures of %s are left out: metrics.json is damaged", redact(folder))
        return {}


def _read(url: str) -> bytes | None:
    """A small file, or None where there is none."""
    where = redact(url)
    try:
        return read_whole(url, where, MAX_JSON)
    except Missing:
        return None
    except StoreError as error:
        raise ValueError(str(error)) from None
