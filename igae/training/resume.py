# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a checkpoint, also of another number of ranks, a trained model, or nothing."""

import functools
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igae.checkpoint import (
    LEARNING_RATES,
    Checkpoint,
    DamagedCheckpoint,
    Progress,
    list_complete,
    load_checkpoint,
    set_aside,
)
from igae.config import parse
from igae.data import ViewBatch
from igae.errors import progress as progress_of
from igae.errors import redact
from igae.export import load_trained
from igae.models import IGAE, to_signed
from igae.ranks import Channel, RefusedByAll, derive_seed, rank, world_size
from igae.scenes import STORAGE, SceneStore
from igae.storage import join
from igae.training.preflight import scene_bytes
from igae.training.rank_data import RankData
from igae.training.recipe import Precision, Recipe
from igae.training.run_folder import flat, public_settings
from igae.training.stage import StageState

AUTO = ("train.precision",)
"""Settings whose `auto` changes nothing within a run."""
FIXED = [
    *("seed", "model", "planes", "render", "data.background"),
    *("autoencoder.create", "autoencoder.latents", "autoencoder.scale"),
]
"""Settings that can't change within a run."""
TOLD = ("data", "train", "autoencoder", "evaluation")
"""Sections whose changes are told; the rest changes nothing that a run computes."""
ROWS_BYTES = 1 << 30
"""Rows and moments that are in memory between a checkpoint and the scenes' store."""
SCALE_BATCH, SCALE_BATCHES = 64, 4
"""Views that the scale of normalized latents is fitted to, on each rank."""
log = logging.getLogger("igae")


def warn_once(text: str, *values: Any) -> None:
    """A warning that concerns all ranks alike."""
    if rank() == 0:
        log.warning(text, *values)


def find(root: str, resume: str, channel: Channel) -> list[str]:
    """The checkpoints to resume from, the first of them that is whole; the same on every rank. Collective.

    Args:
        root: where the run has its checkpoints.
        resume: `auto`, `strict` (the newest or none), `never`, or a checkpoint.
    """
    complete = channel.on_first_rank(lambda: list_complete(root))  # the others must not decide otherwise
    if resume not in ("auto", "strict", "never"):
        wanted, newest = resume.rstrip("/"), complete[-1] if complete else None
        if newest is None or _same_place(newest, wanted):
            return [wanted]
        if _same_place(wanted.rpartition("/")[0] or ".", newest.rpartition("/")[0]):
            raise ValueError(
                f"--resume {resume}: {root} has later checkpoints, up to {newest.rpartition('/')[2]}: branch off into "
                "another run, experiment=NAME, or remove the later checkpoints"
            )
        log.info("%s was begun from %s and has checkpoints of its own", root, resume)
    if complete and resume == "never":
        raise ValueError(
            f"{root} already has checkpoints: choose another name with experiment=NAME, or remove the folder"
        )
    return complete[-1:] if resume == "strict" else complete[::-1]


def restore(
    folders: list[str],
    recipe: Recipe,
    data: RankData,
    model: IGAE,
    store: SceneStore,
    channel: Channel,
    extend: bool = False,
) -> tuple[Progress, StageState, list[str], Precision]:
    """Put the weights and the rows of this rank's scenes of a checkpoint into place: of the first that all ranks find
    whole. Those before it are set aside. In the middle of a stage, the rows' optimizer is started. Collective.

    Args:
        extend: a finished stage is one in the middle where the recipe has more epochs for it now.

    Returns:
        Where the run stands, for this number of ranks, what its stage needs to resume, the checkpoints set aside, and
        the precision of the steps so far.

    Raises:
        ValueError: the checkpoint is of other data or settings, also of other epochs of a stage that is finished and
            not to be extended, or none is whole; no folder has changed.
    """
    damaged = dict[str, str]()

    def read(folder: str) -> tuple[Checkpoint | None, str]:
        try:
            return _read(folder, recipe, data, store, extend), ""
        except DamagedCheckpoint as error:
            return None, error.why

    for folder in folders:
        found, problem = channel.together(functools.partial(read, folder))
        problem = next(filter(None, channel.gather(problem)), "")  # one rank may have read what another needs
        if not problem and found is not None:
            channel.on_first_rank(functools.partial(_set_aside, damaged, folder))
            progress, state = channel.together(functools.partial(_put, found, recipe, data, model))
            return progress, state, list(damaged), precision_of(found.config, folder)
        damaged[folder] = problem
    first = DamagedCheckpoint(*next(iter(damaged.items())))
    every = f"all {len(damaged)} checkpoints are damaged, {first.why}: fix one, or use a new experiment=NAME"
    raise RefusedByAll(str(first) if len(damaged) == 1 else every)


