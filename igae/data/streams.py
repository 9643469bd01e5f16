# SPDX-License-Identifier: Apache-2.0
"""Streams of batches out of packed data.

One thread of this process reads raw samples, shard after shard, and decides the order; DataLoader workers only decode
them. So the order depends on the seed alone, not on the number of workers, and a `StreamState` of two numbers says
exactly where a stream is.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from igae.data.decoding import Decoder, ViewBatch, decode_image
from igae.data.loader import Loader, Plan, StreamState
from igae.data.manifest import Manifest, Scene, Shard
from igae.data.shards import Verify
from igae.errors import redact
from igae.storage import Cache

__all__ = [
    "ImageLoader",
    "Loader",
    "StreamState",
    "Verify",
    "ViewBatch",
    "ViewLoader",
    "decode_image",
    "image_loader",
    "view_loader",
]

ViewLoader = Loader[ViewBatch]
ImageLoader = Loader[Tensor]


def view_loader(
    root: str,
    manifest: Manifest,
    scenes: Sequence[Scene],
    *,
    batch_size: int,
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    shuffle: int = 2000,
    repeat: bool = True,
    workers: int = 2,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    state: StreamState | None = None,
    verify: Verify = "size",
    cache: str | None = None,
) -> ViewLoader:
    """Batches of views of some scenes.

    Args:
        root: folder or URL of the packed data.
        manifest: its manifest.
        scenes: the scenes whose views are wanted; shards with none of them are not read.
        batch_size: views in a batch.
        seed: an epoch's order is a function of (seed, epoch).
        split: training or held-out views.
        shuffle: views in the buffer that batches are drawn from, inside a shard; shards are permuted too. 0: views come
            in their stored order.
        repeat: endless, and batches go across epochs; otherwise one pass, and the last batch may be smaller.
        workers: decoding processes; 0 decodes in this one.
        background: color in [0, 1] that transparent pixels show.
        state: where to begin.
        verify: what of a shard is compared with the manifest before its first sample is given out. `size`: its size, a
            small request each time that it is opened. `sha256`: all its bytes too, which are read through once in each
            process for that; on an object store this is a download. `off`: nothing.
        cache: folder of this machine where copies of whole shards are kept, which are read from then on; the next shard
            is downloaded while one is read. None: shards are read where they are.

    Raises:
        ValueError: no such views, a number out of range, or a cache without room. While iterating `ShardError`, which
            names the shard.
    """
    if not all(0 <= channel <= 1 for channel in background):
        raise ValueError(f"background {background} is not a color in [0, 1]")
    kind = "scenes" if split == "train" else "heldout"
    names = frozenset(scene.name for scene in scenes)
    counts = Counter[str]()
    for shard in manifest.shards:
        if shard.kind == kind:
            counts[shard.name] = sum(number for scene, number in shard.scenes.items() if scene in names)
    counts = +counts  # without the shards that have none
    if not counts:
        raise ValueError(f"the {len(scenes)} chosen scenes have no {split} views in {redact(root)}")
    shards = [shard for shard in manifest.shards if shard.name in counts]
    kept = _cache(cache, root, shards)
    plan = Plan(root, shards, counts, names, None, verify, seed, shuffle, repeat, kept)
    decoder = Decoder[ViewBatch](root, manifest.image_size, background, {scene.name: scene.id for scene in scenes})
    return Loader(plan, decoder, batch_size, workers, state)


def image_loader(
    root: str,
    manifest: Manifest,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: int = 2000,
    repeat: bool = True,
    workers: int = 2,
    state: StreamState | None = None,
    verify: Verify = "size",
    cache: str | None = None,
    part: range | None = None,
) -> ImageLoader:
    """Batches uint8 [B, 3, H, W] of natural images.

    Args:
        part: the natural images that are wanted, of `manifest.images`, counted through the shards in the order of the
            manifest, inside a shard as stored; shards with none of them are not read. The order, epochs and states are
            those of the part alone. None: all.
        others: as in `view_loader`.

    Raises:
        ValueError: no such images, or a number out of range. While iterating `ShardError`, which names the shard.
    """
    if not manifest.images:
        raise ValueError(f"there are no natural images in {redact(root)}: pack some with --images")
    if part is None:
        part = range(manifest.images)
    if part.step != 1 or not 0 <= part.start < part.stop <= manifest.images:
        raise ValueError(f"part {part} is no part of {manifest.images} natural images")
    parts: dict[str, range] = {}
    first = 0
    for shard in manifest.shards:
        if shard.kind == "images":
            parts[shard.name] = range(max(part.start - first, 0), min(part.stop - first, shard.samples))
            first += shard.samples
    shards = [shard for shard in manifest.shards if parts.get(shard.name)]
    counts = {shard.name: len(parts[shard.name]) for shard in shards}
    kept = _cache(cache, root, shards)
    plan = Plan(root, shards, counts, None, parts, verify, seed, shuffle, repeat, kept)
    return Loader(plan, Decoder[Tensor](root, manifest.image_size, (1.0, 1.0, 1.0), None), batch_size, workers, state)


def _cache(folder: str | None, root: str, shards: Sequence[Shard]) -> Cache | None:
    if folder is None:
        return None
    cache = Cache(folder, root)
    cache.check_space(shards)
    return cache
