# SPDX-License-Identifier: Apache-2.0
"""Latents of all training views, encoded once: what the warm-up trains on, because its autoencoder is frozen."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from igae.data.decoding import ViewBatch
from igae.data.loader import StreamState
from igae.ranks import derive_seed


class LatentCache:
    """Latents and cameras of V views, n variants of each, on one device. Variant i of view v is at place n v + i.

    Attributes:
        tensors: what `encode` gives, by name, of all places.
        scene: int64 [n V] on the CPU.

    Args:
        views: batches that together hold every view once, in an order that is the same in each run.
        encode: gives tensors with B rows each of a batch of B views and the number of a variant.
    """

    def __init__(
        self, views: Iterable[ViewBatch], encode: Callable[[ViewBatch, int], dict[str, Tensor]], variants: int = 1
    ) -> None:
        self.variants, scenes, found = variants, [], dict[str, list[Tensor]]()
        for batch in views:
            scenes.append(batch.scene.repeat_interleave(variants))
            encoded = [encode(batch, i) for i in range(variants)]
            for name in encoded[0]:
                found.setdefault(name, []).append(torch.stack([each[name] for each in encoded], 1).flatten(0, 1))
        self.tensors = {name: torch.cat(found.pop(name)) for name in list(found)}
        self.scene = torch.cat(scenes)

    def __len__(self) -> int:
        """Of its views."""
        return len(self.scene) // self.variants


class LatentLoader:
    """Endless batches of full size of the views in a cache, each epoch in an order given by (seed, epoch), and with
    the next variant of each view.

    With a ``group`` above 0, the scenes of an epoch are put into random groups of so many, and the views of a group
    come shuffled, group after group: a scene is used several times before others are. Else all views are shuffled.

    ``state`` is where the next batch starts; a loader made with it continues exactly there.
    """

    def __init__(
        self, cache: LatentCache, batch_size: int, seed: int, state: StreamState | None = None, group: int = 0
    ) -> None:
        self.cache, self.batch_size, self.seed, self.group = cache, batch_size, seed, group
        self.state = state or StreamState()
        self._order = self._permutation(self.state.epoch)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "latents", epoch))
        order = torch.randperm(len(self.cache), generator=generator)
        if self.group == 0:
            return order
        scenes, scene_of = self.cache.scene[:: self.cache.variants].unique(return_inverse=True)
        group_of = torch.randperm(len(scenes), generator=generator) // self.group
        return order[group_of[scene_of[order]].argsort(stable=True)]

    def take(self) -> Tensor:
        """Places in the cache, int64 [batch_size] on the CPU, of the views of the next batch."""
        epoch, position, parts, missing = self.state.epoch, self.state.position, [], self.batch_size
        while missing > 0:
            if position == len(self.cache):
                epoch, position = epoch + 1, 0
                self._order = self._permutation(epoch)
            part, count = self._order[position : position + missing], self.cache.variants
            parts.append(count * part + (part + epoch) % count)
            position, missing = position + len(part), missing - len(part)
        self.state = StreamState(epoch, position)
        return torch.cat(parts)

    def close(self) -> None:
        """Nothing is held open."""
