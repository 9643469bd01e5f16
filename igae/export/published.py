# SPDX-License-Identifier: Apache-2.0
"""Weights of the code that was published with the IG-AE paper (github.com/k-kassab/igae), as an export.

The file is a dictionary (torch.save) of state dictionaries. N scenes, F features, planes of R x R texels, c latent
channels; M base planes of G features and L own features where there are global planes:

===================================  ==================  ==============================================
``vae``                              diffusers' names    AutoencoderKL
``nerfs/local_planes``               [N, 3, F, R, R]     [N, 3, L, R, R] with global planes; columns are
                                                         the first axis of a plane, rows the second
``nerfs/global_planes``              [M, 3, G, R, R]     absent without global planes, as all below
``nerfs/coefs``, ``nerfs/bias``      [N, M], [N,1,1,1,1]
``global_nerfs``                     [M, 3, G, R, R]     ``nerfs/global_planes`` once more
``renderer/decoder.net.0.weight``    [64, F]             ``.bias`` [64]
``renderer/decoder.net.2.weight``    [1 + c, 64]         ``.bias`` [1 + c]; the density comes first
===================================  ==================  ==============================================

A scene's planes are local_planes, then (or plus, with ``fusion_mode: sum``) sum_k coefs_k global_planes_k + bias, which
is `igae.scenes.planes` with other names. How rays are sampled is in the ``config.yaml`` that the code writes beside
the file.

Two things are otherwise than there. Samples by importance are stratified and drawn from the intervals themselves, which
moves a pixel by no more than another draw does; and the decoder gets latents clamped at 1 - 1e-3, not 1 - 1e-4.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igae.config import ConfigError, parse
from igae.export.model import Content
from igae.models import IGAE, Autoencoder, AutoencoderConfig, load_autoencoder
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig

SCALE = 0.02
SAMPLING = {"ray_start": 0.5, "ray_end": 2.1, "box_warp": 2, "depth_resolution": 48, "depth_resolution_importance": 48}
"""What the published default configuration says."""
WHITE = {
    4: [0.6176, 0.5711, 0.5046, 0.4422],
    16: [0.4090, 0.5550, 0.4015, 0.5846, 0.4492, 0.5380, 0.5314, 0.4108]
    + [0.5015, 0.6012, 0.4245, 0.5039, 0.4920, 0.4955, 0.5296, 0.4999],
}
"""Latent channels -> the field's background in [0, 1]: of Stable Diffusion 1.5's and of ostris/vae-kl-f8-d16."""
DECODER = {"net.0.weight": "w1", "net.0.bias": "b1", "net.2.weight": "w2", "net.2.bias": "b2"}


def read_published(path: Path, settings: Mapping[str, Any] | None = None, config: str | None = None) -> Content:
    """What an export is made of, from the file of the published code. Nothing in it is executed.

    Args:
        settings: the published code's configuration; its defaults where left out.
        config: folder or hub id of a diffusers AutoencoderKL whose architecture the file's has; if left out it is read
            off the weights' shapes, with 32 groups of normalization, as all of Stable Diffusion's have.

    Raises:
        ValueError: it is not such a file, or uses what this package doesn't have; the sentence names it.
    """
    vae, nerfs, renderer = _parts(path)
    settings = settings or {}
    if settings.get("rgb_override"):
        raise ValueError(f"{path} holds RGB scenes (rgb_override), and only latent ones can be imported")
    options, background = _sampling(settings, path)
    mlp = _decoder(renderer, path)
    planes, rows = _planes(nerfs, settings, path)
    features, channels = mlp["w1"].shape[1], len(mlp["b2"]) - 1
    if planes.features != features:
        raise ValueError(
            f"{path}: its scenes have {planes.features} features and its decoder takes {features}; features of "
            "coordinates or directions can't be imported, and fusion_mode has to be that of config.yaml"
        )
    size = int(_get(settings, "dataset.img_size", 128))
    autoencoder = _autoencoder(vae, config, float(_get(settings, "vae.normalization.scale", SCALE)), path)
    model = IGAE(autoencoder, planes, options, (size, size), (1.0, 1.0, 1.0))
    if model.latent_shape[0] != channels:
        raise ValueError(f"{path}: its decoder makes {channels} channels and its latents have {model.latent_shape[0]}")
    model.mlp.load_state_dict(mlp)
    if model.base is not None:
        model.base.load_state_dict({"planes": nerfs["global_planes"].float().permute(0, 1, 3, 4, 2)})
    background = WHITE.get(channels) if background is None else background
    if background is None:
        model.refresh_background()
    else:
        model.background.copy_(torch.tensor(background, dtype=torch.float32).expand_as(model.background))
    names = [f"scene-{i:05d}" for i in range(len(nerfs["local_planes"]))]
    source = f"From `{path.name}`, weights of the code published with the paper (github.com/k-kassab/igae)."
    return Content(model, (1.0, 1.0, 1.0), names, planes, rows, source)


def _parts(path: Path) -> list[dict[str, Tensor]]:
    """The three state dictionaries."""
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give the gvae_latest.pt that the published code wrote") from None
    except Exception as error:  # of pickle, of zip files, of torch
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} can't be read as weights alone: {text}") from None
    parts = []
    for name in ("vae", "nerfs", "renderer"):
        part = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
            raise ValueError(f"{path} has no weights {name}: it is no gvae_latest.pt of the published code")
        parts.append({str(key): value.detach() for key, value in part.items()})
    return parts


def _get(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the published configuration, by its dotted key."""
    value: Any = settings
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def _sampling(settings: Mapping[str, Any], path: Path) -> tuple[RenderOptions, list[float] | None]:
    """Render options, and the background where the configuration has it."""
    given: dict[str, Any] = {**SAMPLING, **_get(settings, "latent_nerf.rendering_options", {})}
    reduce = {"sum": "sum", "prod": "product"}.get(_get(settings, "latent_nerf.aggregation_mode", "sum"))
    if given.get("clamp_mode", "softplus") != "softplus" or reduce is None:
        raise ValueError(f"{path}: its configuration has another clamp_mode or aggregation_mode than can be imported")
    background = given.get("bg_color")
    try:
        options = RenderOptions(
            near=given["ray_start"],
            far=given["ray_end"],
            box=float(given["box_warp"]),
            coarse_samples=int(given["depth_resolution"]),
            fine_samples=int(given["depth_resolution_importance"]),
            spacing="disparity" if given.get("disparity_space_sampling") else "depth",
            axes="eg3d",
            reduce=reduce,  # type: ignore[arg-type]
        )
        return options, None if background is None else [float(value) for value in background]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration's latent_nerf.rendering_options are impossible: {error}") from None


