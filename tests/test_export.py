# SPDX-License-Identifier: Apache-2.0
"""Exports: the same pixels in processes that know nothing of the run, one scene's bytes for one scene, refusals."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import huggingface_hub
import object_store
import pytest
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file
from torch import Tensor

import train
from igae import checkpoint
from igae.cli.export import main
from igae.data import orbit
from igae.export import Content, Export, load_model, load_trained, read_run, write
from igae.models import IGAE, Autoencoder, AutoencoderConfig, load_autoencoder
from igae.rendering import Cameras, DecodingMLP, RenderOptions, render
from igae.scenes import PlanesConfig, RowAdam

NAMES = ["scene_0", "scene_1", "scene_2", "scene_3"]
CAMERAS = orbit(3, 1.3, 0.4)
PLANES = PlanesConfig(resolution=4, features=4)
LENS = torch.tensor([[1.1, 0.0, 0.5], [0.0, 1.1, 0.5], [0.0, 0.0, 1.0]])


@dataclass
class Made:
    run: Path
    recipe: Path
    export: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small run, with all its checkpoints, and its export."""
    folder = tmp_path_factory.mktemp("export")
    recipe = runs.recipe_file(folder, runs.packed_data(folder))
    assert (
        train.main(["--config", str(recipe), "checkpoint.keep=100", "train.warmup.epochs=1", "train.joint.epochs=1"])
        == 0
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    made = Made(folder / "outputs/run", recipe, folder / "out")
    assert main([str(made.run), str(made.export)]) == 0
    return made


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://export"
    fs = fsspec.filesystem("memory")
    if fs.exists("/export"):
        fs.rm("/export", recursive=True)


def last(made: Made) -> Path:
    return Path(checkpoint.list_complete(str(made.run / "checkpoints"))[-1])


def expected_latents(made: Made) -> Tensor:
    """Renders [4 scenes x 3 cameras, c, h, w] by the renderer, the definition of latent pixels of patches of 2 x 2
    rendered ones, and the files of the checkpoint alone."""
    shared, scenes = load_file(last(made) / "shared.safetensors"), load_file(last(made) / "scenes-00000.safetensors")
    mlp = DecodingMLP(8, 4)
    mlp.load_state_dict({name[4:]: value for name, value in shared.items() if name.startswith("mlp.")})
    planes = scenes["planes"][scenes["ids"].argsort()]
    rendered = render(
        planes,
        mlp,
        Cameras(CAMERAS.repeat(4, 1, 1), LENS.expand(12, 3, 3), (16, 16)),
        RenderOptions(coarse_samples=4, fine_samples=2),
        background=shared["background"].repeat_interleave(2, 0).repeat_interleave(2, 1),
        scene=torch.arange(4).repeat_interleave(3),
    )
    patches = rendered.features.detach().unfold(1, 2, 2).unfold(2, 2, 2)  # [12, h, w, c, 2, 2]
    mean, weight = patches.mean((4, 5)), shared["head.weight"].view(4, 2, 2, 4)
    assert weight.abs().max() > 1e-3  # it was trained
    latents = mean + torch.einsum("bhwkij,cijk->bhwc", patches - mean[..., None, None], weight)
    return latents.permute(0, 3, 1, 2)


def expected_images(made: Made) -> Tensor:
    """Their pixels in 0..255, not rounded, by diffusers and the run's own autoencoder."""
    scale = load_file(last(made) / "shared.safetensors")["autoencoder.scale"]
    latents = torch.atanh(expected_latents(made).clamp(-0.999, 0.999)) / scale
    with torch.no_grad():
        images = AutoencoderKL.from_pretrained(made.run / "autoencoder").decode(latents).sample
    return (images.clamp(-1, 1) + 1) * 127.5


WITHOUT_IGAE = """
import sys, torch
sys.modules["igae"] = None  # an import of it fails
from diffusers import AutoencoderKL
torch.set_num_threads(1)
autoencoder = AutoencoderKL.from_pretrained(sys.argv[1])
with torch.no_grad():
    latents = autoencoder.encode(torch.load(sys.argv[2])).latent_dist.mean
    torch.save((latents, autoencoder.decode(latents).sample), sys.argv[3])
"""
WITH_IGAE = """
import sys, torch
from igae.export import Export
torch.set_num_threads(1)
export = Export(sys.argv[1])
cameras, lens = torch.load(sys.argv[2])
scenes = [export.scene(name) for name in export.names]
torch.save((torch.cat([scene.image(cameras, lens) for scene in scenes]),
            torch.cat([scene.render(cameras, lens)[0] for scene in scenes])), sys.argv[3])
"""


def test_other_processes_make_the_same_pixels(made: Made, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.save(images, tmp_path / "images")
    torch.save((CAMERAS, LENS), tmp_path / "cameras")
    root = str(Path(__file__).parent.parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(made.export), str(tmp_path / given), str(tmp_path / out)], cwd=at
        )
        for code, given, out, at in [
            (WITHOUT_IGAE, "images", "autoencoded", str(tmp_path)),
            (WITH_IGAE, "cameras", "scenes", root),
        ]
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    own = AutoencoderKL.from_pretrained(made.run / "autoencoder")
    with torch.no_grad():
        latents = own.encode(images).latent_dist.mean
        assert all(map(torch.equal, torch.load(tmp_path / "autoencoded"), (latents, own.decode(latents).sample)))

    pictures, rendered = torch.load(tmp_path / "scenes")
    assert pictures.dtype == torch.uint8 and pictures.shape == (12, 16, 16, 3)
    # Measured: 0; batches of other sizes may round otherwise.
    torch.testing.assert_close(rendered, expected_latents(made), atol=1e-5, rtol=0)
    exact = expected_images(made).permute(0, 2, 3, 1)
    assert (pictures - exact).abs().max() < 0.51 and exact.std() > 1


def test_the_model_is_that_of_the_checkpoint(made: Made) -> None:
    before = torch.random.get_rng_state()
    model = load_model(str(made.export))
    assert torch.equal(torch.random.get_rng_state(), before)
    shared = load_file(last(made) / "shared.safetensors")
    assert model.state_dict().keys() == shared.keys()
    assert all(torch.equal(value, shared[name]) for name, value in model.state_dict().items())
    assert model.options == RenderOptions(coarse_samples=4, fine_samples=2, patch=2)
    with torch.no_grad():  # and can go on being trained: the background follows from the autoencoder
        model.background.zero_()
    model.refresh_background()
    torch.testing.assert_close(model.background, shared["background"])


def test_images_are_those_of_the_run_to_the_last_bit(made: Made) -> None:
    run, export = load_trained(str(made.run)), Export(str(made.export))
    assert run.render.patch == export.render.patch == 2 and run.names == export.names
    for name in ("scene_0", "scene_3"):
        assert torch.equal(run.scene(name).image(CAMERAS, LENS), export.scene(name).image(CAMERAS, LENS))
        for of_run, exported in zip(*(t.scene(name).render(CAMERAS, LENS) for t in (run, export)), strict=True):
            assert torch.equal(of_run, exported)


def test_the_export_is_an_autoencoder_to_train_with(made: Made) -> None:
    loaded = load_autoencoder(AutoencoderConfig(path=str(made.export)))
    own = AutoencoderKL.from_pretrained(made.run / "autoencoder").state_dict()
    assert {name: True for name in own} == {n: torch.equal(v, own[n]) for n, v in loaded.net.state_dict().items()}


def test_a_scene_is_read_without_the_others(
    made: Made, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = 3 * 8 * 8 * 8 * 4
    fs = fsspec.filesystem("memory")
    assert main([str(last(made)), memory]) == 0
    assert f"{memory}: 4 scenes" in capsys.readouterr().out
    fs.rm("/export", recursive=True)
    write(read_run(str(last(made))), memory, file_bytes=3 * row + 1)
    assert len(fs.glob("/export/scenes-*.safetensors")) == 2  # of three scenes and one
    expected = load_file(made.export / "scenes-00000.safetensors")["planes"]

    # The planes of all other scenes of the shard become rubbish, which reading this one must not notice.
    shard = "/export/scenes-00000.safetensors"
    data = bytearray(fs.cat_file(shard))
    first = 8 + int.from_bytes(data[:8], "little")
    for other in (0, 2):
        data[first + other * row : first + (other + 1) * row] = b"\xff" * row
    fs.pipe_file(shard, bytes(data))

    touched: list[tuple[str, int, int]] = []
    read = MemoryFileSystem.cat_file

    def noting(self, path, start=None, end=None, **options):  # type: ignore[no-untyped-def]
        result = read(self, path, start=start, end=end, **options)
        touched.append((path.rsplit("/", 1)[-1], start or 0, (start or 0) + len(result)))
        return result

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noting)
    export = Export(memory)
    assert torch.equal(export.rows(["scene_1"])[0], expected[1])
    planes = [(a, b) for name, a, b in touched if name.startswith("scenes-0") and b > first]
    assert "scenes-00001.safetensors" not in [name for name, _, _ in touched]
    # Its own row, and the checksums at the file's end, 4 bytes a scene.
    assert sorted(planes) == [(first + row, first + 2 * row), (first + 3 * row, first + 3 * row + 12)]

    assert torch.equal(export.rows(["scene_3", "scene_1", "scene_3"]), expected[[3, 1, 3]])
    with pytest.raises(ValueError, match=r"scenes-00000.safetensors is damaged: the checksum of row 2"):
        export.scene("scene_2")


def test_an_object_store(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store.moto() as port:
        object_store.use(monkeypatch, port)
        fsspec.filesystem("s3").mkdir("bucket")
        assert main([str(made.run), "s3://bucket/models/one"]) == 0
        export, local = Export("s3://bucket/models/one"), Export(str(made.export))
        assert export.names == local.names == NAMES
        assert torch.equal(
            export.scene("scene_2").image(CAMERAS[0], LENS), local.scene("scene_2").image(CAMERAS[0], LENS)
        )
        with pytest.raises(ValueError, match=r"^s3://bucket/models/one is not empty: remove"):
            write(read_run(str(made.run)), "s3://bucket/models/one")
        fsspec.filesystem("s3").rm("bucket/models/one/igae.json")
        with pytest.raises(ValueError, match=r"^s3://bucket/models/one has no igae.json: give the folder"):
            Export("s3://bucket/models/one")


def test_a_checkpoint_in_the_middle_of_a_stage_is_finished_first(made: Made) -> None:
    folder = next(path for path in (made.run / "checkpoints").iterdir() if not path.name.endswith("-end"))
    content = read_run(str(folder))
    assert content.metrics == {}  # metrics.json is of the last step
    loaded = checkpoint.load_checkpoint(str(folder))
    rows = loaded.rows([0, 1, 2, 3])
    planes = rows.pop("planes")
    stored = planes.clone()
    adam = RowAdam(planes)
    adam.load_state({**rows, "learning_rates": loaded.optimizer["planes/learning_rates"]})
    adam.catch_up()
    assert not torch.equal(stored, planes)
    torch.testing.assert_close(torch.cat([content.rows(0, 1), content.rows(1, 4)]), planes)


def test_the_card(made: Made) -> None:
    text = (made.export / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "igae" and "license" not in card.data.to_dict()
    metrics = json.loads((made.run / "metrics.json").read_text())["joint"]
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    key = ("views of its own scenes", "PSNR of decoded renders, held-out views (dB)")
    assert found[key] == round(metrics["heldout/rgb_psnr"], 4)
    settings = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert settings is not None and yaml.safe_load(settings[1])["planes"]["features"] == 8
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 2
    names: dict[str, object] = {}
    for code in codes:
        exec(code, names)
    assert isinstance(names["autoencoder"], AutoencoderKL)
    assert isinstance(names["images"], Tensor) and names["images"].shape == (8, 16, 16, 3)


def test_scenes_that_share_base_planes(made: Made, tmp_path: Path) -> None:
    planes = "planes={resolution: 8, features: 8, base_planes: 3, micro_features: 3, macro_features: 5, bias: true}"
    settings = [planes, "experiment=base", "train.warmup.epochs=1", "train.joint.epochs=0", "checkpoint.every=3"]
    assert train.main(["--config", str(made.recipe), *settings]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    run = made.run.parent / "base"
    for step, out in (("step-00000008-end", "end"), ("step-00000003", "middle")):
        assert main([str(run / "checkpoints" / step), str(tmp_path / out)]) == 0
    folder = run / "checkpoints/step-00000008-end"
    shared, scenes = load_file(folder / "shared.safetensors"), load_file(folder / "scenes-00000.safetensors")
    export = Export(str(tmp_path / "end"))
    scene, row = export.scene("scene_2"), scenes["planes"][scenes["ids"].tolist().index(2)]
    assert torch.equal(scene.row, row) and len(row) == 3 * 8 * 8 * 3 + 3 + 1
    micro, weights, bias = row[:576].view(3, 8, 8, 3), row[576:579], row[579]
    macro = sum(weights[k] * shared["base.planes"][k] for k in range(3)) + bias
    torch.testing.assert_close(scene.planes, torch.cat([micro, macro], -1))

    # The same as a scene with planes of its own.
    own = PlanesConfig(resolution=8, features=8)
    plain = IGAE(export.model.autoencoder, own, export.model.options, (16, 16))
    plain.mlp, plain.head, plain.background = export.model.mlp, export.model.head, export.model.background
    write(Content(plain, (1.0, 1.0, 1.0), ["a"], own, lambda a, b: scene.planes[None], ""), str(tmp_path / "plain"))
    image = Export(str(tmp_path / "plain")).scene("a").image(CAMERAS, LENS)
    difference = image.int() - scene.image(CAMERAS, LENS).int()
    assert difference.abs().max() <= 1  # where rounding differs
    # Base planes are there once, whatever the number of scenes.
    assert load_file(tmp_path / "end/igae.safetensors")["base.planes"].shape == (3, 3, 8, 8, 5)
    assert not torch.equal(Export(str(tmp_path / "middle")).rows(["scene_2"])[0], row)


def test_scenes_are_fitted_to_an_export_as_to_its_run(made: Made, tmp_path: Path) -> None:
    whole = yaml.safe_load(made.recipe.read_text())
    stage = {"epochs": 1, "batch_size": 4, "learning_rates": {"planes": 1e-2}}
    stages = {
        "warmup": {**stage, "weights": {"latent": 1}},
        "joint": {**stage, "weights": {"latent": 0, "rgb": 1}},
    }
    recipe = {
        "experiment": "x",
        "outputs": str(tmp_path),
        "data": {**whole["data"], "workers": 0},
        "train": stages,
        "evaluation": {"pictures": 0, "orbits": 0},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(recipe))
    fitted = []
    for name, model in (("run", made.run), ("export", made.export)):
        assert train.main(["--config", str(tmp_path / "fit.yaml"), f"experiment={name}", f"model={model}"]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(tmp_path / name), str(tmp_path / f"{name}-out")]) == 0
        fitted.append(Export(str(tmp_path / f"{name}-out")))
    assert torch.equal(fitted[0].rows(NAMES), fitted[1].rows(NAMES))
    for name, value in fitted[1].model.state_dict().items():
        assert torch.equal(value, fitted[0].model.state_dict()[name]), name
    assert not torch.equal(fitted[1].rows(NAMES), Export(str(made.export)).rows(NAMES))
    metrics = json.loads((tmp_path / "export/metrics.json").read_text())["fit"]
    assert f"{metrics['heldout/rgb_psnr']:.4g}" in (tmp_path / "export-out/README.md").read_text()
    # What belongs to the model is refused, as with a checkpoint.
    arguments = ["--config", str(tmp_path / "fit.yaml"), f"model={made.export}", "planes={features: 9}"]
    assert train.main(arguments) == 2


def test_where_the_source_of_a_moved_scene_is(made: Made, tmp_path: Path) -> None:
    content = read_run(str(made.run))
    assert content.normalizations == {} and Export(str(made.export)).normalization("scene_0") == (0, 0, 0, 1)
    content.normalizations["scene_1"] = (1.5, -2.0, 0.25, 3.0)
    write(content, str(tmp_path / "moved"), file_bytes=1)  # a file a scene
    moved = Export(str(tmp_path / "moved"))
    assert [moved.normalization(f"scene_{i}") for i in (0, 1)] == [(0, 0, 0, 1), (1.5, -2.0, 0.25, 3.0)]
    with pytest.raises(ValueError, match="scene_9"):
        moved.normalization("scene_9")


def test_rgb_scenes(tmp_path: Path) -> None:
    model = IGAE(Autoencoder(None, 1.0), PLANES, RenderOptions(), (6, 5), (0.0, 0.5, 1.0))
    model.refresh_background()
    planes = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    names = ["Stuhl, grün", "b"]
    write(Content(model, (0.0, 0.5, 1.0), names, PLANES, lambda a, b: planes[a:b], "Made up."), str(tmp_path / "rgb"))
    export = Export(str(tmp_path / "rgb"))
    assert export.names == names and export.model.autoencoder.is_identity
    assert not (tmp_path / "rgb/config.json").exists()
    assert torch.equal(export.rows(names), planes)
    away = CAMERAS[0].clone()
    away[:3, 2] *= -1  # it looks into the other direction: only the background
    away[:3, 0] *= -1
    picture = export.scene("b").image(away, LENS)
    assert picture.shape == (1, 6, 5, 3) and (picture - torch.tensor([0, 127.5, 255])).abs().max() <= 1
