# SPDX-License-Identifier: Apache-2.0
"""What any stage needs is looked for before the first step of the first: one sentence, and nothing is written."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from scene_files import picture, write_data, write_scene

import train
from igae import config
from igae.data import PackOptions, pack
from igae.export import load_trained
from igae.training import RankData, Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")


@pytest.fixture(scope="module")
def scenes_alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of two scenes, without natural images."""
    folder = tmp_path_factory.mktemp("scenes")
    source = write_data(folder / "source", views=(9, 6, 5))
    pack(str(folder / "shards"), PackOptions(scenes=str(source / "scenes"), subset="square16"))
    return str(folder / "shards")


@pytest.fixture(scope="module")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of a scene and natural images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("small")
    write_scene(folder / "scenes" / "scene_0", 6, size=8)
    (folder / "natural").mkdir()
    for i in range(4):
        (folder / "natural" / f"{i}.png").write_bytes(picture(i, 8))
    pack(str(folder / "shards"), PackOptions(scenes=str(folder / "scenes"), images=str(folder / "natural")))
    return str(folder / "shards")


def refused(capsys: pytest.CaptureFixture[str], folder: Path, shards: str, *arguments: str) -> str:
    """The sentence with which training ends; no stage has begun, and nothing is written."""
    assert train.main(["--config", str(runs.recipe_file(folder, shards)), *arguments]) == 2
    text = capsys.readouterr().err
    assert "reading data" not in text and not (folder / "outputs").exists()
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


CREATE = "autoencoder={create: {_class_name: AutoencoderKL, %s: 1, block_out_channels: [8], norm_num_groups: 4}}"
NEEDS = {
    "natural images": (
        [],
        "train.joint.natural_images is 2 but SHARDS holds none: .*, or set train.joint.natural_images=0$",
    ),
    "natural images, of the warm-up alone": (["--stage", "warmup"], "train.joint.natural_images is 2 but SHARDS"),
    "gray images in": ([CREATE % "in_channels"], "in_channels is 1 and has to be 3: images are RGB"),
    "gray images out": ([CREATE % "out_channels"], "out_channels is 1 and has to be 3: images are RGB"),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_the_second_stage_needs(
    what: str, scenes_alone: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = NEEDS[what]
    root = scenes_alone if "natural" in what else shards
    assert re.search(sentence.replace("SHARDS", root), refused(capsys, tmp_path, root, *arguments))


def test_lpips_needs_images_of_some_size(small_images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lpips = "train.joint.weights.natural_lpips=0.1"
    sentence = refused(capsys, tmp_path, small_images, lpips, "render.patch=1")
    assert "natural_lpips is 0.1 but LPIPS needs images of 16 pixels or more" in sentence and " have 8: " in sentence


ORIGINS = {
    "the file": ("categories: {bus: [0, 3]}", [], "own.yaml: data.categories: unknown category 'bus'"),
    "a base": ("", [], "base.yaml: data.categories: unknown category 'trams'"),
    "the command line": (
        "",
        ["data.categories={buss: [0, 3]}"],
        "command line: data.categories: unknown category 'buss'",
    ),
    "one of them": (
        "categories: {toys: [0, 2]}",
        ["data.categories.bus=[0, 3]"],
        "command line: data.categories: unknown category 'bus'",
    ),
    "a range": ("categories: {toys: [3, 1]}", [], "own.yaml: data.categories: range [3, 1] of category 'toys'"),
    "an empty range": ("categories: {toys: [3, 3]}", [], "own.yaml: data.categories selects none of the 3 scenes"),
}


@pytest.mark.parametrize("where", ORIGINS)
def test_categories_are_told_with_where_they_come_from(
    where: str, scenes_alone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, overrides, sentence = ORIGINS[where]
    base = tmp_path / "base.yaml"
    base.write_text(runs.recipe_file(tmp_path, scenes_alone).read_text())
    if where == "a base":
        base.write_text(base.read_text().replace("data:\n", "data:\n  categories: {trams: [0, 3]}\n"))
    own = tmp_path / "own.yaml"
    own.write_text("base: base.yaml\n" + (f"data: {{{line}}}\n" if line else ""))
    assert train.main(["--config", str(own), "train.joint.natural_images=0", *overrides]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last
    assert "categories=null" in last or "0 <= start" in last
    # What the sentence says helps.
    all_scenes = config.load(Recipe, own, ["train.joint.natural_images=0", *overrides, "data.categories=null"])
    assert len(RankData.split(all_scenes).scenes) == 3


def test_own_scenes_train_without_natural_images_and_lpips(
    scenes_alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe for own data, in both stages, without a network; its autoencoder stays nearer to the original than
    that of the recipe that it is made from."""

    def fails(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    small = runs.recipe_file(tmp_path, scenes_alone)
    own = yaml.safe_load(small.read_text())
    settings = [f"{name}={own[name]}" for name in ("data", "planes", "render", "autoencoder", "outputs", "evaluation")]
    moved = {}
    for name, more in (("own_data", []), ("igae_improved", ["train.joint.natural_images=0"])):
        short = [
            f"train.{stage}.{key}"
            for stage in ("warmup", "joint")
            for key in ("epochs=2", "min_steps=0", "augment.shift=1")
        ]
        recipe = config.load(Recipe, f"{name}.yaml", [*settings, *short, *more])
        trainer = Trainer(recipe)
        before = {key: value.clone() for key, value in trainer.model.autoencoder.named_parameters()}
        trainer.run()
        assert trainer.progress.finished and trainer.progress.stage == "joint"
        after = dict(trainer.model.autoencoder.named_parameters())
        moved[name] = sum(float((after[key] - value).detach().square().sum()) for key, value in before.items()) ** 0.5
        AcceleratorState._reset_state(reset_partial_state=True)
    # Measured: 0.10, the ratio of the learning rates.
    assert 0 < moved["own_data"] < 0.3 * moved["igae_improved"]
    assert load_trained(str(tmp_path / "outputs" / "own_data")).names
