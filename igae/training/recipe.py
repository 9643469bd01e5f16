# SPDX-License-Identifier: Apache-2.0
"""The whole configuration of a run."""

import functools
import logging
import math
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from igae.config import Section
from igae.data import DataConfig
from igae.evaluation import EvaluationConfig
from igae.models import AugmentConfig, AutoencoderConfig, LossWeights
from igae.rendering import RenderOptions
from igae.scenes import StoredPlanesConfig

StageName = Literal["warmup", "joint"]
Precision = Literal["fp32", "bf16"]
STAGES: tuple[StageName, ...] = get_args(StageName)
log_once = functools.cache(logging.getLogger("igae").info)  # settings may be validated more than once


class LearningRates(Section):
    """Adam's learning rates; a part with learning rate 0 is frozen."""

    encoder: float = Field(default=0.0, ge=0)
    decoder: float = Field(default=0.0, ge=0)
    mlp: float = Field(default=0.0, ge=0)
    """Of the decoding MLP, and of the map from patches to latent pixels (`render.patch`)."""
    base_planes: float = Field(default=0.0, ge=0)
    planes: float = Field(default=0.0, ge=0)
    """Of all that is a scene's own: planes, weights of base planes, bias."""


class StageConfig(Section):
    RENAMED = {"photos": "natural_images"}

    epochs: float = Field(ge=0)
    """Passes over the scene views (over the natural images where batch_size is 0); 0 leaves the stage out."""
    min_steps: int = Field(default=0, ge=0)
    """Steps at least, of one rank (an Nth of them with N ranks): few scenes need more passes."""
    batch_size: int = Field(ge=0)
    """Scene views a rank and step."""
    natural_images: int = Field(default=0, ge=0)
    """Natural images a rank and step; 0 turns the losses natural_* off, whatever their weights."""
    accumulate: int = Field(default=1, ge=1)
    """Batches of batch_size and natural_images that each rank takes one after another in a step, to save memory."""
    learning_rates: LearningRates
    schedule: Literal["epoch", "multistep", "cosine"] = "epoch"
    """`epoch`: rates times `decay` after each epoch; `multistep`: after each epoch of `milestones`; `cosine`: to 0."""
    decay: float = Field(default=0.988032, gt=0, le=1)
    milestones: list[int] = []
    mlp_epochs: float | None = None
    """The decoding MLP is frozen after so many epochs; never if left out."""
    augment: AugmentConfig = AugmentConfig()
    group: int | None = Field(default=None, ge=0)
    """Of cached latents: scenes whose views come together, shuffled, before those of others do; 0: all views are
    shuffled. Left out: 0 where all planes are on the GPU, else as many as keep each scene there while it is used."""
    alternate: bool = False
    """Scene views and natural images in turns, a step each, instead of together."""
    weights: LossWeights

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        if not self.natural_images:
            self._leave_natural_images_out()
        rates, weights = self.learning_rates, self.weights
        if self.epochs > 0 and self.batch_size + self.natural_images == 0:
            raise ValueError("batch_size and natural_images are both 0: there is nothing to train on")
        if self.alternate and not (self.batch_size and self.natural_images):
            raise ValueError("alternate needs batch_size and natural_images above 0")
        if self.alternate and rates.encoder + rates.decoder == 0:
            raise ValueError(
                "alternate needs a learning rate for encoder or decoder: natural images train nothing else"
            )
        if self.milestones and self.schedule != "multistep":
            raise ValueError("milestones are of the multistep schedule only: set schedule to multistep")
        if self.epochs > 0 and self.group and not self.uses_cached_latents:
            raise ValueError("group is of cached latents, and this stage reads images: leave it out")
        views = weights.latent + weights.rgb + weights.ae + weights.planes_tv + weights.depth_tv + weights.opacity
        views += weights.distortion + weights.of_plugins
        if self.epochs > 0 and not self.batch_size and views + weights.base_orthogonality > 0:
            raise ValueError(
                "batch_size is 0, so only losses of natural images (natural_*) can have a weight, not even latent"
            )
        if self.batch_size and views == 0:
            raise ValueError("views are loaded (batch_size) but no loss of views has a weight")
        natural_losses = weights.natural_ae + weights.natural_lpips + weights.natural_kl + weights.natural_tv
        if self.natural_images and natural_losses == 0:
            raise ValueError("natural_images are loaded but no loss of natural images (natural_*) has a weight")
        if self.epochs > 0 and not any(rates.model_dump().values()):
            raise ValueError("all learning_rates are 0: nothing would be trained")
        rendered = weights.latent + weights.rgb + weights.depth_tv + weights.opacity + weights.distortion
        rendered += weights.of_plugins
        reached = {
            "encoder": weights.latent + weights.ae + weights.of_plugins + natural_losses,
            "decoder": weights.decodes + weights.ae + weights.natural_ae + weights.natural_lpips,
            "mlp": rendered,
            "base_planes": rendered + weights.planes_tv,
            "planes": rendered + weights.planes_tv,
        }
        for part, loss in reached.items():
            if self.epochs > 0 and getattr(rates, part) > 0 and loss == 0:
                raise ValueError(f"learning_rates.{part} is above 0 but no loss with a weight reaches the {part}")
        return self

    def _leave_natural_images_out(self) -> None:
        """Without them their losses are off, whatever recipe the weights come from, with all that is for them alone."""
        off = {name: 0.0 for name, weight in self.weights if name.startswith("natural_") and weight > 0}
        if not off:
            return
        weights, rates = self.weights.model_copy(update=off), self.learning_rates
        encoder, decoder = weights.latent + weights.ae + weights.of_plugins, weights.decodes + weights.ae
        of_views = {"encoder": encoder, "decoder": decoder}
        frozen = {part: 0.0 for part, loss in of_views.items() if loss == 0 and getattr(rates, part) > 0}
        if self.epochs > 0:
            log_once("without natural images these are 0, as they should be: %s", ", ".join([*off, *frozen]))
        new = {"weights": weights, "learning_rates": rates.model_copy(update=frozen), "alternate": False}
        for name, value in new.items():
            object.__setattr__(self, name, value)  # the section is frozen

    @property
    def uses_cached_latents(self) -> bool:
        """Whether latents of all views are constants of this stage, so that no image is needed in its steps."""
        return self.batch_size > 0 and self.learning_rates.encoder == 0 and not self.weights.needs_images

    def rate_factor(self, step: int, steps_per_epoch: int, steps: int) -> float:
        """What the learning rates are multiplied with at a step (counted from 0) of ``steps``."""
        epoch = step // steps_per_epoch
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / steps))
        if self.schedule == "multistep":
            epoch = sum(milestone <= epoch for milestone in self.milestones)
        return float(self.decay**epoch)


