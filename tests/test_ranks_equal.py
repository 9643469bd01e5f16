# SPDX-License-Identifier: Apache-2.0
"""What N ranks compute under each strategy is what one rank computes with a batch N times as large."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
from plug_ins import importable, registered
from scene_files import open_images, open_views
from slow_ownership import assign
from torch import Tensor

from igae import config
from igae.data import Manifest, ViewBatch
from igae.models import IGAE
from igae.ranks import Channel, rank, world_size
from igae.scenes import SceneStore
from igae.training import Engine, RankData, Recipe, Stage, StageState

STEPS = 8
POISONED = 3


def small_recipe(folder: Path, *overrides: str) -> Recipe:
    # The published learning rates: larger ones amplify rounding, by Adam's division of small gradients by small ones.
    rates = {"encoder": 5e-5, "decoder": 5e-5, "mlp": 1e-4, "planes": 1e-4}
    settings = [f"train.joint.learning_rates.{part}={rate}" for part, rate in rates.items()]
    settings += ["train.joint.decay=1.0", "autoencoder.latents=mean", "autoencoder.scale=0.3"]
    # How a view is moved depends, as the noise of samples does, on its place in a batch and on the rank that has it.
    settings += [*runs.NOT_AUGMENTED, *overrides]
    return config.load(Recipe, str(folder / "recipe.yaml"), settings)


def every_view(recipe: Recipe, manifest: Manifest) -> dict[int, ViewBatch]:
    """All training views by scene."""
    loader = open_views(
        recipe.data.root, manifest, manifest.scenes, batch_size=1000, shuffle=0, repeat=False, workers=0
    )
    views = next(loader)
    loader.close()
    return {scene.id: pick(views, views.scene == scene.id) for scene in manifest.scenes}


def pick(batch: ViewBatch, which: Tensor) -> ViewBatch:
    return ViewBatch(**{name: value[which] for name, value in vars(batch).items()})


def join(batches: list[ViewBatch]) -> ViewBatch:
    return ViewBatch(**{name: torch.cat([vars(b)[name] for b in batches]) for name in vars(batches[0])})


class Fixed:
    """A stream of given batches."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = iter(batches)

    def __next__(self) -> Any:
        return next(self._batches)

    def close(self) -> None:
        pass


