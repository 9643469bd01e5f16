# SPDX-License-Identifier: Apache-2.0
"""What is checked before a run trains: that all ranks do the same, data for its stages, memory for its scenes."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import yaml

from igae import __version__
from igae.data import Manifest
from igae.models import LPIPS
from igae.ranks import SWITCHES, Channel, world_size
from igae.scenes import PlanesConfig
from igae.training.rank_data import RankData
from igae.training.recipe import Recipe, StageName
from igae.training.run_folder import flat, public_settings

OF_A_MACHINE = ("data.root", "data.cache", "data.workers", "planes.scratch")
"""Settings that may differ between machines: what the data are, the manifest says."""


def agree(recipe: Recipe, channel: Channel, load: Callable[[], Manifest] | None = None, **arguments: Any) -> Manifest:
    """Refuse, on all ranks alike, that another one has other settings, arguments, data or another igae. Collective.

    Args:
        load: reads the manifest; that of `data.root` if left out.

    Returns:
        The manifest.

    Raises:
        ValueError: the sentence names the first key that differs, and both values.
    """
    settings = {"the version of igae": __version__, **{f"--{name}": value for name, value in arguments.items()}}
    settings |= {name: os.environ.get(name, "false").lower() for name in SWITCHES}
    settings |= {k: v for k, v in flat(yaml.safe_load(public_settings(recipe))).items() if k not in OF_A_MACHINE}
    channel.agree(settings)
    found = channel.together(load or (lambda: Manifest.load(recipe.data.root)))
    if world_size() > 1:
        channel.agree({"the digest of the manifest of data.root": found.fingerprint[:16]}, recipe.data.root)
    return found


def split(recipe: Recipe, manifest: Manifest) -> RankData:
    """Split the data of a run among its ranks. Raises ValueError where there is not enough for each, or where a stage,
    the first or a later one, needs what the data don't have."""
    data = RankData.split(recipe, manifest)
    root, side = recipe.data.root, min(data.manifest.image_size)
    for name, stage in recipe.train.stages.items():
        if stage.batch_size and not data.scenes:
            raise ValueError(
                f"train.{name}.batch_size is {stage.batch_size} but {root} holds no scenes: pack some with --scenes, "
                f"or set train.{name}.epochs=0"
            )
        if stage.natural_images and not data.manifest.images:
            raise ValueError(
                f"train.{name}.natural_images is {stage.natural_images} but {root} holds none: pack some with "
                f"--images, or set train.{name}.natural_images=0"
            )
        if stage.weights.natural_lpips and side < LPIPS.SMALLEST:
            raise ValueError(
                f"train.{name}.weights.natural_lpips is {stage.weights.natural_lpips} but LPIPS needs images of "
                f"{LPIPS.SMALLEST} pixels or more and those at {root} have {side}: set it to 0, or pack larger ones"
            )
    return data


def scene_bytes(planes: PlanesConfig) -> int:
    """Memory of a scene on its owner: its row and two moments, float32."""
    return 3 * 4 * math.prod(planes.row_shape)


def check_memory(needed: int, device: torch.device, instead: str = "train fewer scenes (data.categories)") -> None:
    """Refuse planes and moments of ``needed`` bytes that the GPU has no room for, and say what to do ``instead``."""
    remedy = f"lower planes.resolution or planes.features, or {instead}"
    _check_room("the planes and their optimizer state", needed, device, remedy)


def check_latents(needed: int, device: torch.device, name: StageName, variants: int) -> None:
    """Refuse cached latents of a stage, ``needed`` bytes, that the GPU has no room for."""
    what = f"train.{name}.augment.variants (now {variants})" if variants > 1 else "the number of scenes"
    _check_room(f"the cached latents of {name}", needed, device, f"lower {what}, or train on more GPUs")


def _check_room(what: str, needed: int, device: torch.device, remedy: str) -> None:
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise ValueError(f"{what} need {needed / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free: {remedy}")