def _set_aside(damaged: dict[str, str], newest: str) -> None:
    for folder, why in damaged.items():
        log.warning("%s (%s): this run resumes from %s, and steps after it are lost", why, set_aside(folder), newest)


def _read(folder: str, recipe: Recipe, data: RankData, store: SceneStore, extend: bool) -> Checkpoint:
    """A checkpoint, whose rows are put into a store."""
    loaded = load_checkpoint(folder)
    progress = loaded.progress
    if progress.data != data.manifest.digest:
        raise ValueError(
            f"{folder} was trained on other shards than those at {recipe.data.root}: use a new experiment=NAME"
        )
    if progress.finished and _is_longer_now(loaded, recipe, data, extend):
        progress.finished = False
    fixed = FIXED if progress.finished else [*FIXED, "train.plane_optimizer", f"train.{progress.stage}.alternate"]
    compare_settings(folder, loaded.config, recipe, fixed)
    if not np.array_equal(loaded.ids, data.scenes.ids):
        raise ValueError(
            f"{folder} has {len(loaded.ids)} scenes and this configuration has {len(data.scenes)} (or others): "
            "data.categories can't change within a run; use a new experiment=NAME"
        )
    if LEARNING_RATES not in loaded.optimizer:
        raise ValueError(f"{folder} has fitted scenes, without an optimizer's state: use a new experiment=NAME")
    rates = loaded.optimizer.pop(LEARNING_RATES)
    if not progress.finished:
        store.start_optimizer(recipe.train.kernels)
        store.load_state_dict({"learning_rates": rates})
    some = max(1, ROWS_BYTES // scene_bytes(recipe.planes))
    starts = range(0, len(store), some)
    for start in progress_of("reading planes", len(starts), "parts", starts):  # host memory may have room for them once
        rows = loaded.rows(store.ids[start : start + some].tolist())
        store.load_state_dict({"planes": rows["planes"]} if progress.finished else rows, start)
    return loaded


def _is_longer_now(loaded: Checkpoint, recipe: Recipe, data: RankData, extend: bool) -> bool:
    """Whether the recipe has more epochs of a finished stage than were made. Raises ValueError where they are not to be
    made."""
    name, made = loaded.progress.stage, loaded.progress.step
    before = flat(parse(loaded.config, loaded.folder))
    stage = getattr(recipe.train, name)
    keys = {f"train.{name}.{key}": getattr(stage, key) for key in ("epochs", "min_steps")}
    changed = [f"{key} was {before[key]} and is {now}" for key, now in keys.items() if before.get(key, now) != now]
    steps = data.steps(stage)
    if not changed or steps * world_size() <= made * loaded.progress.world:
        return False
    if not extend:
        raise ValueError(
            f"{name} is finished in {redact(loaded.folder)}, {' and '.join(changed)} now: add --extend to continue it "
            "to that, or train anew with experiment=NAME"
        )
    log.info("%s is continued to step %d", name, steps)
    return True


def _put(loaded: Checkpoint, recipe: Recipe, data: RankData, model: IGAE) -> tuple[Progress, StageState]:
    """Put the rest of what was read into place."""
    progress, folder = loaded.progress, loaded.folder
    try:
        model.load_state_dict(loaded.shared)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{folder} has weights of another autoencoder or MLP than this configuration ({reason}): "
            "use a new experiment=NAME"
        ) from error
    if not progress.finished:
        _move_to_this_world(progress, data.steps_per_epoch(getattr(recipe.train, progress.stage)))
    progress.world = world_size()
    what = f"{progress.stage} is finished at" if progress.finished else "resumes from"
    log.info("%s step %d, %s", what, progress.total, folder)
    return progress, StageState(progress.consumed, loaded.optimizer, rows_resumed=not progress.finished)


