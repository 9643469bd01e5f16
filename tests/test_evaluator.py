# SPDX-License-Identifier: Apache-2.0
"""Evaluation: which views it takes, its metrics against independent ones, and that it leaves no trace."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from numpy.typing import NDArray
from PIL import Image
from runs import create_autoencoder as create
from scene_files import over_white
from skimage.metrics import structural_similarity
from torch import Tensor

from igae.data import DataConfig, Manifest, PackOptions, pack
from igae.evaluation import METRICS, EvaluationConfig, Evaluator, current_name, write_results
from igae.evaluation.depth import DepthMaps, depth_errors
from igae.models import IGAE, Autoencoder, AutoencoderConfig, Views, load_autoencoder
from igae.ranks import Channel
from igae.rendering import Cameras, RenderOptions
from igae.scenes import PlanesConfig, SceneStore

CPU = torch.device("cpu")
# Views of the scenes that tests/runs.py packs: 12, 5, 1 and 20; the first tenth of each is held out.
HELDOUT = [(0, 0), (1, 0), (3, 0), (3, 1)]
Pixels = NDArray[np.float64]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    runs.packed_data(folder)
    return folder


def evaluator(data: Path, workers: int = 0, **values: Any) -> Evaluator:
    root = str(data / "shards")
    manifest = Manifest.load(root)
    settings = EvaluationConfig(**{"pictures": 3, "orbits": 1, "orbit_frames": 3, **values})
    scenes = manifest.select(None)
    owned = {scene.id for scene in scenes}
    return Evaluator(settings, DataConfig(root=root, workers=workers), manifest, scenes, owned, CPU, Channel())


def build(autoencoder: Autoencoder | None = None, patch: int = 1) -> tuple[IGAE, SceneStore]:
    options = RenderOptions(coarse_samples=5, fine_samples=5, patch=patch)
    autoencoder = autoencoder or create("AutoencoderKL", scale=0.2)
    planes = PlanesConfig(resolution=6, features=8, init_std=2.0)
    model = IGAE(autoencoder, planes, options, (16, 16), seed=3).eval()
    model.mlp.b2.data[0] += 2.0  # so that there are surfaces
    if model.head is not None:
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.1)
    model.refresh_background()
    return model, SceneStore(planes, range(4), 0, CPU)


def raw(data: Path, scene: int, view: int) -> Pixels:
    """A view as it was before packing, [H, W, 3] in [-1, 1]."""
    return over_white(file(data, scene, view)) / 127.5 - 1


def file(data: Path, scene: int, view: int) -> Path:
    return data / "source" / "scenes" / "square16" / f"scene_{scene}" / "images" / f"{view:03d}.png"


def background_and_object(path: Path, side: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the side x side equal parts of a view show nothing, and which nothing else than an object, for sure.

    Where the image has alpha, this says so. Without, parts that are white are background if a way over such parts leads
    to the border, and parts are object whose pixels, and all around these, are not white.
    """
    image = Image.open(path)
    alpha, size = image.mode == "RGBA", image.height // side
    seen = np.asarray(image)[..., 3] if alpha else (np.asarray(image) != 255).any(-1)
    if alpha:
        parts = seen.reshape(side, size, side, size)
        return (parts == 0).all((1, 3)), (parts == 255).all((1, 3))
    around = np.pad(seen, 1, constant_values=True)  # nothing is known of what is beyond the border
    objects, empty = np.zeros((side, side), np.bool_), np.zeros((side, side), np.bool_)
    for i, j in np.ndindex(side, side):
        objects[i, j] = around[size * i : size * (i + 1) + 2, size * j : size * (j + 1) + 2].all()
        empty[i, j] = not seen[size * i : size * (i + 1), size * j : size * (j + 1)].any()
    reached = np.zeros_like(empty)
    todo = [(i, j) for i, j in np.ndindex(side, side) if {i, j} & {0, side - 1}]
    while todo:
        i, j = todo.pop()
        if 0 <= i < side and 0 <= j < side and empty[i, j] and not reached[i, j]:
            reached[i, j] = True
            todo += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return reached, objects


def pixels(image: Tensor) -> Pixels:
    return image.detach().permute(1, 2, 0).double().numpy()


def decibels(found: Pixels, truth: Pixels) -> float:
    return float(10 * np.log10(4 / np.mean((found - truth) ** 2)))


