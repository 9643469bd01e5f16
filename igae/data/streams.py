# SPDX-License-Identifier: Apache-2.0
"""Streams of batches out of packed data.

One thread of this process reads raw samples, shard after shard, and decides the order; DataLoader workers only decode
them. So the order depends on the seed alone, not on the number of workers, and a `StreamState` of two numbers says
exactly where a stream is.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from igae.data.columns import Scene, Shard
from igae.data.config import DataConfig
from igae.data.decoding import Decoder, ViewBatch
from igae.data.loader import Loader, Plan, StreamState
from igae.data.manifest import Manifest
from igae.data.shards import ShardReader
from igae.errors import redact
from igae.storage import Cache

WHITE = (1.0, 1.0, 1.0)
"""What transparent natural images are laid over: the background of the configuration is that of objects."""
ViewLoader = Loader[ViewBatch]
ImageLoader = Loader[Tensor]


def view_loader(
    config: DataConfig,
    manifest: Manifest,
    scenes: Sequence[Scene],
    *,
    batch_size: int,
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    repeat: bool = True,
    state: StreamState | None = None,
) -> ViewLoader:
    """Batches of views of some scenes.

    An epoch's order is a function of (seed, epoch): shards are permuted, and inside a shard views are drawn from a
    buffer of `config.shuffle` views; with 0 views come in their stored order.

    Args:
        manifest: that of `config.root`.
        scenes: the scenes whose views are wanted; shards with none of them are not read.
        batch_size: views in a batch.
        split: training or held-out views.
        repeat: endless, and batches go across epochs; otherwise one pass, and the last batch may be smaller.
        state: where to begin.

    Raises:
        ValueError: no such views, a number out of range, or a cache without room. While iterating `ShardError`, which
            names the shard.
    """
    ids = {scene.name: scene.id for scene in scenes}
    wanted = np.zeros(len(manifest.scenes), bool)
    wanted[list(ids.values())] = True
    places, entries, samples = manifest.shards.entries("scenes" if split == "train" else "heldout")
    total = np.zeros(len(manifest.shards), np.int64)
    np.add.at(total, places, np.where(wanted[entries], samples, 0))
    shards = manifest.shards.take(np.flatnonzero(total))
    if not shards:
        raise ValueError(f"the {len(scenes)} chosen scenes have no {split} views in {redact(config.root)}")
    counts = {shard.name: count for shard, count in zip(shards, total[total > 0].tolist(), strict=True)}
    plan = Plan(_reader(config, shards), shards, counts, frozenset(ids), None, seed, config.shuffle, repeat)
    decoder = Decoder[ViewBatch](config.root, manifest.image_size, config.background, ids)
    return Loader(plan, decoder, batch_size, config.workers, state)


def image_loader(
    config: DataConfig,
    manifest: Manifest,
    *,
    batch_size: int,
    seed: int = 0,
    repeat: bool = True,
    state: StreamState | None = None,
    part: range | None = None,
) -> ImageLoader:
    """Batches uint8 [B, 3, H, W] of natural images.

    Args:
        part: the natural images that are wanted, of `manifest.images`, counted through the shards in the order of the
            manifest, inside a shard as stored; shards with none of them are not read. The order, epochs and states are
            those of the part alone. None: all.

    Raises:
        ValueError: no such images, or a number out of range. While iterating `ShardError`, which names the shard.
    """
    if not manifest.images:
        raise ValueError(
            f"there are no natural images in {redact(config.root)}: pack some with --images, or "
            "set train.joint.natural_images=0 and, for an autoencoder that stays good, train.joint.weights.ae=1"
        )
    if part is None:
        part = range(manifest.images)
    if part.step != 1 or not 0 <= part.start < part.stop <= manifest.images:
        raise ValueError(f"part {part} is no part of {manifest.images} natural images")
    parts: dict[str, range] = {}
    first = 0
    every = manifest.shards.take(manifest.shards.places("images"))
    for shard in every:
        parts[shard.name] = range(max(part.start - first, 0), min(part.stop - first, shard.samples))
        first += shard.samples
    shards = [shard for shard in every if parts[shard.name]]
    counts = {shard.name: len(parts[shard.name]) for shard in shards}
    plan = Plan(_reader(config, shards), shards, counts, None, parts, seed, config.shuffle, repeat)
    decoder = Decoder[Tensor](config.root, manifest.image_size, WHITE, None)
    return Loader(plan, decoder, batch_size, config.workers, state)


def _reader(config: DataConfig, shards: Sequence[Shard]) -> ShardReader:
    cache = None
    if config.cache is not None:
        cache = Cache(config.cache, config.root)
        cache.check_space(shards)
    return ShardReader(config.root, config.verify, cache)
