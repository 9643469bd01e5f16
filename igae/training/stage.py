# SPDX-License-Identifier: Apache-2.0
"""One stage of training: its data, its optimizers, its steps."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from igae.data import LatentCache, LatentLoader, StreamState, ViewBatch, pixel_of
from igae.models import IGAE
from igae.ranks import derive_seed
from igae.scenes import SceneStore
from igae.training.encoding import encode_views, log_once, plain_borders, tell_background
from igae.training.meter import Meter, Outcome
from igae.training.parallel.engine import Engine
from igae.training.rank_data import RankData
from igae.training.recipe import Recipe, StageConfig, StageName
from igae.training.step import CapturedStep, StepInputs, TrainingStep

BACKGROUND_EVERY = 50
"""Steps between refreshes of the background while the encoder learns: it moves slowly, and an encode costs time."""
MOST_AHEAD = 64
"""Batches whose scenes are brought to the device before their step."""


@dataclass
class StageState:
    """Where a stage resumes, by default at its start: samples that this rank has taken of each stream, the state of the
    optimizer of shared parameters, and whether that of the rows is in their store already."""

    consumed: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rows_resumed: bool = False


class Stage:
    """Data and optimizers of one stage; :meth:`step` makes a training step. All ranks make the same steps.

    Attributes:
        streams: the batches of each kind of data, by name.
        consumed: samples that this rank has taken of each stream in this stage.
        run: makes a step of its inputs, eagerly or as a CUDA graph.
        refresh_every: steps between refreshes of the background; 0: none.
    """

    def __init__(
        self,
        name: StageName,
        recipe: Recipe,
        engine: Engine,
        model: IGAE,
        store: SceneStore,
        data: RankData,
        state: StageState,
    ) -> None:
        self.name, self.recipe, self.data = name, recipe, data
        self.engine, self.model, self.store = engine, model, store
        self.config: StageConfig = getattr(recipe.train, name)
        self.steps_per_epoch = data.steps_per_epoch(self.config)
        self.steps = data.steps(self.config)
        self.refresh_every = BACKGROUND_EVERY if self.config.learning_rates.encoder > 0 else 0
        self.consumed = {"views": 0, "natural_images": 0} | state.consumed
        self._background = torch.from_numpy(pixel_of(recipe.data.background)).to(engine.device)
        # Before the engine takes the model apart: cached latents are encoded with it.
        self.cache = self.encode_views() if self.config.uses_cached_latents else None
        # The first stage looks at its views before it trains: at all that it encodes, or at those of its first step.
        self._to_look_at = self.cache is None and name == next(iter(recipe.train.stages))
        self._ahead, self._group = self._look_ahead()
        self._upcoming: deque[tuple[dict[str, Tensor], Tensor]] = deque()
        self.streams = self._open_streams()
        self._prepare_optimizers(state)
        self.meter = Meter(engine.device, data.world, engine.replicated)
        self.run = self._make_step()

    def _look_ahead(self) -> tuple[int, int]:
        """Batches that are read before their step, so that their scenes can come to the device, and the scenes of a
        group of views: those of a group and of the next one have room there together."""
        config, slots = self.config, self.store.slots
        if slots == len(self.store) or not config.batch_size:
            return 0, config.group or 0
        spare = (slots - config.batch_size * config.accumulate) // 2
        group = config.group if config.group is not None else spare if spare >= config.batch_size else 0
        if self.cache is None:
            return config.accumulate, 0
        if group:
            log_once(f"{self.name}: views come in groups of {group} scenes; the device has room for {slots}")
        return max(config.accumulate, min(MOST_AHEAD, spare // config.batch_size)), group

    def _open_streams(self) -> dict[str, Any]:
        config, streams = self.config, dict[str, Any]()
        seed = derive_seed(self.recipe.seed, self.name, "stream")
        if self.cache is not None:
            state = StreamState(*divmod(self.consumed["views"], len(self.cache)))
            streams["views"] = LatentLoader(self.cache, config.batch_size, seed, state, self._group)
        elif config.batch_size:
            streams["views"] = self.data.open_views(config.batch_size, seed, consumed=self.consumed["views"])
        if config.natural_images:
            consumed = self.consumed["natural_images"]
            streams["natural_images"] = self.data.open_natural_images(config.natural_images, seed, consumed=consumed)
        return streams

    def encode_views(self) -> LatentCache:
        """What the steps train on instead of images."""
        return encode_views(self.recipe, self.name, self.model, self.data, self._background)

    def _prepare_optimizers(self, state: StageState) -> None:
        rates, model, train = self.config.learning_rates, self.model, self.recipe.train
        parts = model.autoencoder.parts()
        groups = [
            ("encoder", [p for _, p in parts["encoder"]], rates.encoder),
            ("decoder", [p for _, p in parts["decoder"]], rates.decoder),
            ("mlp", [*model.mlp.parameters(), *(model.head.parameters() if model.head else [])], rates.mlp),
            ("base_planes", [] if model.base is None else [model.base.planes], rates.base_planes),
        ]
        self.engine.prepare(model, [(name, params) for name, params, rate in groups if params and rate > 0])
        self.engine.load_optimizer_state(state.optimizer)
        if not state.rows_resumed:
            self.store.start_optimizer(train.kernels)

    def _make_step(self) -> TrainingStep | CapturedStep:
        config, engine = self.config, self.engine
        step = TrainingStep(
            engine,
            self.store,
            config,
            sample=self.recipe.autoencoder.latents == "sample",
            ranks=self.data.world,
            cache=self.cache,
            background=self._background,
            before_waiting=self.meter.end,
        )
        can_be_captured = engine.asynchronous and self.store.can_be_captured and config.learning_rates.planes > 0
        always_alike = config.batch_size > 0 and config.accumulate == 1 and not config.alternate
        if not (self.recipe.train.cuda_graph and can_be_captured and always_alike):
            return step
        self.store.reserve(self.steps)
        self.meter.times_steps = False  # a graph is one piece
        return CapturedStep(step, config.batch_size, self.model.refresh_background)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rates of a step by part of the model."""
        factor = self.config.rate_factor(step, self.steps_per_epoch, self.steps)
        rates = {name: rate * factor for name, rate in self.config.learning_rates.model_dump().items()}
        if self.recipe.train.scale_learning_rates:
            rates = {name: rate * (1 if name == "planes" else self.data.world) for name, rate in rates.items()}
        if self.config.mlp_epochs is not None and step >= self.config.mlp_epochs * self.steps_per_epoch:
            rates["mlp"] = 0.0
        return rates

    def step(self, number: int, stop: bool = False) -> Outcome:
        """Make step ``number`` (from 0) of this stage. Collective.

        Args:
            stop: this rank was asked to stop after the step.
        """
        self.meter.begin()
        rows, batches = self._next_batches(number)
        seeds = [derive_seed(self.recipe.seed, self.name, number, self.data.rank, i) for i in range(len(batches))]
        refresh = self.refresh_every > 0 and number % self.refresh_every == 0
        inputs = StepInputs(rows, batches, seeds, stop, self.learning_rates(number), refresh)
        outcome = self.meter.note(Outcome(*self.run(inputs)))
        if number + 1 < self.steps:
            self._prefetch()
        return outcome

    def _prefetch(self) -> None:
        """Read batches of the next steps, and have their scenes brought to the device while this step is made."""
        with self.meter.waiting_for_data():
            while len(self._upcoming) < self._ahead:
                self._upcoming.append(self._read_views())
                self.store.prefetch(self._upcoming[-1][1])

    def _next_batches(self, number: int) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
        """Rows and batches of a step (see `StepInputs`). With ``alternate``, views and natural images take turns."""
        config, meter = self.config, self.meter
        batches: list[dict[str, Tensor]] = [{} for _ in range(config.accumulate)]
        if "natural_images" in self.streams and not (config.alternate and number % 2 == 0):
            for batch in batches:
                with meter.waiting_for_data():
                    batch["natural_images"] = next(self.streams["natural_images"])
                self.consumed["natural_images"] += len(batch["natural_images"])
        if "views" not in self.streams or (config.alternate and number % 2 == 1):
            return None, batches
        with meter.waiting_for_data():
            found = [self._upcoming.popleft() if self._upcoming else self._read_views() for _ in batches]
        rows, index = self.store.locate(torch.cat([scenes for _, scenes in found]))
        for batch, (views, _), places in zip(batches, found, index.split([len(s) for _, s in found]), strict=True):
            batch |= {**views, "index": places}
            self.consumed["views"] += len(places)
        return rows, batches

    def _read_views(self) -> tuple[dict[str, Tensor], Tensor]:
        """Views of a batch, and their scenes."""
        stream = self.streams["views"]
        if self.cache is not None:
            places = stream.take()
            return {"view": places}, self.cache.scene[places]
        views: ViewBatch = next(stream)
        if self._to_look_at:
            self._to_look_at = False
            tell_background(plain_borders(views.images, self._background.cpu()), len(views.scene), self._background)
        wanted = ["images", "cam2world", "intrinsics", *(["masks", "has_alpha"] * (self.config.weights.opacity > 0))]
        return {name: getattr(views, name) for name in wanted}, views.scene

    @property
    def taken(self) -> int:
        """Views that this rank has taken in this stage; natural images, where there are no views."""
        return self.consumed["views" if self.config.batch_size else "natural_images"]

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
