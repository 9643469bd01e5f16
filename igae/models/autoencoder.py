# SPDX-License-Identifier: Apache-2.0
"""Image autoencoders of diffusers, and the normalized latents that scenes are rendered in."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from igae.config import plug_in
from igae.models.config import AutoencoderConfig
from igae.models.layers import keep_dtypes, skip_products, to_channels_last
from igae.storage import Limits, StoreError, is_url, reason, retry, staged_files

# atanh is infinite at 1: normalized latents are clamped to 1 - MARGIN before they are mapped back.
MARGIN = 1e-3
# Standard deviation of scale * latents that `scale: auto` aims at: the share of tanh's range that latents fill.
AUTO_SPREAD = 0.3
CLASSES: tuple[str, ...] = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL", "VQModel")
CLASSES += ("AutoencoderKLFlux2", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE")
"""diffusers' autoencoders of images: their encoders and decoders need nothing else, and give the same each time."""
MOST_TENSORS, MOST_WEIGHTS = 2_000, 4_000_000_000
"""Of an autoencoder that is created; diffusers' largest have less than a fifth."""
HUB = Limits(attempts=6, first_wait=0.5, attempt_seconds=10.0, total_seconds=20.0, lines=1)
"""For the hub's first answer. Its client would try for minutes, each file, and tell of each try in two lines."""


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

    def speed_up(self, *, kernels: bool) -> None:
        """Change how the network is computed, and nothing of what: no product comes twice, and with ``kernels`` fused
        CUDA kernels do what is between convolutions, with channels as the last dimension in memory. Weights must be
        whole on each rank."""
        if self.net is not None:
            skip_products(self.net)
            if kernels:
                to_channels_last(self.net)

    def posterior(self, images: Tensor) -> Posterior:
        """Encode images [B, 3, H, W] in [-1, 1]."""
        if self.net is None:
            return Posterior(images, None)
        encoded = self.net.encode(images)
        if hasattr(encoded, "latent_dist"):
            # The moments in fp32 also under autocast: exp(logvar) overflows half formats.
            mean, logvar = encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
            return Posterior(mean, logvar)
        return Posterior(encoded[0].float(), None)  # called latents, or latent

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, c, h, w]."""
        if self.net is None:
            return latents
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
    return Autoencoder(net, scale)


def _class_of(name: Any) -> Any:
    """The class that `_class_name` stands for. Names may be others' words: nothing else of diffusers is called."""
    import diffusers

    if name in CLASSES and hasattr(diffusers, name):
        return getattr(diffusers, name)
    try:
        cls = plug_in("autoencoders", str(name))
    except ValueError as error:
        known = ", ".join(CLASSES)
        raise ValueError(
            f"{str(name)[:80]} is none of the image autoencoders of diffusers ({known}), and {error}"
        ) from error
    if cls.__name__ != name:
        raise ValueError(
            f"the entry point {name} is the class {cls.__name__}: give it that name, which config.json has"
        )
    return cls


