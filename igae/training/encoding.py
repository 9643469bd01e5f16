# SPDX-License-Identifier: Apache-2.0
"""Latents of all views, encoded once: what a stage whose autoencoder is frozen trains on."""

import functools
import logging
import math
from contextlib import closing

import torch
from torch import Tensor

from igae.data import LatentCache, ViewBatch
from igae.errors import progress
from igae.models import IGAE, NUMBERS, Views, augment, coverage_bounds, to_signed
from igae.ranks import derive_seed
from igae.training.preflight import check_latents
from igae.training.rank_data import RankData
from igae.training.recipe import Recipe, StageName

BATCH = 64
NEAR = 8
"""Levels (of 255) that one color may differ by within a border, and from view to view: JPEG does that."""
MANY = 0.1
"""Share of the views above which something about them is told."""
log = logging.getLogger("igae")
log_once = functools.cache(log.info)  # waves of a fit are alike


def plain_borders(images: Tensor, background: Tensor) -> Tensor:
    """Colors uint8 [n, 3] of the borders of those views whose border is of one color (an object may reach it, in up to
    a quarter of its pixels), but not of the background's.

    Args:
        images: uint8 [B, 3, H, W].
        background: uint8 [3].
    """
    height, width = images.shape[2:]
    border = torch.cat([images[:, :, :: height - 1].flatten(2), images[..., :: width - 1].flatten(2)], 2)
    color = border.median(2).values
    alike = (border.int() - color[..., None].int()).abs().amax(1) <= NEAR
    away = (color.int() - background.int()).abs().amax(1)
    return color[(alike.float().mean(1) >= 0.75) & (away > NEAR / 4)]


def tell_background(colors: Tensor, views: int, background: Tensor) -> bool:
    """Warn where more than a tenth of the views have a border of one and the same color, as :func:`plain_borders` finds
    them; returns whether that is so."""
    if not len(colors):
        return False
    found, counts = colors.unique(dim=0, return_counts=True)
    most = found[counts.argmax()]
    alike = int(((colors.int() - most.int()).abs().amax(1) <= NEAR).sum())
    if alike <= MANY * views:
        return False
    now, right = ([round(channel / 255, 3) for channel in color.tolist()] for color in (background, most))
    log.warning(
        "%.0f %% of the views have a border of the color %s, and data.background is %s: if it is what is behind the "
        "objects, set data.background=%s",
        100 * alike / views,
        right,
        now,
        str(right).replace(" ", ""),
    )
    return True


class ViewEncoder:
    """Encodes batches of views, each as a number of variants; the same for a view in each run on any rank.

    Attributes:
        variants: of each view; 1 where views don't move.
        seen, cut, cut_masks: views so far, those of them whose objects reach the border, and those that are masked.
        plain: colors of borders, as :func:`plain_borders` finds them.
    """

    def __init__(self, recipe: Recipe, name: StageName, model: IGAE, background: Tensor) -> None:
        self.recipe, self.config, self.model, self.background = recipe, recipe.train.stages[name], model, background
        self.variants = self.config.augment.variants if self.config.augment.is_on else 1
        self.wants_masks = self.config.weights.opacity > 0
        self.size = [recipe.render.patch * side for side in model.latent_shape[1:]]
        self.seen = self.cut = self.cut_masks = 0
        self.plain: list[Tensor] = []

    @property
    def bytes_of_a_view(self) -> int:
        """Of what is kept: float32 latents and cameras, uint8 coverage."""
        coverage = 2 * math.prod(self.size) if self.wants_masks else 0
        return self.variants * (4 * (math.prod(self.model.latent_shape) + 25) + coverage)

    @torch.no_grad()
    def __call__(self, batch: ViewBatch, variant: int) -> dict[str, Tensor]:
        """Latents of a variant of views, its cameras, and coverage where opacity is trained."""
        recipe, model, device = self.recipe, self.model, self.background.device
        noise, numbers = torch.empty(len(batch.scene), *model.latent_shape), torch.empty(len(batch.scene), NUMBERS)
        generator = torch.Generator()
        for i, (scene, view) in enumerate(zip(batch.scene.tolist(), batch.view.tolist(), strict=True)):
            generator.manual_seed(derive_seed(recipe.seed, "encode", scene, view, *([variant] * (variant > 0))))
            noise[i].normal_(generator=generator)
            numbers[i].uniform_(generator=generator)
        if variant == 0:
            edges = batch.masks[:, :: batch.masks.shape[1] - 1].amax((1, 2)), batch.masks[..., [0, -1]].amax((1, 2))
            cut = torch.maximum(*edges) > 0
            self.seen, self.cut = self.seen + len(cut), self.cut + int(cut.sum())
            self.cut_masks += int((cut & batch.has_alpha & (batch.masks.amin((1, 2)) < 255)).sum())
            self.plain.append(plain_borders(batch.images, self.background.cpu()))
        here = batch.to(device)
        masks = here.masks if self.wants_masks else None
        views = Views(here.scene, here.cam2world, here.intrinsics, here.images, None, masks, here.has_alpha)
        if self.config.augment.is_on:
            views = augment(views, self.config.augment, self.background, numbers.to(device))
        assert views.images is not None
        with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
            posterior = model.autoencoder.posterior(to_signed(views.images))
        latents = posterior.sample(noise.to(device)) if recipe.autoencoder.latents == "sample" else posterior.mean
        kept = {"latents": latents, "cam2world": views.cam2world, "intrinsics": views.intrinsics}
        if views.masks is not None:
            coverage = coverage_bounds(views.masks, here.has_alpha, self.size)
            kept["coverage"] = (255 * coverage).round().to(torch.uint8)
        return kept


def encode_views(recipe: Recipe, name: StageName, model: IGAE, data: RankData, background: Tensor) -> LatentCache:
    """Latents of the training views that this rank owns.

    Args:
        background: uint8 [3], of the views.

    Raises:
        ValueError: the GPU has no room for them.
    """
    encode = ViewEncoder(recipe, name, model, background)
    needed = encode.bytes_of_a_view * int(data.owned.views.sum())
    check_latents(needed, background.device, name, encode.variants)
    log_once(f"{name}: encoding {needed // encode.bytes_of_a_view} views")
    total = math.ceil(int(data.owned.views.sum()) / BATCH)
    with closing(data.open_views(BATCH, repeat=False)) as views:
        batches = progress(f"{name}: encoding views", total, f"batches of {BATCH}", views)
        cache = LatentCache(batches, encode, encode.variants)
    log_once(f"{name}: {len(cache)} views, {cache.variants} cached latents of each, {needed / 2**30:.2f} GiB")
    if tell_background(torch.cat(encode.plain), encode.seen, background):
        return cache
    if (encode.config.augment.is_on or encode.wants_masks) and encode.cut > MANY * encode.seen:
        cause = (
            "the masks may be inverted (white is the object), or the crop cuts the object (pack with --fit pad)"
            if 2 * encode.cut_masks > encode.cut
            else "if it is a plain background, set data.background to its color; if it is the room, pack with masks "
            "(docs/own-data.md)"
        )
        log.warning(
            "%.0f %% of the views show something at their border: %s; if it is an object, set shift and rotate of "
            "train.%s.augment to 0: background is what they fill in",
            100 * encode.cut / encode.seen,
            cause,
            name,
        )
    return cache
