# SPDX-License-Identifier: Apache-2.0
"""Image autoencoders of diffusers, and the normalized latents that scenes are rendered in."""

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from igae.models.channels_last import keep_dtypes, to_channels_last
from igae.models.config import AutoencoderConfig
from igae.storage import staged_files

# atanh is infinite at 1: normalized latents are clamped to 1 - MARGIN before they are mapped back.
MARGIN = 1e-3
# Standard deviation of scale * latents that `scale: auto` aims at: the share of tanh's range that latents fill.
AUTO_SPREAD = 0.3


class Posterior(NamedTuple):
    """mean [B, c, h, w]; logvar of the same shape, or None for an autoencoder without a distribution."""

    mean: Tensor
    logvar: Tensor | None

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Latents; `noise` is N(0, 1) of the mean's shape, from torch's generator if left out."""
        if self.logvar is None:
            return self.mean
        if noise is None:  # not randn_like: which number an element gets would depend on the layout in memory
            noise = torch.randn(self.mean.shape, device=self.mean.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class Autoencoder(nn.Module):
    """A diffusers autoencoder and the normalizer of its latents, n(z) = tanh(s z).

    Args:
        net: the diffusers model, or None for the identity (latents are the images, n(z) = z).
        scale: s, or None where it is still to be fitted with :meth:`fit_scale`.
    """

    net: Any  # diffusers' classes share encode and decode by convention only

    def __init__(self, net: nn.Module | None, scale: float | None) -> None:
        super().__init__()
        self.net = net
        if net is not None:
            keep_dtypes(net)
        self.register_buffer("scale", torch.tensor(float("nan") if scale is None else scale))
        self.scale: Tensor

    @property
    def is_identity(self) -> bool:
        return self.net is None

    def speed_up(self, *, compile: bool, channels_last: bool) -> None:
        """Change how the network is computed, and nothing of what: with torch.compile, and with channels as the last
        dimension in memory. Without gradients it is never compiled: there batches have many sizes."""
        if self.net is None:
            return
        if channels_last:
            to_channels_last(self.net)
        if compile:
            for name in ("encoder", "decoder"):
                if (part := getattr(self.net, name, None)) is not None:
                    part.compile(dynamic=False)

    def posterior(self, images: Tensor) -> Posterior:
        """Encode images [B, 3, H, W] in [-1, 1]."""
        if self.net is None:
            return Posterior(images, None)
        with torch.compiler.set_stance("default" if torch.is_grad_enabled() else "force_eager"):
            encoded = self.net.encode(images)
        if hasattr(encoded, "latent_dist"):
            # The moments in fp32 also under autocast: exp(logvar) overflows half formats.
            mean, logvar = encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
            return Posterior(mean, logvar)
        return Posterior(encoded.latents.float(), None)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, c, h, w]."""
        if self.net is None:
            return latents
        with torch.compiler.set_stance("default" if torch.is_grad_enabled() else "force_eager"):
            images: Tensor = self.net.decode(latents).sample
        return images.float()

    def normalize(self, latents: Tensor) -> Tensor:
        """n(z) = tanh(s z), in (-1, 1)."""
        return latents if self.net is None else torch.tanh(self.scale * latents)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, of values clamped to [-1 + MARGIN, 1 - MARGIN]."""
        if self.net is None:
            return normalized
        return torch.atanh(normalized.clamp(-1.0 + MARGIN, 1.0 - MARGIN)) / self.scale

    def save(self, folder: Path) -> None:
        """Write the autoencoder in diffusers' format, for ``autoencoder.path`` or ``from_pretrained``; OSError where it
        can't be written."""
        if self.net is not None:
            with staged_files(folder) as staging:
                self.net.save_pretrained(staging)

    @property
    def scale_is_fitted(self) -> bool:
        return bool(torch.isfinite(self.scale))

    def fit_scale(self, mean_square: float) -> None:
        """Set s such that latents with this mean of squares have the standard deviation AUTO_SPREAD around zero."""
        self.scale.fill_(AUTO_SPREAD / math.sqrt(mean_square))

    def parts(self) -> dict[Literal["encoder", "decoder"], list[tuple[str, nn.Parameter]]]:
        """Named trainable parameters of the encoder and of the decoder; each parameter is in exactly one of them."""
        groups: dict[Literal["encoder", "decoder"], list[tuple[str, nn.Parameter]]] = {"encoder": [], "decoder": []}
        for name, parameter in self.named_parameters():
            part = name.removeprefix("net.").split(".")[0]
            groups["encoder" if part in ("encoder", "quant_conv") else "decoder"].append((name, parameter))
        return groups


def load_autoencoder(config: AutoencoderConfig, seed: int = 0) -> Autoencoder:
    """The autoencoder that a config names, in fp32 on the CPU.

    Args:
        seed: of the weights where one is created.

    Raises:
        ValueError: nothing usable is at ``config.path``; the sentence says where it was looked for.
    """
    scale = None if config.scale == "auto" else config.scale
    torch.manual_seed(seed)
    if config.path == "identity":
        return Autoencoder(None, 1.0)
    net = _create(config.create) if config.create is not None else _from_pretrained(config.path or "", config.subfolder)
    if not (hasattr(net, "encode") and hasattr(net, "decode")):
        raise ValueError(f"autoencoder: {type(net).__name__} is not an image autoencoder (it has no encode and decode)")
    return Autoencoder(net, scale)


def _class_of(name: str) -> Any:
    """The class that `_class_name` stands for, one of diffusers': names may be others' words, and import nothing."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ValueError(f"diffusers has no class {name}")
    return cls


def _create(settings: Mapping[str, Any]) -> nn.Module:
    settings = dict(settings)
    name = settings.pop("_class_name", "AutoencoderKL")
    try:
        cls = _class_of(name)
    except ValueError as error:
        raise ValueError(f"autoencoder.create: {error}") from None
    try:
        net: nn.Module = cls(**settings)
    except Exception as error:  # diffusers checks little itself: what comes depends on the setting that is wrong
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"autoencoder.create: {name} refuses these settings ({reason})") from error
    return net


def _from_pretrained(path: str, subfolder: str | None) -> nn.Module:
    import diffusers

    source = str(files("igae") / "models/demo-autoencoder") if path == "demo" else path
    try:
        name = diffusers.AutoencoderKL.load_config(source, subfolder=subfolder)["_class_name"]
        net: nn.Module
        net, info = _class_of(name).from_pretrained(
            source, subfolder=subfolder, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, AttributeError, KeyError) as error:
        place = "folder" if Path(source).exists() else "folder, and no hub repository that can be reached and read,"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"autoencoder.path: {path} is no {place} with a diffusers autoencoder ({reason})") from error
    if info["missing_keys"]:
        raise ValueError(f"autoencoder.path: the weights in {path} lack {', '.join(sorted(info['missing_keys'])[:3])}")
    return net
