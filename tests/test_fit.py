# SPDX-License-Identifier: Apache-2.0
"""New scenes are fitted to a trained model, wave after wave: the same ones on any number of ranks, and after a kill."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import train
from igae import checkpoint, config
from igae.checkpoint import Checkpoint
from igae.data import Manifest
from igae.export import read_run, take_settings, write
from igae.models.igae import Views
from igae.scenes import SceneStore
from igae.training import Fit, Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")

PLANES = {"resolution": 8, "features": 8, "base_planes": 3, "micro_features": 3, "macro_features": 5, "bias": True}
FIT: dict[str, Any] = {
    "experiment": "fit",
    "fit": {"wave": 1},
    "train": {
        "warmup": {
            "epochs": 6,
            "batch_size": 4,
            "learning_rates": {"planes": 5e-2},
            "weights": {"latent": 1, "planes_tv": 1e-4},
        },
        "joint": {"epochs": 1, "batch_size": 3, "learning_rates": {"planes": 1e-2}, "weights": {"latent": 0, "rgb": 1}},
    },
    "evaluation": {"views": 1, "pictures": 0, "orbits": 0},
}
SCENES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shards, a model that was trained on them, and the recipe of a fit."""
    folder = tmp_path_factory.mktemp("fit")
    shards = runs.packed_data(folder)
    overrides = [f"planes={PLANES}", "experiment=model", "train.joint.epochs=1"]
    overrides += [f"train.{stage}.learning_rates.base_planes=1e-2" for stage in ("warmup", "joint")]
    assert train.main(["--config", str(runs.recipe_file(folder, shards)), *overrides]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        **FIT,
        "model": str(folder / "outputs" / "model"),
        "outputs": str(folder / "outputs"),
        "data": {"root": shards, "workers": 0, "shuffle": 16},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Checkpoint:
    """What one rank makes of all scenes without a pause."""
    seen = ["tracking.trackers=[tensorboard]", "evaluation={views: 1, pictures: 2, orbits: 1, orbit_frames: 2}"]
    assert ranks.Ranks(runs.train, 1, str(folder / "fit.yaml"), "experiment=whole", *seen).exit_codes() == [0]
    return result(folder, "whole")


def load_fit(folder: Path, *overrides: str) -> Recipe:
    return config.load(Recipe, folder / "fit.yaml", overrides, complete=take_settings)


def checkpoints(folder: Path, name: str) -> Path:
    return folder / "outputs" / name / "checkpoints" / "step-00000000-end"


def result(folder: Path, name: str) -> Checkpoint:
    (only,) = checkpoint.list_complete(str(folder / "outputs" / name / "checkpoints"))
    return checkpoint.load_checkpoint(only)


def planes(loaded: Checkpoint) -> Tensor:
    return loaded.rows(SCENES)["planes"]


def test_a_fit_trains_scenes_and_nothing_else(folder: Path, fitted: Checkpoint) -> None:
    assert fitted.ids.tolist() == sorted(SCENES) and fitted.progress.finished
    model = checkpoint.load_checkpoint(checkpoint.list_complete(str(folder / "outputs" / "model" / "checkpoints"))[-1])
    assert fitted.shared.keys() == model.shared.keys()
    for name, value in model.shared.items():
        assert torch.equal(fitted.shared[name], value), name
    start = SceneStore(load_fit(folder).planes, SCENES, 0, torch.device("cpu")).rows
    assert bool((planes(fitted) != start).all()), "every number of every scene is trained"
    lines = [json.loads(line) for line in (folder / "outputs" / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "seconds_per_scene" in line] == [1, 2, 3, 4]
    assert "seconds_per_scene" in (folder / "outputs" / "whole" / "report.html").read_text()
    events = EventAccumulator(str(folder / "outputs" / "whole" / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["views", "latents", "orbit/scene_0"]
    pictures = (folder / "outputs" / "whole" / "pictures").iterdir()
    assert sorted(path.name for path in pictures) == ["fit-latents.png", "fit-views.png"]
    # Each file is safetensors, and one scene of it can be read alone.
    first = load_file(checkpoints(folder, "whole") / "scenes-00000.safetensors")
    assert first["planes"].shape == (1, 3 * 8 * 8 * 3 + 3 + 1) and len(first["ids"]) == 1
    assert sorted(path.suffix for path in checkpoints(folder, "whole").iterdir()) == sorted(
        [".safetensors"] * 6 + [".json", ".yaml"]
    )


class FitAlone(Fit):
    """Without an evaluation."""

    def conclude(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("only", ["warmup", "joint"])
def test_both_stages_lower_their_loss(folder: Path, only: str) -> None:
    other = "joint" if only == "warmup" else "warmup"
    recipe = load_fit(folder, f"experiment={only}", "fit.wave=4", f"train.{only}.epochs=12", f"train.{other}.epochs=0")
    losses: list[float] = []
    fit = FitAlone(recipe)
    name = "latent" if only == "warmup" else "rgb"
    fit.model.register_forward_hook(lambda _, __, found: losses.append(float(found[name].detach())))
    fit.run()
    tenth = len(losses) // 10
    # Measured: 0.91 and 0.95 of it. The images are noise, of which a scene can learn the mean color only.
    assert sum(losses[-tenth:]) < 0.98 * sum(losses[:tenth])


def test_two_ranks_fit_what_one_does(folder: Path, fitted: Checkpoint) -> None:
    """The command itself, on real processes: nothing of the batches, noise or rays depends on the number of ranks."""
    codes = ranks.Ranks(runs.train, 2, str(folder / "fit.yaml"), "experiment=two").exit_codes()
    assert codes == [0, 0]
    two = result(folder, "two")
    # Measured: 2.2e-6. The last bits of a convolution depend on what the process has computed before.
    assert (planes(two) - planes(fitted)).abs().max() < 1e-5
    assert two.shared.keys() == fitted.shared.keys()
    one, other = (json.loads((folder / f"outputs/{n}/metrics.json").read_text())["fit"] for n in ("whole", "two"))
    assert one == pytest.approx(other, abs=1e-5)


def render(fit: Fit, rows: Tensor) -> Tensor:
    pose = torch.eye(4)
    pose[2, 3] = -1.5
    lens = torch.tensor([[1.2, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]])
    with torch.no_grad():
        return fit.model.render(rows, Views(torch.zeros(1, dtype=torch.int64), pose[None], lens[None]), None)[0]


class FitAndRender(Fit):
    """Renders the scenes of each wave when it is written."""

    renders: dict[int, Tensor]

    def fit_wave(self, index: int) -> bool:
        done = super().fit_wave(index)
        scenes = load_file(checkpoints(self.folder.parents[1], "forgetful") / f"scenes-{index:05d}.safetensors")
        self.renders |= {int(i): render(self, scenes["planes"][k : k + 1]) for k, i in enumerate(scenes["ids"])}
        return done


def test_the_first_wave_renders_the_same_after_the_last(folder: Path) -> None:
    fit = FitAndRender(load_fit(folder, "experiment=forgetful", "fit.wave=2"))
    fit.renders = renders = {}
    fit.run()
    assert sorted(renders) == SCENES
    AcceleratorState._reset_state(reset_partial_state=True)
    # In another model, with what the finished checkpoint has.
    again, loaded = Fit(load_fit(folder, "experiment=other")), result(folder, "forgetful")
    again.model.load_state_dict(loaded.shared)
    for scene, picture in renders.items():
        assert torch.equal(render(again, loaded.rows([scene])["planes"]), picture)


def test_each_view_is_encoded_once(folder: Path) -> None:
    """The work for a scene does not grow with the number of waves."""
    views = sum(scene.views for scene in Manifest.load(str(folder / "shards")).scenes)
    for wave in (1, 2, 4):
        fit = FitAlone(load_fit(folder, f"experiment=count{wave}", f"fit.wave={wave}"))
        encoded, rendered = list[int](), list[int]()
        encoder = fit.model.autoencoder.net.encoder
        encoder.register_forward_pre_hook(lambda _, images, seen=encoded: seen.append(len(images[0])))
        fit.model.register_forward_pre_hook(lambda _, arguments, seen=rendered: seen.append(len(arguments[1].index)))
        fit.run()
        assert sum(encoded) == views
        # Epochs are rounded to whole batches: 6 of them at batches of 4, and one at batches of 3.
        assert 0.75 * 7 * views < sum(rendered) <= 7 * views
        AcceleratorState._reset_state(reset_partial_state=True)


def test_few_scenes_are_fitted_in_smaller_batches(folder: Path) -> None:
    """A step has at most five views a scene: else one scene would have a step an epoch, of many repeated views."""
    found = []
    for batch in (64, 5):
        settings = [f"experiment=few-{batch}", f"train.warmup.batch_size={batch}", f"train.joint.batch_size={batch}"]
        running = ranks.Ranks(runs.train, 1, str(folder / "fit.yaml"), *settings, "train.warmup.epochs=2")
        assert running.exit_codes() == [0]
        found.append(planes(result(folder, f"few-{batch}")))
    assert torch.equal(*found)


def wait_for(path: Path, running: ranks.Ranks) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and any(process.is_alive() for process in running.processes)
        time.sleep(0.01)


@pytest.mark.parametrize(("how", "world"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_fit_resumes_after_its_finished_waves(
    folder: Path, fitted: Checkpoint, how: signal.Signals, world: int
) -> None:
    """On as many ranks as before, or more."""
    name = f"stopped-{how.name}"
    arguments = (str(folder / "fit.yaml"), f"experiment={name}")
    first = ranks.Ranks(runs.train, 1, *arguments)
    finished = checkpoints(folder, name) / "scenes-00000.json"
    wait_for(finished, first)
    os.kill(first.processes[0].pid or 0, how)
    assert first.exit_codes() == [-signal.SIGKILL if how == signal.SIGKILL else 0]
    assert finished.exists() and checkpoint.list_complete(str(finished.parent.parent)) == []
    scenes = finished.with_suffix(".safetensors")
    written = scenes.stat().st_mtime_ns
    assert ranks.Ranks(runs.train, world, *arguments).exit_codes() == [0] * world
    assert scenes.stat().st_mtime_ns == written, "a finished wave was fitted again"
    assert (planes(result(folder, name)) - planes(fitted)).abs().max() < 1e-5


def test_a_fit_that_is_done_is_left_alone(folder: Path, fitted: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoints(folder, "whole").iterdir()}
    with caplog.at_level("INFO", logger="igae"):
        assert Fit(load_fit(folder, "experiment=whole")).run() == {}
    assert "nothing is left to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in checkpoints(folder, "whole").iterdir()} == before


def test_a_damaged_wave_is_fitted_again(folder: Path, fitted: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    """And results that a crash has emptied are made again; strict refuses the wave."""
    recipe, end = load_fit(folder, "experiment=damaged"), checkpoints(folder, "damaged")
    part = Fit(recipe)
    part.parts.begin(fitted.config, fitted.progress.data)
    for number, wave in enumerate(part.waves):
        scenes = [scene.id for scene in wave]
        part.parts.write(number, {"ids": torch.tensor(scenes), **fitted.rows(scenes)})
    (end / "scenes-00001.safetensors").write_bytes(bytes((end / "scenes-00001.safetensors").stat().st_size))
    (end.parent.parent / "metrics.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"scenes-00001\.safetensors is damaged: .*: remove scenes-00001\.json"):
        Fit(recipe, "strict").run()
    assert Fit(recipe).run() and "scenes-00001.safetensors is damaged" in caplog.text
    torch.testing.assert_close(planes(result(folder, "damaged")), planes(fitted), rtol=0, atol=1e-5)  # measured: 2.2e-6
    assert "fit" in json.loads((end.parent.parent / "metrics.json").read_text())


# --- What is refused -------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The sentence of a command that ends with exit code 2."""
    assert train.main(["--config", str(folder / "fit.yaml"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["experiment=whole", "train.warmup.epochs=7"],
            ["train.warmup.epochs was 6.0", "is 7.0 now", "experiment=NAME"],
        ),
        (["experiment=whole", "fit.wave=3"], ["fit.wave was 1"]),
        (["experiment=whole", "--resume", "never"], ["already has scenes", "experiment=NAME"]),
        (["--resume", "outputs/x"], ["leave --resume out"]),
        (["model="], ["no model is given", "model=outputs/RUN"]),
        (["--stage", "joint"], ["leave --stage out"]),
        (["train.warmup.epochs=0", "train.joint.epochs=0"], ["nothing to do"]),
        (
            ["train.joint.natural_images=1", "train.joint.weights.natural_ae=1"],
            ["train.joint.natural_images: nothing", "set it to 0"],
        ),
        (["model=nowhere/at/all"], ["nowhere/at/all is neither a checkpoint nor the folder of a run"]),
        (["planes.features=16"], ["planes.features is the model's", "leave it out"]),
        (["autoencoder.path=demo"], ["autoencoder.path is the model's"]),
    ],
)
def test_what_a_fit_refuses(
    folder: Path, fitted: Checkpoint, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    whole = folder / "outputs" / "whole"
    before = {name: (whole / name).read_bytes() for name in ("config.yaml", "changes.json")}
    sentence = run(capsys, folder, *arguments)
    assert all(word in sentence for word in words), sentence
    assert before == {name: (whole / name).read_bytes() for name in before}, "it is still the settings of what is there"


def test_other_shards_are_refused(folder: Path, fitted: Checkpoint, tmp_path: Path) -> None:
    other = runs.packed_data(tmp_path)
    manifest = json.loads(Path(other, "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    Path(other, "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other shards"):
        Fit(load_fit(folder, "experiment=whole", f"data.root={other}")).run()


def test_more_ranks_than_waves_are_refused(folder: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    assert ranks.Ranks(runs.train, 3, str(folder / "fit.yaml"), "fit.wave=2", log=log).exit_codes() == [2] * 3
    text = Path(log).read_text()
    assert text.count("error: 3 ranks have only 2 waves of up to 2 scenes to fit: set fit.wave=1") == 1, text


def test_a_rank_that_is_stopped_ends_the_others(folder: Path, tmp_path: Path) -> None:
    """Those that wait for its waves, and those that still make some."""
    log, many = str(tmp_path / "log"), ["train.warmup.epochs=4000", "train.timeout=10"]
    run = ranks.Ranks(runs.train, 2, str(folder / "fit.yaml"), "experiment=hangs", "fit.wave=2", *many, log=log)
    deadline = time.monotonic() + 60
    while "steps, elapsed" not in (text := Path(log).read_text() if Path(log).exists() else ""):
        assert time.monotonic() < deadline and run.processes[0].is_alive(), text
        time.sleep(0.1)
    os.kill(run.processes[1].pid or 0, signal.SIGSTOP)
    run.processes[0].join(20)
    code = run.processes[0].exitcode
    for process in run.processes:
        process.kill()
    assert code == 1 and "error: rank 0 has lost another rank" in Path(log).read_text(), code


def test_fitted_scenes_are_no_state_to_train_on(folder: Path, fitted: Checkpoint) -> None:
    recipe = load_fit(folder, "experiment=whole", "train.joint.learning_rates.decoder=1e-4")
    with pytest.raises(ValueError, match="without an optimizer's state"):
        Trainer(recipe)


# --- Parts that go on learning ---------------------------------------------------------------------------------------


def test_what_scenes_share_may_go_on_learning(folder: Path) -> None:
    """Then all scenes are trained together, as in any run, from the model's weights."""
    rates = [f"train.joint.learning_rates.{part}=1e-3" for part in ("decoder", "mlp", "base_planes")]
    recipe = load_fit(folder, "experiment=aligned", *rates)
    assert not recipe.fits_in_waves
    trainer = Trainer(recipe)
    model = checkpoint.load_checkpoint(checkpoint.list_complete(str(folder / "outputs" / "model" / "checkpoints"))[-1])
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(trained[name], model.shared[name]) for name in trained)
    trainer.run()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, model.shared[name])}
    encoder = {f"autoencoder.{name}" for name, _ in trainer.model.autoencoder.parts()["encoder"]}
    assert moved == set(trained) - encoder


def test_the_background_is_the_models(folder: Path) -> None:
    recipe = runs.recipe_file(folder, str(folder / "shards"))
    short = ["train.warmup.epochs=0.25", "train.joint.epochs=0"]
    assert train.main(["--config", str(recipe), "experiment=blue", "data.background=[0, 0.5, 1]", *short]) == 0
    run = folder / "outputs" / "blue"
    write(read_run(str(run)), str(folder / "blue-export"))
    for model in (run, folder / "blue-export"):
        for override in ([], ["data.background=[0, 0.5, 1]"]):
            assert load_fit(folder, f"model={model}", *override).data.background == (0, 0.5, 1)
        with pytest.raises(
            ValueError, match=r"data.background is \[1, 1, 1\] and the model.* \[0.0, 0.5, 1.0\]"
        ) as error:
            load_fit(folder, f"model={model}", "data.background=[1, 1, 1]")
        assert "leave it out" in str(error.value) and "\n" not in str(error.value)


def test_settings_come_from_the_model(folder: Path) -> None:
    recipe = load_fit(folder, "autoencoder.latents=mean", "render.fine_samples=3")
    assert recipe.planes.base_planes == 3 and recipe.planes.bias and recipe.fits_in_waves
    assert (recipe.autoencoder.latents, recipe.render.fine_samples, recipe.render.coarse_samples) == ("mean", 3, 4)
    assert recipe.render.patch == 2
    end = checkpoint.list_complete(str(folder / "outputs/model/checkpoints"))[-1]
    assert end.endswith("step-00000040-end")
    assert recipe.model == end
    resolved = folder / "resolved.yaml"
    resolved.write_text(config.dump(recipe))
    assert config.load(Recipe, resolved, complete=take_settings) == recipe
    for name in (end, str(folder / "outputs/model/checkpoints"), str(folder / "outputs/model/")):
        assert load_fit(folder, f"model={name}").model == end
