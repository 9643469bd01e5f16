# SPDX-License-Identifier: Apache-2.0
"""One training step: a function of its inputs that runs eagerly or, once captured, as a CUDA graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from igae.data import LatentCache, to_device
from igae.errors import TrainingError, in_one_sentence
from igae.models import Views, augment, augment_numbers
from igae.scenes import SceneStore
from igae.training.parallel.engine import Engine
from igae.training.recipe import StageConfig

WARMUP_CALLS = 3
"""Eager calls before a step is captured: what is compiled, loaded or allocated at first use can't be captured."""
PLACES = ("index", "view")


@dataclass
class StepInputs:
    """What a step reads."""

    rows: Tensor | None
    """int64 [S], distinct rows of the scene store, -1 for padding; None where the step has no views."""
    batches: list[dict[str, Tensor]]
    """The batches whose losses the step averages. For B views: `index` [B], the place of each view's scene among the
    rows, with `view` [B], places in the latent cache, or with `images`, `cam2world`, `intrinsics` and, for losses of
    opacity, `masks` and `has_alpha` (see `ViewBatch`). `natural_images`: uint8 [P, 3, H, W]."""
    seeds: Sequence[int | Tensor]
    """Of the random numbers of each batch."""
    stop: bool | Tensor
    """This rank was asked to stop after the step."""
    learning_rates: Mapping[str, float | Tensor]
    """By part of the model."""
    refresh: bool = False
    """Compute the field's background from the autoencoder first."""


class StepOutput(NamedTuple):
    """What a step gives, on the device."""

    losses: dict[str, Tensor]
    """Of this rank, by name."""
    applied: Tensor
    """1 where all losses and gradients of all ranks are finite; 0: nothing has changed."""
    stop: Tensor
    """0 where no rank was asked to stop, else more."""
    norms: dict[str, Tensor]
    """L2 norms of the gradients that this rank holds, by part of the model."""


@dataclass
class TrainingStep:
    """Forward and backward passes of all batches, then one step of shared parameters and of rows. Collective.

    The loss is the mean over the batches and over the ranks, and all gradients are its gradients: N ranks do what one
    rank does with a batch N times as large.
    """

    engine: Engine
    store: SceneStore
    config: StageConfig
    sample: bool
    """Draw latents from the posterior; else use its mean."""
    ranks: int
    """How many train together."""
    cache: LatentCache | None = None
    """The latents that `view` of the inputs points into."""
    background: Tensor | None = None
    """uint8 [3], what augmented views are filled with."""
    before_waiting: Callable[[], None] = lambda: None
    """Called where this rank has computed what it can before it waits for others."""

    def __call__(self, inputs: StepInputs) -> StepOutput:
        """Make a step with inputs on the CPU."""
        batches = [{k: to_device(v, self.engine.device) for k, v in batch.items()} for batch in inputs.batches]
        return self.compute(replace(inputs, batches=batches))

    def compute(self, inputs: StepInputs) -> StepOutput:
        """Make a step with batches on the device. With all inputs there, nothing in it waits for the device."""
        rates, rows, leaf, gradient = inputs.learning_rates, inputs.rows, None, None
        if rows is not None:
            leaf = self.store.take(rows).requires_grad_(self.config.learning_rates.planes > 0)
        losses = self._backward(leaf, inputs)
        watched, norms = losses["total"], {}
        if leaf is not None and leaf.grad is not None:
            gradient = leaf.grad
            norms["planes"] = gradient.norm()
            watched = watched + norms["planes"]
        asked = inputs.stop.float() if isinstance(inputs.stop, Tensor) else inputs.stop
        agreed, stop, shared = self.engine.agree(watched, asked)
        applied = self.engine.step(rates, agreed)
        if rows is not None and gradient is not None:
            self.store.step(rows, gradient, rates["planes"], scale=1 / self.ranks, apply=applied)
        return StepOutput(losses, applied, stop, shared | norms)

    def _backward(self, leaf: Tensor | None, inputs: StepInputs) -> dict[str, Tensor]:
        """Add up the gradients of all batches; returns the means of their losses."""
        engine, count = self.engine, len(inputs.batches)
        means: dict[str, Tensor] = {}
        if engine.forward_waits:
            self.before_waiting()
        for i, (batch, seed) in enumerate(zip(inputs.batches, inputs.seeds, strict=True)):
            if isinstance(seed, int):  # a graph's generator is seeded before its replay
                torch.manual_seed(seed)
            views, images, refresh = self._views(batch, seed), batch.get("natural_images"), inputs.refresh and i == 0
            arguments = (leaf, views, images, self.config.weights, self.sample, seed, refresh)
            losses: dict[str, Tensor] = engine.forward(*arguments, last=i == count - 1)
            if i == count - 1 and not engine.forward_waits:
                self.before_waiting()
            if count > 1:
                losses = {name: loss / count for name, loss in losses.items()}
            engine.backward(losses["total"], i == count - 1)
            for name, loss in losses.items():
                means[name] = means[name] + loss.detach() if name in means else loss.detach()
        return means

    def _views(self, batch: dict[str, Tensor], seed: int | Tensor) -> Views | None:
        if "index" not in batch:
            return None
        if self.cache is not None:
            return Views(batch["index"], **{name: rows[batch["view"]] for name, rows in self.cache.tensors.items()})
        views = Views(**{name: tensor for name, tensor in batch.items() if name != "natural_images"})
        if self.config.augment.is_on:
            assert self.background is not None
            numbers = augment_numbers(seed, len(views.index), views.index.device)
            views = augment(views, self.config.augment, self.background, numbers)
        return views


