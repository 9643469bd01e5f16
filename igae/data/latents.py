# SPDX-License-Identifier: Apache-2.0
"""Latents of all training views, encoded once: what the warm-up trains on, because its autoencoder is frozen."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from igae.data.decoding import ViewBatch
from igae.data.loader import StreamState
from igae.ranks import derive_seed


class LatentCache:
    """Latents and cameras of V views, on one device.

    Args:
        views: batches that together hold every view once, in an order that is the same in each run.
        encode: gives latents [B, c, h, w] on ``device`` of a batch of B views.
    """

    def __init__(self, views: Iterable[ViewBatch], encode: Callable[[ViewBatch], Tensor], device: torch.device) -> None:
        latents, scenes, cam2world, intrinsics = [], [], [], []
        for batch in views:
            latents.append(encode(batch))
            scenes.append(batch.scene)
            cam2world.append(batch.cam2world)
            intrinsics.append(batch.intrinsics)
        self.latents = torch.cat(latents)
        self.scene = torch.cat(scenes)
        self.cam2world = torch.cat(cam2world).to(device)
        self.intrinsics = torch.cat(intrinsics).to(device)

    def __len__(self) -> int:
        return len(self.latents)


class LatentLoader:
    """Endless batches of full size of the views in a cache, each epoch in an order given by (seed, epoch).

    ``state`` is where the next batch starts; a loader made with it continues exactly there.
    """

    def __init__(self, cache: LatentCache, batch_size: int, seed: int, state: StreamState | None = None) -> None:
        self.cache, self.batch_size, self.seed = cache, batch_size, seed
        self.state = state or StreamState()
        self._order = self._permutation(self.state.epoch)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "latents", epoch))
        return torch.randperm(len(self.cache), generator=generator)

    def take(self) -> Tensor:
        """Places in the cache, int64 [batch_size] on the CPU, of the views of the next batch."""
        epoch, position, parts, missing = self.state.epoch, self.state.position, [], self.batch_size
        while missing > 0:
            if position == len(self.cache):
                epoch, position = epoch + 1, 0
                self._order = self._permutation(epoch)
            part = self._order[position : position + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        self.state = StreamState(epoch, position)
        return torch.cat(parts)

    def close(self) -> None:
        """Nothing is held open."""
