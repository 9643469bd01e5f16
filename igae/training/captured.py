# SPDX-License-Identifier: Apache-2.0
"""A training step as one CUDA graph: its launches cost the host more than the device needs for their work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from igae.data import LatentCache, to_device
from igae.errors import TrainingError, in_one_sentence
from igae.models import IGAE, LossWeights, Views
from igae.scenes import RowAdam
from igae.training.parallel.engine import Engine

EAGER_CALLS = 3
"""Calls before the step is captured: what is compiled, loaded or made at first use can't be."""


class CapturedStep:
    """Encodes, renders and decodes views, and steps planes and shared parameters, without asking the host.

    What it returns is overwritten by the next call.

    Args:
        batch_size: views of a step.
        rates: names of the learning rates, in the order in which calls give them.
        world: ranks that train together.
        sample: draw latents from the posterior (else its mean).
        cache: where views are latents that were encoded before.
    """

    def __init__(
        self,
        engine: Engine,
        model: IGAE,
        adam: RowAdam,
        weights: LossWeights,
        batch_size: int,
        rates: list[str],
        world: int,
        sample: bool,
        cache: LatentCache | None = None,
    ) -> None:
        self._engine, self._model, self._adam, self._cache = engine, model, adam, cache
        self._weights, self._batch_size, self._rates = weights, batch_size, rates
        self._world, self._sample = world, sample
        self._numbers = torch.zeros(3 * batch_size + 2 + len(rates), dtype=torch.int64, device=engine.device)
        self._tensors: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(
        self,
        rows: Tensor,
        index: Tensor,
        view: Tensor | None,
        tensors: dict[str, Tensor],
        seed: int,
        stop: bool,
        rates: dict[str, float],
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Make a step.

        Args:
            rows: int64 [S], distinct rows of the planes, S <= batch_size.
            index: int64 [batch_size], the place of each view's scene among them.
            view: int64 [batch_size], places in the cache, where there is one.
            tensors: `natural_images` uint8 [P, 3, H, W] if there are some, and without a cache `images` uint8
                [batch_size, 3, H, W], `cam2world` [batch_size, 4, 4] and `intrinsics` [batch_size, 3, 3]. The same
                names and shapes in all calls.
            seed: of the renderer's samples and the posterior's.

        Returns:
            losses; 1 where the step was applied, else 0; 0 where it is not the last one, else more; norms of the
            gradients.

        Raises:
            TrainingError: the step can't be captured.
        """
        padding = torch.full((self._batch_size - len(rows),), -1)
        numbers = torch.tensor([rates[name] for name in self._rates], dtype=torch.float64).view(torch.int64)
        view = torch.zeros_like(index) if view is None else view
        self._put(self._numbers, torch.cat([rows, padding, index, view, torch.tensor([seed, int(stop)]), numbers]))
        for name, tensor in tensors.items():
            if self._calls == 0:
                self._tensors[name] = torch.empty_like(tensor, device=self._engine.device)
            self._put(self._tensors[name], tensor)
        if self._sample and tensors:
            torch.manual_seed(seed)  # a graph draws numbers from where the generator stands when it is replayed
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            with _fastest_convolutions():
                return self._step()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._output

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with _fastest_convolutions(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._step()
        except RuntimeError as error:
            if in_one_sentence(error) is not None:  # it is something else: no memory, a lost rank or worker
                raise
            raise TrainingError(
                f"a step can't be captured in a CUDA graph ({str(error).splitlines()[0]}): something in it, in the "
                "autoencoder perhaps, asks the host for a value; set train.cuda_graph=false"
            ) from error
        return graph

    def _put(self, place: Tensor, tensor: Tensor) -> None:
        assert place.shape == tensor.shape
        place.copy_(to_device(tensor, self._engine.device))

    def _step(self) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        count = self._batch_size
        rows, index, view = self._numbers[: 3 * count].split(count)
        seed, stop = self._numbers[3 * count], self._numbers[3 * count + 1].float()
        rates = dict(zip(self._rates, self._numbers[3 * count + 2 :].view(torch.float64).unbind(), strict=True))
        leaf = self._adam.visit(rows).requires_grad_()
        given, cache = dict(self._tensors), self._cache
        natural_images = given.pop("natural_images", None)
        if cache is not None:
            views = Views(index, cache.cam2world[view], cache.intrinsics[view], latents=cache.latents[view])
        else:
            views = Views(index, **given)
        losses = self._engine.forward(leaf, views, natural_images, self._weights, self._sample, seed)
        self._engine.backward(losses["total"])
        assert leaf.grad is not None
        own = leaf.grad.norm()
        agreed, stop, norms = self._engine.agree(losses["total"].detach() + own, stop)
        applied = self._engine.step(rates, agreed)
        self._adam.step(rows, leaf.grad, rates["planes"], scale=1 / self._world, apply=applied)
        return {name: loss.detach() for name, loss in losses.items()}, applied, stop, norms | {"planes": own}


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms, for some seconds in all: worth it for shapes that come back in each step."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
