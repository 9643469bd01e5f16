# SPDX-License-Identifier: Apache-2.0
"""The package of docs/extending.md, installed: from packing to the evaluation of an export, and without it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import documents
import numpy as np
import pytest
import torch
import yaml
from documents import ROOT
from PIL import Image
from plug_ins import importable, registered

from igae import checkpoint, config
from igae.cli.main import main
from igae.config import plug_in
from igae.data import Manifest, formats, orbit
from igae.export import Export, load_trained
from igae.models import AutoencoderConfig, LossWeights, load_autoencoder
from igae.rendering import DecodingMLP, RenderOptions, make_field
from igae.storage import TensorFile
from igae.training import Recipe

PAGE = ROOT / "docs" / "extending.md"
SMALL = (
    "data.workers=0 planes.resolution=8 planes.features=8 render.coarse_samples=4 render.fine_samples=4 "
    "train.warmup.epochs=1 train.warmup.batch_size=4 train.joint.epochs=1 train.joint.batch_size=4 "
    "train.joint.natural_images=0 tracking.every=1 evaluation.views=1 evaluation.scenes=2 evaluation.pictures=0 "
    "evaluation.orbits=0 evaluation.orbit_frames=2"
).split()
MISSING = "no installed package has an entry point {} in the group igae.{}"


@dataclass
class Made:
    root: Path
    installed: Path
    """Where the package is."""

    @property
    def export(self) -> Path:
        return self.root / "exports" / "example"


def write_captures(folder: Path) -> None:
    """Two scenes as poses_csv reads them, whose cameras look at a point beside the origin."""
    for seed in range(2):
        scene = folder / f"scene_{seed}"
        scene.mkdir(parents=True)
        lines = []
        for i, pose in enumerate(orbit(6, 2.6, 0.3, center=(1.0, 2.0, 3.0)).double()):
            pixels = np.random.default_rng(10 * seed + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(scene / f"{i}.png")
            lines.append(",".join([f"{i}.png", "17.5", *(repr(x) for x in pose.flatten().tolist())]))
        (scene / "poses.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The page's package, installed, and what its commands leave."""
    root = tmp_path_factory.mktemp("extending")
    source, installed = root / "igae-example", root / "installed"
    commands = []
    for block in documents.blocks(PAGE):
        if block.language == "sh":
            commands += re.sub(r"\\\n\s*", "", block.text).splitlines()
        else:
            file = source / block.text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text + "\n")
    install, *commands = map(shlex.split, commands)
    assert install == ["pip", "install", "./igae-example"] and len(commands) == 4
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "--target"]
    subprocess.run([*pip, str(installed), str(source)], check=True, timeout=120)
    shutil.rmtree(source)
    write_captures(root / "captures")
    with importable(installed), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["igae"])
        for program, *words in commands:
            assert program == "igae"
            assert main([*words, *{"train": SMALL, "pack": ["--workers=2"]}.get(words[0], [])]) == 0, words
    return Made(root, installed)


def test_an_input_format(made: Made) -> None:
    manifest = Manifest.load(str(made.root / "data" / "captures"))
    assert [(scene.name, scene.views, scene.heldout) for scene in manifest.scenes] == [
        ("scene_0", 5, 1),
        ("scene_1", 5, 1),
    ]
    # UNIT_BOX is False: what the cameras look at is at the origin now, and as far away as views of igae-data are.
    assert manifest.cameras is not None and manifest.cameras.mean_focal == pytest.approx(17.5 / 16)
    assert manifest.cameras.mean_distance == pytest.approx(1.3)
    assert manifest.scenes[0].normalization == pytest.approx((1, 2, 3, 0.5))


def pack(scenes: Path, output: Path) -> int:
    return main(["pack", "--scenes", str(scenes), "--output", str(output), "--workers=1"])


