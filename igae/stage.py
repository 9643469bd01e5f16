# SPDX-License-Identifier: Apache-2.0
"""One stage of training: its data, its optimizers, its steps."""

import time
from typing import Any

import torch
from torch import Tensor

from igae.autoencoder import Autoencoder
from igae.data.latents import LatentBatch, LatentCache, LatentLoader
from igae.data.manifest import Manifest, Scene
from igae.data.streams import ImageLoader, StreamState, ViewBatch, ViewLoader, image_loader, view_loader
from igae.distributed import derive_seed, rank
from igae.engine import Engine
from igae.model import IGAE, Views, to_signed
from igae.recipe import Recipe, StageName
from igae.scenes import RowAdam, SceneBank

ENCODE_BATCH = 64


class Stage:
    """Data and optimizers of one stage; :meth:`step` makes a training step.

    Args:
        streams: states of the data streams to go on from, by name; empty at the start of the stage.
    """

    def __init__(
        self,
        name: StageName,
        recipe: Recipe,
        engine: Engine,
        model: IGAE,
        bank: SceneBank,
        manifest: Manifest,
        scenes: list[Scene],
        streams: dict[str, dict[str, int]],
    ) -> None:
        self.name, self.recipe, self.engine, self.model, self.bank = name, recipe, engine, model, bank
        self.config = recipe.train.warmup if name == "warmup" else recipe.train.joint
        if self.config.batch_size and not scenes:
            raise ValueError(
                f"train.{name}.batch_size is {self.config.batch_size} but {recipe.data.root} holds no scenes"
            )
        if self.config.photos and not manifest.images:
            raise ValueError(
                f"train.{name}.photos is {self.config.photos} but {recipe.data.root} holds no photographs: pack them "
                f"with --images, or set train.{name}.photos and the photo_* weights to 0"
            )
        count, batch = (
            (sum(scene.views for scene in scenes), self.config.batch_size)
            if self.config.batch_size
            else (manifest.images, self.config.photos)
        )
        self.steps_per_epoch = max(1, count // batch) * (2 if self.config.alternate else 1)
        self.steps = max(1, round(self.config.epochs * self.steps_per_epoch))
        self._prepare_optimizers()
        self._open_streams(manifest, scenes, streams)
        self.data_wait = 0.0  # seconds spent waiting for data since it was last set to 0

    def _prepare_optimizers(self) -> None:
        rates, parts = self.config.learning_rates, self.model.autoencoder.parts()
        groups = [
            ("encoder", [p for _, p in parts["encoder"]], rates.encoder),
            ("decoder", [p for _, p in parts["decoder"]], rates.decoder),
            ("mlp", list(self.model.mlp.parameters()), rates.mlp),
        ]
        self.engine.prepare(self.model, [(name, params) for name, params, rate in groups if params and rate > 0])
        self.plane_adam = RowAdam(self.bank.planes, mode=self.recipe.train.plane_optimizer)

    def _open_streams(self, manifest: Manifest, scenes: list[Scene], streams: dict[str, dict[str, int]]) -> None:
        data, seed = self.recipe.data, derive_seed(self.recipe.seed, self.name, "stream")
        state = {name: StreamState(**value) for name, value in streams.items()}
        self._streams: dict[str, Any] = {}
        if self.config.uses_cached_latents:
            cache = encode_views(self.recipe, self.model, manifest, scenes, self.engine.device)
            self._streams["views"] = LatentLoader(cache, self.config.batch_size, seed, state.get("views"))
        elif self.config.batch_size:
            self._streams["views"] = view_loader(
                data.root,
                manifest,
                scenes,
                batch_size=self.config.batch_size,
                seed=seed,
                shuffle=data.shuffle,
                workers=data.workers,
                background=data.background,
                state=state.get("views"),
            )
        if self.config.photos:
            self._streams["photos"] = image_loader(
                data.root,
                manifest,
                batch_size=self.config.photos,
                seed=seed,
                shuffle=data.shuffle,
                repeat=True,
                workers=min(1, data.workers),
                state=state.get("photos"),
            )

    @property
    def stream_states(self) -> dict[str, dict[str, int]]:
        return {
            name: {"epoch": stream.state.epoch, "position": stream.state.position}
            for name, stream in self._streams.items()
        }

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def learning_rates(self, step: int) -> dict[str, float]:
        """Rates of a step by part."""
        factor = self.config.rate_factor(step, self.steps_per_epoch, self.steps)
        rates = {name: rate * factor for name, rate in self.config.learning_rates.model_dump().items()}
        if self.config.mlp_epochs is not None and step >= self.config.mlp_epochs * self.steps_per_epoch:
            rates["mlp"] = 0.0
        return rates

    def _next(self, name: str) -> Any:
        start = time.perf_counter()
        batch = next(self._streams[name])
        self.data_wait += time.perf_counter() - start
        return batch

    def step(self, step: int) -> tuple[dict[str, Tensor], bool]:
        """Make step number ``step`` (from 0) of this stage.

        Returns:
            The losses (on the device, not read), and whether they and all gradients were finite: where they were not,
            nothing has been changed.
        """
        seed = derive_seed(self.recipe.seed, self.name, step, rank())
        torch.manual_seed(seed)
        alternate, device = self.config.alternate, self.engine.device
        photos: Tensor | None = None
        if "photos" in self._streams and not (alternate and step % 2 == 0):
            photos = self._next("photos").to(device, non_blocking=True)
        views, rows, leaf = None, None, None
        if "views" in self._streams and not (alternate and step % 2 == 1):
            batch = self._next("views")
            rows, index = self.bank.rows_of(batch.scene)
            self.plane_adam.catch_up(rows)
            leaf = self.bank.planes[rows.to(device)]
            leaf.requires_grad_(self.config.learning_rates.planes > 0)
            views = _views_on(batch, index, device)
        losses: dict[str, Tensor] = self.engine.wrapped(
            leaf, views, photos, self.config.weights, self.recipe.autoencoder.latents == "sample", seed
        )
        self.engine.backward(losses["total"])
        gradients = self.engine.gradients()
        if leaf is not None and leaf.grad is not None:
            gradients.append(leaf.grad)
        norms = torch.stack(torch._foreach_norm(gradients))
        losses = {name: loss.detach() for name, loss in losses.items()}
        if not bool((norms.sum() + losses["total"]).isfinite()):
            self.engine.clear_gradients()
            return losses, False
        rates = self.learning_rates(step)
        if leaf is not None and leaf.grad is not None:
            assert rows is not None
            self.plane_adam.step(rows, leaf.grad, rates["planes"])
        self.engine.step(rates)
        return losses, True


def _views_on(batch: ViewBatch | LatentBatch, index: Tensor, device: torch.device) -> Views:
    index = index.to(device, non_blocking=True)
    if isinstance(batch, LatentBatch):
        return Views(index, batch.cam2world, batch.intrinsics, latents=batch.latents)
    batch = batch.to(device, non_blocking=True)
    return Views(index, batch.cam2world, batch.intrinsics, images=batch.images)


def encode_views(
    recipe: Recipe, model: IGAE, manifest: Manifest, scenes: list[Scene], device: torch.device
) -> LatentCache:
    """Latents of all training views; equal in each run, so that a resumed run finds what it had."""
    autoencoder: Autoencoder = model.autoencoder

    @torch.no_grad()
    def encode(images: Tensor, number: int) -> Tensor:
        torch.manual_seed(derive_seed(recipe.seed, "encode", number))
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            posterior = autoencoder.posterior(to_signed(images))
        return posterior.sample() if recipe.autoencoder.latents == "sample" else posterior.mean

    loader = view_loader(
        recipe.data.root,
        manifest,
        scenes,
        batch_size=ENCODE_BATCH,
        shuffle=0,
        repeat=False,
        workers=recipe.data.workers,
        background=recipe.data.background,
    )
    try:
        return LatentCache(loader, encode, device)
    finally:
        loader.close()


@torch.no_grad()
def fit_scale(
    recipe: Recipe, autoencoder: Autoencoder, manifest: Manifest, scenes: list[Scene], device: torch.device
) -> None:
    """Fit the normaliser's scale to the latents of some views (of photographs where there are no scenes)."""
    seed = derive_seed(recipe.seed, "scale")
    loader: ViewLoader | ImageLoader
    if scenes:
        loader = view_loader(
            recipe.data.root,
            manifest,
            scenes,
            batch_size=ENCODE_BATCH,
            seed=seed,
            shuffle=recipe.data.shuffle,
            workers=0,
            background=recipe.data.background,
        )
    else:
        loader = image_loader(
            recipe.data.root, manifest, batch_size=ENCODE_BATCH, seed=seed, shuffle=recipe.data.shuffle, workers=0
        )
    batches: list[Tensor] = []
    for _ in range(4):
        batch: ViewBatch | Tensor = next(loader)  # type: ignore[assignment]
        batches.append(batch.images if isinstance(batch, ViewBatch) else batch)
    loader.close()
    autoencoder.fit_scale(torch.cat([autoencoder.posterior(to_signed(x.to(device))).mean for x in batches]))
