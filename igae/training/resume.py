# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint, also with another number of ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from igae import checkpoint
from igae.checkpoint import LEARNING_RATES, Progress
from igae.models import IGAE
from igae.ranks import Channel, rank, world_size
from igae.scenes import SceneBank
from igae.training.preflight import check_changes
from igae.training.recipe import Recipe
from igae.training.shares import Data, steps_per_epoch

log = logging.getLogger("igae")


@dataclass
class Restored:
    """What a checkpoint holds for the optimizers."""

    optimizer: dict[str, Tensor]
    planes: dict[str, Tensor]


def find(root: str, resume: str, channel: Channel) -> str | None:
    """The checkpoint to go on from, the same on every rank, or None. Collective.

    Args:
        root: where the run has its checkpoints.
        resume: `auto`, `never`, or a checkpoint.
    """
    # As the first rank sees it: the others must not decide otherwise.
    complete = channel.gather(checkpoint.list_complete(root) if rank() == 0 else [])[0]
    if resume not in ("auto", "never"):
        wanted, newest = resume.rstrip("/"), complete[-1] if complete else None
        if newest is None or _same_place(newest, wanted):
            return wanted
        if _same_place(wanted.rpartition("/")[0] or ".", newest.rpartition("/")[0]):
            raise ValueError(
                f"--resume {resume}: {root} has gone on to {newest.rpartition('/')[2]}: branch off into "
                "another run, experiment=NAME, or remove the later checkpoints"
            )
        log.info("%s was begun from %s and has checkpoints of its own", root, resume)
    if complete and resume == "never":
        raise ValueError(
            f"{root} already has checkpoints: choose another name with experiment=NAME, or remove the folder"
        )
    return complete[-1] if complete else None


def restore(
    folder: str, recipe: Recipe, data: Data, model: IGAE, bank: SceneBank, digest: str
) -> tuple[Progress, Restored]:
    """Put a checkpoint's weights and the planes of this rank's scenes into place.

    Args:
        digest: of the manifest's shards; those that the checkpoint was trained on must be the same.

    Returns:
        Where the run stands, for this number of ranks, and what the optimizers need.
    """
    loaded = checkpoint.load_checkpoint(folder)
    if loaded.progress.data != digest:
        raise ValueError(
            f"{folder} was trained on other shards than those at {recipe.data.root}: use a new experiment=NAME"
        )
    check_changes(folder, loaded, recipe)
    if loaded.ids != frozenset(scene.id for scene in data.scenes):
        raise ValueError(
            f"{folder} has {len(loaded.ids)} scenes and this configuration has {len(data.scenes)} (or others): "
            "data.categories can't change within a run; use a new experiment=NAME"
        )
    try:
        model.load_state_dict(loaded.shared)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{folder} has weights of another autoencoder or MLP than this configuration ({reason}): "
            "use a new experiment=NAME"
        ) from error
    if LEARNING_RATES not in loaded.optimizer:
        raise ValueError(f"{folder} has fitted scenes, without an optimizer's state: use a new experiment=NAME")
    rows = loaded.rows(bank.scene_ids.tolist())
    bank.planes.copy_(rows.pop("planes"))
    rates = loaded.optimizer.pop(LEARNING_RATES)
    progress = loaded.progress
    if not progress.finished:
        _move_to_this_world(progress, steps_per_epoch(recipe, progress.stage, data))
    progress.world = world_size()
    log.info("going on from %s", folder)
    return progress, Restored(loaded.optimizer, {**rows, "learning_rates": rates})


def _move_to_this_world(progress: Progress, steps_per_epoch: int) -> None:
    """Keep the place in the stage where the number of ranks or the batch is another one: the same epoch, and as many
    samples taken by all ranks together."""
    if steps_per_epoch != progress.steps_per_epoch:
        step = round(progress.step * steps_per_epoch / progress.steps_per_epoch)
        log.warning("step %d of %s is step %d with this batch", progress.step, progress.stage, step)
        progress.step, progress.steps_per_epoch = step, steps_per_epoch
    if progress.world != world_size():
        log.warning("%d ranks trained before this restart, and %d do now", progress.world, world_size())
        progress.consumed = {name: n * progress.world // world_size() for name, n in progress.consumed.items()}


def _same_place(a: str, b: str) -> bool:
    return a == b or ("://" not in a + b and Path(a).resolve() == Path(b).resolve())