def initialize(model: IGAE, recipe: Recipe, data: RankData, channel: Channel) -> None:
    """Without a checkpoint: take the weights of the trained model that the recipe names, or fit the scale of normalized
    latents where it is `auto`, and compute the background. The same on every rank. Collective."""
    if recipe.model is not None:
        trained = recipe.model
        channel.together(lambda: load_trained(trained).load_into(model))
        return
    if not model.autoencoder.scale_is_fitted:
        fit_scale(model, derive_seed(recipe.seed, "scale"), data, channel)
    model.refresh_background()


@torch.no_grad()
def fit_scale(model: IGAE, seed: int, data: RankData, channel: Channel) -> None:
    """Fit the normalizer's scale to the latents of some views of each rank (of natural images where there are no
    scenes). Collective."""
    data = replace(data, config=data.config.model_copy(update={"workers": 0}))
    loader: Any = data.open_views(SCALE_BATCH, seed) if data.owned else data.open_natural_images(SCALE_BATCH, seed)
    squares = torch.zeros(2, dtype=torch.float64)  # their sum, and how many
    with closing(loader):
        for _ in progress_of("fitting the scale of latents", SCALE_BATCHES, "batches", range(SCALE_BATCHES)):
            batch = next(loader)
            images = batch.images if isinstance(batch, ViewBatch) else batch
            latents = model.autoencoder.posterior(to_signed(images.to(model.background.device))).mean.double().cpu()
            squares += torch.tensor([float(latents.square().sum()), latents.numel()])
    total, count = channel.sum(squares).tolist()
    model.autoencoder.fit_scale(total / count)


def _move_to_this_world(progress: Progress, steps_per_epoch: int) -> None:
    """Keep the place in the stage where the number of ranks or the batch is another one: the same epoch, and as many
    samples taken by all ranks together."""
    if steps_per_epoch != progress.steps_per_epoch:
        step = round(progress.step * steps_per_epoch / progress.steps_per_epoch)
        warn_once("step %d of %s is step %d with this batch", progress.step, progress.stage, step)
        progress.step, progress.steps_per_epoch = step, steps_per_epoch
    if progress.world != world_size():
        warn_once("%d ranks trained before this restart, and %d do now", progress.world, world_size())
        progress.consumed = {name: n * progress.world // world_size() for name, n in progress.consumed.items()}


def _same_place(a: str, b: str) -> bool:
    return a == b or ("://" not in a + b and Path(a).resolve() == Path(b).resolve())


def precision_of(settings: str, folder: str) -> Precision:
    """What the scenes of a checkpoint, or of a fit, were trained in, by its settings."""
    return "bf16" if flat(parse(settings, folder)).get("train.precision") == "bf16" else "fp32"


def compare_settings(folder: str, settings: str, recipe: Recipe, fixed: list[str]) -> None:
    """Refuse other values of the ``fixed`` keys than in the settings of a folder; tell other changes."""
    before, now = flat(parse(settings, folder)), flat(parse(public_settings(recipe), folder))
    root, name = recipe.checkpoint.root, before.get("experiment")
    if root and folder.startswith(join(root, "")) and name != recipe.experiment:
        raise ValueError(
            f"checkpoint.root {redact(root)} has checkpoints of experiment {name}, this is {recipe.experiment}: give "
            f"each a folder of its own, such as checkpoint.root={redact(join(root, recipe.experiment))}"
        )
    now |= {key: before.get(key) for key in AUTO if now[key] == "auto"}
    now["train.plane_optimizer"] = "exact"  # 0.1.0 had another, whose moments have another meaning
    changed = [key for key in now if key in before and before[key] != now[key] and key not in STORAGE]
    for key in changed:
        if any(f"{key}.".startswith(f"{name}.") for name in fixed):
            raise ValueError(
                f"{key} was {before[key]} in {folder} and is {now[key]} now, which can't change within a run: "
                "use a new experiment=NAME"
            )
    if told := [f"{key} was {before[key]} and is {now[key]}" for key in changed if key.split(".")[0] in TOLD]:
        warn_once("changed since the last start: %s", "; ".join(told))
