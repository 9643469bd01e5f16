# SPDX-License-Identifier: Apache-2.0
"""What `auto` stands for: the precision and the compilation that suit the device, the strategy and the steps to do."""

import shutil
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from igae.kernels import keep_compiled
from igae.models import IGAE
from igae.ranks import share
from igae.training.parallel.engine import Engine
from igae.training.recipe import Precision, StageConfig, TrainConfig

Capability = tuple[int, int] | None
BF16_SINCE = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16."""
TRITON_SINCE = (7, 0)
# Measured on H100 and H200: docs/experiments/log/training-step.md (2026-11-24 and 2026-11-28) and log/scaling.md. By
# these, compiling pays after five minutes of steps with an autoencoder of Stable Diffusion's size, and after half an
# hour with the small one of the development data, as found there.
NETWORK_COSTS = 119.0
"""Seconds in which encoder and decoder are compiled, forward and backward, where the caches have nothing."""
NETWORK_SAVES = (68.7e-3 - 41.9e-3) / 15.63e12
"""Seconds a FLOP of encoder and decoder in a step: a captured joint step of 15.63 TFLOP without compile and with it."""
LOSSES_COST = 5.0
"""Seconds in which the total variation of planes is compiled."""
LOSSES_SAVE = (1.517e-3 - 0.810e-3) / 32
"""Seconds a view in a step: a captured warm-up step of 32 views."""


@dataclass(frozen=True)
class Speed:
    """How a job computes."""

    precision: Precision
    compile: bool
    channels_last: bool
    why: str
    """In a line."""

    def apply(self, model: IGAE, engine: Engine) -> None:
        """Have a model, which is not prepared yet, compute so."""
        model.bf16 = self.precision == "bf16"
        engine.compute_in(model.bf16)
        if self.compile:
            keep_compiled(min(32, share()))
        model.speed_up(compile=self.compile, channels_last=self.channels_last)

    @property
    def settings(self) -> dict[str, str | bool]:
        return {"precision": self.precision, "compile": self.compile, "channels_last": self.channels_last}


def choose_speed(
    train: TrainConfig,
    engine: Engine,
    model: IGAE,
    stages: Iterable[tuple[StageConfig, int]],
    began_in: Precision | None = None,
) -> Speed:
    """What is set, and what suits where `auto` is.

    Args:
        stages: with the steps that are to do.
        began_in: the precision of the steps so far.

    Raises:
        ValueError: these had a precision that this GPU does not have.
    """
    capability = capability_of(engine.device)
    return choose(train, capability, engine.replicated, began_in, lambda: compilation(model, stages))


def choose(
    train: TrainConfig,
    capability: Capability,
    replicated: bool,
    began_in: Precision | None,
    compilation: Callable[[], tuple[float, float]],
) -> Speed:
    """As :func:`choose_speed`, of facts.

    Args:
        capability: compute capability of the GPU; None: a CPU.
        replicated: each rank has all of the module.
        compilation: seconds that compiling costs and saves.
    """
    precision, why = choose_precision(train, capability, began_in)
    compiled, because = _choose_compile(train, capability, replicated, compilation)
    channels_last = replicated and (compiled if train.channels_last == "auto" else train.channels_last)
    parts = [f"{precision} ({why})", *["channels_last"] * channels_last, f"{'' if compiled else 'not '}compiled"]
    return Speed(precision, compiled, channels_last, f"{', '.join(parts)} ({because})")


def capability_of(device: torch.device) -> Capability:
    """Compute capability of a GPU; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_precision(
    train: TrainConfig, capability: Capability, began_in: Precision | None = None
) -> tuple[Precision, str]:
    """The precision and why; arguments and errors are those of :func:`choose_speed`."""
    if train.precision != "auto":
        return train.precision, "as set"
    device = "a CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
    suits: Precision = "bf16" if capability is not None and capability >= BF16_SINCE else "fp32"
    if began_in in (None, suits):
        return suits, f"on {device}"
    if capability is not None and began_in == "bf16":
        raise ValueError(
            f"train.precision is auto and was bf16 so far, which {device} does not have: resume elsewhere, or set "
            "train.precision=fp32"
        )
    return began_in, "as it was so far"


def _choose_compile(
    train: TrainConfig,
    capability: Capability,
    replicated: bool,
    compilation: Callable[[], tuple[float, float]],
) -> tuple[bool, str]:
    if not replicated:
        return False, "the autoencoder is sharded"
    if train.compile != "auto":
        return train.compile, "as set"
    if capability is None:
        return False, "a CPU gains nothing"
    if capability < TRITON_SINCE:
        return False, "Triton does not know this GPU"
    if missing := missing_for_triton():
        return False, f"{missing} is missing"
    costs, saves = compilation()
    return saves > costs, f"it takes up to {costs:.0f} s and saves {saves:.0f} s in the steps to do"


def missing_for_triton() -> str | None:
    """What of all that Triton needs to compile a kernel is not there."""
    if find_spec("triton") is None:
        return "triton"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "a C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h"
    return None


def compilation(model: IGAE, stages: Iterable[tuple[StageConfig, int]]) -> tuple[float, float]:
    """Seconds that compiling costs and saves.

    Args:
        stages: with the steps that are to do.
    """
    encode, decode = flop_of_an_image(model)
    flop = views = 0.0
    for stage, steps in stages:
        weights, count = stage.weights, steps * stage.accumulate / (2 if stage.alternate else 1)
        natural = stage.natural_images
        encoded = (
            0
            if stage.uses_cached_latents
            else natural + stage.batch_size * (weights.latent + weights.ae + weights.of_plugins > 0)
        )
        decoded = stage.batch_size * (weights.decodes + (weights.ae > 0)) + natural
        flop += 3 * count * (encoded * encode + decoded * decode)  # backward passes are two of three
        views += count * stage.batch_size * (weights.planes_tv > 0)
    return NETWORK_COSTS * (flop > 0) + LOSSES_COST * (views > 0), flop * NETWORK_SAVES + views * LOSSES_SAVE


@torch.no_grad()
def flop_of_an_image(model: IGAE) -> tuple[float, float]:
    """Of its matrix products and convolutions in the encoder and in the decoder."""
    with FlopCounterMode(display=False) as encoder:
        latents = model.autoencoder.posterior(model.plain).mean
    with FlopCounterMode(display=False) as decoder:
        model.autoencoder.decode(latents)
    return encoder.get_total_flops(), decoder.get_total_flops()
