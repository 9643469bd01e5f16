# SPDX-License-Identifier: Apache-2.0
"""Training steps for benchmarks: shards, a model of Stable Diffusion's size with random weights, and stages that are in
the middle of a long training."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from igae import config
from igae.data import CameraSummary, LatentCache, Manifest, Scene, Scenes, Shard, Shards, ShardWriter, ViewBatch, orbit
from igae.models import IGAE
from igae.scenes import SceneStore
from igae.training import Engine, RankData, Recipe, Stage, StageState, Strategy, compute_in

ROOT = Path(__file__).resolve().parent.parent

AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
}
VIEWS = 2  # of a scene
STEP = 20_000  # where in training the planes' optimizer is


def write_data(folder: Path, scenes: int, size: int, shard_scenes: int = 100) -> str:
    """Shards of `scenes` scenes and 1,000 natural images, with few different pictures in them."""
    root = folder / f"shards-{scenes}"
    root.mkdir()
    rng, poses = np.random.default_rng(0), orbit(16, 1.3, 0.4).tolist()
    pictures = []
    for _ in range(16):
        out = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(out, "PNG")
        pictures.append(out.getvalue())
    lens = [[1.1, 0.0, 0.5], [0.0, 1.1, 0.5], [0.0, 0.0, 1.0]]
    shards: list[Shard] = []
    for start in range(0, scenes, shard_scenes):
        name = f"scenes-{len(shards):05d}.tar"
        writer = ShardWriter(str(root / name), name, "scenes")
        with writer:
            for view in range(VIEWS):
                for scene in range(start, min(start + shard_scenes, scenes)):
                    place = (scene * 7 + view * 5) % 16
                    camera = json.dumps({"cam2world": poses[place], "intrinsics": lens}).encode()
                    members = {"png": pictures[place], "json": camera}
                    writer.add(f"scene_{scene}/{view}", members, f"scene_{scene}")
        shards.append(writer.entry())
    writer = ShardWriter(str(root / "images-00000.tar"), "images-00000.tar", "images")
    with writer:
        for i in range(1000):
            writer.add(f"images/{i}", {"png": pictures[i % 16]})
    listed = Scenes.of(Scene(i, f"scene_{i}", "toys", VIEWS, 0) for i in range(scenes))
    cameras = CameraSummary(1.3, 1.3, 1.3, 1.1)
    every = Shards.of([*shards, writer.entry()], listed)
    Manifest((size, size), 0, "toys", every, listed, 1000, cameras).save(str(root))
    return str(root)


def recipe_of(stage: str, shards: str, overrides: list[str]) -> Recipe:
    settings = [
        f"data.root={shards}",
        f"autoencoder={{create: {json.dumps(AUTOENCODER)}, scale: 0.1}}",
        "train.joint.weights.natural_lpips=0",  # its weights are a download
        "train.precision=" + ("bf16" if torch.cuda.is_available() else "fp32"),
        *overrides,
    ]
    return config.load(Recipe, str(ROOT / "configs" / "igae.yaml"), settings)


def random_latents(model: IGAE, data: RankData, device: torch.device) -> LatentCache:
    """A cache as after encoding, without the time that it takes."""
    scene = torch.tensor([scene.id for scene in data.owned]).repeat(VIEWS)
    cameras = orbit(16, 1.3, 0.4)[torch.arange(len(scene)) % 16]
    lens = torch.tensor([[1.1, 0.0, 0.5], [0.0, 1.1, 0.5], [0.0, 0.0, 1.0]]).expand(len(scene), 3, 3).contiguous()
    views = ViewBatch(torch.zeros(len(scene), 1), scene, scene, cameras, lens, torch.zeros(len(scene), 1), scene > 0)

    def encode(_: ViewBatch, variant: int) -> dict[str, torch.Tensor]:
        latents = torch.randn(len(scene), *model.latent_shape, device=device)
        return {"latents": latents, "cam2world": cameras.to(device), "intrinsics": lens.to(device)}

    return LatentCache([views], encode)


def model_of(recipe: Recipe, engine: Engine) -> IGAE:
    """The model, computed as in a run of the recipe."""
    data = RankData.split(recipe)
    model = IGAE.from_recipe(recipe, data.manifest.image_size, engine.device)
    model.refresh_background()
    compute_in("fp32" if recipe.train.precision == "fp32" else "bf16", model, engine)
    return model


def alone(engine: Engine, async_steps: bool = False) -> Engine:
    """An engine of this process only, beside one that may have others."""
    single: Engine = object.__new__(Engine)
    single.device, single._strategy = engine.device, Strategy(engine.device, async_steps)
    return single


class PreparedStage(Stage):
    """A stage whose latents are random, so that nothing has to be encoded."""

    def encode_views(self) -> LatentCache:
        return random_latents(self.model, self.data, self.engine.device)


def prepare(engine: Engine, model: IGAE, stage: str, recipe: Recipe) -> Stage:
    """A stage of this process's part of the scenes, in the middle of a long training."""
    data, device = RankData.split(recipe), engine.device
    # Planes of all scenes at once: one generator a scene takes long on one core.
    store = SceneStore(recipe.planes, [scene.id for scene in data.owned], None, device)
    store.rows.normal_(0, 0.1)
    result = PreparedStage("warmup" if stage == "warmup" else "joint", recipe, engine, model, store, data, StageState())
    count, moments = len(store), store.state_dict()
    last = STEP - torch.randint(0, max(1, count // result.config.batch_size), (count,))
    moments["exp_avg"].normal_(0, 1e-6)
    moments["exp_avg_sq"].fill_(1e-10)
    rates = torch.full((STEP,), 1e-4, dtype=torch.float64)
    store.load_state_dict({**moments, "updated": last, "visited": last, "learning_rates": rates})
    store.reserve(result.steps)
    return result
