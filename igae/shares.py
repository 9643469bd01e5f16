# SPDX-License-Identifier: Apache-2.0
"""What of the data each rank owns: scenes and photographs, and the steps that follow from it."""

import logging
import math
from dataclasses import dataclass

from igae import ownership
from igae.data.manifest import Manifest, Scene
from igae.distributed import rank, world_size
from igae.recipe import Recipe

log = logging.getLogger("igae")


@dataclass
class Data:
    """What is trained on: all of it, and what of it this rank owns."""

    manifest: Manifest
    scenes: list[Scene]
    """All scenes of the run."""
    parts: list[list[Scene]]
    """Those of each rank."""

    @property
    def owned(self) -> list[Scene]:
        """Those of this rank."""
        return self.parts[rank()]

    @property
    def photos(self) -> range:
        """Photographs of this rank, by their place in the shards."""
        return ownership.share(self.manifest.images, rank(), world_size())


def steps_per_epoch(recipe: Recipe, stage: str, data: Data) -> int:
    """Steps in which all ranks together see every view once (every photograph, where there are no views); the same
    number on every rank."""
    config = recipe.train.warmup if stage == "warmup" else recipe.train.joint
    count, batch = (
        (sum(scene.views for scene in data.scenes), config.batch_size)
        if config.batch_size
        else (data.manifest.images, config.photos)
    )
    return max(1, count // max(1, batch * config.accumulate * world_size())) * (2 if config.alternate else 1)


def own_data(recipe: Recipe) -> Data:
    """The data of the run and this rank's part of it: the same on every rank, without asking another."""
    manifest = Manifest.load(recipe.data.root)
    scenes = manifest.select(recipe.data.categories)
    if manifest.scenes and not scenes:
        raise ValueError(f"data.categories selects none of the {len(manifest.scenes)} scenes at {recipe.data.root}")
    ids = {scene.name: scene.id for scene in scenes}
    shards = [
        {ids[name]: views for name, views in shard.scenes.items() if name in ids}
        for shard in manifest.shards
        if shard.kind == "scenes"
    ]
    parts = ownership.assign(shards, world_size()) if scenes else [[] for _ in range(world_size())]
    data = Data(manifest, scenes, [[manifest.scenes[i] for i in part] for part in parts])
    if any(stage.epochs and stage.photos for stage in (recipe.train.warmup, recipe.train.joint)) and manifest.images:
        len(data.photos)  # refuses more ranks than photographs
    return data


def scene_bytes(recipe: Recipe) -> int:
    """Memory of a scene on its owner: its row and two moments, float32."""
    return 3 * 4 * math.prod(recipe.planes.row_shape)


def log_ranks(recipe: Recipe, data: Data, strategy: str) -> None:
    """Say how many ranks there are, and what each owns."""
    world = world_size()
    log.info("%d rank%s, %s; %d scenes", world, "s" * (world > 1), strategy, len(data.scenes))
    if world > 1 and data.scenes:
        log.info(
            "%s",
            ownership.table(
                [
                    (r, len(part), sum(scene.views for scene in part), len(part) * scene_bytes(recipe))
                    for r, part in enumerate(data.parts)
                ]
            ),
        )
