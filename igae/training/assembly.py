# SPDX-License-Identifier: Apache-2.0
"""The model that a configuration describes."""

import torch

from igae.models import IGAE, LPIPS, load_autoencoder
from igae.ranks import derive_seed
from igae.scenes import BasePlanes
from igae.training.recipe import Recipe


def build_model(recipe: Recipe, image_size: tuple[int, int], device: torch.device) -> IGAE:
    """The model at its start, the same on every rank; its background is still to be taken.

    Args:
        image_size: (H, W) of the views.

    Raises:
        ValueError: the autoencoder, or weights of a loss, can't be had or don't fit.
    """
    seed = recipe.seed
    needs_lpips = any(s.epochs and s.weights.natural_lpips for s in (recipe.train.warmup, recipe.train.joint))
    perceptual = LPIPS(recipe.train.lpips_weights) if needs_lpips else None
    base = None
    if recipe.planes.base_planes:
        base = BasePlanes(recipe.planes, torch.Generator().manual_seed(derive_seed(seed, "base planes")))
    return IGAE(
        load_autoencoder(recipe.autoencoder, derive_seed(seed, "autoencoder")),
        torch.Generator().manual_seed(derive_seed(seed, "mlp")),
        recipe.planes.features,
        recipe.render,
        image_size,
        recipe.data.background,
        perceptual.to(device) if perceptual is not None else None,
        bf16=recipe.train.precision == "bf16",
        renderer=recipe.train.kernels,
        base=base,
    ).to(device)
