# SPDX-License-Identifier: Apache-2.0
"""Base planes that scenes share: rows and planes by their formula, what is trained, which combinations there are."""

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SEED, build, generator, views, weights
from torch import Tensor

from igae import checkpoint, config
from igae.config import ConfigError
from igae.models.losses import orthogonality
from igae.scenes import BasePlanes, PlanesConfig, SceneStore
from igae.training import Recipe, Stage, StageState, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")

CONCAT = {"base_planes": 3, "micro_features": 3, "macro_features": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "concat": CONCAT,
    "concat, bias": {**CONCAT, "bias": True},
    "sum": {"base_planes": 3, "micro_features": 8, "macro_features": 8, "fusion": "sum"},
    "sum, bias": {"base_planes": 2, "micro_features": 8, "macro_features": 8, "fusion": "sum", "bias": True},
    "ultra-light": {"base_planes": 4, "macro_features": 8},
    "ultra-light, bias": {"base_planes": 1, "macro_features": 8, "bias": True},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def planes_config(name: str, resolution: int = 6) -> PlanesConfig:
    return PlanesConfig(resolution=resolution, features=8, **VARIANTS[name])


def by_formula(given: PlanesConfig, base: Tensor, row: Tensor) -> Tensor:
    """T = micro with sum_k w_k B_k + b, a number at a time."""
    side, micro_count, macro_count = given.resolution, given.micro_features, given.macro_features
    own = 3 * side * side * micro_count
    micro, scene_weights = row[:own].reshape(3, side, side, micro_count), row[own : own + given.base_planes]
    bias = row[-1] if given.bias else torch.zeros((), dtype=row.dtype)
    out = torch.zeros(3, side, side, given.features, dtype=row.dtype)
    for plane in range(3):
        for i in range(side):
            for j in range(side):
                macro = [
                    sum(scene_weights[k] * base[k, plane, i, j, c] for k in range(given.base_planes)) + bias
                    for c in range(macro_count)
                ]
                own_part = list(micro[plane, i, j])
                if given.fusion == "sum":
                    values = [a + b for a, b in zip(own_part, macro, strict=True)]
                else:
                    values = own_part + macro
                out[plane, i, j] = torch.stack(values)
    return out


@variants
def test_planes_and_their_gradients_are_the_formula(name: str) -> None:
    given = planes_config(name, resolution=2)
    module = BasePlanes(given, generator(1)).double()
    rows = torch.randn(3, *given.row_shape, generator=generator(2), dtype=torch.float64, requires_grad=True)
    fused, nothing = module(rows)
    assert nothing is None and fused.shape == (3, 3, 2, 2, 8)
    slow = torch.stack([by_formula(given, module.planes, row) for row in rows])
    torch.testing.assert_close(fused, slow, rtol=1e-13, atol=1e-13)
    probe = torch.randn(fused.shape, generator=generator(3), dtype=torch.float64)
    found = torch.autograd.grad((fused * probe).sum(), [rows, module.planes])
    expected = torch.autograd.grad((slow * probe).sum(), [rows, module.planes])
    for mine, theirs in zip(found, expected, strict=True):
        assert bool((theirs != 0).all())
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_numbers_of_a_scene() -> None:
    published = {"resolution": 64, "features": 32, "base_planes": 50, "bias": True}
    light = PlanesConfig(**published, macro_features=32)
    assert light.row_shape == (51,)
    fused = PlanesConfig(**published, micro_features=10, macro_features=22)
    assert fused.row_shape == (3 * 64 * 64 * 10 + 50 + 1,)
    plain = PlanesConfig(resolution=64, features=32)
    assert plain.row_shape == (3, 64, 64, 32)
    assert math.prod(plain.row_shape) / math.prod(fused.row_shape) > 3.19


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "micro planes alone": ({"micro_features": 8}, "set base_planes"),
    "macro planes without a base": ({"macro_features": 8}, "set base_planes"),
    "sum of nothing": ({"fusion": "sum"}, "set base_planes"),
    "bias of plain planes": ({"bias": True}, "set base_planes"),
    "a base that is not used": ({"base_planes": 3, "micro_features": 8}, "macro_features is 0"),
    "too few features": ({"base_planes": 3, "micro_features": 2, "macro_features": 5}, "set features=7"),
    "concat of whole planes": ({"base_planes": 3, "micro_features": 8, "macro_features": 8}, "set features=16"),
    "sum of unequal planes": ({**CONCAT, "fusion": "sum"}, "set both to features, 8"),
    "sum without micro planes": ({"base_planes": 3, "macro_features": 8, "fusion": "sum"}, "fusion=concat"),
    "another fusion": ({**CONCAT, "fusion": "product"}, "concat"),
    "negative base": ({**CONCAT, "base_planes": -1}, "0"),
}