class CapturedStep:
    """A training step that becomes a CUDA graph: its launches cost the CPU more than its work costs the GPU.

    Inputs are copied into tensors that the graph reads, all numbers in one copy. Each call has one batch with views, of
    the same shapes but for the number of rows. What is returned is overwritten by the next call.

    Args:
        batch_size: views of a batch.
        refresh: computes the field's background, outside of the graph.
        warmup_calls: eager calls before the capture.
    """

    def __init__(
        self, step: TrainingStep, batch_size: int, refresh: Callable[[], None], warmup_calls: int = WARMUP_CALLS
    ) -> None:
        self._step, self._batch_size, self._refresh, self._warmup_calls = step, batch_size, refresh, warmup_calls
        self._static: StepInputs | None = None
        self._calls, self.is_captured = 0, False

    def __call__(self, inputs: StepInputs) -> StepOutput:
        """Make a step with inputs on the CPU. TrainingError where it can't be captured."""
        if inputs.refresh:
            self._refresh()
        static = self._load(inputs)
        if self._step.sample and self._images:  # a replay draws from where the generator stands
            torch.manual_seed(int(inputs.seeds[0]))
        self._calls += 1
        if self._calls <= self._warmup_calls:
            with fastest_convolutions():
                return self._step.compute(static)
        if not self.is_captured:
            self._graph, self._output = capture(self._step.compute, static)
            self.is_captured = True
        self._graph.replay()
        return self._output

    def _load(self, inputs: StepInputs) -> StepInputs:
        """Copy inputs to where the graph reads them."""
        [batch], rows = inputs.batches, inputs.rows
        assert rows is not None
        numbers = [
            torch.cat([rows, torch.full((self._batch_size - len(rows),), -1)]),
            *(batch[name] for name in PLACES if name in batch),
            torch.tensor([inputs.seeds[0], int(inputs.stop)]),
            torch.tensor(list(inputs.learning_rates.values()), dtype=torch.float64).view(torch.int64),
        ]
        if self._static is None:
            self._static = self._allocate(inputs, [len(part) for part in numbers])
        pairs = [(self._numbers, torch.cat(numbers)), *((place, batch[k]) for k, place in self._images.items())]
        for place, tensor in pairs:
            assert place.shape == tensor.shape
            place.copy_(to_device(tensor, place.device))
        return self._static

    def _allocate(self, inputs: StepInputs, sizes: list[int]) -> StepInputs:
        device, batch = self._step.engine.device, inputs.batches[0]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._images = {name: torch.empty_like(t, device=device) for name, t in batch.items() if name not in PLACES}
        rows, *places, (seed, stop), rates = self._numbers.split(sizes)
        named = zip([name for name in PLACES if name in batch], places, strict=True)
        by_part = zip(inputs.learning_rates, rates.view(torch.float64).unbind(), strict=True)
        return StepInputs(rows, [{**dict(named), **self._images}], [seed], stop, dict(by_part))


def capture(compute: Callable[[StepInputs], StepOutput], inputs: StepInputs) -> tuple[torch.cuda.CUDAGraph, StepOutput]:
    """Capture a step in a CUDA graph; returns it with the tensors that its replays write.

    Raises:
        TrainingError: something in the step needs a value on the CPU.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with fastest_convolutions(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            return graph, compute(inputs)
    except RuntimeError as error:
        if in_one_sentence(error) is not None:  # it is something else: no memory, a lost rank or worker
            raise
        raise TrainingError(
            f"a step can't be captured in a CUDA graph ({str(error).splitlines()[0]}): something in it, in the "
            "autoencoder perhaps, needs a value on the CPU; set train.cuda_graph=false"
        ) from error


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms, for some seconds in all: worth it for shapes that come back in each step."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
