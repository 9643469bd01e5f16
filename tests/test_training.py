# SPDX-License-Identifier: Apache-2.0
"""Training as a user runs it: small, but with every part real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import runs
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import train
from igae import checkpoint, config
from igae.checkpoint.format import CONFIG, STATE, FileEntry, dump_state, parse_state
from igae.errors import LostRank, TrainingError
from igae.evaluation import problems
from igae.export import load_trained
from igae.training import ASYNC_STEPS, Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")

ROOT = Path(__file__).parent.parent


def _run(recipe_file: str, *arguments: str) -> int:
    return train.main(["--config", recipe_file, *arguments])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _newest(recipe_file: str, name: str) -> Path:
    return Path(checkpoint.list_complete(str(Path(recipe_file).parent / "outputs" / name / "checkpoints"))[-1])


def test_every_trainable_parameter_moves_in_each_stage(recipe_file: str) -> None:
    recipe = config.load(Recipe, recipe_file, ["train.warmup.epochs=0.2", "train.joint.epochs=0.2"])
    trainer = Trainer(recipe)
    model, store = trainer.model, trainer.store
    names = {name for name, _ in model.named_parameters()}
    assert any("quant_conv" in name for name in names) and any("post_quant_conv" in name for name in names)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = store.rows.clone()
    trainer.run("warmup")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in names if name.startswith(("mlp.", "head."))}
    # One step of four views touches at least one scene, and exactly the touched scenes move.
    assert (store.rows != rows).flatten(1).any(1).sum() >= 1

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = store.rows.clone()
    trainer.run("joint")
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == set()
    assert (store.rows != rows).flatten(1).any(1).sum() >= 1


@pytest.mark.parametrize("settings", [[], runs.PLAIN], ids=["all on", "plain"])
def test_five_and_five_steps_equal_ten(recipe_file: str, settings: list[str]) -> None:
    options = [
        *settings,
        "train.warmup.epochs=1.25",
        "train.joint.epochs=1.25",
        "checkpoint.every=5",
        "evaluation.every=2",  # which catches planes up: where that is done changes last bits
    ]
    recipe = config.load(Recipe, recipe_file, [*options, "experiment=ten"])
    trainer = Trainer(recipe)
    trainer.run()
    assert trainer.progress.total == 20

    # The same in parts of five steps, each ended by a signal and in a trainer of its own.
    recipe = config.load(Recipe, recipe_file, [*options, "experiment=parts"])
    for total in (5, 10, 15, 20):
        part = Trainer(recipe)
        _stop_after(part, total, signal.SIGTERM if settings else signal.SIGUSR1)
        part.run()
        assert part.progress.total == total
    Trainer(recipe).run()
    ten, parts = _tensors(_newest(recipe_file, "ten")), _tensors(_newest(recipe_file, "parts"))
    assert ten.keys() == parts.keys()
    different = [name for name in ten if not torch.equal(ten[name], parts[name])]
    assert different == []


def _stop_after(trainer: Trainer, total: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the step before step number ``total``: all ranks agree to stop while
    they make a step, so it is the next one that is the last."""

    def stopping(*_: object) -> None:
        if trainer.progress.total == total - 2:
            os.kill(os.getpid(), number)

    trainer.model.register_forward_pre_hook(stopping)


