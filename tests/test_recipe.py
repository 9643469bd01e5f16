# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: its rules, the recipes that ship, and the course of the learning rates."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from hypothesis import given
from hypothesis import strategies as st

from igae import config
from igae.config import ConfigError
from igae.training import Recipe, StageConfig
from igae.training.recipe import log_once

CONFIGS = Path(__file__).parent.parent / "configs"


def stage(**values: Any) -> StageConfig:
    base: dict[str, Any] = {"epochs": 4, "batch_size": 4, "learning_rates": {"planes": 1e-2}, "weights": {}}
    return StageConfig(**{**base, **values})


def load_small(tmp_path: Path, change: dict[str, Any]) -> Recipe:
    """The recipe of small runs with some keys set."""
    recipe = copy.deepcopy(yaml.safe_load(runs.RECIPE))
    recipe["data"]["root"] = "shards"
    for key, value in change.items():
        node = recipe
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return config.load(Recipe, file)


NATURAL_WEIGHTS = {"latent": 0, "natural_ae": 1}

BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing to train on": (
        {"train.joint.batch_size": 0, "train.joint.natural_images": 0, "train.joint.weights": {"latent": 0}},
        "train.joint",
        "nothing to train on",
    ),
    "alternate without natural_images": (
        {"train.joint.alternate": True, "train.joint.natural_images": 0, "train.joint.weights": {"latent": 1}},
        "train.joint",
        "alternate",
    ),
    "alternate without views": (
        {"train.joint.alternate": True, "train.joint.batch_size": 0, "train.joint.weights": NATURAL_WEIGHTS},
        "train.joint",
        "alternate",
    ),
    "alternate with a frozen autoencoder": (
        {"train.joint.alternate": True, "train.joint.learning_rates": {"planes": 1e-2}},
        "train.joint",
        "alternate",
    ),
    "milestones of another schedule": ({"train.warmup.milestones": [3]}, "train.warmup", "milestones"),
    "natural_images without their losses": ({"train.warmup.natural_images": 2}, "train.warmup", "natural_"),
    "all rates 0": ({"train.warmup.learning_rates": {}}, "train.warmup", "learning_rates"),
    "negative rate": ({"train.joint.learning_rates.mlp": -1e-4}, "train.joint.learning_rates.mlp", "0"),
    "negative weight": ({"train.joint.weights.rgb": -1}, "train.joint.weights.rgb", "0"),
    "no decay": ({"train.joint.decay": 0}, "train.joint.decay", "0"),
    "growth": ({"train.joint.decay": 1.01}, "train.joint.decay", "1"),
    "schedule": ({"train.joint.schedule": "step"}, "train.joint.schedule", "multistep"),
    "negative epochs": ({"train.warmup.epochs": -1}, "train.warmup.epochs", "0"),
    "fraction of a view": ({"train.warmup.batch_size": 2.5}, "train.warmup.batch_size", "2.5"),
    "keep": ({"checkpoint.keep": 1}, "checkpoint.keep", "2"),
    "checkpoint every 0": ({"checkpoint.every": 0}, "checkpoint.every", "1"),
    "precision": ({"train.precision": "fp16"}, "train.precision", "bf16"),
    "plane optimizer of 0.1.0": ({"train.plane_optimizer": "lazy"}, "train: plane_optimizer is always exact", "NAME"),
    "max_skipped": ({"train.max_skipped": 0}, "train.max_skipped", "1"),
    "experiment with a slash": ({"experiment": "../evil"}, "experiment", "../evil"),
    "empty experiment": ({"experiment": ""}, "experiment", ""),
    "seed": ({"seed": -1}, "seed", "0"),
    "planes of one texel": ({"planes.resolution": 1}, "planes.resolution", "2"),
    "no features": ({"planes.features": 0}, "planes.features", "1"),
    "negative noise": ({"planes.init_std": -0.1}, "planes.init_std", "0"),
    "workers": ({"data.workers": -1}, "data.workers", "0"),
    "one orbit frame": ({"evaluation.orbit_frames": 1}, "evaluation.orbit_frames", "2"),
    "no evaluation views": ({"evaluation.views": 0}, "evaluation.views", "1"),
    "near without far": ({"render.near": 0.5}, "render", "auto"),
    "two autoencoders": ({"autoencoder.path": "demo"}, "autoencoder", "path or create"),
    "no autoencoder": ({"autoencoder": {"scale": 1.0}}, "autoencoder", "path or create"),
    "identity with image losses": (
        {"autoencoder": {"path": "identity"}, "train.joint.natural_images": 0, "train.joint.weights": {"rgb": 1}},
        "train.joint",
        "identity",
    ),
    "identity with natural images": (
        {"autoencoder": {"path": "identity"}, "train.joint.weights": {"natural_ae": 1}},
        "train.joint",
        "identity",
    ),
    "unknown key": ({"train.joint.weights.natural_lpip": 1}, "train.joint.weights.natural_lpip", "natural_lpips"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rules(name: str, tmp_path: Path) -> None:
    change, key, word = BROKEN[name]
    with pytest.raises(ConfigError) as error:
        load_small(tmp_path, change)
    text = str(error.value)
    assert key in text and word in text and "\n" not in text


@pytest.mark.parametrize("name", ["latent", "rgb", "ae", "planes_tv", "depth_tv"])
def test_losses_of_views_need_views(name: str) -> None:
    settings = {"batch_size": 0, "natural_images": 2, "learning_rates": {"encoder": 1e-4, "decoder": 1e-4}}
    assert stage(**settings, weights=NATURAL_WEIGHTS).batch_size == 0
    with pytest.raises(ValueError, match="batch_size"):
        stage(**settings, weights={**NATURAL_WEIGHTS, name: 1.0})


def test_views_need_a_loss() -> None:
    with pytest.raises(ValueError, match="weights|loss"):
        stage(weights={"latent": 0})


def test_a_stage_that_is_left_out_needs_nothing(tmp_path: Path) -> None:
    left_out = {"epochs": 0, "batch_size": 0, "learning_rates": {}, "weights": {"latent": 0}}
    assert load_small(tmp_path, {"train.warmup": left_out}).train.warmup.epochs == 0
    identity = {"autoencoder": {"path": "identity"}, "train.joint.epochs": 0}
    assert load_small(tmp_path, identity).autoencoder.path == "identity"


def as_of_a_model(data: dict[str, Any]) -> None:
    """What train.py adds to a configuration that names a model: here that of fused_planes_stage1.yaml."""
    if "model" in data:
        trained = yaml.safe_load(config.dump(config.load(Recipe, CONFIGS / "fused_planes_stage1.yaml")))
        for name in ("autoencoder", "planes", "render"):
            data[name] = {**trained[name], **data.get(name, {})}


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_recipes_that_ship_load(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_DIR", "/data")
    monkeypatch.setenv("IGAE_SHARDS", "/data/shards")
    monkeypatch.setenv("IGAE_MODEL", "/data/model")
    recipe = config.load(Recipe, CONFIGS / file, complete=as_of_a_model)
    assert recipe.experiment == file.removesuffix(".yaml")
    copied = tmp_path / "resolved.yaml"
    copied.write_text(config.dump(recipe))
    assert config.load(Recipe, copied) == recipe


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_recipes_that_ship_take_all_scenes(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any data have those; what the data of a publication are called is for the reader to say."""
    monkeypatch.setenv("IGAE_MODEL", "/data/model")
    assert config.load(Recipe, CONFIGS / file, complete=as_of_a_model).data.categories is None


@pytest.mark.parametrize("name", ["warmup", "joint"])
def test_without_natural_images_their_losses_are_off(name: str, tmp_path: Path) -> None:
    """Of whatever recipe the weights come from; all that needs them (LPIPS) goes by the weights."""
    losses = ["natural_ae", "natural_lpips", "natural_kl", "natural_tv"]
    change = {f"train.{name}.weights.{loss}": 0.5 for loss in losses} | {
        f"train.{name}.natural_images": 2,
        f"train.{name}.alternate": True,
        f"train.{name}.learning_rates": {"encoder": 1e-4, "decoder": 1e-4, "planes": 1e-2},
    }
    on = getattr(load_small(tmp_path, change).train, name)
    assert [getattr(on.weights, loss) for loss in losses] == [0.5] * 4
    off = config.load(Recipe, tmp_path / "recipe.yaml", [f"train.{name}.natural_images=0"])
    found = getattr(off.train, name)
    assert [getattr(found.weights, loss) for loss in losses] == [0] * 4
    assert found.weights == on.weights.model_copy(update=dict.fromkeys(losses, 0.0))  # and nothing else
    # In the small recipe's warm-up natural images alone reach the decoder: it is frozen without them.
    assert found.learning_rates.decoder == (0 if name == "warmup" else 1e-4) and found.learning_rates.encoder == 1e-4
    again = tmp_path / "resolved.yaml"
    again.write_text(config.dump(off))
    assert config.load(Recipe, again) == off


def test_weights_that_are_turned_off_are_told(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="igae"):
        stage(weights={"natural_kl": 0.25, "natural_tv": 0.125, "natural_ae": 0})
    assert caplog.messages == ["without natural images these are 0, as they should be: natural_kl, natural_tv"]
    caplog.clear()
    with caplog.at_level("INFO", logger="igae"):
        stage(natural_images=1, learning_rates={"encoder": 1e-4}, weights={"natural_kl": 1})
        stage()
    assert caplog.messages == []


def test_the_recipe_for_own_data_leaves_the_autoencoder_near_the_original() -> None:
    own, improved = (
        config.load(Recipe, CONFIGS / f"{name}.yaml", ["data.root=shards"]) for name in ("own_data", "igae_improved")
    )
    for part in own.train.stages.values():
        assert part.natural_images == 0
        assert not any(weight for name, weight in part.weights if name.startswith("natural_"))
    rates, others = own.train.joint.learning_rates, improved.train.joint.learning_rates
    assert rates.encoder < others.encoder / 5 and rates.decoder < others.decoder / 5
    assert own.train.joint.weights.ae >= improved.train.joint.weights.ae > 0
    assert (own.planes, own.render) == (improved.planes, improved.render)


def test_the_published_recipe() -> None:
    recipe = config.load(Recipe, CONFIGS / "igae.yaml", ["data.root=shards"])
    assert "'data.categories={objaverse: [0, 500]}'" in (CONFIGS / "igae.yaml").read_text()
    assert recipe.autoencoder.path == "ostris/vae-kl-f8-d16" and recipe.autoencoder.scale == 0.02
    assert (recipe.planes.resolution, recipe.planes.features) == (64, 32)
    assert (recipe.render.coarse_samples, recipe.render.fine_samples) == (48, 48)
    nothing = {**dict.fromkeys(type(recipe.train.joint.weights).model_fields, 0.0), "plugins": {}}
    warmup, joint = recipe.train.warmup, recipe.train.joint
    assert (warmup.epochs, warmup.batch_size, warmup.natural_images, warmup.mlp_epochs) == (50, 32, 0, 45)
    frozen = dict.fromkeys(type(warmup.learning_rates).model_fields, 0.0)
    assert warmup.learning_rates.model_dump() == {**frozen, "mlp": 1e-3, "planes": 1e-3}
    assert warmup.weights.model_dump() == {**nothing, "latent": 1, "planes_tv": 1e-5}
    assert (joint.epochs, joint.batch_size, joint.natural_images, joint.mlp_epochs) == (75, 12, 3, None)
    rates = {"encoder": 5e-5, "decoder": 5e-5, "mlp": 1e-4, "planes": 1e-4}
    assert joint.learning_rates.model_dump() == {**frozen, **rates}
    assert joint.weights.model_dump() == {
        **nothing,
        "latent": 1,
        "rgb": 1,
        "ae": 0.1,
        "natural_ae": 0.1,
        "natural_lpips": 0.01,
        "natural_tv": 1e-5,
        "planes_tv": 1e-4,
    }
    for part in (warmup, joint):
        assert (part.schedule, part.decay, part.alternate) == ("epoch", 0.988032, False)
    # Latents of the warm-up are constants, those of the joint stage are not.
    assert warmup.uses_cached_latents and not joint.uses_cached_latents


@pytest.mark.parametrize(
    ("values", "cached"),
    [
        ({}, True),
        ({"learning_rates": {"encoder": 1e-4}}, False),
        ({"learning_rates": {"decoder": 1e-4}, "weights": {"rgb": 1}}, False),
        ({"weights": {"latent": 1, "ae": 1}}, False),
        ({"natural_images": 1, "learning_rates": {"decoder": 1e-4}, "weights": {"natural_ae": 1}}, True),
        (
            {"batch_size": 0, "natural_images": 1, "learning_rates": {"decoder": 1e-4}, "weights": NATURAL_WEIGHTS},
            False,
        ),
    ],
)
def test_when_latents_are_encoded_once(values: dict[str, Any], cached: bool) -> None:
    assert stage(**values).uses_cached_latents is cached


@given(st.integers(0, 500), st.integers(1, 60), st.floats(0.5, 1))
def test_rates_decay_by_epoch(step: int, steps_per_epoch: int, decay: float) -> None:
    found = stage(decay=decay).rate_factor(step, steps_per_epoch, 1000)
    assert found == pytest.approx(decay ** math.floor(step / steps_per_epoch), rel=1e-12)


def test_the_default_decay_is_the_published_one() -> None:
    assert [stage().rate_factor(s, 10, 100) for s in (0, 9, 10, 25)] == [1, 1, 0.988032, 0.988032**2]


def test_rates_fall_at_milestones() -> None:
    given = stage(schedule="multistep", milestones=[2, 3], decay=0.1)
    by_epoch = [given.rate_factor(10 * epoch + 9, 10, 50) for epoch in range(5)]
    assert by_epoch == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert given.rate_factor(20, 10, 50) == pytest.approx(0.1)  # from the milestone's first step
    turned = stage(schedule="multistep", milestones=[3, 2], decay=0.1)
    assert [turned.rate_factor(10 * e, 10, 50) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])


@given(st.integers(1, 1000), st.integers(1, 50), st.data())
def test_rates_fall_like_a_cosine(steps: int, steps_per_epoch: int, data: st.DataObject) -> None:
    given_stage = stage(schedule="cosine")
    step = data.draw(st.integers(0, steps - 1))
    found = given_stage.rate_factor(step, steps_per_epoch, steps)
    assert found == pytest.approx(math.cos(math.pi * step / (2 * steps)) ** 2, abs=1e-12)
    assert given_stage.rate_factor(0, steps_per_epoch, steps) == 1
    assert given_stage.rate_factor(steps, steps_per_epoch, steps) == pytest.approx(0, abs=1e-12)
    assert found >= given_stage.rate_factor(step + 1, steps_per_epoch, steps)
