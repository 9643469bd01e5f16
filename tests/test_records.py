# SPDX-License-Identifier: Apache-2.0
"""What training records of its steps: against the gradients themselves, and against a clock and ranks that are told."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch

from igae import config
from igae.data import LatentLoader
from igae.errors import TrainingError
from igae.ranks import rank
from igae.scenes import SceneStore
from igae.training import Meter, Outcome, Recipe, Stage, StageName, Trainer

PREFIXES = {
    "encoder": ("autoencoder.net.encoder.", "autoencoder.net.quant_conv."),
    "decoder": ("autoencoder.net.decoder.", "autoencoder.net.post_quant_conv."),
    "mlp": ("mlp.", "head."),
    "base_planes": ("base.",),
}
SHORT = ["train.warmup.epochs=0.5", "train.joint.epochs=0.5", "tracking.every=1"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("records")
    return str(runs.recipe_file(folder, runs.packed_data(folder)))


def recorded(trainer: Trainer) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


class Norms(Trainer):
    """Computes the norms of gradients from the gradients themselves."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.newest: dict[str, float] = {}
        self.of_steps: list[dict[str, float]] = []
        self._squares: dict[str, dict[str, float]] = {part: {} for part in PREFIXES}
        for name, parameter in self.model.named_parameters():
            part = next(part for part, prefixes in PREFIXES.items() if name.startswith(prefixes))
            parameter.register_post_accumulate_grad_hook(partial(self._see, part, name))

    def _see(self, part: str, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._squares[part][name] = float(parameter.grad.double().square().sum())

    def open_stage(self, name: StageName) -> Stage:
        stage = super().open_stage(name)
        stage.run.store = SeenStore(stage.store, self.newest)
        make = stage.run

        def run(inputs: Any) -> Any:
            output = make(inputs)
            for part, squares in self._squares.items():
                if squares:
                    self.newest[part] = sum(squares.values()) ** 0.5
                squares.clear()
            self.of_steps.append(dict(self.newest))
            return output

        stage.run = run
        return stage


class SeenStore:
    """A scene store, and the norm of the newest gradient."""

    def __init__(self, store: SceneStore, newest: dict[str, float]) -> None:
        self.take, self._store, self._newest = store.take, store, newest

    def step(self, rows: Any, gradient: Any, learning_rate: Any, *, scale: float, apply: Any) -> None:
        self._newest["planes"] = float((gradient.double() * scale).square().sum()) ** 0.5
        self._store.step(rows, gradient, learning_rate, scale=scale, apply=apply)


@pytest.mark.usefixtures("one_run_a_process")
def test_norms_are_those_of_the_gradients(recipe_file: str) -> None:
    """With batches that alternate: a part that a step does not reach keeps the norm of the step before."""
    options = [
        "planes={resolution: 8, features: 8, base_planes: 3, micro_features: 3, macro_features: 5, bias: true}",
        "train.warmup.learning_rates.base_planes=1e-4",
        "train.joint.learning_rates.base_planes=1e-4",
        "train.joint.alternate=true",
        "train.joint.accumulate=2",
    ]
    trainer = Norms(config.load(Recipe, recipe_file, [*SHORT, *options, "experiment=norms"]))
    trainer.run("warmup")
    trainer.newest.clear()
    trainer.run("joint")
    expected = trainer.of_steps
    lines = recorded(trainer)
    assert len(lines) == len(expected) == 8
    for line, norms in zip(lines, expected, strict=True):
        found = {key.removeprefix("grad_norm/"): value for key, value in line.items() if key.startswith("grad_norm/")}
        assert found == pytest.approx(norms, rel=1e-6)  # measured 7e-8
        assert min(found.values()) > 0
        assert set(found) >= ({"mlp", "base_planes", "planes"} if line["stage"] == "warmup" else {"encoder", "decoder"})
    # Each of the losses is there, whatever the step that a record comes after: views were in steps 0, 2, ...
    assert {"loss/latent", "loss/rgb", "loss/natural_ae"} <= lines[-1].keys() and "loss/rgb" in lines[-2]


@pytest.mark.usefixtures("one_run_a_process")
def test_a_captured_step_records_the_same(recipe_file: str) -> None:
    """The function that a CUDA graph is captured from; views are counted there too."""
    options = [*SHORT, "autoencoder.latents=sample"]
    plain = Trainer(config.load(Recipe, recipe_file, [*options, "experiment=plain"]))
    plain.run()
    other = runs.StaticTrainer(config.load(Recipe, recipe_file, [*options, "experiment=captured"]))
    other.run()
    for a, b in zip(recorded(plain), recorded(other), strict=True):
        assert a.keys() == b.keys() and {"grad_norm/mlp", "grad_norm/planes"} <= a.keys()
        for name in a:
            if name.startswith(("loss/", "grad_norm/")):
                # Rows are padded to the batch there, so planes_tv has one more addend, 0: measured 9e-8.
                assert a[name] == pytest.approx(b[name], rel=1e-6), name
        assert b["views_per_second"] > 0 and not any(name.startswith("gpu_memory") for name in a)


@pytest.mark.usefixtures("one_run_a_process")
def test_a_step_that_asks_the_host_is_no_graph(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refused(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    settings = [*SHORT, "train.warmup.epochs=1", "experiment=refused"]
    trainer = runs.StaticTrainer(config.load(Recipe, recipe_file, settings))
    trainer.warmup_calls = 3
    with pytest.raises(TrainingError, match="stream is capturing\\).*set train.cuda_graph=false$"):
        trainer.run()


class Told:
    """A channel whose other ranks say what is told."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_metrics_of_three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(torch.device("cpu"), ranks=3, replicated=True)
    meter.restart(1000)
    one = torch.ones(())
    for wait, forward, rest in ((1.0, 2.0, 1.0), (0.5, 2.5, 1.0)):
        meter.begin()
        with meter.waiting_for_data():
            now += wait
        now += forward
        meter.end()
        now += rest
        norms = {"mlp": torch.tensor([3.0, 4.0]), "planes": torch.tensor(6.0)}
        outcome = meter.note(Outcome({"total": 2 * one}, one, 0 * one, norms))
    assert outcome.read() == (True, False)
    # losses, squares of the norms, views, share of waiting, seconds, memory
    others = [
        ([4.0], {"mlp": 25.0, "planes": 64.0}, 16, 0.5, 9.0, {}),
        ([6.0], {"mlp": 25.0, "planes": 0.0}, 16, 0.0, 3.0, {}),
    ]
    figures = meter.read(1016, Told(others))  # type: ignore[arg-type]
    assert figures == pytest.approx(
        {
            "loss/total": 4.0,
            "grad_norm/mlp": 5.0,  # all ranks have the same gradient
            "grad_norm/planes": 10 / 3,  # of the mean of their losses, each of which is of other planes
            "views_per_second": 48 / 8,
            "data_wait": (1.5 / 8 + 0.5 + 0.0) / 3,
            "data_wait_max": 0.5,
            "slowest_rank": 1,
            "straggler_factor": 9 / 6,  # 6, 9 and 3 seconds
        }
    )
    now += 4
    after = meter.read(1020, Told([([4.0], {"mlp": 1.0, "planes": 1.0}, 4, 0.0, 0.0, {})] * 2))  # type: ignore[arg-type]
    assert after["views_per_second"] == 12 / 4 and after["data_wait"] == 0
    assert "straggler_factor" not in after and "slowest_rank" not in after  # nothing was measured, as in captured steps
    assert after["loss/total"] == pytest.approx(10 / 3)  # of the last step that there was


def test_parts_of_gradients_add_up() -> None:
    meter = Meter(torch.device("cpu"), ranks=2, replicated=False)
    one = torch.ones(())
    meter.note(Outcome({"total": one}, one, 0 * one, {"mlp": torch.tensor([3.0])}))
    assert meter.read(1, Told([([1.0], {"mlp": 16.0}, 0, 0.0, 0.0, {})]))["grad_norm/mlp"] == 5  # type: ignore[arg-type]


def test_one_rank_waits_for_no_other_and_says_nothing_of_it() -> None:
    meter = Meter(torch.device("cpu"), ranks=1, replicated=True)
    meter.begin()
    meter.end()
    one = torch.ones(())
    meter.note(Outcome({"total": one}, one, 0 * one, {}))
    figures = meter.read(4, Told([]))  # type: ignore[arg-type]
    assert figures.keys() == {"loss/total", "views_per_second", "data_wait"}


class Slow(Trainer):
    """The second rank waits for its data in the warm-up, and is slow to compute in the joint stage."""

    def open_stage(self, name: StageName) -> Stage:
        stage = super().open_stage(name)
        if rank() == 1 and name == "warmup":
            stage.streams["views"] = SlowLatents(stage.cache, stage.config.batch_size, 0)
        elif rank() == 1:
            self.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
        return stage


class SlowLatents(LatentLoader):
    def take(self) -> torch.Tensor:
        time.sleep(0.5)
        return super().take()


def train_with_a_slow_rank(folder: str) -> None:
    options = ["train.warmup.epochs=1", "train.joint.epochs=1", "tracking.every=1", "experiment=slow"]
    trainer = Slow(config.load(Recipe, f"{folder}/recipe.yaml", options))
    trainer.run()
    trainer.engine.close()


def test_the_rank_that_others_wait_for_is_found(recipe_file: str) -> None:
    folder = Path(recipe_file).parent
    ranks.run(train_with_a_slow_rank, 2, str(folder))
    lines = [json.loads(line) for line in (folder / "outputs/slow/metrics.jsonl").read_text().splitlines()]
    # The first steps also make what is made once.
    warmup, joint = ([r for r in lines if r["stage"] == s and "straggler_factor" in r][2:] for s in ("warmup", "joint"))
    assert len(warmup) == len(joint) == 2
    for line in warmup + joint:
        # Half a second is more than the rest of a step; twice the mean at most. Measured: 1.4 to 1.9.
        assert line["slowest_rank"] == 1 and 1.15 < line["straggler_factor"] <= 2, line
    assert all(r["data_wait_max"] > 0.3 and r["data_wait_max"] > 1.5 * r["data_wait"] for r in warmup), warmup
    assert all(r["data_wait_max"] < 0.3 for r in joint), joint
    # What is recorded is what is documented.
    documented = (Path(__file__).parent.parent / "docs/tracking.md").read_text()
    names = {name for line in lines for name in line} - {"step", "stage", "time"}
    missing = [n for n in names if f"`{n}`" not in documented and f"`{n.partition('/')[0]}/" not in documented]
    assert len(names) > 20 and missing == []
