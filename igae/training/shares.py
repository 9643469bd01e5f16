# SPDX-License-Identifier: Apache-2.0
"""What of the data each rank owns: scenes and natural images, and the steps that follow from it."""

import hashlib
import logging
import math
from dataclasses import dataclass, field

from igae.data import Manifest, Scene
from igae.ranks import rank, world_size
from igae.scenes import assign_scenes, ownership_table, share_images
from igae.training.recipe import Recipe

log = logging.getLogger("igae")


@dataclass
class Data:
    """What is trained on: all of it, and what of it this rank owns."""

    manifest: Manifest
    scenes: list[Scene]
    """All scenes of the run."""
    parts: list[list[Scene]]
    """Those of each rank."""
    rank: int = field(default_factory=rank)
    """Which of the ranks that train on it this one is."""
    world: int = field(default_factory=world_size)
    """How many there are."""

    @property
    def owned(self) -> list[Scene]:
        """Those of this rank."""
        return self.parts[self.rank]

    @property
    def digest(self) -> str:
        """Of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    @property
    def natural_images(self) -> range:
        """Natural images of this rank, by their place in the shards."""
        return share_images(self.manifest.images, self.rank, self.world)


def steps_per_epoch(recipe: Recipe, stage: str, data: Data) -> int:
    """Steps in which all ranks together see every view once (every natural image, where there are no views); the same
    number on every rank."""
    config = recipe.train.warmup if stage == "warmup" else recipe.train.joint
    count, batch = (
        (sum(scene.views for scene in data.scenes), config.batch_size)
        if config.batch_size
        else (data.manifest.images, config.natural_images)
    )
    return max(1, count // max(1, batch * config.accumulate * data.world)) * (2 if config.alternate else 1)


def select(recipe: Recipe) -> tuple[Manifest, list[Scene]]:
    """The manifest, and the scenes of the run in its order."""
    manifest = Manifest.load(recipe.data.root)
    scenes = manifest.select(recipe.data.categories)
    if manifest.scenes and not scenes:
        raise ValueError(f"data.categories selects none of the {len(manifest.scenes)} scenes at {recipe.data.root}")
    return manifest, scenes


def own_data(recipe: Recipe) -> Data:
    """The data of the run and this rank's part of it: the same on every rank, without asking another."""
    manifest, scenes = select(recipe)
    ids = {scene.name: scene.id for scene in scenes}
    shards = [
        {ids[name]: views for name, views in shard.scenes.items() if name in ids}
        for shard in manifest.shards
        if shard.kind == "scenes"
    ]
    parts = assign_scenes(shards, world_size()) if scenes else [[] for _ in range(world_size())]
    data = Data(manifest, scenes, [[manifest.scenes[i] for i in part] for part in parts])
    if (
        any(stage.epochs and stage.natural_images for stage in (recipe.train.warmup, recipe.train.joint))
        and manifest.images
    ):
        len(data.natural_images)  # refuses more ranks than natural images
    return data


def waves(manifest: Manifest, scenes: list[Scene], most: int) -> list[list[Scene]]:
    """Scenes in even groups of at most ``most``, in the order of the shards, so that a group reads few of them."""
    wanted = {scene.name: scene for scene in scenes}
    names = [name for shard in manifest.shards if shard.kind == "scenes" for name in shard.scenes]
    order = [wanted[name] for name in names if name in wanted]
    count = math.ceil(len(order) / most)
    return [order[len(order) * i // count : len(order) * (i + 1) // count] for i in range(count)]


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
            ownership_table(
                [
                    (r, len(part), sum(scene.views for scene in part), len(part) * scene_bytes(recipe))
                    for r, part in enumerate(data.parts)
                ]
            ),
        )
