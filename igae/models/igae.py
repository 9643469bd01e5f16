# SPDX-License-Identifier: Apache-2.0
"""The module that is trained: autoencoder, decoding MLP, base planes; views and plane rows in, losses out."""

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igae.models.autoencoder import Autoencoder, load_autoencoder
from igae.models.config import AutoencoderConfig, LossWeights
from igae.models.fused import fits, planes_variation, runs_on
from igae.models.head import PatchHead
from igae.models.losses import (
    LossInputs,
    coverage_bounds,
    kl_divergence,
    opacity_loss,
    orthogonality,
    total_variation,
)
from igae.models.lpips import LPIPS
from igae.models.views import Views, to_signed
from igae.ranks import derive_seed
from igae.rendering import Cameras, Rendered, RenderOptions, make_field, render
from igae.scenes import BasePlanes, PlanesConfig
from igae.storage import reason

Losses = dict[str, Tensor]


class ModelRecipe(Protocol):
    """What of a training recipe describes a model (see `igae.training.Recipe`)."""

    seed: int
    autoencoder: AutoencoderConfig
    render: RenderOptions
    data: Any
    train: Any

    @property
    def planes(self) -> PlanesConfig: ...


@torch.no_grad()
def _latent_shape(autoencoder: Autoencoder, image: Tensor) -> tuple[int, int, int]:
    """Shape (c, h, w) of an image's latents; ValueError where the autoencoder can't take images of this size."""
    height, width = image.shape[2:]
    image = image.to(autoencoder.scale.device)
    try:
        latents = autoencoder.posterior(image).mean
        channels, *decoded = autoencoder.decode(latents).shape[1:]
    except Exception as error:  # of torch and diffusers: others' networks break in ways of their own
        raise ValueError(
            f"the autoencoder can't encode and decode RGB images of {height} x {width} ({reason(error)}): "
            "name another one, or pack the data with another --resize"
        ) from error
    if channels != 3:
        raise ValueError(f"the autoencoder makes images of {channels} channels from RGB images: name another one")
    if decoded != [height, width]:
        factor = max(1, decoded[0] // latents.shape[2])
        if height % factor == width % factor == 0:
            raise ValueError(f"the autoencoder makes images of {decoded} from those of {[height, width]}: name another")
        raise ValueError(
            f"the autoencoder needs sides that are multiples of {factor} and the images have {height} x {width}: pack "
            f"them again, with --resize {max(factor, min(height, width) // factor * factor)}"
        )
    return latents.shape[1], latents.shape[2], latents.shape[3]


class IGAE(nn.Module):
    """Autoencoder, decoding MLP and base planes with the way from plane rows to losses.

    Args:
        planes: sizes of the scenes' planes. Where scenes share base planes, ``rows`` below are [S, row] as `BasePlanes`
            takes them, else planes [S, 3, R, R, C].
        image_size: (H, W) of the views.
        background: RGB color in [0, 1] that fills the views where no object is.
        seed: of the MLP's and the base planes' initial weights.
        renderer: the backend of `igae.rendering.render`.
        perceptual: the LPIPS network where a weight asks for it; it is not part of the state.
    """

    bf16 = False
    """Whether the autoencoder's arithmetic in training is bfloat16; its weights are not."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        planes: PlanesConfig,
        options: RenderOptions,
        image_size: tuple[int, int],
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        seed: int = 0,
        renderer: Literal["auto", "cuda", "torch"] = "auto",
        perceptual: LPIPS | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.options, self.renderer = autoencoder, options, renderer
        color = torch.tensor(background).view(1, 3, 1, 1)
        self.register_buffer("plain", (2.0 * color - 1.0).expand(1, 3, *image_size).contiguous(), persistent=False)
        self.latent_shape = channels, height, width = _latent_shape(autoencoder, self.plain)
        if image_size[0] % (height * options.patch) or image_size[1] % (width * options.patch):
            factor = image_size[0] // height
            raise ValueError(f"render.patch is {options.patch}: it must divide the autoencoder's downscale {factor}")

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(derive_seed(seed, name))

        self.mlp = make_field(options.field, planes.features, channels, generator("mlp"))
        self.head = PatchHead(channels, options.patch) if options.patch > 1 else None
        self.base = BasePlanes(planes, generator("base planes")) if planes.base_planes else None
        self.register_buffer("background", torch.zeros(height, width, channels))
        self.plain: Tensor
        self.background: Tensor
        # In a tuple, so that it is no submodule: neither trained, nor saved, nor sharded.
        self._perceptual = (perceptual,)

    @classmethod
    def from_recipe(
        cls, recipe: ModelRecipe, image_size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> "IGAE":
        """The model of a recipe at its start, the same on every rank; its background is still to be taken.

        Args:
            image_size: (H, W) of the views.

        Raises:
            ValueError: the autoencoder, or weights of a loss, can't be had or don't fit.
        """
        seed, train = recipe.seed, recipe.train
        lpips = any(stage.epochs and stage.weights.natural_lpips for stage in (train.warmup, train.joint))
        return cls(
            load_autoencoder(recipe.autoencoder, derive_seed(seed, "autoencoder")).to(device),
            recipe.planes,
            recipe.render,
            image_size,
            recipe.data.background,
            seed,
            train.kernels,
            LPIPS(train.lpips_weights).to(device) if lpips else None,
        ).to(device)

    def speed_up(self) -> None:
        """Change how the autoencoder is computed, not what; see :meth:`Autoencoder.speed_up`."""
        kernels = self.renderer != "torch" and runs_on(self.background.device)
        self.autoencoder.speed_up(kernels=kernels)
        if kernels and (perceptual := self._perceptual[0]) is not None:
            perceptual.speed_up(torch.bfloat16 if self.bf16 else torch.float32)

    @torch.no_grad()
    def refresh_background(self) -> None:
        """Take the field's background [h, w, c] in [0, 1] from the autoencoder as it is now."""
        latents = self.autoencoder.normalize(self.autoencoder.posterior(self.plain).mean)
        self.background.copy_((0.5 * (latents[0] + 1.0)).permute(1, 2, 0))

    def render(self, rows: Tensor, views: Views, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized latents [B, c, h, w] in [-1, 1], depth and opacity [B, h g, w g] of views, g rendered pixels along
        a side of a latent pixel.

        Args:
            seed: of the sample positions; None for the fixed ones of evaluation.
        """
        return self.render_planes(self.planes_of(rows)[0], views, seed, self.background)[:3]

    def planes_of(self, rows: Tensor, orthogonal: bool = False) -> tuple[Tensor, Tensor | None]:
        """Planes [S, 3, R, R, C] of scenes' rows; with ``orthogonal`` that loss of the base planes."""
        if self.base is None:
            return rows, None
        with torch.autocast(rows.device.type, enabled=False):
            fused: tuple[Tensor, Tensor | None] = self.base(rows, orthogonality if orthogonal else None)
        return fused

    def render_planes(
        self, planes: Tensor, views: Views, seed: int | None, background: Tensor, distortion: bool = False
    ) -> Rendered:
        """As :meth:`render`, of planes [S, 3, R, R, C] and of the size of the background [h, w, c]; with distortion
        [B, h g, w g] where that is asked for."""
        g = self.options.patch
        cameras = Cameras(views.cam2world, views.intrinsics, (g * background.shape[0], g * background.shape[1]))
        # Positions and transmittance need fp32 also where the autoencoder runs in bf16.
        with torch.autocast(planes.device.type, enabled=False):
            rendered = render(
                planes,
                self.mlp,
                cameras,
                self.options,
                background=background.repeat_interleave(g, 0).repeat_interleave(g, 1) if g > 1 else background,
                scene=views.index,
                seed=seed,
                backend=self.renderer,
                distortion=distortion,
            )
            latents = rendered.features if self.head is None else self.head(rendered.features)
        return rendered._replace(features=latents.permute(0, 3, 1, 2))

    def forward(
        self,
        rows: Tensor | None,
        views: Views | None,
        natural_images: Tensor | None,
        weights: LossWeights,
        sample: bool,
        seed: int | None,
        refresh: bool = False,
    ) -> Losses:
        """Losses of one step, unweighted by name, and their weighted sum as ``total``.

        Args:
            rows: of the scenes that ``views.index`` points to.
            natural_images: uint8 [P, 3, H, W].
            sample: draw latents from the posterior (else its mean).
            seed: of the renderer's samples.
            refresh: call :meth:`refresh_background` first. (Inside of this call, because some strategies have the
                weights together only while it lasts.)
        """
        if refresh:
            self.refresh_background()
        seen = None
        images = to_signed(views.images) if views is not None and views.images is not None else None
        natural = to_signed(natural_images) if natural_images is not None else None
        with torch.autocast(self.background.device.type, torch.bfloat16, enabled=self.bf16):
            encoded = images if weights.latent + weights.ae + weights.of_plugins > 0 else None
            latents, natural_latents, losses = self._encode(encoded, natural, weights, sample)
            decoded: dict[str, tuple[Tensor, Tensor]] = {}  # latents to decode, and the images that they should give
            if views is not None:
                assert rows is not None
                latents = views.latents if latents is None else latents
                seen, of_scenes = self._render_losses(rows, views, latents, weights, seed)
                seen.images = images
                losses |= of_scenes
                if images is not None and weights.decodes:
                    decoded["rgb"] = (self.autoencoder.denormalize(seen.rendered), images)
                if images is not None and latents is not None and weights.ae > 0:
                    decoded["ae"] = (latents, images)
            if natural is not None and natural_latents is not None and weights.natural_ae + weights.natural_lpips > 0:
                decoded["natural"] = (natural_latents, natural)
            if decoded:
                losses |= self._decode_losses(decoded, weights, seen)
            if seen is not None:
                losses |= {name: loss(seen) for name, loss in weights.added.items()}
        total = torch.zeros((), device=self.background.device)
        for name, loss in losses.items():
            total = total + weights[name] * loss
        return {**losses, "total": total}

    def _encode(
        self, images: Tensor | None, natural: Tensor | None, weights: LossWeights, sample: bool
    ) -> tuple[Tensor | None, Tensor | None, Losses]:
        """Latents of views and of natural images, where there are some, and losses of the latter."""
        given = [x for x in (images, natural) if x is not None]
        if not given:
            return None, None, {}
        # One batch through the encoder, and one through the decoder below: launches cost more than pixels.
        posterior = self.autoencoder.posterior(torch.cat(given))
        drawn = posterior.sample() if sample else posterior.mean
        count = 0 if images is None else len(images)
        latents = None if images is None else drawn[:count]
        if natural is None:
            return latents, None, {}
        natural_latents, losses = drawn[count:], {}
        if weights.natural_kl > 0 and posterior.logvar is not None:
            losses["natural_kl"] = kl_divergence(posterior.mean[count:], posterior.logvar[count:])
        if weights.natural_tv > 0:
            losses["natural_tv"] = total_variation(natural_latents, (-2, -1))
        return latents, natural_latents, losses

    def _render_losses(
        self, rows: Tensor, views: Views, latents: Tensor | None, weights: LossWeights, seed: int | None
    ) -> tuple[LossInputs, Losses]:
        """What is rendered, and losses of it and of the planes."""
        losses = {}
        planes, base_loss = self.planes_of(rows, weights.base_orthogonality > 0)
        if base_loss is not None:
            losses["base_orthogonality"] = base_loss
        rendered, depth, opacity, distortion = self.render_planes(
            planes, views, seed, self.background, weights.distortion > 0
        )
        if weights.latent > 0:
            assert latents is not None
            losses["latent"] = F.mse_loss(rendered, self.autoencoder.normalize(latents))
        if weights.planes_tv > 0:
            # Planes count by their views: so the loss is a mean over views, however these are split into batches.
            share = torch.full((len(views.index),), 1 / len(views.index), device=planes.device)
            shares = torch.zeros(len(planes), device=planes.device).index_add(0, views.index, share)
            if self.renderer != "torch" and fits(planes, planes.shape[-1]):
                losses["planes_tv"] = planes_variation(planes, shares)
            else:
                losses["planes_tv"] = total_variation(planes, (2, 3), shares)
        if weights.depth_tv > 0:
            losses["depth_tv"] = total_variation(depth, (-2, -1))
        if weights.opacity > 0:
            coverage = views.coverage
            if coverage is None:
                assert views.masks is not None and views.has_alpha is not None
                coverage = coverage_bounds(views.masks, views.has_alpha, opacity.shape[1:])
            losses["opacity"] = opacity_loss(opacity, coverage)
        if distortion is not None:
            losses["distortion"] = distortion.mean()
        return LossInputs(views, planes, rendered, depth, opacity, latents), losses

    def _decode_losses(
        self, given: dict[str, tuple[Tensor, Tensor]], weights: LossWeights, seen: LossInputs | None
    ) -> Losses:
        """Losses of decoded latents against the images that they should give, both by name."""
        losses = {}
        decoded = self.autoencoder.decode(torch.cat([latents for latents, _ in given.values()]))
        pictures = torch.split(decoded, [len(latents) for latents, _ in given.values()])
        for (name, (_, target)), picture in zip(given.items(), pictures, strict=True):
            if name == "rgb" and seen is not None:
                seen.decoded = picture
            if name != "natural":
                if weights[name] > 0:
                    losses[name] = F.mse_loss(picture, target)
                continue
            if weights.natural_ae > 0:
                losses["natural_ae"] = F.mse_loss(picture, target)
            if weights.natural_lpips > 0:
                assert self._perceptual[0] is not None
                losses["natural_lpips"] = self._perceptual[0](picture, target)
        return losses
