# SPDX-License-Identifier: Apache-2.0
"""What precision `auto` stands for: by the device, or what a run began with."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import yaml
from accelerate.state import AcceleratorState

from igae import config
from igae.checkpoint import list_complete, load_checkpoint
from igae.export import take_settings
from igae.training import Fit, Recipe, Trainer, job
from igae.training.precision import choose_precision

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
A100, H100, T4, CPU = (8, 0), (9, 0), (7, 5), None
RECIPE = config.load(Recipe, CONFIGS / "igae.yaml", ["data.root=x"])
NO_JOINT = ["train.joint.epochs=0", "train.warmup.epochs=1"]


def chosen(overrides: str = "", capability: tuple[int, int] | None = H100, began_in: Any = None) -> tuple[str, str]:
    train = config.load(Recipe, CONFIGS / "igae.yaml", ["data.root=x", *overrides.split()]).train
    return choose_precision(train, capability, began_in)


def test_recipes_that_ship_leave_it_to_the_device() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert "precision" not in yaml.safe_load(path.read_text()).get("train", {}), path
    assert RECIPE.train.precision == "auto"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "bf16"),
        ({"capability": A100}, "bf16"),
        ({"capability": T4}, "fp32"),
        ({"capability": CPU}, "fp32"),
        ({"overrides": "train.precision=fp32"}, "fp32"),
        ({"overrides": "train.precision=bf16", "capability": CPU}, "bf16"),
        # A run goes on as it began, where nobody says otherwise.
        ({"began_in": "fp32"}, "fp32"),
        ({"began_in": "bf16", "capability": CPU}, "bf16"),
        ({"began_in": "fp32", "overrides": "train.precision=bf16"}, "bf16"),
        ({"began_in": "bf16", "overrides": "train.precision=fp32", "capability": T4}, "fp32"),
    ],
    ids=str,
)
def test_what_suits(arguments: dict[str, Any], expected: str) -> None:
    found, why = chosen(**arguments)
    assert found == expected and why and "\n" not in why


def test_a_gpu_that_can_not_go_on_says_which_setting_can() -> None:
    with pytest.raises(ValueError, match=r"^train.precision .*compute capability 7.5.*train.precision=fp32$"):
        chosen(began_in="bf16", capability=T4)


@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_settings_that_are_gone_are_told(value: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = ["data.root=x", f"train.compile={value}", f"train.channels_last={value}"]
    train = config.load(Recipe, CONFIGS / "igae.yaml", settings).train
    assert train == RECIPE.train
    assert all(f"{name} is gone: remove it" in caplog.text for name in ("compile", "channels_last"))


# ---- Runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_run_a_process: None) -> Any:
    """Sets the compute capability that devices seem to have."""

    def set_capability(capability: tuple[int, int] | None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("igae.training.job.capability_of", lambda _: capability)
        monkeypatch.setattr("igae.training.fit.capability_of", lambda _: capability)

    return set_capability


def start(recipe_file: str, *overrides: str) -> Trainer:
    return Trainer(config.load(Recipe, recipe_file, ["train.joint.epochs=0", *overrides]), extend=True)


def test_a_run_says_what_was_chosen_and_keeps_it(recipe_file: str, gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "igae")
    gpu(H100)
    trainer = start(recipe_file, "train.warmup.epochs=1")
    trainer.run()
    assert caplog.text.count("bf16 (on a GPU of compute capability 9.0)") == 1
    assert trainer.model.bf16 and trainer.engine._strategy.bf16
    saved = yaml.safe_load((trainer.folder / "config.yaml").read_text())["train"]
    assert saved["precision"] == "auto"
    found = json.loads((trainer.folder / "environment.json").read_text())
    assert found["precision"] == "bf16"
    newest = list_complete(str(trainer.folder / "checkpoints"))[-1]
    assert yaml.safe_load(load_checkpoint(newest).config)["train"]["precision"] == "bf16"
    for capability, precision in ((CPU, "bf16"), (A100, "bf16")):
        gpu(capability)
        again = start(recipe_file, "train.warmup.epochs=2")
        assert again.precision == precision and again.model.bf16
    assert "train.precision was" not in caplog.text
    gpu(T4)
    with pytest.raises(ValueError, match="train.precision=fp32"):
        start(recipe_file, "train.warmup.epochs=2")
    gpu(T4)
    assert start(recipe_file, "train.warmup.epochs=2", "train.precision=fp32").precision == "fp32"
    assert re.search("changed since the last start: .*train.precision was bf16 and is fp32", caplog.text)


def test_a_run_that_began_in_fp32_stays_so(recipe_file: str, gpu: Any) -> None:
    gpu(CPU)
    start(recipe_file, "train.warmup.epochs=1").run()
    gpu(H100)
    again = start(recipe_file, "train.warmup.epochs=2")
    assert again.precision == "fp32" and not again.model.bf16


def test_a_fit_that_goes_on_elsewhere_keeps_its_precision(recipe_file: str, gpu: Any) -> None:
    gpu(CPU)
    model = start(recipe_file, "train.warmup.epochs=1")
    model.run()
    rates = ["train.joint.weights={latent: 1}", "train.joint.natural_images=0"]
    rates += [f"train.{stage}.learning_rates={{planes: 1.0e-2}}" for stage in ("warmup", "joint")]

    def fit(experiment: str, *overrides: str) -> Fit:
        overrides = (f"model={model.folder}", f"experiment={experiment}", "train.joint.epochs=0.5", *overrides)
        settings = ["train.warmup.epochs=0.5", "fit.wave=2", "autoencoder=null", *rates, *overrides]
        data = yaml.safe_load(Path(recipe_file).read_text())
        path = Path(recipe_file).with_name("fit.yaml")
        path.write_text(
            yaml.safe_dump({key: data[key] for key in data if key not in ("autoencoder", "render", "planes")})
        )
        return Fit(config.load(Recipe, path, [s for s in settings if s != "autoencoder=null"], complete=take_settings))

    gpu(H100)
    first = fit("elsewhere")
    first._fit_all = lambda _: False  # type: ignore[method-assign]  # stopped before its first wave
    first.run()
    assert first.precision == "bf16"
    gpu(CPU)
    second = fit("elsewhere")
    second.run()
    assert second.precision == "bf16" and second.model.bf16
    (done,) = list_complete(str(second.folder / "checkpoints"))
    assert yaml.safe_load(load_checkpoint(done).config)["train"]["precision"] == "bf16"


def differently(recipe_file: str) -> str:
    """What a rank is told beside one with another GPU."""
    capability = T4 if os.environ["RANK"] == "1" else H100
    job.capability_of = lambda _: capability  # type: ignore[assignment]
    try:
        start(recipe_file)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_would_choose_differently_are_refused(recipe_file: str) -> None:
    told = ranks.run(differently, 2, recipe_file)
    for text in told:
        assert re.match(r'train.precision is "bf16" .* on rank 0 and "fp32" .* on rank 1', text), text