def _outline(cls: Any, settings: Mapping[str, Any], most: int) -> Any:
    """The network on torch's meta device, where weights take no memory: ValueError for one that can't be used here."""
    if extra := {"auto_map", "quantization_config"} & {key for key, value in settings.items() if value is not None}:
        raise ValueError(f"{min(extra)} is not supported: save the autoencoder without it, as diffusers does")
    with torch.device("meta"), _at_most(most):
        net = cls.from_config(dict(settings))
    for name in ("in_channels", "out_channels"):
        if (channels := net.config.get(name, 3)) != 3:
            raise ValueError(f"{name} is {channels} and has to be 3: images are RGB")
    return net


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Refuse (ValueError) a network with more weights while it is made: layers are numbers in a file of a few bytes."""
    names = list[str]()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        names.extend([name] if parameter is not None and parameter.is_meta else [])
        if len(names) > most:
            raise ValueError(f"its settings describe a network of more than {most} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _create(settings: Mapping[str, Any]) -> nn.Module:
    settings = dict(settings)
    name = settings.pop("_class_name", "AutoencoderKL")
    try:
        cls = _class_of(name)
    except ValueError as error:
        raise ValueError(f"autoencoder.create: {error}") from None
    try:
        weights = sum(weight.numel() for weight in _outline(cls, settings, MOST_TENSORS).parameters())
        if weights > MOST_WEIGHTS:
            raise ValueError(f"they describe a network of {weights:.2g} weights, more than {MOST_WEIGHTS:.2g}")
        net: nn.Module = cls(**settings)
    except Exception as error:  # diffusers checks little itself: what comes depends on the setting that is wrong
        raise ValueError(f"autoencoder.create: {name} refuses these settings ({reason(error)})") from error
    return net


def _from_pretrained(path: str, subfolder: str | None) -> nn.Module:
    import diffusers

    source = str(files("igae") / "models/demo-autoencoder") if path == "demo" else path
    try:
        if is_url(source) or Path(source).is_file():
            raise ValueError("a URL" if is_url(source) else "a file")
        there = _Files(source, subfolder)
        if (config := there.find("config.json")) is None:
            raise there.failure or ValueError("it has no config.json")
        settings = dict(diffusers.AutoencoderKL.load_config(config.parent))
        cls = _class_of(settings.get("_class_name"))
        variant, shapes = _find_weights(there)
        _check_shapes(_outline(cls, settings, len(shapes)), shapes)
        net: nn.Module = cls.from_pretrained(
            config.parent, variant=variant, torch_dtype=torch.float32, use_safetensors=True
        )
    except Exception as error:  # of diffusers, the hub's client, safetensors and torch
        place = "folder" if Path(source).exists() else "folder, and no hub repository that can be reached and read,"
        ours = "autoencoder.path=demo autoencoder.scale=auto, a small one that igae has"
        hint = "" if Path(source).exists() else f"; without network: a folder, or {ours}"
        raise ValueError(
            f"autoencoder.path: {path} is no {place} with a diffusers autoencoder ({reason(error)}){hint}"
        ) from error
    return net


class _Files:
    """Files of a folder or hub repository; those that the hub's cache has where the hub does not answer.

    Attributes:
        failure: why it does not.
    """

    def __init__(self, source: str, subfolder: str | None) -> None:
        self._source, self._subfolder = source, subfolder
        self.failure = None if Path(source).is_dir() else _try_hub(source, subfolder)

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        if Path(name).name != name:
            raise ValueError(f"its list of weights has {name[:80]!r}, which is no file's name")
        if Path(self._source).is_dir():
            path = Path(self._source, self._subfolder or "", name)
            return path if path.is_file() else None
        try:
            offline = self.failure is not None
            return Path(hf_hub_download(self._source, name, subfolder=self._subfolder, local_files_only=offline))
        except EntryNotFoundError:
            return None


def _try_hub(source: str, subfolder: str | None) -> StoreError | None:
    """Why the hub does not answer, if it does not; it is tried once where its cache has the autoencoder."""
    from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache

    logging.getLogger("huggingface_hub").handlers.clear()  # what the root's handler prints, too
    name = "/".join(filter(None, (subfolder, "config.json")))
    url, found = hf_hub_url(source, name), try_to_load_from_cache(source, name)
    if constants.HF_HUB_OFFLINE:
        return StoreError("HF_HUB_OFFLINE is set, and the hub's cache does not have it")
    cached = isinstance(found, str) and any(Path(found).parent.glob("*.safetensors"))
    try:
        limits = replace(HUB, attempts=1) if cached else HUB
        retry(lambda limit: get_session().head(url, timeout=limit), constants.ENDPOINT, limits=limits)
    except StoreError as error:
        return error
    return None


def _find_weights(there: _Files) -> tuple[str | None, dict[str, tuple[int, ...]]]:
    """The variant of the weights, the plain one first, and the shapes of its tensors."""
    name = "diffusion_pytorch_model"
    for variant, end in ((None, ""), ("fp16", ".fp16")):
        if index := there.find(f"{name}.safetensors.index{end}.json"):
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            parts = [f"{name}{end}.safetensors"]
        if found := [file for part in parts if (file := there.find(part))]:
            return variant, {key: shape for file in found for key, shape in _shapes(file).items()}
    raise there.failure or ValueError(
        f"it has no {name}.safetensors, and others, such as .bin, are not read, because that can run what is in them; "
        "where you trust it, load it with diffusers and save_pretrained it"
    )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a safetensors file, by name; nothing but its header is read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def _check_shapes(net: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse (ValueError) weights that are not those of a network, before it takes memory for them."""
    # Attention had other names once. diffusers knows them.
    found = net._fix_state_dict_keys_on_load(dict(shapes))
    for name, tensor in net.state_dict().items():
        if name not in found:
            raise ValueError(f"its weights lack {name}")
        if found[name] != tensor.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} by config.json and {list(found[name])} in the weights")
