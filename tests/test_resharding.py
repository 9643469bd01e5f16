# SPDX-License-Identifier: Apache-2.0
"""A run goes on under another strategy and on another number of ranks: the same state, and the loss goes on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
from torch import Tensor

from igae import config
from igae.training.recipe import Recipe
from igae.training.stage import Stage
from igae.training.trainer import Trainer

EPOCHS = 40


def snapshot(trainer: Trainer, stage: Stage) -> dict[str, Tensor]:
    """Shared weights and moments, and by scene its planes and their moments, of this rank's scenes. Collective."""
    moments = trainer.engine.optimizer_state()
    with trainer.engine.weights():
        state = {f"weights/{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    state |= {f"moments/{name}": value.clone() for name, value in moments.items()}
    rows = {"planes": trainer.bank.planes, **stage.plane_adam.state()}
    state["rates"] = rows.pop("learning_rates")
    for row, scene in enumerate(trainer.bank.scene_ids.tolist()):
        state |= {f"scene {scene}/{name}": values[row].clone() for name, values in rows.items()}
    return state


def train_on(recipe: str, strategy: str, epochs: float) -> dict[str, Any]:
    """Go on from what is there, and stop with a checkpoint after so many epochs of the joint stage."""
    os.environ.update(ranks.launch_environment(strategy))
    settings = [f"train.joint.epochs={EPOCHS}", "train.warmup.epochs=0", "tracking.every=1"]
    trainer = Trainer(config.load(Recipe, recipe, settings))
    found: dict[str, Any] = {}
    loop = trainer._loop

    def watched(stage: Stage) -> None:
        found["strategy"] = trainer.engine.strategy
        found["start"] = snapshot(trainer, stage)
        found["figures at start"] = trainer._evaluate("joint", last=False)
        real = stage.step

        def step(number: int, stop: bool = False, refresh: bool = False) -> Any:
            return real(number, stop or number + 1 == round(epochs * stage.steps_per_epoch), refresh)

        stage.step = step  # type: ignore[method-assign]
        loop(stage)
        found["end"] = snapshot(trainer, stage)
        found["figures at end"] = trainer._evaluate("joint", last=False)

    trainer._loop = watched  # type: ignore[method-assign]
    trainer.run()
    found["steps"] = trainer.progress.total
    trainer.engine.close()
    return found


def together(results: list[dict[str, Any]], which: str) -> dict[str, Tensor]:
    """The state of all ranks: what they share is equal on all, and of each scene there is one."""
    everything: dict[str, Tensor] = {}
    for result in results:
        for name, value in result[which].items():
            assert name not in everything or (not name.startswith("scene") and torch.equal(everything[name], value)), (
                name
            )
            everything[name] = value
    return everything


def losses(metrics: Path) -> list[float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss/total"] for line in lines if "loss/total" in line]


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([(2, "zero2"), (3, "ddp"), (1, "ddp")], marks=ranks.needs_compiler),
        pytest.param([(3, "fsdp2"), (2, "zero3"), (2, "zero1")], marks=ranks.needs_compiler),
    ],
)
def test_resharding(tmp_path: Path, chain: list[tuple[int, str]]) -> None:
    recipe = str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))
    metrics = tmp_path / "outputs" / "run" / "metrics.jsonl"
    before: list[dict[str, Any]] = []
    ends: list[int] = []
    for number, (world, strategy) in enumerate(chain):
        results = ranks.run(train_on, world, recipe, strategy, 8.0 * (number + 1))
        if before:
            old, new = together(before, "end"), together(results, "start")
            assert old.keys() == new.keys()
            different = [name for name in old if not torch.equal(old[name], new[name])]
            assert different == []
            for name, value in before[0]["figures at end"].items():
                assert results[0]["figures at start"][name] == pytest.approx(value, abs=1e-4), name
        ends.append(len(losses(metrics)))
        before = results
    curve = losses(metrics)
    fallen = curve[0] - sum(curve[ends[0] - 3 : ends[0]]) / 3
    assert fallen > 0
    for end in ends[:-1]:
        last, first = sum(curve[end - 3 : end]) / 3, sum(curve[end : end + 3]) / 3
        # Measured: 3 to 9 % of what the loss had fallen by then.
        assert abs(first - last) < 0.3 * fallen, (curve, end)
