# SPDX-License-Identifier: Apache-2.0
"""A warm-up step as one CUDA graph: its launches cost the host more than the device needs for their work."""

import torch
from torch import Tensor

from igae.data.decoding import to_device
from igae.data.latents import LatentCache
from igae.engine import Engine
from igae.model import IGAE, LossWeights, Views
from igae.scenes import RowAdam

EAGER_CALLS = 3
"""Calls before the step is captured: what is compiled, loaded or made at first use can't be."""


class CapturedStep:
    """Draws views from a cache of latents, renders, and steps planes and shared parameters, without asking the host.

    What it returns is overwritten by the next call.

    Args:
        batch_size: views of a step.
        rates: names of the learning rates, in the order in which calls give them.
        world: ranks that train together.
    """

    def __init__(
        self,
        engine: Engine,
        model: IGAE,
        adam: RowAdam,
        cache: LatentCache,
        weights: LossWeights,
        batch_size: int,
        rates: list[str],
        world: int,
    ) -> None:
        self._engine, self._model, self._adam, self._cache = engine, model, adam, cache
        self._weights, self._batch_size, self._rates, self._world = weights, batch_size, rates, world
        self._input = torch.zeros(3 * batch_size + 2 + len(rates), dtype=torch.int64, device=engine.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(
        self, rows: Tensor, index: Tensor, view: Tensor, seed: int, stop: bool, rates: dict[str, float]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Make a step.

        Args:
            rows: int64 [S], distinct rows of the planes, S <= batch_size.
            index: int64 [batch_size], the place of each view's scene among them.
            view: int64 [batch_size], places in the cache.
            seed: of the renderer's samples.

        Returns:
            losses; 1 where the step was applied, else 0; 0 where it is the last one, else 1; norms of the gradients.
        """
        padding = torch.full((self._batch_size - len(rows),), -1)
        numbers = torch.tensor([rates[name] for name in self._rates], dtype=torch.float64).view(torch.int64)
        packed = torch.cat([rows, padding, index, view, torch.tensor([seed, int(not stop)]), numbers])
        self._input.copy_(to_device(packed, self._engine.device))
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            return self._step()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self._step()
        self._graph.replay()
        return self._output

    def _step(self) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        count = self._batch_size
        rows, index, view = self._input[: 3 * count].split(count)
        seed, go_on = self._input[3 * count], self._input[3 * count + 1].float()
        rates = dict(zip(self._rates, self._input[3 * count + 2 :].view(torch.float64).unbind(), strict=True))
        leaf = self._adam.visit(rows).requires_grad_()
        cache = self._cache
        views = Views(index, cache.cam2world[view], cache.intrinsics[view], latents=cache.latents[view])
        losses = self._engine.forward(leaf, views, None, self._weights, False, seed)
        self._engine.backward(losses["total"])
        assert leaf.grad is not None
        own = leaf.grad.norm()
        agreed, go_on, norms = self._engine.agree(losses["total"].isfinite() & own.isfinite(), go_on)
        applied = self._engine.step(rates, agreed)
        self._adam.step(rows, leaf.grad, rates["planes"], scale=1 / self._world, apply=applied)
        return {name: loss.detach() for name, loss in losses.items()}, applied, go_on, norms | {"planes": own}
