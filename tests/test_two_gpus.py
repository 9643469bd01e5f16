# SPDX-License-Identifier: Apache-2.0
"""Training on two GPUs: a warm-up in a CUDA graph that exchanges gradients, and ranks that don't answer any more."""

import faulthandler
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import test_all_reduce
import torch
from test_training_gpu import PLAIN, difference

from igae import config
from igae.errors import is_lost_rank
from igae.ranks import rank
from igae.training import CapturedStep, Recipe, Stage, StageName, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SHORT = ["train.warmup.epochs=8", "train.joint.epochs=2", "checkpoint.every=1000"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("two")
    return str(runs.recipe_file(folder, runs.packed_data(folder)))


@pytest.mark.parametrize("sent_as", [torch.float32, torch.bfloat16])
def test_the_mean_over_two_gpus(sent_as: torch.dtype) -> None:
    for step in test_all_reduce.means(2, 10**6, 48, 64, sent_as):
        assert (step.calls, step.early) == (3, 2)


class Kept(Trainer):
    """Keeps its stages."""

    opened: tuple[Stage, ...] = ()

    def open_stage(self, name: StageName) -> Stage:
        self.opened = (*self.opened, super().open_stage(name))
        return self.opened[-1]


def train(recipe_file: str, name: str, settings: list[str], file: str) -> tuple[bool, int]:
    """A whole run of this rank, whose weights and planes go into a file; whether the warm-up was captured, and how many
    steps were skipped."""
    ranks.send_in_buckets()
    faulthandler.dump_traceback_later(120, exit=True)  # where it waits, if it does
    trainer = Kept(config.load(Recipe, recipe_file, [*SHORT, f"experiment={name}", *settings]))
    trainer.run()
    state = {name: value.cpu() for name, value in trainer.model.state_dict().items()}
    torch.save({**state, "planes": trainer.store.rows.cpu()}, f"{file}-{rank()}")
    captured = [isinstance(stage.run, CapturedStep) and stage.run.is_captured for stage in trainer.opened]
    trainer.opened = ()  # a communicator is destroyed when no graph has its collectives any more, and waits for that
    gc.collect()
    trainer.engine.close()
    faulthandler.cancel_dump_traceback_later()
    return any(captured), trainer.progress.skipped


def test_a_captured_exchange_is_the_same_training(recipe_file: str) -> None:
    folder, runs_of = Path(recipe_file).parent, {"plain": PLAIN, "fast": ["train.kernels=cuda"]}
    said = {name: ranks.run(train, 2, recipe_file, name, more, f"{folder}/{name}") for name, more in runs_of.items()}
    assert said == {"plain": [(False, 0)] * 2, "fast": [(True, 0)] * 2}
    found = {(name, i): torch.load(f"{folder}/{name}-{i}", weights_only=True) for name in runs_of for i in (0, 1)}
    for name in runs_of:  # what ranks share is the same on both
        one, other = found[name, 0], found[name, 1]
        assert [key for key in one if key != "planes" and not torch.equal(one[key], other[key])] == []
    worst = max(difference(found["plain", i], found["fast", i]) for i in (0, 1))
    print("MEASURED two GPUs", worst)
    assert worst < 5e-2
    lines = [json.loads(line) for line in (folder / "outputs/fast/metrics.jsonl").read_text().splitlines()]
    warmup = [line for line in lines if line["stage"] == "warmup" and "loss/total" in line]
    assert warmup and "straggler_factor" not in warmup[-1] and warmup[-1]["grad_norm/mlp"] > 0


class Lost(Trainer):
    """The second rank makes no step number 6."""

    begun = 0.0

    def open_stage(self, name: StageName) -> Stage:
        stage = super().open_stage(name)
        make = stage.run

        def run(inputs: Any) -> Any:
            if rank() == 1 and self.progress.step == 6:
                time.sleep(60)
                os._exit(0)
            self.begun = time.monotonic()
            return make(inputs)

        stage.run = run
        return stage


def lose_a_rank(recipe_file: str, stage: str, file: str) -> None:
    """The second rank stops in the middle of a stage without a word; the first writes how it takes note of that."""
    own = [
        f"experiment=lost-{stage}",
        "train.timeout=10",
        f"train.{'joint' if stage == 'warmup' else 'warmup'}.epochs=0",
    ]
    trainer = Lost(config.load(Recipe, recipe_file, [*SHORT, *own]))
    faulthandler.dump_traceback_later(45)  # into the log: where it waits, if it does
    try:
        trainer.run()
    except RuntimeError as error:
        if is_lost_rank(error):
            Path(file).write_text(f"{time.monotonic() - trainer.begun:.1f} s: {str(error).splitlines()[0]}")
    os._exit(1)


@pytest.mark.parametrize("stage", ["warmup", "joint"])
def test_a_rank_that_does_not_answer_ends_the_others(recipe_file: str, stage: str) -> None:
    """Steps are a graph by then, whose collectives NCCL would wait for without end."""
    folder = Path(recipe_file).parent
    lost = ranks.Ranks(lose_a_rank, 2, recipe_file, stage, f"{folder}/{stage}.txt", log=f"{folder}/{stage}.log")
    lost.processes[0].join(50)
    code = lost.processes[0].exitcode
    for process in lost.processes:
        process.kill()
        process.join()
    print(Path(f"{folder}/{stage}.log").read_text())
    said = Path(f"{folder}/{stage}.txt")
    print("MEASURED lost", stage, code, said.read_text() if said.exists() else "-")
    assert code == 1 and "did not end in 10 s" in said.read_text()
