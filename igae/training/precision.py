# SPDX-License-Identifier: Apache-2.0
"""The precision that `train.precision: auto` stands for: what suits the device, or what a run began with."""

import torch

from igae.models import IGAE
from igae.training.parallel.engine import Engine
from igae.training.recipe import Precision, TrainConfig

Capability = tuple[int, int] | None
BF16_SINCE = (8, 0)
"""Compute capability of the first GPUs that compute in bfloat16."""


def capability_of(device: torch.device) -> Capability:
    """Compute capability of a GPU; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_precision(
    train: TrainConfig, capability: Capability, began_in: Precision | None = None
) -> tuple[Precision, str]:
    """The precision and why.

    Args:
        capability: compute capability of the GPU; None: a CPU.
        began_in: the precision of the steps so far.

    Raises:
        ValueError: this GPU does not have the precision that the steps so far had.
    """
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


def compute_in(precision: Precision, model: IGAE, engine: Engine) -> None:
    """Have a model, which is not prepared yet, compute in a precision, and as fast as it can there."""
    model.bf16 = precision == "bf16"
    engine.compute_in(model.bf16)
    if engine.replicated:
        model.speed_up()