def load_small(folder: Path, overrides: list[str]) -> Recipe:
    return config.load(Recipe, runs.recipe_file(folder, "shards"), overrides)


@pytest.mark.parametrize("name", REFUSED)
def test_combinations_that_make_no_sense_are_refused(name: str, tmp_path: Path) -> None:
    given, word = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        load_small(tmp_path, [f"planes.{key}={value}" for key, value in given.items()])
    assert word in str(error.value) and "planes" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["train.warmup.learning_rates.base_planes=0.01"], "planes.base_planes is 0"),
        (["train.joint.weights.base_orthogonality=1"], "no two base planes"),
        (
            [
                "planes={features: 8, base_planes: 1, macro_features: 8}",
                "train.joint.weights.base_orthogonality=1",
                "train.joint.learning_rates.base_planes=1e-2",
            ],
            "no two base planes",
        ),
        (
            ["planes={features: 8, base_planes: 2, macro_features: 8}", "train.joint.weights.base_orthogonality=1"],
            "no two base planes",
        ),
        (
            [
                "planes={features: 8, base_planes: 2, macro_features: 8}",
                "train.joint.batch_size=0",
                "train.joint.weights={latent: 0, natural_ae: 1, base_orthogonality: 1}",
            ],
            "batch_size is 0",
        ),
    ],
)
def test_stages_that_make_no_sense_are_refused(overrides: list[str], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        load_small(tmp_path, overrides)


@variants
def test_the_start_of_a_scene(name: str) -> None:
    given = planes_config(name)
    store = SceneStore(given, [5, 2], 7, torch.device("cpu"))
    assert torch.equal(store.rows[1], SceneStore(given, [2], 7, torch.device("cpu")).rows[0])
    assert not torch.equal(store.rows[0], store.rows[1])
    if given.bias:
        assert store.rows[:, -1].count_nonzero() == 0


def test_macro_planes_start_with_the_noise_of_plain_ones() -> None:
    given = PlanesConfig(resolution=8, features=8, init_std=0.3, base_planes=20, macro_features=8, bias=True)
    store = SceneStore(given, range(200), 0, torch.device("cpu"))
    with torch.no_grad():
        fused, _ = BasePlanes(given, generator(4))(store.rows)
    # The standard deviation of a sum of M terms with weights of variance 1 / M: 0.3; 200 scenes x 20 weights know it
    # to 1 / sqrt(8000) of it, about 1 %.
    assert fused.std() == pytest.approx(0.3, rel=0.05)


# --- The loss of base planes -----------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.lists(st.floats(0.01, 100), min_size=5, max_size=5))
def test_orthogonal_planes_of_any_length_have_no_loss(count: int, lengths: list[float]) -> None:
    q, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator(count), dtype=torch.float64))
    planes = q[:count] * torch.tensor(lengths[:count], dtype=torch.float64)[:, None]
    assert orthogonality(planes.view(count, 3, 2, 2, 1)) < 1e-24


def test_the_loss_of_base_planes_by_hand() -> None:
    planes = torch.tensor([[2.0, 0, 0], [1, math.sqrt(3), 0], [0, 0, 5]])  # 60 degrees, 90 and 90
    assert orthogonality(planes) == pytest.approx((0.5**2) / 3, rel=1e-6)
    assert orthogonality(torch.ones(4, 3, 2, 2, 1)) == pytest.approx(1, rel=1e-6)
    opposite = torch.tensor([[1.0, 1], [-2, -2]])
    assert orthogonality(opposite) == pytest.approx(1, rel=1e-6)


