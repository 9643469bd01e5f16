# SPDX-License-Identifier: Apache-2.0
"""Runs whose scenes are in host memory or on a disk end with the same bits as those with all on the device."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
import ranks
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from test_tiers import TIERS

import train
from igae import checkpoint, config
from igae.export import take_settings
from igae.training import Fit, Recipe

SMALL = [
    *(f"train.{stage}.{key}" for stage in ("warmup", "joint") for key in ("batch_size=2", "epochs=0.5")),
    *("train.warmup.group=0", "evaluation.every=5", "checkpoint.every=4", "tracking.every=1", "planes.resident=2"),
]
"""Four scenes and a pool of two, as many as a step needs."""
OTHER = [
    *(f"train.{stage}.{key}" for stage in ("warmup", "joint") for key in ("batch_size=1", "accumulate=2")),
    *("train.joint.alternate=true", "train.warmup.group=2", "planes.storage=disk"),
]


def trained(recipe: str, name: str, *settings: str) -> dict[str, str]:
    """Digests of what a run ends with."""
    assert train.main(["--config", recipe, *SMALL, f"experiment={name}", *settings]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return runs.digests(Path(recipe).parent / "outputs" / name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: str) -> tuple[str, dict[str, str]]:
    """A recipe, and what a run with all scenes on the device ends with."""
    recipe = str(runs.recipe_file(tmp_path_factory.mktemp("tiers"), shards))
    return recipe, trained(recipe, "device", "planes.storage=device")


def losses(recipe: str, name: str) -> list[dict[str, float]]:
    lines = (Path(recipe).parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    keep = ("loss/", "eval/", "grad_norm/")
    return [{k: v for k, v in json.loads(line).items() if k.startswith(keep)} for line in lines]


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_ends_with_the_same_bits(
    tier: str, base: tuple[str, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """With evaluations and checkpoints in between."""
    recipe, expected = base
    with caplog.at_level(logging.INFO, "igae"):
        assert trained(recipe, tier, f"planes.storage={tier}", "checkpoint.background=true") == expected
    assert losses(recipe, tier) == losses(recipe, "device")
    text = caplog.text
    assert "planes and moments of 4 scenes" in text and "2 of them at a time on cpu" in text
    assert "written while training waits" in text


def test_other_kinds_of_steps(base: tuple[str, dict[str, str]]) -> None:
    """Several batches a step, views and natural images in turns, views in groups, steps as a graph makes them."""
    recipe, _ = base
    expected = trained(recipe, "others", *OTHER, "planes.storage=device")
    assert trained(recipe, "others-disk", *OTHER) == expected
    weights = []
    for storage in ("device", "host"):
        own = [f"experiment=graph-{storage}", f"planes.storage={storage}", "train.warmup.group=2"]
        trainer = runs.StaticTrainer(config.load(Recipe, recipe, [*SMALL, *own]))
        trainer.run()
        AcceleratorState._reset_state(reset_partial_state=True)
        weights.append({**trainer.model.state_dict(), "rows": trainer.store.rows})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_killed_run_resumes_in_another_tier(base: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    recipe, expected = base
    scratch, folder = tmp_path / "scratch", Path(recipe).parent / "outputs" / "killed"
    scratch.mkdir()
    on_disk = [recipe, *SMALL, "experiment=killed", "planes.storage=disk", f"planes.scratch={scratch}"]
    for steps in (4, 12):  # kills in both stages
        run = ranks.Ranks(runs.train, 1, *on_disk, log=str(tmp_path / "log"))
        limit = time.monotonic() + 100
        while not any(int(Path(c).name[5:13]) >= steps for c in checkpoint.list_complete(str(folder / "checkpoints"))):
            assert time.monotonic() < limit and run.processes[0].is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.005)
        run.processes[0].kill()
        assert run.exit_codes() == [-9] and os.listdir(scratch) == []
    assert trained(recipe, "killed", "planes.storage=host") == expected
    assert "resumes from step" in (tmp_path / "log").read_text()


def test_a_fit_ends_with_the_same_bits(base: tuple[str, dict[str, str]], shards: str) -> None:
    folder = Path(base[0]).parent
    warmup = {"epochs": 1, "batch_size": 2, "learning_rates": {"planes": 5e-2}, "weights": {"latent": 1}}
    joint = {**warmup, "learning_rates": {"planes": 1e-2}, "weights": {"latent": 0, "rgb": 1}}
    own = {
        "experiment": "fit",
        "model": str(folder / "outputs" / "device"),
        "outputs": str(folder / "outputs"),
        "data": {"root": shards, "workers": 0},
        "fit": {"wave": 3},
        "train": {"warmup": {**warmup, "group": 0}, "joint": joint},
        "evaluation": {"views": 1, "pictures": 0, "orbits": 0},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(own))
    found = []
    for storage in ("device", "disk"):
        more = [f"experiment=fit-{storage}", f"planes.storage={storage}", "planes.resident=2"]
        Fit(config.load(Recipe, folder / "fit.yaml", more, complete=take_settings)).run()
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(runs.digests(folder / "outputs" / f"fit-{storage}"))
    assert found[0] == found[1] and any("planes" in name for name in found[0])


def test_a_pool_that_is_too_small_is_refused_before_anything_is_done(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["planes.storage=host", "planes.resident=3", "train.joint.batch_size=2"]
    assert train.main(["--config", recipe_file, *own]) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "error: a step of train.warmup may need 4 scenes on cpu and planes.resident is 3: set planes.resident=4 or "
        "more, or lower train.warmup.batch_size"
    )
    assert not (Path(recipe_file).parent / "outputs").exists()


def test_groups_are_of_cached_latents(recipe_file: str) -> None:
    with pytest.raises(ValueError, match="train.joint: group is of cached latents, and this stage reads images"):
        config.load(Recipe, recipe_file, ["train.joint.group=2"])
