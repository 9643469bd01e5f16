# SPDX-License-Identifier: Apache-2.0
"""Runs that moved, whose data moved, or that are not what they say."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import runs
import yaml
from accelerate.state import AcceleratorState
from scene_files import write_data
from test_export_faults import sentence

import train
from igae.data.pack import pack
from igae.export import Export, read_run, write


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
    pack(str(tmp_path / "other"), scenes=str(source / "scenes"), subset="square16")
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