# --- In the model ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@variants
def test_losses_are_those_of_the_planes_that_rows_stand_for(name: str) -> None:
    given = planes_config(name)
    plain, model = build(), build()
    model.base = BasePlanes(given, generator(5))
    rows = SceneStore(given, range(3), 3, torch.device("cpu")).rows * 5
    fused = torch.stack([by_formula(given, model.base.planes.detach(), row) for row in rows])
    terms = {"latent": 1.0, "rgb": 0.5, "planes_tv": 0.3, "depth_tv": 0.2}
    expected = plain(fused, views(), None, weights(**terms), False, SEED)
    found = model(rows, views(), None, weights(**terms), False, SEED)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
    assert model.render(rows, views(), None)[0].sub(plain.render(fused, views(), None)[0]).abs().max() < 1e-5
    if given.base_planes > 1:
        more = model(rows, views(), None, weights(**terms, base_orthogonality=0.7), False, SEED)
        assert more["base_orthogonality"] == pytest.approx(float(orthogonality(model.base.planes)))
        assert more["total"] - found["total"] == pytest.approx(0.7 * float(more["base_orthogonality"]), rel=1e-3)


# --- In training -----------------------------------------------------------------------------------------------------


def recipe(folder: Path, shards: str, name: str, *overrides: str) -> Recipe:
    planes = {"resolution": 8, "features": 8, **VARIANTS[name]}
    rates = [f"train.{stage}.learning_rates.base_planes=1e-2" for stage in ("warmup", "joint")]
    if planes["base_planes"] > 1:
        rates.append("train.joint.weights.base_orthogonality=0.1")
    return config.load(Recipe, runs.recipe_file(folder, shards), [f"planes={planes}", *rates, *overrides])


@variants
def test_a_step_moves_every_number_of_its_scenes(tmp_path: Path, shards: str, name: str) -> None:
    trainer = Trainer(recipe(tmp_path, shards, name))
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    rows = trainer.store.rows.clone()
    stage = Stage("joint", trainer.recipe, trainer.engine, trainer.model, trainer.store, trainer.data, StageState())
    assert stage.step(0).read() == (True, False)
    stage.close()
    still = [key for key, value in trainer.model.named_parameters() if torch.equal(value, before[key])]
    assert still == [] and "base.planes" in before
    assert bool((trainer.model.base.planes != before["base.planes"]).all())  # type: ignore[union-attr]
    moved = trainer.store.rows != rows
    touched = moved.any(1)
    assert 1 <= touched.sum() <= 4  # four views
    assert bool(moved[touched].all())


@pytest.mark.parametrize("name", ["concat, bias", "ultra-light"])
def test_a_run_with_base_planes_goes_on_as_if_it_had_not_stopped(tmp_path: Path, shards: str, name: str) -> None:
    short = ["train.warmup.epochs=1", "train.joint.epochs=1", "evaluation.natural_images=0"]
    whole = Trainer(recipe(tmp_path, shards, name, "experiment=whole", *short))
    figures = whole.run()
    assert math.isfinite(figures["heldout/rgb_psnr"])
    first = Trainer(recipe(tmp_path, shards, name, "experiment=parts", *short))
    first.run("warmup")
    AcceleratorState._reset_state(reset_partial_state=True)
    second = Trainer(recipe(tmp_path, shards, name, "experiment=parts", *short))
    assert torch.equal(second.store.rows, first.store.rows)
    assert second.run() == figures
    assert torch.equal(second.store.rows, whole.store.rows)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key
    saved = checkpoint.load_checkpoint(checkpoint.list_complete(second.recipe.checkpoint_root)[-1])
    assert torch.equal(saved.rows([2])["planes"][0], second.store.rows[second.store.ids == 2][0])
    assert saved.rows([2])["planes"].shape[1:] == second.recipe.planes.row_shape


def test_base_planes_are_frozen_by_a_rate_of_0(tmp_path: Path, shards: str) -> None:
    frozen = ["train.warmup.learning_rates.base_planes=0", "train.warmup.epochs=1", "train.joint.epochs=0"]
    trainer = Trainer(recipe(tmp_path, shards, "concat", "train.joint.weights.base_orthogonality=0", *frozen))
    base = {key: value.clone() for key, value in trainer.model.state_dict().items() if key.startswith("base")}
    rows = trainer.store.rows.clone()
    trainer.run()
    assert torch.equal(trainer.model.state_dict()["base.planes"], base["base.planes"])
    assert bool((trainer.store.rows != rows).any(1).all())


@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 4), st.data())
@settings(max_examples=20)
def test_a_scene_does_not_depend_on_the_others_of_its_batch(name: str, count: int, data: st.DataObject) -> None:
    given = planes_config(name)
    module = BasePlanes(given, generator(6))
    rows = torch.randn(count, *given.row_shape, generator=generator(count))
    which = data.draw(st.integers(0, count - 1))
    with torch.no_grad():
        together, alone = module(rows)[0][which], module(rows[which : which + 1])[0][0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