def similarity(found: Pixels, truth: Pixels) -> float:
    """SSIM of Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5. scikit-image leaves out the windows that
    cross the border; mirroring the border first makes it a mean over all pixels."""
    x, y = (np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (found, truth))
    return float(
        structural_similarity(
            x, y, data_range=2.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def chosen(evaluator: Evaluator, split: str) -> list[tuple[int, int]]:
    views = evaluator.splits[split]
    return list(zip(views.scene.tolist(), views.view.tolist(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_views_are_exactly_those(data: Path, workers: int) -> None:
    found = evaluator(data, workers, views=4, scenes=None)
    assert sorted(chosen(found, "heldout")) == HELDOUT
    train = chosen(found, "train")
    assert len(set(train)) == len(train) == 4 + 4 + 1 + 4 and not set(train) & set(HELDOUT)
    for split in ("heldout", "train"):
        for image, (scene, view) in zip(found.splits[split].images, chosen(found, split), strict=True):
            np.testing.assert_allclose(pixels(image.float() / 127.5 - 1), raw(data, scene, view), atol=1e-6)
    again = evaluator(data, 2 - workers, views=4, scenes=None)
    assert chosen(again, "train") == train


def test_number_of_scenes_views_and_natural_images(data: Path) -> None:
    found = evaluator(data, views=1, scenes=2, natural_images=5)
    assert [scene.id for scene in found.scenes] == [0, 2]  # spread evenly
    assert chosen(found, "heldout") == [(0, 0)] and len(chosen(found, "train")) == 2
    assert found.natural_images is not None and found.natural_images.shape == (5, 3, 16, 16)
    found = evaluator(data, scenes=100, natural_images=100)
    assert len(found.scenes) == 4 and found.natural_images is not None and len(found.natural_images) == 11
    assert evaluator(data, natural_images=0).natural_images is None


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_metrics_are_those_of_other_implementations(data: Path, patch: int) -> None:
    model, bank = build(patch=patch)
    found = evaluator(data, views=3, natural_images=6)
    metrics = found.measure(model, bank)
    net = model.autoencoder.net
    expected: dict[str, list[float]] = {}
    maps: dict[str, dict[int, list[tuple[Tensor, ...]]]] = {}  # cameras, depth and opacity: split -> scene -> views

    def note(name: str, value: float) -> None:
        expected.setdefault(name, []).append(value)

    for split, views in found.splits.items():
        pairs: dict[int, list[tuple[Pixels, Pixels]]] = {}  # latents rendered and encoded, of each scene
        maps[split] = {}
        for i, (scene, view) in enumerate(chosen(found, split)):
            truth = raw(data, scene, view)
            image = torch.from_numpy(truth).permute(2, 0, 1)[None].float()
            normalized = torch.tanh(0.2 * net.encode(image).latent_dist.mean)
            shown = Views(torch.tensor([0]), views.cam2world[i : i + 1], views.intrinsics[i : i + 1])
            rendered, depth, opacity = model.render(bank.rows[scene : scene + 1], shown, None)
            maps[split].setdefault(scene, []).append((shown.cam2world, shown.intrinsics, depth, opacity))
            note(f"{split}/latent_psnr", decibels(pixels(rendered[0]), pixels(normalized[0])))
            denormalized = torch.atanh(rendered.clamp(-0.999, 0.999)) / 0.2
            encoded = net.encode(image).latent_dist.mean
            pairs.setdefault(scene, []).append((pixels(denormalized[0]), pixels(encoded[0])))
            decoded = net.decode(denormalized).sample
            again = net.decode(torch.atanh(normalized) / 0.2).sample
            for name, picture in (("rgb", decoded), ("ae", again)):
                clamped = pixels(picture[0]).clip(-1, 1)
                note(f"{split}/{name}_psnr", decibels(clamped, truth))
                note(f"{split}/{name}_ssim", similarity(clamped, truth))
            both = (pixels(decoded[0]).clip(-1, 1), pixels(again[0]).clip(-1, 1))
            note(f"{split}/rgb_ae_psnr", decibels(*both))
            note(f"{split}/rgb_ae_ssim", similarity(*both))
            if split == "heldout":
                others = [v for v in range((12, 5, 1, 20)[scene]) if (scene, v) not in HELDOUT]
                note("heldout/baseline_psnr", decibels(np.mean([raw(data, scene, v) for v in others], axis=0), truth))
                sure = background_and_object(file(data, scene, view), 8 * patch)
                for name, which in zip(("background", "object"), sure, strict=True):
                    for value in opacity[0][torch.from_numpy(which)].tolist():
                        note(f"heldout/opacity_{name}", value)
        for images in pairs.values():
            std = np.std([target for _, target in images], axis=(0, 1, 2))
            for value, target in images:
                note(f"{split}/latent_error", np.sqrt(np.mean(((value - target) / std) ** 2)))
    assert found.natural_images is not None
    for natural in found.natural_images:
        image = natural.float()[None] / 127.5 - 1
        clamped = pixels(net.decode(net.encode(image).latent_dist.mean).sample[0]).clip(-1, 1)
        note("natural/ae_psnr", decibels(clamped, pixels(image[0])))
        note("natural/ae_ssim", similarity(clamped, pixels(image[0])))
    for scene, of_scene in maps["heldout"].items():
        views, others = (
            DepthMaps(Cameras(cam2world, intrinsics, (8 * patch, 8 * patch)), depth, opacity)
            for part in (of_scene, maps["train"][scene])
            for cam2world, intrinsics, depth, opacity in [[torch.cat(x) for x in zip(*part, strict=True)]]
        )
        for value in depth_errors(views, others, model.options.box).tolist():
            note("heldout/depth_error", value)
    note("gap/rgb_psnr", float(np.mean(expected["train/rgb_psnr"]) - np.mean(expected["heldout/rgb_psnr"])))
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(np.mean(values), abs=1e-5), name  # dB and SSIM; measured 3e-7
    numbers = {name: len(expected[f"heldout/opacity_{name}"]) for name in ("background", "object")}
    assert all(50 * patch**2 < number < 0.8 * 4 * 64 * patch**2 for number in numbers.values()), numbers
    assert all(6 < metrics[f"{split}/{name}_psnr"] < 30 for split in ("heldout", "train") for name in ("rgb", "ae"))


@torch.no_grad()
def test_autoencoded_views_do_not_pass_the_normalizer(data: Path) -> None:
    """Its clamp would change latents far out, which training decodes as they are."""
    model, bank = build(create("AutoencoderKL", scale=50.0))
    found = evaluator(data, views=1)
    views = found.splits["heldout"]
    truth = views.images.float() / 127.5 - 1
    net = model.autoencoder.net
    expected = [
        decibels(pixels(again).clip(-1, 1), pixels(image))
        for again, image in zip(net.decode(net.encode(truth).latent_dist.mean).sample, truth, strict=True)
    ]
    assert found.measure(model, bank)["heldout/ae_psnr"] == pytest.approx(np.mean(expected), abs=1e-3)


@torch.no_grad()
def test_identity_scenes_have_no_autoencoder_metrics(data: Path) -> None:
    model, bank = build(load_autoencoder(AutoencoderConfig(path="identity")))
    metrics = evaluator(data, views=2).measure(model, bank)
    assert metrics.keys() == {
        *(f"{split}/{name}" for split in ("heldout", "train") for name in ("latent_psnr", "rgb_psnr", "rgb_ssim")),
        *("heldout/baseline_psnr", "heldout/latent_error", "train/latent_error", "gap/rgb_psnr"),
        *("heldout/depth_error", "heldout/opacity_background", "heldout/opacity_object"),
    }
    # Latents are the images; only decoded ones are clamped, and colors may overshoot by 0.002.
    assert metrics["heldout/rgb_psnr"] == pytest.approx(metrics["heldout/latent_psnr"], abs=0.05)


def trace(model: IGAE, bank: SceneStore) -> list[bytes]:
    tensors = [*model.state_dict().values(), bank.rows, torch.get_rng_state()]
    grads = [torch.tensor(float(p.grad is not None)) for p in model.parameters()]
    return [t.numpy().tobytes() for t in [*tensors, *grads]]


def test_evaluation_is_deterministic_and_leaves_no_trace(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, bank = build()
    before = trace(model, bank)
    first = evaluator(data, workers=1)
    metrics, grids = first.measure(model, bank), first.grids(model, bank)
    videos = first.orbits(model, bank, tmp_path)
    assert trace(model, bank) == before
    assert list(videos) == ["scene_0"] and all(path.stat().st_size > 0 for path in videos.values())
    torch.manual_seed(6)
    second = evaluator(data)
    assert second.measure(model, bank) == metrics == first.measure(model, bank)
    again = second.grids(model, bank)
    assert list(grids) == ["views", "latents"]
    assert all(np.array_equal(again[name], grid) and grid.dtype == np.uint8 for name, grid in grids.items())


def test_examples_are_views_of_the_best_the_median_and_the_worst_scene(data: Path, tmp_path: Path) -> None:
    model, bank = build()
    found = evaluator(data)
    means, of_scenes = found.table(model, bank)
    examples = found.examples(model, bank, of_scenes)
    psnrs = {name: values.get("heldout/rgb_psnr", 99.0) for name, values in of_scenes.items()}  # one has no such view
    order = sorted(psnrs, key=lambda name: psnrs[name])
    assert [example.labels["scene"] for example in examples] == order[:3]
    assert [example.name for example in examples] == ["worst", "median", "best"]
    for example in examples:
        scene = example.labels["scene"]
        truth, *_, latents, depth = np.split(example.picture, 6, axis=1)
        assert np.abs(truth - 127.5 * (raw(data, int(scene[-1]), 0) + 1)).max() <= 1
        assert example.labels["split"] == "held-out" and example.labels["value"] == f"{psnrs[scene]:.4g}"
        assert 0 < float(example.labels["near"]) < float(example.labels["far"])
        assert re.fullmatch("#[0-9a-f]{6}(, #[0-9a-f]{6}){8}", example.labels["scale"])
        assert len(np.unique(depth.reshape(-1, 3), axis=0)) > 4
        assert len(np.unique(latents.reshape(-1, 3), axis=0)) > 4
    write_results(tmp_path, found.scenes, means, of_scenes, examples)
    with Image.open(tmp_path / "examples/best.png") as image:
        assert np.array_equal(np.asarray(image), examples[2].picture) and dict(image.text) == examples[2].labels
    write_results(tmp_path, found.scenes, means, of_scenes, examples[:1])
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["worst.png"]
    assert found.caption == "held-out views of scene_0, scene_1, scene_3"


def test_other_planes_give_other_metrics_of_renders_only(data: Path) -> None:
    model, bank = build()
    found = evaluator(data, views=1)
    before = found.measure(model, bank)
    bank.rows[3] += 1.0
    after = found.measure(model, bank)
    changed = {name for name in before if before[name] != after[name]}
    kinds = ("latent_psnr", "rgb_psnr", "rgb_ssim", "rgb_ae_psnr", "rgb_ae_ssim", "latent_error")
    of_both = {f"{split}/{kind}" for split in ("heldout", "train") for kind in kinds}
    opacity = {"heldout/opacity_background", "heldout/opacity_object"}
    assert changed == {*of_both, *opacity, "gap/rgb_psnr", "heldout/depth_error"}


def test_every_metric_has_a_definition_and_old_names_are_known() -> None:
    assert METRICS["heldout/rgb_psnr"] == "PSNR of decoded renders, held-out views (dB)"
    assert len(METRICS) == 2 * (1 + 3 * 3) + 1 + 3 + 1 + 6 and all(METRICS.values())
    old = {
        "eval/heldout/constant_psnr": "eval/heldout/baseline_psnr",
        "photos/ae_lpips": "natural/ae_lpips",
        "imbalance": "straggler_factor",
        "loss/photo_kl": "loss/natural_kl",
    }
    assert {name: current_name(name) for name in old} == old
    assert all(current_name(name) == name for name in [*METRICS, "loss/total", "lr/planes", "views_per_second"])


def test_a_single_image_has_metrics(data: Path) -> None:
    model, bank = build()
    metrics = evaluator(data, views=1, scenes=1, natural_images=1).measure(model, bank)
    assert {"heldout/rgb_ssim", "natural/ae_ssim"} <= metrics.keys()


def test_scenes_without_held_out_views(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / "scenes"
    shutil.copytree(data / "source/scenes/square16/scene_2", source / "square16/scene_2")
    pack(str(tmp_path / "shards"), PackOptions(scenes=str(source), subset="square16"))
    model, bank = build()
    found = evaluator(tmp_path)
    assert set(found.splits) == {"train"}
    metrics, of_scenes = found.table(model, bank)
    (only,) = found.examples(model, bank, of_scenes)
    assert (only.name, only.labels["scene"], only.labels["split"]) == ("only", "scene_2", "training")
    assert {name.split("/")[0] for name in metrics} == {"train"}
    assert found.grids(model, bank).keys() == {"views", "latents"}


def test_natural_images_alone(data: Path, tmp_path: Path) -> None:
    pack(str(tmp_path / "shards"), PackOptions(images=str(data / "source/natural_images")))
    model, bank = build()
    found = evaluator(tmp_path, natural_images=4)
    assert found.measure(model, bank).keys() == {"natural/ae_psnr", "natural/ae_ssim"}
    assert found.grids(model, bank).keys() == {"views"} and found.orbits(model, bank, tmp_path) == {}
    assert found.examples(model, bank, found.table(model, bank)[1]) == [] and found.caption == "natural images"
