# SPDX-License-Identifier: Apache-2.0
"""`igae evaluate`: metrics against numpy, the same on any number of ranks, and what it refuses."""

import csv
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import runs
import torch
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from scene_files import over_white
from torch import Tensor

from igae.cli import evaluate, measuring
from igae.data import PackOptions, orbit_like, pack
from igae.evaluation import problems
from igae.export import Export, read_run, write
from igae.models import LPIPS

pytestmark = pytest.mark.usefixtures("one_run_a_process")

Pixels = NDArray[np.float64]
Metrics = dict[str, float]
SETTINGS = ["evaluation.views=3", "evaluation.orbit_frames=3", "data.workers=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shards, a run of one stage, `outputs/run`, and an export of it, `export`."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = runs.recipe_file(folder, runs.packed_data(folder))
    ranks.run(runs.train, 1, str(recipe), "train.warmup.epochs=1", "train.joint.epochs=0", *SETTINGS)
    write(read_run(str(folder / "outputs/run")), str(folder / "export"))
    return folder


def command(*arguments: str) -> int:
    return evaluate.main(list(arguments))


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process writes into the run's folder, of all scenes."""
    assert command(str(folder / "outputs/run")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return read(folder / "outputs/run")


def assert_equal(found: Metrics, expected: Metrics) -> None:
    """The same names in the same order, and values (dB, SSIM) to 1e-6; measured 2e-15."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, rel=0), name


def assert_all_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found["scenes"]) == list(expected["scenes"])
    assert_equal(found["means"], expected["means"])
    for name, metrics in expected["scenes"].items():
        assert_equal(found["scenes"][name], metrics)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_find_what_one_finds(folder: Path, alone: dict[str, Any], world: int, tmp_path: Path) -> None:
    arguments = [str(folder / "outputs/run/checkpoints"), "--output", str(tmp_path)]
    few = ["scene_3", "scene_0"] if world == 3 else []  # one rank has no scene
    assert ranks.run(command, world, *arguments, *(["--scenes", *few] if few else [])) == [0] * world
    found = read(tmp_path)
    assert list(found["scenes"]) == (["scene_0", "scene_3"] if few else list(alone["scenes"]))
    for name, metrics in found["scenes"].items():
        assert_equal(metrics, alone["scenes"][name])
    if few:
        natural_images = {name: found["means"][name] for name in ("natural/ae_psnr", "natural/ae_ssim")}
        assert_equal(natural_images, {name: alone["means"][name] for name in natural_images})
    else:
        assert_equal(found["means"], alone["means"])


def decibels(found: Pixels, truth: Pixels) -> float:
    return float(10 * np.log10(4 / np.mean((found - truth) ** 2)))


def similarity(x: Pixels, y: Pixels) -> float:
    """SSIM of Wang et al. 2004, equation 13, of images [H, W, 3] in [-1, 1], window by window: Gaussian weights of
    11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03; the mean over pixels and channels of the mirrored images."""
    distance = np.arange(-5, 6)
    line = np.exp(-(distance**2) / (2 * 1.5**2))
    weights = (np.outer(line, line) / line.sum() ** 2)[:, :, None]
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    x, y = (np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (x, y))
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum((0, 1)), (weights * b).sum((0, 1))
            var_a, var_b = (weights * (a - mean_a) ** 2).sum((0, 1)), (weights * (b - mean_b) ** 2).sum((0, 1))
            both = (weights * (a - mean_a) * (b - mean_b)).sum((0, 1))
            top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def lens(camera: dict[str, float]) -> Tensor:
    """Intrinsics divided by the image's width and height."""
    fx, fy, cx, cy = (camera[name] / 16 for name in ("fl_x", "fl_y", "cx", "cy"))
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def pixels(image: Tensor) -> Pixels:
    return image.detach().permute(1, 2, 0).double().numpy()


@torch.no_grad()
def test_metrics_are_those_of_numpy(folder: Path, alone: dict[str, Any]) -> None:
    """Of held-out views, which are the first tenth of each scene's."""
    export = Export(str(folder / "export"))
    net, s = export.model.autoencoder.net, float(export.model.autoencoder.scale)
    expected: dict[str, dict[str, list[float]]] = {}
    for name, count in (("scene_0", 1), ("scene_1", 1), ("scene_3", 2)):
        source = folder / "source/scenes/square16" / name
        described = json.loads((source / "transforms_opencv.json").read_text())
        of_scene: dict[str, list[float]] = expected.setdefault(name, {})
        for frame in described["frames"][:count]:
            truth = over_white(source / frame["file_path"]) / 127.5 - 1
            latent = net.encode(torch.from_numpy(truth).permute(2, 0, 1)[None].float()).latent_dist.mean
            pose = torch.tensor(frame["transform_matrix"])
            rendered = export.scene(name).render(pose, lens(described))[0]
            decoded = net.decode(torch.atanh(rendered.clamp(-0.999, 0.999)) / s).sample
            shown, again = (pixels(image[0]).clip(-1, 1) for image in (decoded, net.decode(latent).sample))
            metrics = {"latent_psnr": decibels(pixels(rendered[0]), pixels(torch.tanh(s * latent)[0]))}
            for kind, found, target in (("rgb", shown, truth), ("ae", again, truth), ("rgb_ae", shown, again)):
                metrics |= {
                    f"{kind}_psnr": decibels(found, target),
                    f"{kind}_ssim": similarity(found, target),
                }
            for kind, value in metrics.items():
                of_scene.setdefault(f"heldout/{kind}", []).append(value)
    for name, values in expected.items():
        for kind, each in values.items():
            # dB and SSIM; measured 2e-6
            assert alone["scenes"][name][kind] == pytest.approx(np.mean(each), abs=1e-5, rel=0), (name, kind)
    for kind in expected["scene_0"]:
        each = [value for values in expected.values() for value in values[kind]]
        assert alone["means"][kind] == pytest.approx(np.mean(each), abs=1e-5, rel=0), kind  # over the views


@torch.no_grad()
def test_consistency_is_that_of_an_orbit(folder: Path, alone: dict[str, Any]) -> None:
    export = Export(str(folder / "export"))
    net, s = export.model.autoencoder.net, float(export.model.autoencoder.scale)
    source = folder / "source/scenes/square16/scene_2"
    described = json.loads((source / "transforms_opencv.json").read_text())
    poses = orbit_like(torch.tensor([described["frames"][0]["transform_matrix"]]), 3)  # of its only view
    rendered = export.scene("scene_2").render(poses, lens(described))[0]
    images = net.decode(torch.atanh(rendered.clamp(-0.999, 0.999)) / s).sample.clamp(-1, 1)
    again = torch.tanh(s * net.encode(images).latent_dist.mean)
    each = [decibels(pixels(a), pixels(b)) for a, b in zip(again, rendered, strict=True)]
    assert alone["scenes"]["scene_2"]["orbit/latent_psnr"] == pytest.approx(np.mean(each), abs=1e-5, rel=0)  # 2e-8


def test_metrics_are_those_of_the_end_of_training(folder: Path, alone: dict[str, Any]) -> None:
    trained = json.loads((folder / "outputs/run/metrics.json").read_text())["warmup"]
    names = alone["means"].keys() & trained.keys()
    assert {"heldout/rgb_psnr", "train/rgb_ssim", "natural/ae_psnr"} <= names
    for name in names:
        assert alone["means"][name] == pytest.approx(trained[name], abs=1e-6, rel=0), name


def test_the_table_has_a_row_a_scene(folder: Path, alone: dict[str, Any]) -> None:
    with (folder / "outputs/run/evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scene"], row["category"]) for row in rows] == [
        ("scene_0", "toys"),
        ("scene_1", "cars"),
        ("scene_2", "cars"),
        ("scene_3", "toys"),
    ]
    for row in rows:
        filled = {name: float(value) for name, value in row.items() if value and name not in ("scene", "category")}
        assert filled == alone["scenes"][row["scene"]]
    assert rows[2]["heldout/rgb_psnr"] == "" and "natural/ae_psnr" not in rows[0]
    assert all(math.isfinite(value) for value in alone["means"].values())


