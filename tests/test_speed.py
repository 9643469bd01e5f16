# SPDX-License-Identifier: Apache-2.0
"""What `auto` stands for: precision, compilation and layout by device, strategy and the steps to do."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch._inductor.config
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.training_step import AUTOENCODER
from igae import config
from igae.checkpoint import list_complete, load_checkpoint
from igae.export import take_settings
from igae.kernels import keep_compiled
from igae.models import Autoencoder
from igae.training import Fit, Recipe, Trainer, speed
from igae.training.speed import Speed

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
A100, H100, T4, CPU = (8, 0), (9, 0), (7, 5), None
RECIPE = config.load(Recipe, CONFIGS / "igae.yaml", ["data.root=x"])
NO_JOINT = ["train.joint.epochs=0", "train.warmup.epochs=1"]


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has all that compiling needs."""
    monkeypatch.setattr(speed, "missing_for_triton", lambda: None)


def chosen(
    overrides: str = "",
    capability: tuple[int, int] | None = H100,
    *,
    replicated: bool = True,
    began_in: Any = None,
    saves: float = 0.0,
) -> Speed:
    train = config.load(Recipe, CONFIGS / "igae.yaml", ["data.root=x", *overrides.split()]).train
    return speed.choose(train, capability, replicated, began_in, lambda: (100.0, saves))


def test_recipes_that_ship_leave_it_to_the_device() -> None:
    for path in CONFIGS.glob("*.yaml"):
        written = yaml.safe_load(path.read_text()).get("train", {})
        assert not {"precision", "compile", "channels_last"} & written.keys(), path
    assert RECIPE.train.precision == RECIPE.train.compile == RECIPE.train.channels_last == "auto"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("bf16", False, False)),
        ({"saves": 99}, ("bf16", False, False)),
        ({"saves": 101}, ("bf16", True, True)),
        ({"capability": A100, "saves": 101}, ("bf16", True, True)),
        ({"capability": T4, "saves": 101}, ("fp32", True, True)),
        ({"capability": CPU, "saves": 101}, ("fp32", False, False)),
        ({"replicated": False, "saves": 101}, ("bf16", False, False)),
        ({"replicated": False, "overrides": "train.compile=true train.channels_last=true"}, ("bf16", False, False)),
        ({"overrides": "train.precision=fp32"}, ("fp32", False, False)),
        ({"overrides": "train.precision=bf16", "capability": CPU}, ("bf16", False, False)),
        ({"overrides": "train.compile=true", "capability": CPU}, ("fp32", True, True)),
        ({"overrides": "train.compile=false", "saves": 101}, ("bf16", False, False)),
        ({"overrides": "train.compile=true train.channels_last=false"}, ("bf16", True, False)),
        ({"overrides": "train.channels_last=true"}, ("bf16", False, True)),
        # A run goes on as it began, where nobody says otherwise.
        ({"began_in": "fp32"}, ("fp32", False, False)),
        ({"began_in": "bf16", "capability": CPU}, ("bf16", False, False)),
        ({"began_in": "fp32", "overrides": "train.precision=bf16"}, ("bf16", False, False)),
        ({"began_in": "bf16", "overrides": "train.precision=fp32", "capability": T4}, ("fp32", False, False)),
    ],
    ids=str,
)
def test_what_suits(arguments: dict[str, Any], expected: tuple[str, bool, bool]) -> None:
    found = chosen(**arguments)
    assert (found.precision, found.compile, found.channels_last) == expected
    assert "\n" not in found.why and found.precision in found.why
    assert ("not compiled" in found.why) != found.compile


def test_a_gpu_that_can_not_go_on_says_which_setting_can() -> None:
    with pytest.raises(ValueError, match=r"^train.precision .*compute capability 7.5.*train.precision=fp32$"):
        chosen(began_in="bf16", capability=T4)


@pytest.mark.parametrize("missing", ["triton", "a C compiler", "Python.h"])
def test_nothing_is_compiled_without_what_it_needs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "missing_for_triton", lambda: missing)
    found = chosen(saves=1e6)
    assert not found.compile and f"{missing} is missing" in found.why