def _start(tmp_path: Path, *command: str) -> "subprocess.Popen[str]":
    """A training process of many steps, once it has made the first of them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True, text=True, cwd=tmp_path, env=environment
    )
    metrics = tmp_path / "outputs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


LONG = ["train.warmup.epochs=0", "train.joint.epochs=2000"]


def test_signals_save_and_it_exits_with_0(tmp_path: Path, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    process = _start(tmp_path, sys.executable, str(ROOT / "train.py"), "--config", recipe_file, *LONG)
    assert _run(recipe_file, *LONG) == 2
    assert "another process is training" in capsys.readouterr().err
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)  # as schedulers do: to the training process and its workers alike
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert re.search("stopped by SIG(USR1|TERM)", errors)
    state = json.loads((_newest(recipe_file, "run") / "state.json").read_text())
    assert state["stage"] == "joint" and not state["finished"] and state["step"] > 0


def test_training_saves_and_ends_when_its_launcher_dies(tmp_path: Path, recipe_file: str) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    file = ["--config_file", str(ROOT / "launch" / "accelerate" / "one_process.yaml")]
    process = _start(tmp_path, *launcher, *file, str(ROOT / "train.py"), "--config", recipe_file, *LONG)
    before = checkpoint.list_complete(str(tmp_path / "outputs" / "run" / "checkpoints"))
    process.terminate()  # the launcher alone
    _, errors = process.communicate(timeout=60)  # until the training process has closed the pipe, too
    assert "stopped by SIGTERM" in errors
    assert str(_newest(recipe_file, "run")) not in before


def test_stages_one_by_one_equal_both_at_once(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["train.warmup.epochs=0.5", "train.joint.epochs=0.5"]
    assert _run(recipe_file, "--stage", "joint", "experiment=steps", *short) == 2
    assert "no finished warm-up" in capsys.readouterr().err
    assert not (Path(recipe_file).parent / "outputs" / "steps" / "config.yaml").exists()  # a refused start writes none
    assert _run(recipe_file, "--stage", "warmup", "experiment=steps", *short) == 0
    first = _newest(recipe_file, "steps")
    assert _run(recipe_file, "--stage", "warmup", "experiment=steps", *short) == 0  # nothing left to do
    assert _newest(recipe_file, "steps") == first
    assert _run(recipe_file, "--stage", "joint", "experiment=steps", *short) == 0
    assert _run(recipe_file, "experiment=once", *short) == 0
    steps, once = _tensors(_newest(recipe_file, "steps")), _tensors(_newest(recipe_file, "once"))
    assert [name for name in once if not torch.equal(once[name], steps[name])] == []


def test_training_learns_and_reports(recipe_file: str, caplog: pytest.LogCaptureFixture) -> None:
    # Views of noise can only be memorized, so they must not move.
    arguments = ["train.warmup.epochs=12", "tracking.trackers=[tensorboard]", *runs.PLAIN]
    arguments += ["evaluation.pictures=2", "evaluation.orbits=1", "evaluation.orbit_frames=4"]
    assert _run(recipe_file, *arguments) == 0
    run = Path(recipe_file).parent / "outputs" / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    latent = [r["loss/latent"] for r in records if r["stage"] == "warmup" and "loss/latent" in r]
    assert sum(latent[-5:]) < 0.9 * sum(latent[:5])
    joint = [r["loss/total"] for r in records if r["stage"] == "joint" and "loss/total" in r]
    assert sum(joint[-3:]) < sum(joint[:3])
    figures = json.loads((run / "metrics.json").read_text())["joint"]
    for name in ("heldout/rgb_psnr", "train/rgb_psnr", "heldout/latent_psnr", "heldout/ae_psnr", "heldout/rgb_ssim"):
        assert isinstance(figures[name], float)
    assert {"natural/ae_psnr", "heldout/baseline_psnr", "gap/rgb_psnr", "train/latent_error"} <= figures.keys()
    assert sorted(path.stem.rpartition("-")[0] for path in (run / "pictures").glob("*.png")) == [
        f"{stage}-{name}" for stage in ("joint", "warmup") for name in ("latents", "views")
    ]
    assert len(list((run / "orbits" / "joint").glob("*.mp4"))) == 1
    assert config.load(Recipe, run / "config.yaml") == config.load(Recipe, recipe_file, arguments)
    assert list((run / "tensorboard").rglob("events.*"))
    AutoencoderKL.from_pretrained(run / "autoencoder")
    page = (run / "report.html").read_text()
    wrong = problems(json.loads((run / "metrics.json").read_text())["warmup"])
    assert wrong and all(text in caplog.text and text not in page for text in wrong)  # it shows the end
    assert f"{figures['heldout/rgb_psnr']:.5g}" in page and torch.__version__ in page
    assert (page.count("<img "), page.count("<video ")) == (4 + 3 * 6, 1)
    # A report that can't be written, and a run that has ended well.
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert _run(recipe_file, *arguments) == 0
    assert "the report was not written" in caplog.text


def _poison_from(trainer: Trainer, total: int) -> None:
    """Make the loss NaN from step number ``total`` (from 0) of the run on."""

    def poisoned(_: object, __: object, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bad = trainer.progress.total >= total
        return losses | {"total": losses["total"] * float("nan")} if bad else losses

    trainer.model.register_forward_hook(poisoned)


async_steps = pytest.mark.parametrize("async_steps", [0, ASYNC_STEPS], ids=["synchronous", "asynchronous"])
"""Steps that are made before it is known how the last one went, as on a GPU."""


def test_asynchronous_steps_compute_the_same(recipe_file: str) -> None:
    short = ["train.warmup.epochs=1", "train.joint.epochs=2", "tracking.every=7", "checkpoint.every=5"]
    Trainer(config.load(Recipe, recipe_file, [*short, "experiment=waits"])).run()
    recipe = config.load(Recipe, recipe_file, [*short, "experiment=ahead"])
    first = Trainer(recipe)
    first.async_steps = ASYNC_STEPS
    _stop_after(first, 7)
    first.run()
    # The stop is seen a little later, and the steps until then are made.
    assert 7 <= first.progress.total <= 7 + ASYNC_STEPS
    second = Trainer(recipe)
    second.async_steps = ASYNC_STEPS
    second.run()
    waits, ahead = _tensors(_newest(recipe_file, "waits")), _tensors(_newest(recipe_file, "ahead"))
    assert waits.keys() == ahead.keys()
    assert [name for name in waits if not torch.equal(waits[name], ahead[name])] == []


def test_the_step_that_is_captured_computes_the_same(recipe_file: str) -> None:
    """Its padded rows, what it is told in one tensor, and moved views; the CUDA graph itself is tested on a GPU."""
    short = ["train.warmup.epochs=2", "train.joint.epochs=1", "tracking.every=7"]
    Trainer(config.load(Recipe, recipe_file, [*short, "experiment=plain"])).run()
    trainer = runs.StaticTrainer(config.load(Recipe, recipe_file, [*short, "experiment=captured"]))
    _stop_after(trainer, 7)
    trainer.run()
    runs.StaticTrainer(config.load(Recipe, recipe_file, [*short, "experiment=captured"])).run()
    plain, other = _tensors(_newest(recipe_file, "plain")), _tensors(_newest(recipe_file, "captured"))
    assert plain.keys() == other.keys()
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == []


@async_steps
def test_steps_that_are_not_finite_change_nothing_and_stop_the_run(recipe_file: str, async_steps: int) -> None:
    recipe = config.load(Recipe, recipe_file, ["train.warmup.epochs=1", "train.joint.epochs=1", "train.max_skipped=3"])
    trainer = Trainer(recipe)
    trainer.async_steps = async_steps
    trainer.run("warmup")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    rows = trainer.store.rows.clone()
    _poison_from(trainer, 0)
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        trainer.run("joint")
    assert trainer.progress.skipped == 3
    assert torch.equal(trainer.store.rows, rows)
    assert [n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])] == []


@pytest.mark.parametrize("problem", [ValueError, LostRank])
def test_why_training_ends_is_said_though_saving_fails_too(recipe_file: str, problem: type[Exception]) -> None:
    class Failing(checkpoint.CheckpointWriter):
        def close(self) -> None:
            raise problem("the last checkpoint can't be written")

    trainer = Trainer(config.load(Recipe, recipe_file, ["train.warmup.epochs=1", "train.max_skipped=2"]))
    trainer.writer = Failing(trainer.recipe.checkpoint_root, 3, trainer.channel)
    _poison_from(trainer, 0)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.run("warmup")


@async_steps
def test_no_checkpoint_is_made_while_steps_are_skipped_but_a_stage_ends_with_one(
    recipe_file: str, async_steps: int
) -> None:
    options = ["train.warmup.epochs=1", "train.joint.epochs=0", "checkpoint.every=1", "checkpoint.keep=9"]
    trainer = Trainer(config.load(Recipe, recipe_file, options))
    trainer.async_steps = async_steps
    _poison_from(trainer, 5)
    trainer.run()
    names = [Path(path).name for path in checkpoint.list_complete(str(trainer.folder / "checkpoints"))]
    assert names == [f"step-{total:08d}" for total in range(1, 6)] + ["step-00000008-end"]
    assert trainer.progress.skipped == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.joint.batchsize=3"], "did you mean train.joint.batch_size"),
        (["data.root=/nowhere"], "pack the data first"),
        (["autoencoder={path: /nowhere/vae}"], "autoencoder.path: /nowhere/vae"),
        (["data.categories={bus: [0, 3]}"], "bus"),
        (["render.patch=3"], "render.patch is 3: it must divide the autoencoder's downscale 2"),
        (["train.joint.weights.natural_lpips=0.1", "train.lpips_weights=/nowhere/vgg.pth"], "/nowhere/vgg.pth"),
        (["--resume", "/nowhere/step-00000001"], "has no state.json"),
    ],
)
def test_mistakes_are_one_sentence(
    recipe_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert _run(recipe_file, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sentence in lines[-1]


def test_planes_of_0_1_0_that_moved_only_when_visited(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their optimizer's state means something else: they don't train on, but are read, without deferred updates."""
    short = ["train.warmup.epochs=1", "train.joint.epochs=0"]
    trainer = Trainer(config.load(Recipe, recipe_file, short))
    _stop_after(trainer, 3)
    trainer.run()
    folder = _newest(recipe_file, trainer.recipe.experiment)
    settings = (folder / CONFIG).read_text().replace("train:\n", "train:\n  plane_optimizer: lazy\n").encode()
    progress, files = parse_state((folder / STATE).read_bytes())
    files[CONFIG] = FileEntry(len(settings), zlib.crc32(settings))
    (folder / CONFIG).write_bytes(settings)
    (folder / STATE).write_bytes(dump_state(progress, files))
    assert _run(recipe_file, *short) == 2
    sentence = "train.plane_optimizer was lazy in .* and is exact now.*: use a new experiment=NAME"
    assert re.search(sentence, capsys.readouterr().err)
    trained = load_trained(str(folder))
    stored = checkpoint.load_checkpoint(str(folder)).rows(trainer.store.ids.tolist())
    assert (stored["updated"] < progress.total).any()
    assert torch.equal(trained.rows(trained.names), stored["planes"])


def test_another_configuration_does_not_go_on_from_a_checkpoint(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["train.warmup.epochs=1", "train.joint.epochs=0"]
    trainer = Trainer(config.load(Recipe, recipe_file, short))
    _stop_after(trainer, 3)
    trainer.run()
    fixed = [
        "seed=5",
        "render.axes=eg3d",
        "autoencoder.scale=0.7",
        "data.background=[0, 0, 0]",
        "planes.resolution=10",
    ]
    for change in fixed:
        assert _run(recipe_file, *short, change) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert change.split("=")[0] in error and "use a new experiment=NAME" in error
    assert _run(recipe_file, *short, "data.categories={cars: [0, 2]}") == 2
    assert "data.categories can't change" in capsys.readouterr().err
    # A learning rate may change, and the batch size too.
    assert _run(recipe_file, *short, "train.warmup.learning_rates.mlp=2.0e-3") == 0
    assert _run(recipe_file, *short, "train.warmup.batch_size=2") == 0
    assert _run(recipe_file, *short, "--resume", "never") == 2