def train(
    folder: str, strategy: str, parts: list[list[int]], accumulate: int = 1, merge: bool = False, *overrides: str
) -> dict[str, Tensor]:
    """STEPS joint steps; the loss of the last rank is not a number in step POISONED.

    Args:
        parts: scenes of each of the ranks that are imitated or real; a batch has views of one scene of each, in turns,
            so that the union of the batches is the same however many ranks there are.
        merge: make one batch of the `accumulate` batches of a step.
        overrides: of the recipe.

    Returns:
        Shared weights and their moments, norms of gradients in the first and the last step, and planes and their
        moments by scene id.
    """
    os.environ.update(ranks.launch_environment(strategy))
    recipe = small_recipe(Path(folder), f"train.joint.accumulate={1 if merge else accumulate}", *overrides)
    if not set(overrides) & set(FROZEN):
        ranks.send_in_buckets()
    engine = Engine()
    data = RankData.split(recipe)
    if world_size() > 1:
        assert [[scene.id for scene in part] for part in data.parts] == parts
    model, poison = build(recipe, data.manifest), False
    # Fixed sample positions: random ones depend on the place of a view in its batch.
    model.register_forward_pre_hook(lambda _, arguments: (*arguments[:5], None, *arguments[6:]))

    def poisoned(_: IGAE, __: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses | {"total": losses["total"] * torch.nan} if poison and rank() == world_size() - 1 else losses

    model.register_forward_hook(poisoned)
    store = SceneStore(recipe.planes, [scene.id for scene in data.owned], recipe.seed, engine.device)
    stage = Stage("joint", recipe, engine, model, store, data, StageState())
    stage.close()
    views = every_view(recipe, data.manifest)
    natural_images = open_images(recipe.data.root, data.manifest, batch_size=11, shuffle=0, repeat=False, workers=0)
    images = next(natural_images)
    natural_images.close()
    mine = [rank()] if world_size() > 1 else list(range(len(parts)))
    view_batches, natural_batches = [], []
    for micro in range(STEPS * accumulate):
        chosen = []
        for part in (parts[i] for i in mine):
            scene = views[part[micro % len(part)]]
            chosen.append(pick(scene, (torch.arange(2) + 2 * micro) % len(scene.view)))
        view_batches.append(join(chosen))
        natural_batches.append(images[torch.tensor([(micro * len(parts) + i) % 11 for i in mine])])
    if merge:
        view_batches = [join(view_batches[i : i + accumulate]) for i in range(0, len(view_batches), accumulate)]
        natural_batches = [
            torch.cat(natural_batches[i : i + accumulate]) for i in range(0, len(natural_batches), accumulate)
        ]
    stage.refresh_every = 4
    stage.streams = {"views": Fixed(view_batches), "natural_images": Fixed(natural_batches)}
    channel, norms = Channel(), {}
    start = {name: value.clone() for name, value in model.named_parameters()}
    for step in range(STEPS):
        poison = step == POISONED
        outcome = stage.step(step)
        assert outcome.read() == (not poison, False)
        if step in (0, STEPS - 1):
            for name, value in stage.meter.read(stage.taken, channel).items():
                if name.startswith("grad_norm/"):
                    norms[f"norms/{step}/{name}"] = torch.tensor(value, dtype=torch.float64)
        if step == 0:
            with engine.weights():
                still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
            trains = recipe.train.joint.learning_rates.encoder > 0
            frozen = [] if trains else [name for name in start if name.startswith("autoencoder.")]
            assert still == frozen, f"one step did not move {still}"
    moments = engine.optimizer_state()
    store.catch_up()
    engine.finish()
    result = {f"weights/{k}": v.clone() for k, v in model.state_dict().items()}
    result |= {f"moments/{k}": v.clone() for k, v in moments.items()} | norms
    planes = {}
    for row, i in enumerate(store.ids.tolist()):
        planes[f"planes/{i}"] = store.rows[row].clone()
        # Adam's steps don't depend on the scale of gradients, and its moments do.
        planes[f"plane moments/{i}"] = store.state_dict()["exp_avg"][row].clone()
    for part in Channel().gather(planes):
        result |= part
    engine.close()
    return result


def build(recipe: Recipe, manifest: Manifest) -> IGAE:
    from igae.models import load_autoencoder

    model = IGAE(load_autoencoder(recipe.autoencoder, 1), recipe.planes, recipe.render, manifest.image_size, seed=2)
    model.refresh_background()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equal")
    runs.recipe_file(folder, runs.packed_data(folder))
    return folder


def owned(folder: Path, world: int) -> list[list[int]]:
    manifest = Manifest.load(str(folder / "shards"))
    ids = {scene.name: scene.id for scene in manifest.scenes}
    shards = [{ids[name]: n for name, n in shard.scenes.items()} for shard in manifest.shards if shard.kind == "scenes"]
    return assign(shards, world)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    worst: dict[str, float] = {}
    for name in a:
        # The softmax of an attention does not depend on the keys' bias: its gradient is 0, and Adam divides rounding
        # by rounding there. It moves by a learning rate a step at most.
        kind = "keys" if name.endswith("to_k.bias") else name.partition("/")[0]
        unit = float(b[name].abs().max()) if kind in ("plane moments", "norms") else 1.0
        worst[kind] = max(worst.get(kind, 0.0), float((a[name].double() - b[name].double()).abs().max()) / unit)
    return worst


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, dict[str, Tensor]]:
    """What one rank computes with the batches of 2 and of 3 ranks together."""
    return {world: ranks.run(train, 1, str(folder), "ddp", owned(folder, world))[0] for world in (2, 3)}


@pytest.mark.parametrize(
    ("strategy", "world"),
    [("ddp", 3), ("zero1", 2), ("zero2", 3), ("zero3", 2), ("fsdp2", 3)],  # two under ddp and fsdp2: below
)
def test_ranks_compute_what_one_rank_computes(
    folder: Path, alone: dict[int, dict[str, Tensor]], strategy: str, world: int
) -> None:
    results = ranks.run(train, world, str(folder), strategy, owned(folder, world))
    difference = largest_difference(results[0], alone[world])
    # Measured: weights 1.2e-7, moments 1.7e-7, planes 2.3e-6, their moments 5.1e-6, keys' biases 1.8e-5.
    assert difference["weights"] < 1e-6 and difference["moments"] < 1e-6, difference
    assert difference["planes"] < 1e-5 and difference["plane moments"] < 1e-5, difference
    assert difference["keys"] < STEPS * 5e-5, difference
    assert sum(name.startswith("norms/") for name in results[0]) == 2 * 4
    assert difference["norms"] < 1e-4, difference  # measured 1.4e-6
    for other in results[1:]:
        assert max(largest_difference(results[0], other).values()) == 0


