# SPDX-License-Identifier: Apache-2.0
"""Autoencoders from others: every class and layout of diffusers that works, and files that are no good or no friend."""

import json
import logging
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import hub
import pytest
import torch
from huggingface_hub import constants
from runs import KL, TINY

from igae.models import IGAE, AutoencoderConfig, load_autoencoder
from igae.models.autoencoder import HUB
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
DC = {
    "attention_head_dim": 4,
    "latent_channels": 4,
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}
ASYMMETRIC = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "down_block_out_channels": [8, 8],
    "up_block_out_channels": [8, 8],
    "norm_num_groups": 4,
}
FLUX = {**KL, "block_out_channels": (8, 8)}
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKL": KL,
    "AutoencoderTiny": TINY,
    "AutoencoderDC": DC,
    "AsymmetricAutoencoderKL": ASYMMETRIC,
    "VQModel": {**KL, "num_vq_embeddings": 16},
    "AutoencoderKLFlux2": FLUX,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def net_of(name: str) -> Any:
    torch.manual_seed(7)
    return getattr(diffusers, name)(**SMALL[name]).eval()


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    net_of("AutoencoderKL").save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_every_class_encodes_and_decodes_as_diffusers(name: str, tmp_path: Path) -> None:
    net = net_of(name)
    net.save_pretrained(tmp_path)
    found = load_autoencoder(AutoencoderConfig(path=str(tmp_path)))
    encoded = net.encode(IMAGES)
    expected = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
    latents = found.posterior(IMAGES).mean
    assert torch.equal(latents, expected)
    assert torch.equal(found.decode(latents), net.decode(expected).sample)
    created = load_autoencoder(AutoencoderConfig(create={"_class_name": name, **SMALL[name]}))
    assert created.posterior(IMAGES).mean.shape == latents.shape


@torch.no_grad()
@pytest.mark.parametrize("layout", ["fp16", "sharded", "sharded fp16"])
def test_layouts_of_weights(layout: str, kl: Path, tmp_path: Path) -> None:
    net, half = net_of("AutoencoderKL"), "fp16" in layout
    net = net.half() if half else net
    net.save_pretrained(
        tmp_path, variant="fp16" if half else None, max_shard_size="10KB" if "sharded" in layout else "10GB"
    )
    assert not (tmp_path / WEIGHTS).exists()
    found = load_autoencoder(AutoencoderConfig(path=str(tmp_path)))
    latents = found.posterior(IMAGES).mean
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(latents, net.float().encode(IMAGES).latent_dist.mean)


def refusal(config: AutoencoderConfig) -> str:
    """The sentence, within two seconds and 100 MB."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        load_autoencoder(config)
    assert time.process_time() - start < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": ["AutoencoderKL"]}, "none of the image autoencoders"),
        ({"_class_name": "DiffusionPipeline"}, "none of the image autoencoders"),
        ({"_class_name": "AutoencoderKLWan"}, "none of the image autoencoders"),
        ({"_class_name": None}, "none of the image autoencoders"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"layers_per_block": 5_000}, "more than"),
        ({"layers_per_block": 10**6}, "more than"),
        ({"block_out_channels": [2**20, 2**20]}, "[1048576, 3, 3, 3] by config.json and [8, 3, 3, 3]"),
        ({"block_out_channels": [-8, -8]}, "negative"),
        ({"layers_per_block": "many"}, "str"),
        ({"latent_channels": 10**400}, ""),
        ({"in_channels": 1}, "in_channels is 1"),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"out_channels": 4}, "out_channels is 4"),
    ],
)
def test_settings_are_refused_before_they_cost(change: dict[str, Any], words: str, kl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    shutil.copytree(kl, folder)
    settings = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(settings))
    text = refusal(AutoencoderConfig(path=str(folder)))
    assert "autoencoder.path" in text and str(folder) in text and words in text
    if "block_out_channels" not in change and "latent_channels" not in change and change != {"layers_per_block": 5_000}:
        assert "autoencoder.create" in refusal(
            AutoencoderConfig(create={**KL, "_class_name": "AutoencoderKL", **change})
        )


class Ran:
    """What leaves a trace if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Ran(folder / "trace")))


def elsewhere(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"encoder.conv_in.weight": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def overwritten(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pickled, "save_pretrained"),
        (elsewhere, "no file's name"),
        (lambda folder: overwritten(folder, b""), "SafetensorError"),
        (lambda folder: overwritten(folder, b"\xff" * 64), "SafetensorError"),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("[" * 100_000), "RecursionError"),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("[]"), ""),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), ""),
        (lambda folder: (folder / "config.json").write_text("[1]"), ""),
    ],
)
def test_files_are_refused(damage: Callable[[Path], Any], words: str, kl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    shutil.copytree(kl, folder)
    damage(folder)
    text = refusal(AutoencoderConfig(path=str(folder)))
    assert "autoencoder.path" in text and words in text
    assert not (folder / "trace").exists()


def test_networks_that_break_on_images_are_told(kl: Path) -> None:
    autoencoder = load_autoencoder(AutoencoderConfig(path=str(kl)))
    autoencoder.net.encoder.conv_in = None  # 'NoneType' object is not callable
    with pytest.raises(ValueError, match="can't encode and decode RGB images of 16 x 16"):
        IGAE(autoencoder, PlanesConfig(resolution=2, features=4), RenderOptions(), (16, 16))


@pytest.mark.parametrize(("size", "resize"), [((33, 64), 32), ((31, 31), 30)])
def test_sizes_that_do_not_fit_are_told_with_those_that_do(size: tuple[int, int], resize: int, kl: Path) -> None:
    def build(size: tuple[int, int]) -> IGAE:
        return IGAE(load_autoencoder(AutoencoderConfig(path=str(kl))), PlanesConfig(), RenderOptions(), size)

    with pytest.raises(ValueError) as error:
        build(size)
    wanted = f"multiples of 2 and the images have {size[0]} x {size[1]}: pack them again, with --resize {resize}"
    assert str(error.value) == f"the autoencoder needs sides that are {wanted}"
    assert build((resize, resize)).latent_shape[1:] == (resize // 2, resize // 2)


def test_the_hub_is_asked_a_few_times(
    kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line tells of a hub that does not answer; what is in its cache is used without it, at once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(HUB, "first_wait", 0.01)
    there, missing = (AutoencoderConfig(path=path, subfolder="vae") for path in ("user/there", "user/missing"))
    with hub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        server.repos["user/there"] = {"main": {f"vae/{file.name}": file.read_bytes() for file in kl.iterdir()}}
        server.busy = 4
        expected = load_autoencoder(there).state_dict()
        [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert line.startswith(f"{server.url}: try 1 of 6 failed (") and not server.busy
        assert "no hub repository that can be reached and read, " in refusal(missing)
        caplog.clear()
        server.busy = 10**9
        assert all(torch.equal(expected[name], found) for name, found in load_autoencoder(there).state_dict().items())
        assert not caplog.records
        assert f"({server.url} cannot be read, it was tried 6 times: " in refusal(missing) and len(caplog.records) == 1
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "(HF_HUB_OFFLINE is set" in refusal(missing) and load_autoencoder(there).net is not None
    assert not logging.getLogger("huggingface_hub").handlers  # the root's print what it logs