def test_the_compiler_of_this_machine_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(speed, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert speed.missing_for_triton() == "a C compiler"
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    assert speed.missing_for_triton() in (None, "Python.h")
    monkeypatch.setattr(speed, "find_spec", lambda _: None)
    assert speed.missing_for_triton() == "triton"


@pytest.fixture
def large() -> Iterator[Any]:
    """An autoencoder of Stable Diffusion's size, of shapes only."""
    with FakeTensorMode():
        autoencoder = Autoencoder(AutoencoderKL.from_config(AUTOENCODER), 0.1)
        yield SimpleNamespace(autoencoder=autoencoder, plain=torch.empty(1, 3, 128, 128))


def test_a_step_has_the_flop_that_were_measured(large: Any) -> None:
    """15.63 TFLOP: 12 views and 3 natural images are encoded, all of them and the 12 renders decoded."""
    encode, decode = speed.flop_of_an_image(large)
    assert 3 * (15 * encode + 27 * decode) == pytest.approx(15.63e12, rel=0.01)


def test_compiling_pays_when_the_documents_say_so(large: Any) -> None:
    """After five minutes of 68.7 ms steps with a large autoencoder (docs/experiments/training-step.md)."""
    joint, model = RECIPE.train.joint, large
    costs, saves = speed.compilation(model, [(joint, 1000)])
    assert costs == speed.NETWORK_COSTS + speed.LOSSES_COST
    assert saves == pytest.approx(1000 * (26.8e-3 + 12 * 22e-6), rel=0.02)
    pays_after = 1000 * costs / saves
    assert 3 * 60 < pays_after * 68.7e-3 < 10 * 60
    assert speed.compilation(model, [(joint, 2000)])[1] == pytest.approx(2 * saves)
    assert speed.compilation(model, [(joint, 0)]) == (0, 0)  # the stage is at its end
    # The warm-up takes latents from its cache: encoder and decoder are not compiled for it.
    costs, saves = speed.compilation(model, [(RECIPE.train.warmup, 10_000)])
    assert (costs, round(saves, 1)) == (speed.LOSSES_COST, 7.1)


# ---- Runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_run_a_process: None) -> Any:
    """Sets the compute capability that devices seem to have."""

    def set_capability(capability: tuple[int, int] | None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(speed, "capability_of", lambda _: capability)
        monkeypatch.setattr("igae.training.fit.capability_of", lambda _: capability)

    return set_capability


def start(recipe_file: str, *overrides: str) -> Trainer:
    return Trainer(config.load(Recipe, recipe_file, ["train.joint.epochs=0", *overrides]), extend=True)


def test_a_run_says_what_was_chosen_and_keeps_it(recipe_file: str, gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "igae")
    gpu(H100)
    trainer = start(recipe_file, "train.warmup.epochs=1")
    trainer.run()
    assert caplog.text.count("bf16 (on a GPU of compute capability 9.0), not compiled") == 1
    assert trainer.model.bf16 and trainer.engine._strategy.bf16
    saved = yaml.safe_load((trainer.folder / "config.yaml").read_text())["train"]
    assert saved["precision"] == saved["compile"] == saved["channels_last"] == "auto"
    found = json.loads((trainer.folder / "environment.json").read_text())
    assert {name: found[name] for name in trainer.speed.settings} == {
        "precision": "bf16",
        "compile": False,
        "channels_last": False,
    }
    newest = list_complete(str(trainer.folder / "checkpoints"))[-1]
    assert yaml.safe_load(load_checkpoint(newest).config)["train"]["precision"] == "bf16"
    for capability, precision in ((CPU, "bf16"), (A100, "bf16")):
        gpu(capability)
        again = start(recipe_file, "train.warmup.epochs=2")
        assert again.speed.precision == precision and again.model.bf16
    assert not re.search(r"train.(precision|compile|channels_last) was", caplog.text)
    gpu(T4)
    with pytest.raises(ValueError, match="train.precision=fp32"):
        start(recipe_file, "train.warmup.epochs=2")
    gpu(T4)
    assert start(recipe_file, "train.warmup.epochs=2", "train.precision=fp32").speed.precision == "fp32"
    assert re.search("changed since the last start: .*train.precision was bf16 and is fp32", caplog.text)


def test_a_run_that_began_in_fp32_stays_so(recipe_file: str, gpu: Any) -> None:
    gpu(CPU)
    start(recipe_file, "train.warmup.epochs=1").run()
    gpu(H100)
    again = start(recipe_file, "train.warmup.epochs=2")
    assert again.speed.precision == "fp32" and not again.model.bf16


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
    assert first.speed.precision == "bf16"
    gpu(CPU)
    second = fit("elsewhere")
    second.run()
    assert second.speed.precision == "bf16" and second.model.bf16
    (done,) = list_complete(str(second.folder / "checkpoints"))
    assert yaml.safe_load(load_checkpoint(done).config)["train"]["precision"] == "bf16"


def differently(recipe_file: str) -> str:
    """What a rank is told beside one with another GPU."""
    capability = T4 if os.environ["RANK"] == "1" else H100
    speed.capability_of = lambda _: capability  # type: ignore[assignment]
    try:
        start(recipe_file)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_would_choose_differently_are_refused(recipe_file: str) -> None:
    told = ranks.run(differently, 2, recipe_file)
    for text in told:
        assert re.match(r'train.precision is "bf16" .* on rank 0 and "fp32" .* on rank 1', text), text


def test_the_step_count_is_of_what_is_left(recipe_file: str, gpu: Any) -> None:
    gpu(CPU)
    settings = ["train.warmup.epochs=2", "train.joint.epochs=1.5"]
    trainer = Trainer(config.load(Recipe, recipe_file, settings))
    assert [steps for _, steps in trainer._steps_to_do()] == [16, 12]  # 34 views, 4 a step
    trainer.progress.step = 10
    assert [steps for _, steps in trainer._steps_to_do()] == [6, 12]
    trainer.progress.finished = True
    assert [steps for _, steps in trainer._steps_to_do()] == [12]
    trainer.progress.stage, trainer.progress.step, trainer.progress.finished = "joint", 11, False
    assert [steps for _, steps in trainer._steps_to_do()] == [1]


# ---- What is compiled is kept

COMPILE = """
import os, sys
from igae.kernels import keep_compiled
keep_compiled(1)
import torch
from torch._dynamo.utils import counters
from igae.models.losses import total_variation
planes = torch.randn(2, 3, 4, 4, 2, requires_grad=True)
torch.compile(total_variation)(planes, (2, 3), torch.ones(2)).backward()
found = counters["inductor"]
print(found["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], found["fxgraph_cache_miss"])
"""


def compile_in(folder: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if "INDUCTOR" not in name and "TRITON" not in name}
    environment |= {"IGAE_KERNEL_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.PIPE, text=True)


def test_what_is_compiled_is_kept_for_the_next_start(tmp_path: Path) -> None:
    """Two ranks begin at once, and find nothing."""
    started = [compile_in(tmp_path / "kernels") for _ in range(2)]
    first = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert any(int(misses) for _, misses in first)
    again = compile_in(tmp_path / "kernels")
    hits, misses = map(int, again.communicate()[0].split())
    assert hits > 0 and misses == 0
    assert (tmp_path / "kernels" / "torchinductor").is_dir() and (tmp_path / "kernels" / "triton").is_dir()


VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def test_imports_set_nothing_of_ours(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = "import igae.training.trainer, igae.models.igae, os; print(os.environ)"
    command = [sys.executable, "-c", code]
    environment |= {"PYTHONPATH": str(ROOT), "IGAE_KERNEL_CACHE": str(tmp_path / "kernels")}
    printed = subprocess.check_output(command, env=environment, text=True)
    assert str(tmp_path / "kernels" / "t") not in printed and not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        ({"IGAE_KERNEL_CACHE": "/tmp/x/kernels"}, ("/tmp/x/kernels/torchinductor", "/tmp/x/kernels/triton")),
        ({"HOME": "/tmp/x"}, ("/tmp/x/.cache/igae/kernels/torchinductor", "/tmp/x/.cache/igae/kernels/triton")),
        # What torch writes there when it is imported is no wish of the user's.
        (
            {"IGAE_KERNEL_CACHE": "/tmp/x", "TORCHINDUCTOR_CACHE_DIR": default_cache_dir()},
            ("/tmp/x/torchinductor", "/tmp/x/triton"),
        ),
        ({"IGAE_KERNEL_CACHE": "/tmp/x", "TORCHINDUCTOR_CACHE_DIR": "/own"}, ("/own", None)),
        ({"IGAE_KERNEL_CACHE": "/tmp/x", "TRITON_CACHE_DIR": "/own"}, ("/tmp/x/torchinductor", "/own")),
        ({"IGAE_KERNEL_CACHE": "/proc/nowhere"}, (None, None)),  # can't be written
    ],
    ids=str,
)
def test_where_it_is_kept(
    given: dict[str, str], folders: tuple[str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp/x stands for a folder of the test's."""
    for name in (*VARIABLES, "IGAE_KERNEL_CACHE"):
        monkeypatch.setenv(name, "")  # so that all is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value.replace("/tmp/x", str(tmp_path)))
    with torch._inductor.config.patch(compile_threads=64):
        keep_compiled(3)
        assert torch._inductor.config.compile_threads == 3
    expected = [folder and folder.replace("/tmp/x", str(tmp_path)) for folder in folders]
    assert [os.environ.get(name) for name in VARIABLES] == expected
