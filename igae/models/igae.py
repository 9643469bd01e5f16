# SPDX-License-Identifier: Apache-2.0
"""The module that is trained: autoencoder, decoding MLP, base planes; views and plane rows in, losses out."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igae.models.autoencoder import Autoencoder
from igae.models.config import LossWeights
from igae.models.losses import LPIPS, kl_divergence, orthogonality, total_variation
from igae.rendering import DecodingMLP, RenderOptions, render
from igae.scenes import BasePlanes


@dataclass
class Views:
    """Views of scenes: cam2world [B, 4, 4], intrinsics [B, 3, 3], index [B] of each view's scene among the plane rows,
    and either images uint8 [B, 3, H, W] or latents [B, c, h, w] that were encoded before."""

    index: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    images: Tensor | None = None
    latents: Tensor | None = None


def to_signed(images: Tensor) -> Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1.0


@torch.no_grad()
def _latent_shape(autoencoder: Autoencoder, image: Tensor) -> tuple[int, int, int]:
    """Shape (c, h, w) of an image's latents; ValueError where the autoencoder can't take images of this size."""
    size = tuple(image.shape[2:])
    try:
        latents = autoencoder.posterior(image).mean
        decoded = tuple(autoencoder.decode(latents).shape[2:])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the autoencoder can't encode and decode images of {size[0]} x {size[1]} ({reason})"
        ) from error
    if decoded != size:
        raise ValueError(
            f"the autoencoder makes images of {decoded[0]} x {decoded[1]} from those of {size[0]} x {size[1]}: pack "
            "the data with --resize to a multiple of its downscale factor"
        )
    return latents.shape[1], latents.shape[2], latents.shape[3]


class IGAE(nn.Module):
    """Autoencoder, decoding MLP and base planes with the way from plane rows to losses.

    Args:
        image_size: (H, W) of the views.
        background: RGB color in [0, 1] that fills the views where no object is.
        perceptual: the LPIPS network where a weight asks for it; it is not part of the state.
        bf16: the autoencoder's arithmetic in training is bfloat16; its weights are not.
        renderer: the backend of `igae.rendering.render`.
        base: the base planes, where scenes share some. With them ``rows`` below are [S, row] as `BasePlanes` takes
            them, else planes [S, 3, R, R, C].
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        mlp_generator: torch.Generator,
        features: int,
        options: RenderOptions,
        image_size: tuple[int, int],
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        perceptual: LPIPS | None = None,
        bf16: bool = False,
        renderer: Literal["auto", "cuda", "torch"] = "auto",
        base: BasePlanes | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.options, self.bf16, self.renderer = autoencoder, options, bf16, renderer
        color = torch.tensor(background).view(1, 3, 1, 1)
        self.register_buffer("plain", (2.0 * color - 1.0).expand(1, 3, *image_size).contiguous(), persistent=False)
        channels, height, width = _latent_shape(autoencoder, self.plain)
        self.latent_shape = (channels, height, width)
        self.mlp = DecodingMLP(features, channels, generator=mlp_generator)
        self.base = base
        self.register_buffer("background", torch.zeros(height, width, channels))
        self.plain: Tensor
        self.background: Tensor
        self._total_variation = total_variation
        # In a tuple, so that it is no submodule: neither trained, nor saved, nor sharded.
        self._perceptual = (perceptual,)

    def speed_up(self, *, compile: bool, channels_last: bool) -> None:
        """Change how things are computed, not what; see :meth:`Autoencoder.speed_up`."""
        self.autoencoder.speed_up(compile=compile, channels_last=channels_last)
        if compile:  # it reads planes many times over otherwise
            self._total_variation = torch.compile(total_variation)

    @torch.no_grad()
    def refresh_background(self) -> None:
        """Take the field's background [h, w, c] in [0, 1] from the autoencoder as it is now."""
        latents = self.autoencoder.normalize(self.autoencoder.posterior(self.plain).mean)
        self.background.copy_((0.5 * (latents[0] + 1.0)).permute(1, 2, 0))

    def render(self, rows: Tensor, views: Views, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized latents [B, c, h, w] in [-1, 1], depth [B, h, w] and opacity [B, h, w] of views.

        Args:
            seed: of the sample positions; None for the fixed ones of evaluation.
        """
        return self._render(self.planes_of(rows)[0], views, seed)

    def planes_of(self, rows: Tensor, orthogonal: bool = False) -> tuple[Tensor, Tensor | None]:
        """Planes [S, 3, R, R, C] of scenes' rows; with ``orthogonal`` that loss of the base planes."""
        if self.base is None:
            return rows, None
        with torch.autocast(rows.device.type, enabled=False):
            fused: tuple[Tensor, Tensor | None] = self.base(rows, orthogonality if orthogonal else None)
        return fused

    def _render(self, planes: Tensor, views: Views, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        # Positions and transmittance need fp32 also where the autoencoder runs in bf16.
        with torch.autocast(planes.device.type, enabled=False):
            rendered = render(
                planes,
                self.mlp,
                views.cam2world,
                views.intrinsics,
                self.latent_shape[1:],
                self.options,
                background=self.background,
                scene=views.index,
                seed=seed,
                backend=self.renderer,
            )
        return rendered.features.permute(0, 3, 1, 2), rendered.depth, rendered.opacity

    def forward(
        self,
        rows: Tensor | None,
        views: Views | None,
        natural_images: Tensor | None,
        weights: LossWeights,
        sample: bool,
        seed: int | None,
        refresh: bool = False,
    ) -> dict[str, Tensor]:
        """Losses of one step, unweighted by name, and their weighted sum as ``total``.

        Args:
            rows: of the scenes that ``views.index`` points to.
            natural_images: natural images, uint8 [P, 3, H, W].
            sample: draw latents from the posterior (else its mean).
            seed: of the renderer's samples.
            refresh: call :meth:`refresh_background` first. (Inside of this call, because some strategies have the
                weights together only while it lasts.)
        """
        if refresh:
            self.refresh_background()
        with torch.autocast(self.background.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self._losses(rows, views, natural_images, weights, sample, seed)
        total = torch.zeros((), device=self.background.device)
        for name, loss in losses.items():
            total = total + getattr(weights, name) * loss
        return {**losses, "total": total}

    def _losses(
        self,
        rows: Tensor | None,
        views: Views | None,
        natural_images: Tensor | None,
        weights: LossWeights,
        sample: bool,
        seed: int | None,
    ) -> dict[str, Tensor]:
        images = to_signed(views.images) if views is not None and views.images is not None else None
        natural = to_signed(natural_images) if natural_images is not None else None
        latents = views.latents if views is not None else None
        natural_latents, losses = None, {}
        encoded = images if weights.latent + weights.ae > 0 else None
        if encoded is not None or natural is not None:
            # One batch through the encoder, and one through the decoder below: launches cost more than pixels.
            count = 0 if encoded is None else len(encoded)
            posterior = self.autoencoder.posterior(torch.cat([x for x in (encoded, natural) if x is not None]))
            drawn = posterior.sample() if sample else posterior.mean
            if encoded is not None:
                latents = drawn[:count]
            if natural is not None:
                natural_latents = drawn[count:]
                if weights.natural_kl > 0 and posterior.logvar is not None:
                    losses["natural_kl"] = kl_divergence(posterior.mean[count:], posterior.logvar[count:])
                if weights.natural_tv > 0:
                    losses["natural_tv"] = total_variation(natural_latents, (-2, -1))

        decode: dict[str, tuple[Tensor, Tensor]] = {}  # what is decoded: latents, the images that they should give
        if views is not None:
            assert rows is not None
            planes, base_loss = self.planes_of(rows, weights.base_orthogonality > 0)
            if base_loss is not None:
                losses["base_orthogonality"] = base_loss
            rendered, depth, _ = self._render(planes, views, seed)
            if weights.latent > 0:
                assert latents is not None
                losses["latent"] = F.mse_loss(rendered, self.autoencoder.normalize(latents))
            if weights.planes_tv > 0:
                # Planes count by their views: so the loss is a mean over views, however these are split into batches.
                share = torch.full((len(views.index),), 1 / len(views.index), device=planes.device)
                shares = torch.zeros(len(planes), device=planes.device).index_add(0, views.index, share)
                losses["planes_tv"] = self._total_variation(planes, (2, 3), shares)
            if weights.depth_tv > 0:
                losses["depth_tv"] = total_variation(depth, (-2, -1))
            if images is not None and weights.rgb > 0:
                decode["rgb"] = (self.autoencoder.denormalize(rendered), images)
            if images is not None and latents is not None and weights.ae > 0:
                decode["ae"] = (latents, images)
        if natural is not None and natural_latents is not None and weights.natural_ae + weights.natural_lpips > 0:
            decode["natural"] = (natural_latents, natural)
        if decode:
            decoded = self.autoencoder.decode(torch.cat([z for z, _ in decode.values()]))
            pictures = torch.split(decoded, [len(z) for z, _ in decode.values()])
            for (name, (_, target)), picture in zip(decode.items(), pictures, strict=True):
                if name != "natural":
                    losses[name] = F.mse_loss(picture, target)
                    continue
                if weights.natural_ae > 0:
                    losses["natural_ae"] = F.mse_loss(picture, target)
                if weights.natural_lpips > 0:
                    assert self._perceptual[0] is not None
                    losses["natural_lpips"] = self._perceptual[0](picture, target)
        return losses
