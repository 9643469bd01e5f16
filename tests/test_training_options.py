# SPDX-License-Identifier: Apache-2.0
"""Small runs with other settings than the recipe's train."""

import pytest
import runs
import torch

from igae import config
from igae.training import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")
NO_JOINT = "train.joint.epochs=0"


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.joint.alternate=true"],
        ["train.precision=bf16"],
        ["train.joint.weights.depth_tv=0.01", "autoencoder.latents=mean", "autoencoder.scale=0.5"],
        [
            "train.joint.learning_rates={decoder: 1.0e-4}",
            "train.joint.schedule=multistep",
            "train.joint.milestones=[1]",
        ],
        ["render.axes=eg3d", "render.reduce=product", "render.near=0.7", "render.far=1.9", "data.workers=0"],
        [
            "autoencoder={create: {_class_name: AutoencoderTiny, encoder_block_out_channels: [8, 8], "
            "decoder_block_out_channels: [8, 8], num_encoder_blocks: [1, 1], num_decoder_blocks: [1, 1]}, scale: auto}"
        ],
        ["autoencoder={path: identity}", "render.patch=1", "train.joint.epochs=0"],
        runs.PLAIN,
        ["render.rays_per_pixel=2", "train.joint.augment={zoom: 2.0}", "train.warmup.augment={rotate: 180}"],
        [
            "train.warmup.epochs=0",
            "train.joint.batch_size=0",
            "train.joint.weights={latent: 0, natural_ae: 1}",
            "train.joint.learning_rates={encoder: 1.0e-4, decoder: 1.0e-4}",
        ],
    ],
    ids=[
        "alternate",
        "bf16",
        "depth",
        "decoder-only",
        "render",
        "tiny",
        "rgb",
        "plain",
        "areas",
        "natural_images-only",
    ],
)
def test_options_train(recipe_file: str, overrides: list[str]) -> None:
    short = [f"train.{s}.epochs=0.5" for s in ("warmup", "joint") if not any(f"{s}.epochs" in o for o in overrides)]
    recipe = config.load(Recipe, recipe_file, [*short, *overrides])
    trainer = Trainer(recipe)
    before = trainer.store.rows.clone()
    figures = trainer.run()
    assert figures and all(value == value for value in figures.values())
    assert trainer.progress.finished and trainer.progress.skipped == 0
    assert torch.equal(before, trainer.store.rows) == ("train.joint.batch_size=0" in overrides)


def test_a_stage_has_its_least_steps_however_few_its_views_are(recipe_file: str) -> None:
    recipe = config.load(Recipe, recipe_file, ["train.warmup.epochs=0.5", "train.warmup.min_steps=7", NO_JOINT])
    trainer = Trainer(recipe)
    trainer.run()
    assert trainer.progress.total == 7  # half an epoch is 4


def test_least_steps_shorten_nothing(recipe_file: str) -> None:
    recipe = config.load(Recipe, recipe_file, ["train.warmup.epochs=1", "train.warmup.min_steps=7", NO_JOINT])
    trainer = Trainer(recipe)
    trainer.run()
    assert trainer.progress.total == 8  # 34 views, 4 a step
