# SPDX-License-Identifier: Apache-2.0
"""A run goes on under another strategy and on another number of ranks: the same state, and the loss goes on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
from torch import Tensor

from igae import config
from igae.training import Recipe, Stage, StageName, Trainer

EPOCHS = 20


class Watched(Trainer):
    """Is asked to stop after so many epochs of a stage, and looks at its state before and after them."""

    epochs = 0.0
    found: dict[str, Any]

    def open_stage(self, name: StageName) -> Stage:
        last = round(self.epochs * self.data.steps_per_epoch(self.recipe.train.joint))

        def stop(*_: object) -> None:  # ranks agree on it in the next step
            if self.progress.step == last - 2:
                os.kill(os.getpid(), signal.SIGTERM)

        self.model.register_forward_pre_hook(stop)
        return super().open_stage(name)

    def train(self, stage: Stage) -> bool:
        self.found = {"strategy": self.engine.strategy, **self.look("start")}
        stopped = super().train(stage)
        self.found |= self.look("end")
        return stopped

    def look(self, when: str) -> dict[str, Any]:
        """Metrics, and shared weights and moments, and by scene its planes and their moments, of this rank's scenes.
        Collective."""
        moments = self.engine.optimizer_state()
        with self.engine.weights():
            state = {f"weights/{name}": value.clone() for name, value in self.model.state_dict().items()}
        state |= {f"moments/{name}": value.clone() for name, value in moments.items()}
        rows = {name: value.clone() for name, value in self.store.state_dict().items()}
        state["rates"] = rows.pop("learning_rates")
        for row, scene in enumerate(rows.pop("ids").tolist()):
            state |= {f"scene {scene}/{name}": values[row] for name, values in rows.items()}
        metrics = self.evaluate(self.store, "joint", self.progress.total, last=False)
        return {when: state, f"metrics at {when}": metrics}


def train_on(recipe: str, strategy: str, epochs: float) -> dict[str, Any]:
    """Resume from what is there, and stop with a checkpoint after so many epochs of the joint stage."""
    os.environ.update(ranks.launch_environment(strategy))
    settings = [f"train.joint.epochs={EPOCHS}", "train.warmup.epochs=0", "tracking.every=1"]
    trainer = Watched(config.load(Recipe, recipe, settings))
    trainer.epochs = epochs
    trainer.run()
    trainer.engine.close()
    return trainer.found | {"steps": trainer.progress.total}


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
        [(2, "zero2"), (3, "ddp"), (1, "ddp")],
        [(3, "fsdp2"), (2, "zero3"), (2, "zero1")],
    ],
)
def test_resharding(tmp_path: Path, chain: list[tuple[int, str]]) -> None:
    recipe = str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))
    metrics = tmp_path / "outputs" / "run" / "metrics.jsonl"
    before: list[dict[str, Any]] = []
    ends: list[int] = []
    for number, (world, strategy) in enumerate(chain):
        results = ranks.run(train_on, world, recipe, strategy, 8.0 + 3 * number)
        if before:
            old, new = together(before, "end"), together(results, "start")
            assert old.keys() == new.keys()
            different = [name for name in old if not torch.equal(old[name], new[name])]
            assert different == []
            for name, value in before[0]["metrics at end"].items():
                assert results[0]["metrics at start"][name] == pytest.approx(value, abs=1e-4), name
        ends.append(len(losses(metrics)))
        before = results
    curve = losses(metrics)
    fallen = curve[0] - sum(curve[ends[0] - 3 : ends[0]]) / 3
    assert fallen > 0
    for end in ends[:-1]:
        last, first = sum(curve[end - 3 : end]) / 3, sum(curve[end : end + 3]) / 3
        # Measured: 2 to 20 % of what the loss had fallen by then: views move, and there are masks in some alone.
        assert abs(first - last) < 0.3 * fallen, (curve, end)