def test_what_is_wrong_is_said(folder: Path, alone: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.clear()
    assert command(str(folder / "outputs/run"), "--output", str(folder / "again")) == 0
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == problems(alone["means"]) and len(said) == 2  # trained for one epoch, on noise


def test_an_export_has_the_metrics_of_its_run(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    assert command(str(folder / "export"), "--output", str(tmp_path), *SETTINGS) == 0
    assert_all_equal(read(tmp_path), alone)
    bare = tmp_path / "bare"  # of no run: says nothing of data
    write(replace(read_run(str(folder / "outputs/run")), config=None), str(bare))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = [f"data.root={folder / 'shards'}", "evaluation.natural_images=4", *SETTINGS]
    assert command(str(bare), "--output", str(tmp_path / "new"), *settings) == 0
    assert_all_equal(read(tmp_path / "new"), alone)


def test_lpips_where_its_weights_are(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    class Distance(LPIPS):
        """That network's own numbers are tested with the losses."""

        def __init__(self, weights: str | Path | None = None) -> None:
            torch.nn.Module.__init__(self)
            assert weights == str(tmp_path / "vgg.pth")

        def distances(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction - target).abs().amax((1, 2, 3))

    assert not any(name.endswith("lpips") for name in alone["means"])
    (tmp_path / "vgg.pth").touch()
    weights = [f"train.lpips_weights={tmp_path / 'vgg.pth'}"]
    measuring.evaluate(str(folder / "outputs/run"), ["scene_1"], weights, str(tmp_path), lpips=Distance)
    found = read(tmp_path)
    kinds = {f"{split}/{kind}_lpips" for split in ("heldout", "train") for kind in ("rgb", "ae", "rgb_ae")}
    assert {name for name in found["scenes"]["scene_1"] if name.endswith("lpips")} == kinds
    assert {name for name in found["means"] if name.endswith("lpips")} == {*kinds, "natural/ae_lpips"}
    assert all(0.1 < found["means"][name] <= 2 for name in kinds)
    other = {name: value for name, value in found["scenes"]["scene_1"].items() if not name.endswith("lpips")}
    assert other == pytest.approx(alone["scenes"]["scene_1"], abs=1e-6, rel=0)


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(folder / "outputs/run"), ["--output", str(tmp_path / "out")]
    source = folder / "source"
    pack(str(tmp_path / "natural_images"), PackOptions(images=str(source / "natural_images")))
    (tmp_path / "file").touch()

    def sentence(*arguments: str) -> str:
        assert command(*arguments) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1, text
        return text

    assert "is neither a checkpoint nor the folder of a run" in sentence(str(tmp_path / "none"))
    text = sentence(run, *out, "--scenes", "scene_9", "chair")
    assert "no scene scene_9, chair; did you mean scene_" in text and "scene_0, scene_1, scene_2, scene_3" in text
    assert "no manifest.json in" in sentence(run, *out, f"data.root={tmp_path / 'none'}")
    assert "was trained on other scenes" in sentence(run, *out, f"data.root={tmp_path / 'natural_images'}")
    text = sentence(
        str(folder / "export"), *out, f"data.root={tmp_path / 'natural_images'}", "evaluation.natural_images=0"
    )
    assert "has neither scenes nor natural images to evaluate on" in text
    assert "--output FOLDER" in sentence(str(folder / "export"))
    assert "autoencoder is that of" in sentence(str(folder / "export"), *out, "autoencoder.path=x")
    assert "can't be made" in sentence(run, "--output", str(tmp_path / "file/out"))
    assert "give a folder of this machine" in sentence(run, "--output", "s3://bucket/x")
    assert "did you mean evaluation.scenes" in sentence(run, *out, "evaluation.scene=3")
    assert not (tmp_path / "out").exists()
