# SPDX-License-Identifier: Apache-2.0
"""One stage of training: its data, its optimizers, its steps."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from igae.data import (
    LatentBatch,
    LatentCache,
    LatentLoader,
    StreamState,
    ViewBatch,
    image_loader,
    to_device,
    view_loader,
)
from igae.models import IGAE, Views, to_signed
from igae.ranks import Channel, derive_seed
from igae.scenes import CudaRowAdam, SceneBank, make_row_adam
from igae.training.captured import CapturedStep
from igae.training.meter import Meter, Outcome
from igae.training.parallel.engine import Engine
from igae.training.recipe import Recipe, StageName
from igae.training.shares import Data, steps_per_epoch

ENCODE_BATCH = 64


class Stage:
    """Data and optimizers of one stage; :meth:`step` makes a training step. All ranks make the same steps.

    Args:
        consumed: samples that this rank has taken of each stream in this stage; empty at its start.
    """

    def __init__(
        self,
        name: StageName,
        recipe: Recipe,
        engine: Engine,
        model: IGAE,
        bank: SceneBank,
        data: Data,
        consumed: dict[str, int],
    ) -> None:
        self.name, self.recipe, self.engine, self.model, self.bank = name, recipe, engine, model, bank
        self.config = recipe.train.warmup if name == "warmup" else recipe.train.joint
        if self.config.batch_size and not data.scenes:
            raise ValueError(
                f"train.{name}.batch_size is {self.config.batch_size} but {recipe.data.root} holds no scenes"
            )
        if self.config.natural_images and not data.manifest.images:
            raise ValueError(
                f"train.{name}.natural_images is {self.config.natural_images} but {recipe.data.root} holds none: pack "
                f"some with --images, or set train.{name}.natural_images and the natural_* weights to 0"
            )
        self._rank, self._world = data.rank, data.world
        self.steps_per_epoch = steps_per_epoch(recipe, name, data)
        self.steps = max(1, round(self.config.epochs * self.steps_per_epoch))
        self.consumed = {"views": 0, "natural_images": 0} | consumed
        # Before the engine takes the model apart: cached latents are encoded with it.
        self._streams = dict(self._open_streams(data))
        self._prepare_optimizers()
        self._captured: CapturedStep | None = None
        self.meter = Meter(engine.device, self._world, engine.replicated)

    def _prepare_optimizers(self) -> None:
        rates, parts = self.config.learning_rates, self.model.autoencoder.parts()
        groups = [
            ("encoder", [p for _, p in parts["encoder"]], rates.encoder),
            ("decoder", [p for _, p in parts["decoder"]], rates.decoder),
            ("mlp", list(self.model.mlp.parameters()), rates.mlp),
            ("base_planes", [] if self.model.base is None else [self.model.base.planes], rates.base_planes),
        ]
        chosen = [(name, params) for name, params, rate in groups if params and rate > 0]
        self.engine.prepare(self.model, chosen)
        train = self.recipe.train
        self.plane_adam = make_row_adam(self.bank.planes, mode=train.plane_optimizer, backend=train.kernels)

    def _open_streams(self, data: Data) -> Iterator[tuple[str, Any]]:
        settings, seed = self.recipe.data, derive_seed(self.recipe.seed, self.name, "stream")
        if self.config.batch_size:
            state = StreamState(*divmod(self.consumed["views"], sum(scene.views for scene in data.owned)))
            if self.config.uses_cached_latents:
                cache = encode_views(self.recipe, self.model, data, self.engine.device)
                yield "views", LatentLoader(cache, self.config.batch_size, seed, state)
            else:
                yield (
                    "views",
                    view_loader(
                        settings, data.manifest, data.owned, batch_size=self.config.batch_size, seed=seed, state=state
                    ),
                )
        if self.config.natural_images:
            yield (
                "natural_images",
                image_loader(
                    settings.model_copy(update={"workers": min(1, settings.workers)}),
                    data.manifest,
                    part=data.natural_images,
                    batch_size=self.config.natural_images,
                    seed=seed,
                    state=StreamState(*divmod(self.consumed["natural_images"], len(data.natural_images))),
                ),
            )

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def learning_rates(self, step: int) -> dict[str, float]:
        """Rates of a step by part."""
        factor = self.config.rate_factor(step, self.steps_per_epoch, self.steps)
        rates = {name: rate * factor for name, rate in self.config.learning_rates.model_dump().items()}
        if self.recipe.train.scale_learning_rates:
            rates = {name: rate * (1 if name == "planes" else self._world) for name, rate in rates.items()}
        if self.config.mlp_epochs is not None and step >= self.config.mlp_epochs * self.steps_per_epoch:
            rates["mlp"] = 0.0
        return rates

    def _take(self, name: str, wanted: bool) -> list[Any] | None:
        """The batches of a step from a stream, if there is one and it is its turn."""
        if name not in self._streams or not wanted:
            return None
        with self.meter.waiting_for_data():
            batches = [next(self._streams[name]) for _ in range(self.config.accumulate)]
        self.consumed[name] += sum(len(batch if isinstance(batch, Tensor) else batch.scene) for batch in batches)
        return batches

    def step(self, step: int, stop: bool = False, refresh: bool = False) -> Outcome:
        """Make step number ``step`` (from 0) of this stage. Collective.

        The loss is the mean over the batches of the step and over the ranks, and all gradients are its gradients: N
        ranks do what one rank does with a batch N times as large.

        Args:
            stop: this rank was asked to stop after the step.
            refresh: take the field's background from the autoencoder as it is now.
        """
        if self._can_be_captured():
            return self._captured_step(step, stop, refresh)
        self.meter.begin()
        alternate, device, count = self.config.alternate, self.engine.device, self.config.accumulate
        natural_images = self._take("natural_images", not (alternate and step % 2 == 0))
        batches = self._take("views", not (alternate and step % 2 == 1))
        rows, leaf, places = None, None, None
        if batches is not None:
            rows, index = self.bank.rows_of(torch.cat([batch.scene for batch in batches]))
            leaf = self.plane_adam.visit(rows)
            leaf.requires_grad_(self.config.learning_rates.planes > 0)
            places = index.split([len(batch.scene) for batch in batches])
        total: dict[str, Tensor] = {}
        for i in range(count):
            seed = derive_seed(self.recipe.seed, self.name, step, self._rank, i)
            torch.manual_seed(seed)
            last = i == count - 1
            if i == 0 and self.engine.forward_waits:
                self.meter.end()
            losses: dict[str, Tensor] = self.engine.forward(
                leaf,
                _views_on(batches[i], places[i], device) if batches is not None and places is not None else None,
                to_device(natural_images[i], device) if natural_images is not None else None,
                self.config.weights,
                self.recipe.autoencoder.latents == "sample",
                seed,
                refresh and i == 0,
                last=last,
            )
            if last and not self.engine.forward_waits:
                self.meter.end()
            self.engine.backward(losses["total"] / count, last)
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach() / count
        gradient = leaf.grad if leaf is not None else None
        watched, own = total["total"], {}
        if gradient is not None:
            own["planes"] = gradient.norm()
            watched = watched + own["planes"]
        agreed, ends, norms = self.engine.agree(watched, stop)
        rates = self.learning_rates(step)
        applied = self.engine.step(rates, agreed)
        if gradient is not None:
            assert rows is not None
            self.plane_adam.step(rows, gradient, rates["planes"], scale=1 / self._world, apply=applied)
        return self.meter.note(Outcome(total, applied, ends, norms | own))

    @property
    def taken(self) -> int:
        """Views that this rank has taken in this stage; natural images, where there are no views."""
        return self.consumed["views" if self.config.batch_size else "natural_images"]

    def _can_be_captured(self) -> bool:
        """Whether all that a step does can be in a CUDA graph, the same one for each step."""
        config = self.config
        fits = self.engine.asynchronous and config.batch_size > 0 and config.accumulate == 1 and not config.alternate
        fits = fits and config.learning_rates.planes > 0 and isinstance(self.plane_adam, CudaRowAdam)
        return fits and self.recipe.train.cuda_graph

    def _captured_step(self, step: int, stop: bool, refresh: bool) -> Outcome:
        rates, loader = self.learning_rates(step), self._streams["views"]
        cache = loader.cache if isinstance(loader, LatentLoader) else None
        if self._captured is None:
            self.plane_adam.reserve(self.plane_adam.step_count + self.steps)
            self._captured = CapturedStep(
                self.engine,
                self.model,
                self.plane_adam,
                self.config.weights,
                self.config.batch_size,
                list(rates),
                self._world,
                sample=self.recipe.autoencoder.latents == "sample",
                cache=cache,
            )
        if refresh:
            self.model.refresh_background()
        more: dict[str, Tensor] = {}
        if cache is not None:
            view = loader.take()
            self.consumed["views"] += len(view)
            scene = cache.scene[view]
        else:
            batches = self._take("views", True)
            assert batches is not None
            [batch] = batches
            view, scene = None, batch.scene
            more = {"images": batch.images, "cam2world": batch.cam2world, "intrinsics": batch.intrinsics}
        if (natural_images := self._take("natural_images", True)) is not None:
            [more["natural_images"]] = natural_images
        rows, index = self.bank.rows_of(scene)
        seed = derive_seed(self.recipe.seed, self.name, step, self._rank, 0)
        return self.meter.note(Outcome(*self._captured(rows, index, view, more, seed, stop, rates)))


def _views_on(batch: ViewBatch | LatentBatch, index: Tensor, device: torch.device) -> Views:
    index = to_device(index, device)
    if isinstance(batch, LatentBatch):
        return Views(index, batch.cam2world, batch.intrinsics, latents=batch.latents)
    batch = batch.to(device, non_blocking=True)
    return Views(index, batch.cam2world, batch.intrinsics, images=batch.images)


def encode_views(recipe: Recipe, model: IGAE, data: Data, device: torch.device) -> LatentCache:
    """Latents of the training views that this rank owns; those of a view are the same in each run and on any rank."""
    sample = recipe.autoencoder.latents == "sample"

    @torch.no_grad()
    def encode(batch: ViewBatch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
            posterior = model.autoencoder.posterior(to_signed(to_device(batch.images, device)))
        if not sample:
            return posterior.mean
        noise, generator = torch.empty(posterior.mean.shape), torch.Generator()
        for i, (scene, view) in enumerate(zip(batch.scene.tolist(), batch.view.tolist(), strict=True)):
            generator.manual_seed(derive_seed(recipe.seed, "encode", scene, view))
            noise[i].normal_(generator=generator)
        return posterior.sample(noise.to(device))

    in_order = recipe.data.model_copy(update={"shuffle": 0})
    with closing(view_loader(in_order, data.manifest, data.owned, batch_size=ENCODE_BATCH, repeat=False)) as loader:
        return LatentCache(loader, encode, device)


@torch.no_grad()
def fit_scale(recipe: Recipe, model: IGAE, data: Data, device: torch.device, channel: Channel) -> None:
    """Fit the normalizer's scale to the latents of some views of each rank (of natural images where there are no
    scenes). Collective."""
    settings, seed = recipe.data.model_copy(update={"workers": 0}), derive_seed(recipe.seed, "scale")
    loader: Any
    if data.owned:
        loader = view_loader(settings, data.manifest, data.owned, batch_size=ENCODE_BATCH, seed=seed)
    else:
        loader = image_loader(settings, data.manifest, part=data.natural_images, batch_size=ENCODE_BATCH, seed=seed)
    squares = torch.zeros(2, dtype=torch.float64)  # their sum, and how many
    with closing(loader):
        for _ in range(4):
            batch: ViewBatch | Tensor = next(loader)
            images = batch.images if isinstance(batch, ViewBatch) else batch
            latents = model.autoencoder.posterior(to_signed(images.to(device))).mean.double().cpu()
            squares += torch.tensor([float(latents.square().sum()), latents.numel()])
    total, count = channel.sum(squares).tolist()
    model.autoencoder.fit_scale(total / count)