class TrainConfig(Section):
    RENAMED = {"run_ahead": "async_steps"}
    REMOVED = {"plane_optimizer": "exact", "compile": ..., "channels_last": ...}

    precision: Literal["auto"] | Precision = "auto"
    """Arithmetic of the autoencoder, and what DDP sends large gradients as; weights are fp32 in both (matrix products
    in TF32 on GPUs). `auto`: `bf16` on GPUs that have it, else `fp32`; a run that is resumed keeps its own. The
    renderer has a precision of its own."""
    kernels: Literal["auto", "cuda", "torch"] = "auto"
    """How rays are rendered, planes are stepped, and what lies between an autoencoder's convolutions is computed, there
    not where sharded: `torch`: in PyTorch, which is the definition; `cuda`: in fused kernels; `auto`: in kernels where
    they can."""
    async_steps: bool = True
    """On a GPU, launch steps before it is known whether the last ones were applied; not where sharded."""
    cuda_graph: bool = True
    """Steps are one CUDA graph where they can be: with async_steps, not sharded, planes in kernels, without accumulate
    and alternate."""
    warmup: StageConfig
    joint: StageConfig
    scale_learning_rates: bool = False
    """Multiply the learning rates of what the ranks share (autoencoder, MLP) by their number; those of planes never."""
    timeout: int = Field(default=600, ge=10)
    """Seconds after which ranks that wait for another one give up."""
    max_skipped: int = Field(default=20, ge=1)
    """The run stops after so many steps in a row whose loss or gradient was not finite."""
    lpips_weights: str | None = None
    """File with VGG16's weights for LPIPS; fetched into torch's hub cache if left out."""

    @property
    def stages(self) -> dict[StageName, StageConfig]:
        """Those that are not left out, in their order."""
        return {name: stage for name, stage in zip(STAGES, (self.warmup, self.joint), strict=True) if stage.epochs > 0}


