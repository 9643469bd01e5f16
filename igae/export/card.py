# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: a README with metadata that model hubs read."""

from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from igae.export.layout import Description

if TYPE_CHECKING:
    from igae.export.writer import Content

SHOWN = {
    "heldout/rgb_psnr": "PSNR of decoded renders, held-out views (dB)",
    "heldout/rgb_ssim": "SSIM of decoded renders, held-out views",
    "heldout/latent_psnr": "PSNR of rendered latents, held-out views (dB)",
    "heldout/ae_psnr": "PSNR of autoencoded held-out views (dB)",
    "natural/ae_psnr": "PSNR of autoencoded natural images (dB)",
}


def model_card(description: Description, where: str, content: "Content") -> str:
    """The text of README.md.

    Args:
        where: target of the export, without credentials.
    """
    figures = {name: content.figures[name] for name in SHOWN if name in content.figures}
    place = where.removeprefix("hf://")
    name = place.rstrip("/").rsplit("/", 1)[-1] or "export"
    data = ModelCardData(
        library_name="igae",
        tags=["igae", "autoencoder", "tri-planes", "3d", "arxiv:2410.22936"],
        model_name=name if figures else None,
        eval_results=[
            EvalResult(
                task_type="image-to-3d",
                dataset_type="views",
                dataset_name="views of its own scenes" if key.startswith("heldout") else "natural images",
                metric_type=key.rsplit("_", 1)[-1],
                metric_name=SHOWN[key],
                metric_value=round(value, 4),
            )
            for key, value in figures.items()
        ]
        or None,
    )
    channels = content.model.mlp.out_channels
    height, width = content.model.latent_shape[1:]
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}\n"]
    if description.autoencoder is None:
        parts.append(f"{description.scenes} RGB tri-plane scenes of igae, rendered at {width} x {height} pixels.\n")
    else:
        parts.append(
            "An inverse graphics autoencoder ([arXiv 2410.22936](https://arxiv.org/abs/2410.22936)): an image "
            f"autoencoder and {description.scenes} 3D scenes, tri-planes in its latent space. Renders are latents of "
            f"{channels} channels, {width} x {height}; decoded they are images of {description.image_size[1]} x "
            f"{description.image_size[0]} pixels.\n"
        )
    parts.append(f"{content.source}\n")
    if figures:
        lines = "\n".join(f"| {SHOWN[key]} | {value:.4g} |" for key, value in figures.items())
        parts.append(f"| measured | |\n|---|---|\n{lines}\n")
    if description.autoencoder is not None:
        code = _autoencoder(description.autoencoder, where)
        parts.append(f"## The autoencoder\n\nIt needs diffusers alone:\n\n{code}")
        scale = float(content.model.autoencoder.scale)
        parts.append(f"Scenes are rendered in normalized latents, tanh({scale:.6g} z) of the autoencoder's z.\n")
    if description.scenes:
        parts.append(f"## A scene\n\n{_scene(where, content)}")
    if content.config is not None:
        parts.append(f"## Configuration\n\nOf the run (`config.yaml`):\n\n```yaml\n{content.config.rstrip()}\n```\n")
    return "\n".join(parts)


def _autoencoder(cls: str, where: str) -> str:
    repo, _, folder = where.rstrip("/").removeprefix("hf://").partition("/")
    name, _, rest = folder.partition("/")
    path, options = where, ""
    if where.startswith("hf://"):
        name, _, revision = name.partition("@")
        path = f"{repo}/{name}"
        options = (f', revision="{revision}"' if revision else "") + (f', subfolder="{rest}"' if rest else "")
    elif "://" in where:
        path = "a local copy of this folder"
    return f'```python\nfrom diffusers import {cls}\n\nautoencoder = {cls}.from_pretrained("{path}"{options})\n```\n'


def _scene(where: str, content: "Content") -> str:
    distance, focal = (f"{value:.4g}" for value in content.camera)
    shape = ", ".join(map(str, content.model.plain.shape[2:]))
    return f"""```python
import torch
from igae.data import orbit
from igae.export import Export

export = Export("{where}")
scene = export.scene({content.scenes[0]!r})  # export.names has all names
cam2world = orbit(8, radius={distance}, elevation=0.3)  # [8, 4, 4], OpenCV
intrinsics = torch.tensor([[{focal}, 0, 0.5], [0, {focal}, 0.5], [0, 0, 1]])  # divided by width and height
images = scene.image(cam2world, intrinsics)  # uint8 [8, {shape}, 3]
latents, depth, opacity = scene.render(cam2world, intrinsics)
```
"""