def _decoder(renderer: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Parameters of the decoding MLP."""
    try:
        mlp = {own: renderer[f"decoder.{name}"].float() for name, own in DECODER.items()}
    except KeyError as error:
        raise ValueError(f"{path} has no renderer/{error.args[0]}: it is none of the published code") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in mlp.items()}
    hidden, out = 64, len(mlp["b2"]) if mlp["b2"].ndim else 0
    if shapes != {"w1": (hidden, *shapes["w1"][1:2]), "b1": (hidden,), "w2": (out, hidden), "b2": (out,)} or out < 2:
        raise ValueError(f"{path}: its decoder has shapes {shapes}, and {hidden} hidden features can be imported")
    return mlp


def _planes(
    nerfs: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path
) -> tuple[PlanesConfig, Callable[[int, int], Tensor]]:
    """What a scene's row is, and rows [stop - start, *row_shape]."""
    own, base = nerfs.get("local_planes"), nerfs.get("global_planes")
    if own is None or own.ndim != 5 or own.shape[1] != 3 or own.shape[3] != own.shape[4] or not len(own):
        raise ValueError(f"{path} has no nerfs/local_planes [scenes, 3, features, R, R]")
    scenes, _, micro, resolution, _ = own.shape
    channels_last = (0, 1, 3, 4, 2)
    if base is None:
        plain = PlanesConfig(resolution=resolution, features=micro)
        return plain, lambda start, stop: own[start:stop].float().permute(channels_last).contiguous()
    coefs, bias = nerfs.get("coefs"), nerfs.get("bias", torch.zeros(scenes, 1, 1, 1, 1))
    good = base.ndim == 5 and base.shape[1:] == (3, base.shape[2], resolution, resolution)
    if not good or coefs is None or coefs.shape != (scenes, len(base)) or bias.shape != (scenes, 1, 1, 1, 1):
        raise ValueError(f"{path}: nerfs/global_planes, coefs and bias don't fit its {scenes} scenes")
    added = _get(settings, "global_latent_nerf.fusion_mode", "concat") == "sum"
    if added and base.shape[2] != micro:
        raise ValueError(f"{path}: fusion_mode is sum, and its local and global planes have different features")
    parts = [own.permute(channels_last).flatten(1), coefs, bias.flatten(1)] if micro else [coefs, bias.flatten(1)]
    config = PlanesConfig(
        resolution=resolution,
        features=micro if added else micro + base.shape[2],
        base_planes=len(base),
        micro_features=micro,
        macro_features=base.shape[2],
        fusion="sum" if added else "concat",
        bias=True,
    )
    return config, lambda start, stop: torch.cat([part[start:stop].float() for part in parts], 1)


def _autoencoder(vae: Mapping[str, Tensor], config: str | None, scale: float, path: Path) -> Autoencoder:
    import diffusers

    try:
        if config is not None:
            found = diffusers.AutoencoderKL.load_config(config)
            create = {key: value for key, value in found.items() if not key.startswith("_")}
        else:
            create = architecture(vae)
        autoencoder = load_autoencoder(AutoencoderConfig(create=create, scale=scale))
        autoencoder.net.load_state_dict(vae)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path}: its autoencoder can't be built ({last}): name one of the same architecture, --autoencoder FOLDER"
        ) from error
    return autoencoder


def architecture(vae: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the AutoencoderKL that weights are of, as their shapes tell."""
    blocks = 1 + max(int(match[1]) for name in vae if (match := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    layers = 1 + max(int(m[1]) for name in vae if (m := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", name)))
    return {
        "block_out_channels": [len(vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": layers,
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in vae,
    }


def read_settings(path: Path) -> Mapping[str, Any]:
    """The published code's configuration. Raises ValueError where the file is none."""
    try:
        tree = parse(path.read_text(encoding="utf-8"), "YAML")
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} can't be read as the published code's configuration: {text}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no configuration of the published code: it has no keys")
    return tree