class CheckpointConfig(Section):
    every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the end of a stage makes one as well."""
    keep: int = Field(default=3, ge=2)
    """How many are kept; at least 2, so that a broken newest one costs little."""
    root: str | None = None
    """Folder or fsspec URL of the checkpoints; `checkpoints` in the run's folder if left out."""
    background: bool = False
    """Write while training goes on; costs memory for a copy of the planes and their moments."""


class FitConfig(Section):
    wave: int = Field(default=256, ge=1)
    """Scenes that a rank fits at a time: their rows, the rows' moments and the latents of their views are in memory."""


class TrackingConfig(Section):
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where scalars, pictures and videos go besides metrics.jsonl; needs `pip install -e '.[tracking]'`."""
    project: str = "igae"
    """wandb's project."""
    entity: str | None = None
    """wandb's user or team; null is the default of the account."""
    every: int = Field(default=50, ge=1)
    """Steps between two records of the training scalars. A record waits for the GPU, which then waits for a step."""


class Recipe(Section):
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; everything it writes is in `outputs`/NAME."""
    outputs: str = "outputs"
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: str | None = None
    """Run, checkpoint or export (folder or URL) whose autoencoder, MLP and base planes are taken. Where no stage trains
    them, scenes are fitted to them in waves (`fit`), however many there are."""
    autoencoder: AutoencoderConfig
    planes: StoredPlanesConfig = StoredPlanesConfig()
    render: RenderOptions = RenderOptions()
    train: TrainConfig
    fit: FitConfig = FitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        """Where a run writes."""
        return Path(self.outputs) / self.experiment

    @property
    def checkpoint_root(self) -> str:
        """Folder or URL of a run's checkpoints."""
        return self.checkpoint.root or str(self.folder / "checkpoints")

    def computed_in(self, precision: Precision) -> "Recipe":
        """The same with the precision that was chosen."""
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": precision})})

    @property
    def fits_in_waves(self) -> bool:
        """Whether scenes are all that is trained: what they share is the model's."""
        rates = [stage.learning_rates.model_dump() for stage in self.train.stages.values()]
        return self.model is not None and not any(r for part in rates for name, r in part.items() if name != "planes")

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for name, stage in self.train.stages.items():
            if self.autoencoder.path == "identity" and (stage.weights.needs_images or stage.natural_images):
                raise ValueError(
                    f"train.{name}: with autoencoder.path=identity the only image loss is `latent` "
                    "(set the weights rgb and ae, and natural_images, to 0)"
                )
            base, rate = self.planes.base_planes, stage.learning_rates.base_planes
            if base == 0 and rate > 0:
                raise ValueError(
                    f"train.{name}.learning_rates.base_planes is {rate} but planes.base_planes is 0: set one of them"
                )
            if stage.weights.base_orthogonality > 0 and (base < 2 or rate == 0):
                raise ValueError(
                    f"train.{name}.weights.base_orthogonality is above 0 but there are no two base planes that are "
                    "trained: set planes.base_planes to 2 or more and their learning rate above 0, or the weight to 0"
                )
        return self
