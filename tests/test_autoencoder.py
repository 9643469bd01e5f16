# SPDX-License-Identifier: Apache-2.0
"""Autoencoders: the same numbers as diffusers gives, parts, normalizer, and what users can get wrong."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from runs import KL, TINY
from runs import create_autoencoder as create
from torch import Tensor

from igae.models import Autoencoder, AutoencoderConfig, load_autoencoder
from igae.models.autoencoder import Posterior

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(7)
    AutoencoderKL(**KL).save_pretrained(root / "kl")
    AutoencoderTiny(**TINY).save_pretrained(root / "tiny")
    UNet2DModel(
        block_out_channels=[8, 8],
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(root / "unet")
    (root / "empty").mkdir()
    shutil.copytree(root / "kl", root / "pipeline" / "vae")
    shutil.copytree(root / "kl", root / "damaged")
    weights = root / "damaged" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    shutil.copytree(root / "kl", root / "no-weights")
    (root / "no-weights" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(root / "kl", root / "other-shape")
    config = json.loads((root / "kl" / "config.json").read_text())
    (root / "other-shape" / "config.json").write_text(json.dumps({**config, "latent_channels": 7}))
    shutil.copytree(root / "kl", root / "no-json")
    (root / "no-json" / "config.json").write_text("{")
    return {path.name: path for path in root.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_a_kl_autoencoder_from_a_folder_is_that_of_diffusers(folders: dict[str, Path], subfolder: str | None) -> None:
    folder = folders["pipeline" if subfolder else "kl"]
    found = load_autoencoder(AutoencoderConfig(path=str(folder), subfolder=subfolder))
    net = AutoencoderKL.from_pretrained(folders["kl"])
    expected = net.encode(IMAGES).latent_dist
    posterior = found.posterior(IMAGES)
    assert torch.equal(posterior.mean, expected.mean) and posterior.mean.shape == (3, 4, 8, 8)
    assert posterior.logvar is not None and torch.equal(posterior.logvar, expected.logvar)
    assert torch.equal(found.decode(posterior.mean), net.decode(expected.mean).sample)
    assert not found.is_identity and found.scale == torch.tensor(0.02)


@torch.no_grad()
def test_a_tiny_autoencoder_from_a_folder_is_that_of_diffusers(folders: dict[str, Path]) -> None:
    found = load_autoencoder(AutoencoderConfig(path=str(folders["tiny"])))
    net = AutoencoderTiny.from_pretrained(folders["tiny"])
    posterior = found.posterior(IMAGES)
    assert posterior.logvar is None and torch.equal(posterior.mean, net.encode(IMAGES).latents)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert torch.equal(found.decode(posterior.mean), net.decode(posterior.mean).sample)


@torch.no_grad()
@pytest.mark.parametrize(("name", "cls"), [("AutoencoderKL", AutoencoderKL), ("AutoencoderTiny", AutoencoderTiny)])
def test_created_weights_depend_on_the_seed_alone(name: str, cls: type) -> None:
    torch.manual_seed(99)
    first = create(name, seed=3)
    torch.manual_seed(5)
    again, other = create(name, seed=3), create(name, seed=4)
    assert isinstance(first.net, cls)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.posterior(IMAGES).mean, other.posterior(IMAGES).mean)


@torch.no_grad()
def test_identity() -> None:
    found = load_autoencoder(AutoencoderConfig(path="identity"))
    latents = found.posterior(IMAGES).mean
    for same in (latents, found.decode(latents), found.normalize(latents), found.denormalize(latents)):
        assert torch.equal(same, IMAGES)
    assert found.is_identity and found.scale_is_fitted and list(found.parameters()) == []
    assert found.parts() == {"encoder": [], "decoder": []}


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_parts_are_what_each_direction_uses(name: str) -> None:
    found = create(name)
    parts = found.parts()
    named = [*parts["encoder"], *parts["decoder"]]
    assert sorted(n for n, _ in named) == sorted(n for n, _ in found.named_parameters())
    assert len({id(p) for _, p in named}) == len(named) == len(list(found.net.parameters()))
    # By use: encoding moves gradients into the encoder's part alone, decoding into the decoder's.
    posterior = found.posterior(IMAGES)
    (posterior.mean.sum() + (0 if posterior.logvar is None else posterior.logvar.sum())).backward()
    assert {id(p) for p in found.parameters() if p.grad is not None} == {id(p) for _, p in parts["encoder"]}
    found.zero_grad()
    found.decode(posterior.mean.detach()).sum().backward()
    assert {id(p) for p in found.parameters() if p.grad is not None} == {id(p) for _, p in parts["decoder"]}
    if name == "AutoencoderKL":
        assert any(".quant_conv." in n for n, _ in parts["encoder"])
        assert any(".post_quant_conv." in n for n, _ in parts["decoder"])


@given(st.floats(1e-3, 2.0), st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_normalizer_and_its_inverse(scale: float, shares: list[float]) -> None:
    autoencoder = Autoencoder(torch.nn.Identity(), scale).double()
    latents = torch.tensor(shares, dtype=torch.float64) * 3.7 / scale  # tanh(3.7) is inside the margin
    normalized = autoencoder.normalize(latents)
    s = float(torch.tensor(scale))
    assert normalized.tolist() == pytest.approx([math.tanh(s * z) for z in latents.tolist()], abs=1e-15)
    # float64: measured 2.2e-14 / scale, at the ends, where tanh is flat
    assert autoencoder.denormalize(normalized).tolist() == pytest.approx(latents.tolist(), abs=1e-12 / scale)


def test_denormalize_of_extremes_is_finite() -> None:
    autoencoder = Autoencoder(torch.nn.Identity(), 0.02)
    found = autoencoder.denormalize(torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.002]))
    limit = math.atanh(1 - 1e-3) / 0.02
    assert found.tolist() == pytest.approx([-limit, -limit, 0, limit, limit], rel=1e-4)


def test_auto_scale_gives_latents_a_the_chosen_spread() -> None:
    autoencoder = create("AutoencoderKL", scale="auto")
    assert not autoencoder.scale_is_fitted
    for spread in (0.3, 30.0):
        latents = spread * torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        autoencoder.fit_scale(float(latents.square().mean()))
        assert autoencoder.scale_is_fitted
        assert float((autoencoder.scale * latents).std()) == pytest.approx(0.3, rel=1e-2)  # of 5120 values
    assert autoencoder.state_dict()["scale"] == autoencoder.scale  # in checkpoints
    assert create("AutoencoderKL", scale=0.5).scale == 0.5


def test_samples_have_the_mean_and_variance() -> None:
    count = 20000
    mean, logvar = torch.tensor([-3.0, 0.0, 0.5, 40.0]), torch.tensor([-6.0, 0.0, 1.0, 2.0])
    torch.manual_seed(0)
    drawn = Posterior(mean.expand(count, 4), logvar.expand(count, 4)).sample().double()
    unit = (drawn - mean) / logvar.double().div(2).exp()
    assert unit.mean(0).abs().max() < 4 / count**0.5  # four standard errors
    assert (unit.var(0) - 1).abs().max() < 4 * (2 / count) ** 0.5
    assert (torch.corrcoef(unit.T) - torch.eye(4)).abs().max() < 4 / count**0.5
    torch.manual_seed(0)
    assert torch.equal(Posterior(mean.expand(count, 4), logvar.expand(count, 4)).sample().double(), drawn)


def refusal(config: AutoencoderConfig) -> str:
    with pytest.raises(ValueError) as error:
        load_autoencoder(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["empty", "damaged", "no-weights", "other-shape", "no-json", "pipeline", "absent"])
def test_folders_without_a_usable_autoencoder_are_named(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = folders.get(name, folders["empty"].parent / "absent")
    text = refusal(AutoencoderConfig(path=str(folder)))
    assert "autoencoder.path" in text and str(folder) in text


def test_models_that_are_no_autoencoders_are_refused(folders: dict[str, Path]) -> None:
    assert "UNet2DModel" in refusal(AutoencoderConfig(path=str(folders["unet"])))
    unet = {"_class_name": "UNet2DModel", "block_out_channels": [8, 8], "norm_num_groups": 4}
    unet |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    assert "UNet2DModel" in refusal(AutoencoderConfig(create=unet))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"_class_name": "AutoencoderNone"}, "AutoencoderNone"),
        ({"chanels": 3}, "chanels"),
        ({"block_out_channels": [8, 9]}, "divisible"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "AutoencoderKL"),
        ({"down_block_types": ["NoBlock"] * 2}, "NoBlock"),
    ],
)
def test_settings_that_diffusers_refuses(change: dict[str, object], word: str) -> None:
    text = refusal(AutoencoderConfig(create={**KL, **change}))
    assert "autoencoder.create" in text and word in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"path": "identity", "create": KL},
        {"path": "x", "scale": 0.0},
        {"path": "x", "scale": -1},
        {"path": "x", "scale": math.nan},
        {"path": "x", "scale": math.inf},
        {"path": "x", "scale": "fit"},
        {"path": "x", "latents": "mode"},
    ],
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AutoencoderConfig(**settings)  # type: ignore[arg-type]


def test_moments_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        autoencoder = create("AutoencoderKL")
        posterior = autoencoder.posterior(IMAGES)
        images: Tensor = autoencoder.decode(posterior.mean)
    assert posterior.logvar is not None
    assert {posterior.mean.dtype, posterior.logvar.dtype, images.dtype} == {torch.float32}
