# SPDX-License-Identifier: Apache-2.0
"""What is faster on a GPU is the same training."""

import json
from pathlib import Path

import pytest
import runs
import torch
from accelerate.state import AcceleratorState

from igae import config
from igae.training import Recipe, Trainer

pytestmark = [
    pytest.mark.usefixtures("one_run_a_process"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PLAIN = ["train.kernels=torch", "train.async_steps=false", "train.cuda_graph=false"]
FAST = [
    "train.kernels=cuda",
    *(f"train.{name}=true" for name in ("async_steps", "cuda_graph")),
]
SHORT = ["train.warmup.epochs=2", "train.joint.epochs=2"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpu")
    return str(runs.recipe_file(folder, runs.packed_data(folder)))


def run(recipe_file: str, *settings: str) -> dict[str, torch.Tensor]:
    """Weights and planes at the end of a run."""
    name = f"experiment=run-{len(list(Path(recipe_file).parent.glob('outputs/*')))}"
    trainer = Trainer(config.load(Recipe, recipe_file, [*SHORT, name, *settings]))
    trainer.run()
    assert trainer.progress.skipped == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return {**trainer.model.state_dict(), "planes": trainer.store.rows}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of planes, decoding MLP with the map of patches, or autoencoder.

    Not of single tensors: Adam moves one whose gradient is all but 0 by its rounding.
    """
    found = []
    for part in ("planes", ("mlp", "head"), "autoencoder"):
        names = [name for name in a if name.startswith(part)]
        x, y = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (a, b))
        found.append(float((x - y).norm() / x.norm()))
    return max(found)


def test_a_host_that_is_ahead_computes_the_same(recipe_file: str) -> None:
    waits, ahead = run(recipe_file, *PLAIN), run(recipe_file, *PLAIN, "train.async_steps=true")
    worst = difference(ahead, waits)
    print("MEASURED ahead", worst)
    assert worst < 2e-2  # atomic additions come in another order each time, and Adam divides small by small


@pytest.mark.parametrize("settings", [[], runs.PLAIN], ids=["all", "plain"])
def test_fast_training_is_the_same_training(recipe_file: str, settings: list[str]) -> None:
    slow, fast = run(recipe_file, *PLAIN, *settings), run(recipe_file, *FAST, *settings)
    worst = difference(slow, fast)
    print("MEASURED fast", worst)
    assert worst < 5e-2


def test_captured_steps_record_what_others_do(recipe_file: str) -> None:
    """The third record (steps count from 1, `tracking.every` is 3) is of a replayed graph."""
    found = []
    for name, settings in (("plain", PLAIN), ("graph", ["train.kernels=cuda"])):
        more = ["autoencoder.latents=sample", f"experiment=recorded-{name}"]
        trainer = Trainer(config.load(Recipe, recipe_file, [*SHORT, *more, *settings]))
        trainer.run()
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append([json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()])
    for plain, graph in zip(*found, strict=True):
        assert plain.keys() == graph.keys()
        for name in plain:
            if name.startswith("grad_norm/"):
                assert graph[name] == pytest.approx(plain[name], rel=5e-2), name
        if "loss/total" in plain:
            assert graph["gpu_memory/reserved"] >= graph["gpu_memory/allocated"] > 0
            assert plain["grad_norm/planes"] > 0 and plain["grad_norm/mlp"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_skipped_steps_change_nothing(recipe_file: str, ahead: bool) -> None:
    """With a host that runs ahead the device alone leaves them out."""
    settings = [f"experiment=skips-{ahead}", "train.max_skipped=3", f"train.async_steps={ahead}"]
    trainer = Trainer(config.load(Recipe, recipe_file, [*SHORT, *settings]))
    trainer.run("warmup")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    planes = trainer.store.rows.clone()
    trainer.model.register_forward_hook(lambda _, __, losses: losses | {"total": losses["total"] * float("nan")})
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        trainer.run("joint")
    assert torch.equal(trainer.store.rows, planes)
    assert [n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])] == []
