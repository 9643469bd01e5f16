# SPDX-License-Identifier: Apache-2.0
"""Runs that moved, whose data moved, or that are not what they say."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from scene_files import write_data
from test_export_faults import sentence

import train
from igae.cli import evaluate, export
from igae.config import ConfigError
from igae.data import DataConfig, PackOptions, orbit, pack
from igae.export import Export, data_root, find_model, load_trained, read_run, write
from igae.models import AutoencoderConfig, load_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shards and a run of one stage, `outputs/run`."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = runs.recipe_file(folder, runs.packed_data(folder))
    assert train.main(["--config", str(recipe), "train.warmup.epochs=1", "train.joint.epochs=0"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "outputs/run", tmp_path / "run"))


def test_metrics_of_another_step_are_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert read_run(str(run)).metrics == metrics["warmup"] and "heldout/rgb_psnr" in metrics["warmup"]
    metrics["warmup"]["step"] += 1
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert read_run(str(run)).metrics == {}
    with caplog.at_level(logging.WARNING):
        (run / "metrics.json").write_text("{")
        assert read_run(str(run)).metrics == {}
    assert "metrics.json is damaged" in caplog.text


def test_what_moved_is_found_where_it_is_said_to_be(folder: Path, run: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(folder / "shards", tmp_path / "moved"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["checkpoint"]["root"] = str(tmp_path / "elsewhere")
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    for where in (run, tmp_path / "elsewhere"):
        content = read_run(str(where), [f"data.root={shards}"])
        assert content.scenes == ["scene_0", "scene_1", "scene_2", "scene_3"]
    write(content, str(tmp_path / "out"))
    assert Export(str(tmp_path / "out")).names == content.scenes


def test_what_does_not_belong_to_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    assert sentence(lambda: read_run(str(run), [f"data.root={tmp_path}"])).startswith(f"no manifest.json in {tmp_path}")
    source = write_data(tmp_path / "source", views=(3, 3))
    pack(str(tmp_path / "other"), PackOptions(scenes=str(source / "scenes"), subset="square16"))
    text = sentence(lambda: read_run(str(run), [f"data.root={tmp_path / 'other'}"]))
    assert f"was trained on other scenes than those at {tmp_path}/other: say where they are" in text
    text = sentence(lambda: read_run(str(run), ["autoencoder={path: demo}"]))
    assert "has weights of another autoencoder or MLP than its configuration says" in text
    with pytest.raises(ValueError, match="unknown key data.rot; did you mean data.root"):
        read_run(str(run), ["data.rot=x"])
    scenes = next((run / "checkpoints").glob("*-end")) / "scenes-00000.safetensors"
    data = bytearray(scenes.read_bytes())
    data[len(data) * 5 // 6] ^= 1  # the planes come last
    scenes.write_bytes(data)
    text = sentence(lambda: write(read_run(str(run)), str(tmp_path / "out")))
    assert "scenes-00000.safetensors is damaged" in text and not (tmp_path / "out").exists()


def test_one_loader_for_runs_checkpoints_and_exports(folder: Path, run: Path, tmp_path: Path) -> None:
    write(read_run(str(run)), str(tmp_path / "out"))
    end = str(next((run / "checkpoints").glob("*-end")))
    for where in (run, run / "checkpoints", end, f"{tmp_path}/out/"):
        trained = load_trained(str(where))
        assert trained.where == (end if where != f"{tmp_path}/out/" else f"{tmp_path}/out") == find_model(str(where))
        assert trained.names == ["scene_0", "scene_1", "scene_2", "scene_3"]
        assert (trained.planes.features, trained.render.fine_samples, trained.render.patch) == (8, 2, 2)
        settings: dict[str, dict[str, object]] = {"render": {"fine_samples": 9}}
        trained.complete(settings)
        assert settings["render"] == {**settings["render"], "fine_samples": 9, "coarse_samples": 4, "patch": 2}
        assert load_autoencoder(AutoencoderConfig(**settings["autoencoder"])).net is not None  # type: ignore[arg-type]
        text = sentence(lambda found=trained: found.complete({"planes": {"features": 9}}))  # type: ignore[misc]
        assert (
            text.startswith("planes.features is the model's") and "of planes only init_std, storage, resident" in text
        )
        assert sentence(lambda found=trained: found.rows(["scene_9"])).endswith(  # type: ignore[misc]
            "has no scene scene_9; did you mean scene_3?"
        )
    scenes = [load_trained(str(where)).scene("scene_1") for where in (run, tmp_path / "out")]
    assert torch.equal(scenes[0].row, scenes[1].row) and not scenes[0].model.training
    views = orbit(2, 1.3, 0.4), torch.tensor([[1.1, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]])
    assert torch.equal(scenes[0].image(*views), scenes[1].image(*views))
    # Weights go into models for other views too, whose background is taken anew.
    for where in (run, tmp_path / "out"):
        trained = load_trained(str(where))
        assert trained.model_for((16, 16), (1.0, 1.0, 1.0)) is trained.model
        other = trained.model_for((32, 16), (0.0, 0.0, 0.0))
        assert other.background.shape == (16, 8, 4) and torch.equal(other.mlp.w1, trained.model.mlp.w1)
    assert "leave it out" in sentence(lambda: load_trained(str(tmp_path / "out"), ["planes.features=4"]))
    text = sentence(lambda: load_trained(str(run), ["dta.root=x"]))
    assert text.startswith("dta.root: only autoencoder, data, planes, render matter") and "did you mean data?" in text


@pytest.mark.parametrize("name", ["shared.safetensors", "scenes-00000.safetensors", "config.yaml", "state.json"])
def test_the_newest_checkpoint_that_loads(run: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """A damaged one is told, in a line, and left as it is."""
    older, newest = (run / "checkpoints" / step for step in ("step-00000004", "step-00000008-end"))
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    trained = load_trained(str(run))
    (line,) = caplog.messages
    assert trained.where == str(older) == find_model(str(run)) == find_model(str(run / "checkpoints"))
    assert line.startswith(f"{newest}/{name} is damaged: ") and f": {older} is taken" in line
    assert find_model(str(run), whole=False) == str(newest)
    assert read_run(str(run)).scenes == trained.names and (newest / name).stat().st_size == len(whole) // 2
    for where in (newest, older.parent):
        if where == older.parent:
            (older / "shared.safetensors").unlink()
        text = sentence(lambda place=where: load_trained(str(place)))  # type: ignore[misc]
        assert f"{newest}/{name} is damaged" in text
    assert text.startswith("all 2 checkpoints are damaged, ")
    (newest / name).write_bytes(whole)
    assert load_trained(str(run)).where == str(newest)


def test_commands_take_the_newest_that_loads(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (newest,) = (run / "checkpoints").glob("*-end")
    (newest / "shared.safetensors").write_bytes(b"")
    settings = ["evaluation.scenes=1", "evaluation.views=1", "evaluation.orbits=0", "evaluation.natural_images=0"]
    assert evaluate.main(["--checkpoint", str(run), *settings]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert export.main([str(run), str(tmp_path / "export")]) == 0
    told = [line for line in caplog.messages if "is damaged" in line]
    assert len(told) == 2 and all("step-00000004 is taken" in line for line in told), told
    assert (run / "evaluation.json").is_file() and Export(str(tmp_path / "export")).names == load_trained(
        str(run)
    ).names


def test_a_saved_configuration_is_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment or of files gets into it, whoever wrote it."""
    monkeypatch.setenv("SECRET", "hunter2")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["base"] = str(run / "config.yaml")
    settings["checkpoint"]["root"] = "${SECRET}/$${SECRET}"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="neither a checkpoint") as caught:
        load_trained(str(run))
    assert "hunter2" not in str(caught.value)
    for text in ("[1, 2]", "a: [", "\x00"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ConfigError) as broken:
            load_trained(str(run))
        assert str(broken.value).startswith(f"{run}/config.yaml:") and "\n" not in str(broken.value)


def test_metrics_of_version_0_1_have_their_names_of_today(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["warmup"] |= {"heldout/constant_psnr": 1.5, "photos/ae_psnr": 2.5}
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = read_run(str(run)).metrics
    assert (found["heldout/baseline_psnr"], found["natural/ae_psnr"]) == (1.5, 2.5)
    assert not {"heldout/constant_psnr", "photos/ae_psnr"} & found.keys()


def test_a_relative_root_is_that_of_the_folder_a_run_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, origins = DataConfig(root="data/shards"), {("data", "root"): "/runs/outputs/run/config.yaml"}
    with pytest.raises(ValueError) as raised:
        data_root(data, origins)
    said = str(raised.value)
    assert said.startswith("/runs/outputs/run/config.yaml has its data at data/shards, relative to the folder that the")
    assert str(tmp_path) in said and "data.root=SHARDS" in said
    assert data_root(data, {("data", "root"): "command line"}) == "data/shards"  # who says it knows
    (tmp_path / "data/shards").mkdir(parents=True)
    assert data_root(data, origins) == "data/shards"
