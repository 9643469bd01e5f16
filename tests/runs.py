# SPDX-License-Identifier: Apache-2.0
"""Small training runs for tests: a few 16 x 16 scenes and a tiny autoencoder, seconds on a core."""

import hashlib
import json
import os
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file
from scene_files import cut_out, write_data

from igae import checkpoint
from igae.data import PackOptions, pack
from igae.models.autoencoder import Autoencoder, load_autoencoder
from igae.models.config import AutoencoderConfig
from igae.training import CapturedStep, Stage, StageName, Trainer

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TINY = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}

RECIPE = """
experiment: run
data: {workers: 1, shuffle: 16}
autoencoder:
  create:
    _class_name: AutoencoderKL
    down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
    up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
    block_out_channels: [8, 8]
    layers_per_block: 1
    latent_channels: 4
    norm_num_groups: 4
  scale: auto
planes: {resolution: 8, features: 8}
render: {coarse_samples: 4, fine_samples: 2, patch: 2}
train:
  warmup:
    epochs: 4
    batch_size: 4
    learning_rates: {planes: 1.0e-2, mlp: 1.0e-2}
    augment: {shift: 2, zoom: 1.1, rotate: 10, variants: 2}
    weights: {latent: 1, planes_tv: 1.0e-4, opacity: 0.1, distortion: 1.0e-3}
  joint:
    epochs: 4
    batch_size: 4
    natural_images: 2
    learning_rates: {encoder: 1.0e-4, decoder: 1.0e-4, planes: 1.0e-2, mlp: 1.0e-3}
    augment: {shift: 2, zoom: 1.1, rotate: 10}
    weights:
      {latent: 1, rgb: 1, ae: 0.1, natural_ae: 0.1, natural_tv: 1.0e-5, natural_kl: 1.0e-6, planes_tv: 1.0e-4,
       opacity: 0.1, distortion: 1.0e-3}
checkpoint: {every: 4}
evaluation: {views: 1, pictures: 0, orbits: 0, natural_images: 4}
tracking: {every: 3}
"""
NOT_AUGMENTED = [f"train.{stage}.augment={{}}" for stage in ("warmup", "joint")]
NO_MASKS = [f"train.{stage}.weights.{loss}=0" for stage in ("warmup", "joint") for loss in ("opacity", "distortion")]
PLAIN = ["render.patch=1", *NOT_AUGMENTED, *NO_MASKS]
"""Overrides of the recipe that leave out what is off by default."""


def packed_data(folder: Path) -> str:
    """Pack four scenes (34 training and 4 held-out views) and 11 natural images; returns the shards' folder.

    Scene 0 has alpha, scene 3 is in front of white without, and the others fill their views.
    """
    source = write_data(folder / "source", images=11)
    for scene, alpha in (("scene_0", True), ("scene_3", False)):
        for image in (source / "scenes" / "square16" / scene / "images").iterdir():
            cut_out(image, alpha)
    pack(
        str(folder / "shards"),
        PackOptions(scenes=str(source / "scenes"), subset="square16", images=str(source / "natural_images")),
    )
    return str(folder / "shards")


def recipe_file(folder: Path, shards: str) -> Path:
    """The recipe of small runs, on these shards and with its outputs in the folder."""
    recipe = yaml.safe_load(RECIPE)
    recipe["data"]["root"] = shards
    recipe["outputs"] = str(folder / "outputs")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def create_autoencoder(name: str, seed: int = 0, **settings: object) -> Autoencoder:
    """A tiny AutoencoderKL or AutoencoderTiny with random weights; latents have half the images' resolution."""
    created = {"_class_name": name, **(KL if name == "AutoencoderKL" else TINY)}
    return load_autoencoder(AutoencoderConfig(create=created, **settings), seed)  # type: ignore[arg-type]


class StaticTrainer(Trainer):
    """Makes its steps as those that a CUDA graph is captured from, also without a GPU."""

    warmup_calls = 10**9

    def open_stage(self, name: StageName) -> Stage:
        stage = super().open_stage(name)
        stage.run = CapturedStep(stage.run, stage.config.batch_size, self.model.refresh_background, self.warmup_calls)
        stage.meter.times_steps = False
        return stage


def train(recipe: str, *arguments: str) -> None:
    """What `python train.py --config RECIPE ARGUMENTS` does; ends the process if it fails."""
    import train

    if code := train.main(["--config", recipe, *arguments]):
        sys.stderr.flush()
        os._exit(code)


def digests(run: Path) -> dict[str, str]:
    """Digest of every tensor of the newest checkpoint."""
    newest = Path(checkpoint.list_complete(str(run / "checkpoints"))[-1])
    return {
        f"{newest.name}/{file.name}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def exported(run: Path) -> str:
    """Digest of the autoencoder in diffusers' format."""
    return hashlib.sha256((run / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def figures(run: Path) -> dict[str, float]:
    """What metrics.json says."""
    stages = json.loads((run / "metrics.json").read_text())
    return {f"{stage}/{name}": value for stage, found in stages.items() for name, value in found.items()}