def test_wrong_input(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_captures(tmp_path / "captures")
    for scene, text in (("scene_0", "0.png,17.5,1,0,0"), ("scene_1", "0.png,wide")):
        (tmp_path / "captures" / scene / "poses.csv").write_text(text)
    with importable(made.installed):
        assert pack(tmp_path / "captures", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "scene 'scene_0': poses.csv: line 1 has 3 numbers of cam2world instead of 16" in told
    assert "scene 'scene_1': poses.csv: line 1 has something else than numbers after the file" in told


def test_a_loss(made: Made) -> None:
    run = made.root / "outputs" / "example"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, most in (("half_transparent", 1), ("edges", 4)):
        found = [record[f"loss/{name}"] for record in records if f"loss/{name}" in record]
        assert len(found) == 2 and all(0 < loss <= most for loss in found)  # the joint stage alone has it
    joint = [record for record in records if "loss/edges" in record]
    weights = yaml.safe_load((run / "config.yaml").read_text())["train"]["joint"]["weights"]
    for record in joint:
        terms = {name: record[f"loss/{name}"] for name in weights if f"loss/{name}" in record}
        total = sum(weights[name] * value for name, value in terms.items())
        total += 0.01 * record["loss/half_transparent"] + 0.1 * record["loss/edges"]
        assert record["loss/total"] == pytest.approx(total, rel=1e-4)


def test_an_autoencoder_and_a_field(made: Made) -> None:
    run = made.root / "outputs" / "example"
    saved = json.loads((run / "autoencoder" / "config.json").read_text())
    assert (saved["_class_name"], saved["size"]) == ("Patches", 4)
    folder = checkpoint.list_complete(str(run / "checkpoints"))[-1]
    shapes = {name: entry.shape for name, entry in TensorFile(f"{folder}/shared.safetensors").entries.items()}
    assert shapes["autoencoder.net.encoder.weight"] == (8, 3, 4, 4) and shapes["mlp.w3"] == (64, 64)
    # What was evaluated is the export.
    means = json.loads((made.root / "results" / "evaluation.json").read_text())["means"]
    end = json.loads((run / "metrics.json").read_text())["joint"]
    assert means["heldout/rgb_psnr"] == pytest.approx(end["heldout/rgb_psnr"], abs=1e-4)
    card = (made.export / "README.md").read_text()
    assert "It needs igae-example 0.1 beside igae." in card and "from igae_example.patches import Patches" in card
    with importable(made.installed):
        trained = load_trained(str(run), [f"data.root={made.root / 'data' / 'captures'}"])
        exported = Export(str(made.export))
        assert type(exported.model.mlp).__name__ == "DeepMLP" and exported.render.field == "deep"
        pose, lens = orbit(1, 1.3, 0.3), torch.tensor([[1.1, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]])
        images = [model.scene("scene_1").image(pose, lens) for model in (trained, exported)]
        assert torch.equal(*images) and images[0].float().std() > 1


def sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_the_package(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence names what is missing; the losses are not."""
    assert "igae_example" not in sys.modules
    with pytest.raises(ValueError) as error:
        Export(str(made.export)).model  # noqa: B018
    assert MISSING.format("Patches", "autoencoders") in sentence(error)
    with pytest.raises(ValueError) as error:
        load_trained(str(made.root / "outputs" / "example")).model  # noqa: B018
    assert MISSING.format("Patches", "autoencoders") in sentence(error)
    with pytest.raises(ValueError, match="in the group igae.fields: install the one"):
        make_field("deep", 8, 4, torch.Generator())
    settings = ["data.root=x", "train.joint.weights.plugins.edges=0.1"]
    with pytest.raises(config.ConfigError, match="train.joint.weights.plugins: .*" + MISSING.format("edges", "losses")):
        config.load(Recipe, "igae.yaml", settings)
    assert config.load(Recipe, "igae.yaml", [*settings[:1], "train.joint.weights.plugins.edges=0"])
    assert pack(made.root / "captures", tmp_path / "out") == 2
    assert "no scenes in" in capsys.readouterr().err
    # Of an export that needs its autoencoder and its field, but whose losses are not installed.
    registered(tmp_path / "some", "some", "autoencoders", Patches="igae_example.patches:Patches")
    registered(tmp_path / "some", "other", "fields", deep="igae_example.deep:DeepMLP")
    shutil.copytree(made.installed / "igae_example", tmp_path / "some" / "igae_example")
    with importable(tmp_path / "some"):
        data = f"data.root={made.root / 'data' / 'captures'}"
        assert main(["evaluate", "--checkpoint", str(made.export), "--output", str(tmp_path), data]) == 0
    assert (tmp_path / "evaluation.json").read_bytes() == (made.root / "results" / "evaluation.json").read_bytes()


@pytest.mark.parametrize("name", ["trap", "trap:Autoencoder", "trap.Autoencoder", "igae_trap", "../trap"])
def test_names_of_others_import_nothing(name: str, made: Made, tmp_path: Path) -> None:
    """A module lies on the path, and names it in all ways: it is not imported, because no package has declared it."""
    for file in ("trap.py", "igae_trap.py"):
        (tmp_path / file).write_text("raise SystemExit('imported')\n")
    export = shutil.copytree(made.export, tmp_path / "export")
    index = json.loads((export / "igae.json").read_text())
    index["render"]["field"] = name
    (export / "igae.json").write_text(json.dumps(index))
    with importable(tmp_path), importable(made.installed):
        with pytest.raises(ValueError) as error:
            Export(str(export)).model  # noqa: B018
        assert MISSING.format(name, "fields") in sentence(error)
        with pytest.raises(ValueError) as error:
            load_autoencoder(AutoencoderConfig(create={"_class_name": name}))
        assert MISSING.format(name, "autoencoders") in sentence(error)
        with pytest.raises(ValueError):
            LossWeights(plugins={name: 1.0})


def test_entry_points_that_are_wrong(made: Made, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "fine.py").write_text("def loss(inputs):\n    return inputs.opacity.mean()\n")
    registered(
        tmp_path, "one", "losses", broken="broken:loss", twice="fine:loss", latent="fine:loss", total="fine:loss"
    )
    registered(tmp_path, "two", "losses", twice="broken:loss", nothing="fine:nothing")
    registered(tmp_path, "three", "autoencoders", Other="igae_example.patches:Patches")
    with importable(tmp_path), importable(made.installed):
        for name, says in {
            "broken": r"broken:loss, .* can't be imported \(ModuleNotFoundError: .*a_module_that_is_not_there",
            "nothing": "fine:nothing, .* can't be imported",
            "twice": "2 installed packages have an entry point twice",
        }.items():
            with pytest.raises(ValueError, match=says):
                plug_in("losses", name)
        for name in ("latent", "total"):
            with pytest.raises(ValueError, match=f"{name} is the name of a loss of igae"):
                LossWeights(plugins={name: 1.0})
        with pytest.raises(ValueError, match="the entry point Other is the class Patches"):
            load_autoencoder(AutoencoderConfig(create={"_class_name": "Other"}))
        for weights, decodes in (({"edges": 1.0}, True), ({"half_transparent": 1.0}, False), ({"edges": 0.0}, False)):
            found = LossWeights(plugins=weights)
            assert (found.decodes, found.needs_images, found.of_plugins) == (decodes, decodes, sum(weights.values()))
    # igae's own formats are there also where a package has the same name, and are asked first.
    registered(tmp_path / "formats", "four", "formats", blender="fine:loss", mine="fine:loss")
    with importable(tmp_path), importable(tmp_path / "formats"):
        assert list(formats())[-1] == "mine" and formats()["blender"].__name__ == "igae.data.sources.blender"


def test_the_kernels_leave_other_networks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of what the kernels know, with a forward of its own."""
    from igae.kernels import LIBRARIES, Library
    from igae.rendering import cuda

    class Anywhere(Library):
        @staticmethod
        def missing(device: torch.device) -> str | None:
            return None

    class Other(DecodingMLP):
        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            density, color = super().forward(features)
            return density + 1, color

    monkeypatch.setitem(LIBRARIES, "cpu", Anywhere)
    planes = torch.zeros(1, 3, 4, 4, 8)
    assert cuda.unsupported(planes, DecodingMLP(8, 4), RenderOptions()) is None
    assert "64 hidden units" in str(cuda.unsupported(planes, Other(8, 4), RenderOptions()))
