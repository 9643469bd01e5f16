# SPDX-License-Identifier: Apache-2.0
"""What of the data each rank trains on: scenes and natural images, and the steps that follow from it."""

import logging
import math
from dataclasses import dataclass, field

import numpy as np

from igae.data import DataConfig, ImageLoader, Manifest, Scenes, StreamState, ViewLoader, image_loader, view_loader
from igae.errors import counted, origin_of
from igae.ranks import rank, world_size
from igae.scenes import assign_scenes, ownership_table, share_images
from igae.training.recipe import Recipe, StageConfig

log = logging.getLogger("igae")


@dataclass
class RankData:
    """The data of a run, and which part of it this rank owns.

    Attributes:
        scenes: all scenes of the run.
        parts: the scenes of each rank.
        rank: which of the ranks that train on the data this one is.
        world: how many there are.
        timeout: seconds after which a worker that does not answer is taken for lost.
    """

    config: DataConfig
    manifest: Manifest
    scenes: Scenes
    parts: list[Scenes]
    rank: int = field(default_factory=rank)
    world: int = field(default_factory=world_size)
    timeout: float = 600.0

    @classmethod
    def split(cls, recipe: Recipe, manifest: Manifest | None = None) -> "RankData":
        """Split the data of a run among its ranks: the same on every rank, without communication.

        Args:
            manifest: of the data, where it is read already.

        Raises:
            ValueError: there is no such data, or not enough of it for each rank.
        """
        manifest, scenes = select(recipe, manifest)
        parts = [scenes] * world_size()
        if scenes:
            shards, ids, views = manifest.shards.entries("scenes")
            ours = np.isin(ids, scenes.ids)
            owned = assign_scenes(shards[ours], ids[ours], views[ours], world_size())
            parts = [manifest.scenes.take(part) for part in owned]
        data = cls(recipe.data, manifest, scenes, parts)
        data.timeout = recipe.train.timeout
        if manifest.images and any(stage.natural_images for stage in recipe.train.stages.values()):
            len(data.natural_images)  # refuses more ranks than natural images
        return data

    @classmethod
    def alone(cls, config: DataConfig, manifest: Manifest, scenes: Scenes, timeout: float = 600.0) -> "RankData":
        """Scenes that this rank trains by itself."""
        return cls(config, manifest, scenes, [scenes], 0, 1, timeout)

    @property
    def owned(self) -> Scenes:
        """The scenes of this rank."""
        return self.parts[self.rank]

    @property
    def natural_images(self) -> range:
        """The natural images of this rank, by their place in the shards."""
        return share_images(self.manifest.images, self.rank, self.world)

    def steps_per_epoch(self, stage: StageConfig) -> int:
        """Steps in which all ranks together see every view once (every natural image, where there are no views); the
        same number on every rank."""
        count, batch = self.manifest.images, stage.natural_images
        if stage.batch_size:
            count, batch = int(self.scenes.views.sum()), stage.batch_size
        return max(1, count // max(1, batch * stage.accumulate * self.world)) * (2 if stage.alternate else 1)

    def steps(self, stage: StageConfig) -> int:
        """Steps of a stage, the same number on every rank."""
        return max(1, round(max(stage.epochs * self.steps_per_epoch(stage), stage.min_steps / self.world)))

    def open_views(self, batch_size: int, seed: int = 0, *, repeat: bool = True, consumed: int = 0) -> ViewLoader:
        """Batches of the training views of this rank's scenes: shuffled and endless, or one pass in a fixed order.

        Args:
            consumed: views that were taken before.
        """
        config = self.config if repeat else self.config.model_copy(update={"shuffle": 0})
        state = StreamState(*divmod(consumed, int(self.owned.views.sum())))
        loader = view_loader(
            config, self.manifest, self.owned, batch_size=batch_size, seed=seed, repeat=repeat, state=state
        )
        loader.timeout = self.timeout
        return loader

    def open_natural_images(self, batch_size: int, seed: int = 0, *, consumed: int = 0) -> ImageLoader:
        """Endless shuffled batches uint8 [batch_size, 3, H, W] of this rank's natural images."""
        config, part = self.config.model_copy(update={"workers": min(1, self.config.workers)}), self.natural_images
        state = StreamState(*divmod(consumed, len(part)))
        loader = image_loader(config, self.manifest, part=part, batch_size=batch_size, seed=seed, state=state)
        loader.timeout = self.timeout
        return loader

    def log_parts(self, strategy: str, scene_bytes: int) -> None:
        """Say how many ranks there are, and what each owns (``scene_bytes`` of memory for each scene)."""
        log.info("%s, %s; %s", counted(self.world, "rank"), strategy, counted(len(self.scenes), "scene"))
        if self.world > 1 and self.scenes:
            sizes = [(len(part), int(part.views.sum())) for part in self.parts]
            log.info("%s", ownership_table([(r, n, views, n * scene_bytes) for r, (n, views) in enumerate(sizes)]))


def select(recipe: Recipe, manifest: Manifest | None = None) -> tuple[Manifest, Scenes]:
    """The manifest, which may be read already, and the scenes of the run in its order."""
    root, categories = recipe.data.root, recipe.data.categories
    manifest = manifest or Manifest.load(root)
    scenes = manifest.select(categories, recipe.origins)
    if manifest.scenes and not scenes:
        where = origin_of(("data", "categories", *(categories or ())), recipe.origins, "the recipe")
        raise ValueError(
            f"{where}: data.categories selects none of the {len(manifest.scenes)} scenes at {root}: "
            "name others, or take all with data.categories=null"
        )
    return manifest, scenes


def waves(manifest: Manifest, scenes: Scenes, most: int) -> list[Scenes]:
    """Scenes in even groups of at most ``most``, in the order of the shards, so that a group reads few of them."""
    _, ids, _ = manifest.shards.entries("scenes")
    ids = ids[np.isin(ids, scenes.ids)]
    _, first = np.unique(ids, return_index=True)
    order = manifest.scenes.take(ids[np.sort(first)])
    count = math.ceil(len(order) / most)
    return [order[len(order) * i // count : len(order) * (i + 1) // count] for i in range(count)]