FROZEN = ("train.joint.learning_rates.encoder=0", "train.joint.learning_rates.decoder=0")


def test_gradients_that_are_exchanged_at_once_are_the_same(folder: Path) -> None:
    """Under DDP with a frozen autoencoder, as in a warm-up; with two batches a step."""
    parts = owned(folder, 3)
    together = ranks.run(train, 1, str(folder), "ddp", parts, 2, True, *FROZEN)[0]
    results = ranks.run(train, 3, str(folder), "ddp", parts, 2, False, *FROZEN)
    difference = largest_difference(results[0], together)
    # Measured: weights 7.2e-7, moments 4.7e-9, planes 4.6e-7, their moments 3.7e-6, norms 7.9e-7.
    assert difference["weights"] < 5e-6 and difference["moments"] < 1e-6, difference
    assert difference["planes"] < 1e-5 and difference["plane moments"] < 1e-5, difference
    assert sum(name.startswith("norms/") for name in together) == 2 * 2 and difference["norms"] < 1e-4, difference
    for other in results[1:]:
        assert max(largest_difference(results[0], other).values()) == 0


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_batches_that_are_taken_one_after_another_count_as_one(folder: Path, strategy: str) -> None:
    parts = owned(folder, 2)
    together = ranks.run(train, 1, str(folder), "ddp", parts, 2, True)[0]
    split = ranks.run(train, 2, str(folder), strategy, parts, 2)[0]
    difference = largest_difference(split, together)
    # Measured: weights 1.1e-7, moments 7.5e-8, planes 2.5e-7, their moments 3.6e-6.
    assert difference["weights"] < 1e-6 and difference["moments"] < 1e-6, difference
    assert difference["planes"] < 1e-5 and difference["plane moments"] < 1e-5, difference
    assert difference["norms"] < 1e-4, difference  # measured 1.4e-6


BASE_PLANES = (
    "render.patch=1",
    "planes={resolution: 8, features: 8, base_planes: 3, micro_features: 3, macro_features: 5, bias: true}",
    "train.joint.learning_rates.base_planes=1e-4",
    "train.joint.weights.base_orthogonality=0.1",
)


PLUG_IN = "train.joint.weights.plugins={rough: 3.0}"
ROUGH = """
def rough(inputs):
    steps = (inputs.decoded - inputs.images).diff(dim=-1)
    return steps.square().mean() + (inputs.opacity * (1 - inputs.opacity)).mean()


rough.needs_images = True
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package with a loss, for processes that start meanwhile too."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "roughness.py").write_text(ROUGH)
    registered(folder, "roughness", "losses", rough="roughness:rough")
    with importable(folder):
        yield


@pytest.fixture(scope="module")
def alone_with_base_planes(folder: Path, installed: None) -> dict[str, Tensor]:
    arguments = (str(folder), "ddp", owned(folder, 2), 1, False, *BASE_PLANES)
    result: dict[str, Tensor] = ranks.run(train, 1, *arguments, PLUG_IN)[0]
    without = largest_difference(ranks.run(train, 1, *arguments)[0], result)
    assert without["weights"] > 1e-5 and without["planes"] > 1e-5 and without["norms"] > 0.1, "the loss has no effect"
    return result


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_ranks_share_base_planes(folder: Path, alone_with_base_planes: dict[str, Tensor], strategy: str) -> None:
    """Base planes are shared weights; weights of them and biases are of a scene, in its row. With a loss of another
    package."""
    results = ranks.run(train, 2, str(folder), strategy, owned(folder, 2), 1, False, *BASE_PLANES, PLUG_IN)
    assert results[0]["weights/base.planes"].shape == (3, 3, 8, 8, 5)
    assert all(results[0][f"planes/{i}"].shape == (3 * 8 * 8 * 3 + 3 + 1,) for part in owned(folder, 2) for i in part)
    difference = largest_difference(results[0], alone_with_base_planes)
    # Measured: weights 1.2e-7, moments 1.3e-7, planes 5.7e-7, their moments 4.1e-6.
    assert difference["weights"] < 1e-6 and difference["moments"] < 1e-6, difference
    assert difference["planes"] < 1e-5 and difference["plane moments"] < 2e-5, difference
    assert sum(name.startswith("norms/") for name in results[0]) == 2 * 5 and difference["norms"] < 1e-4, difference
    assert max(largest_difference(*results).values()) == 0
