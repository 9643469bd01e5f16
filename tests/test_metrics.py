# SPDX-License-Identifier: Apache-2.0
"""Metrics of latents and opacity: closed forms. When metrics are a problem."""

import pytest
import torch

from igae.evaluation.metrics import latent_errors, opacity_on, problems, ranked, verdict


def test_latent_errors_are_in_standard_deviations_of_the_targets() -> None:
    torch.manual_seed(0)
    targets = torch.randn(6, 4, 32, 32)
    scales, offsets = torch.tensor([[0.01, 1.0, 3.0, 100.0], [5.0, 0.0, -2.0, 1.0]])[..., None, None]
    noise = 0.25 * torch.randn(6, 4, 32, 32)
    found = latent_errors(targets + noise, targets)
    assert found.shape == (6,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.25] * 6, rel=0.05)  # measured 0.014
    # whatever the unit of a channel is
    scaled = latent_errors(scales * (targets + noise) + offsets, scales * targets + offsets)
    assert scaled.tolist() == pytest.approx(found.tolist(), rel=1e-5)  # measured 8e-7
    assert latent_errors(targets, targets).tolist() == [0.0] * 6
    # the best constant
    mean = targets.mean((0, 2, 3), keepdim=True).expand_as(targets)
    assert float(latent_errors(mean, targets).square().mean()) == pytest.approx(1.0, abs=1e-9)  # measured 2e-16


def test_channels_that_are_constant_have_no_relative_error() -> None:
    targets = torch.full((2, 3, 4, 4), 0.1)
    assert latent_errors(targets + 1, targets).shape == (0,)
    targets[:, 1] = torch.tensor([-1.0, 1.0]).repeat(2, 4, 2)  # of variance 1
    assert latent_errors(targets + 0.5, targets).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)  # measured 0


def test_opacity_on_pixels_that_are_background_or_object_for_sure() -> None:
    opacity = torch.tensor([[[0.0, 0.25, 0.5], [1.0, 0.75, 0.125]]])
    lower = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 0.5]]])
    upper = torch.tensor([[[0.0, 0.0, 0.25], [1.0, 1.0, 1.0]]])
    found = opacity_on(opacity, lower, upper)
    assert (found["background"].tolist(), found["object"].tolist()) == ([0.0, 0.25], [1.0, 0.75])
    edges = opacity_on(opacity, torch.zeros_like(lower), torch.ones_like(upper))
    assert all(values.shape == (0,) for values in edges.values())


def test_problems() -> None:
    def of(heldout: float, baseline: float, train: float) -> list[str]:
        return problems({"heldout/rgb_psnr": heldout, "heldout/baseline_psnr": baseline, "train/rgb_psnr": train})

    assert of(20.0, 20.0, 23.0) == []
    (worse,) = of(20.0, 20.5, 21.0)
    assert worse.startswith("held-out views are worse than the mean training image: 20.00 dB, that image 20.50 dB; ")
    (memorized,) = of(20.0, 12.0, 23.25)
    assert memorized.startswith("training views are 3.2 dB better than held-out ones: the scenes memorize them; ")
    assert of(20.0, 21.0, 24.0)[0].startswith("held-out views are worse") and len(of(20.0, 21.0, 24.0)) == 2
    assert problems({"heldout/latent_error": 0.5}) == []
    [fog] = problems({"heldout/latent_error": 1.09, "heldout/latent_psnr": 36.6})
    assert "1.09" in fog and "depth pictures" in fog
    assert problems({}) == problems({"train/rgb_psnr": 30.0, "natural/ae_psnr": 20.0}) == []
    assert of(float("nan"), 20.0, 20.0) == []


def test_verdict() -> None:
    metrics = {"heldout/rgb_psnr": 23.6, "heldout/baseline_psnr": 14.5, "heldout/ae_psnr": 25.4, "train/rgb_psnr": 24.5}
    assert verdict(metrics) == (
        "held-out views 23.6 dB: 9.1 dB above the mean training image, "
        "1.8 dB below what the autoencoder alone reaches (25.4 dB); training views are 0.9 dB better"
    )
    other = {"heldout/baseline_psnr": 24.0, "heldout/ae_psnr": 23.5, "train/rgb_psnr": 23.0}
    assert verdict(metrics | other) == (
        "held-out views 23.6 dB: 0.4 dB below the mean training image, "
        "0.1 dB above what the autoencoder alone reaches (23.5 dB); training views are 0.6 dB worse"
    )
    # What joint training takes from the autoencoder brings the two nearer to each other, and is no merit.
    for was, said in ((29.8, "(25.4 dB, 29.8 dB before joint training);"), (26.3, "(25.4 dB);"), (20.0, "(25.4 dB);")):
        assert f"what the autoencoder alone reaches {said}" in verdict(metrics, {"heldout/ae_psnr": was})
    assert verdict(metrics, {"heldout/rgb_psnr": 20.0}) == verdict(metrics)
    del metrics["heldout/ae_psnr"]  # RGB scenes
    assert verdict(metrics).startswith("held-out views 23.6 dB: 9.1 dB above the mean training image; training views")
    assert verdict({"train/rgb_psnr": 24.5}).startswith("training views 24.5 dB; there are no held-out views")
    assert verdict({"natural/ae_psnr": 30.0}) == "autoencoded natural images 30.0 dB; there are no scenes"
    assert verdict({}) == ""


def test_scenes_are_ranked_by_the_psnr_of_held_out_renders_or_what_is_nearest() -> None:
    scenes = {"a": {"train/rgb_psnr": 3.0, "heldout/rgb_psnr": 1.0}, "b": {"heldout/rgb_psnr": 0.5}, "c": {"x": 1.0}}
    assert ranked(scenes) == ("heldout/rgb_psnr", ["b", "a"])
    assert ranked({"a": {"train/rgb_psnr": 3.0}, "b": {"train/rgb_psnr": 4.0}}) == ("train/rgb_psnr", ["a", "b"])
    assert ranked({"a": {"heldout/latent_error": 0.1}, "b": {"heldout/latent_error": 0.9}})[1] == ["b", "a"]
    assert ranked({}) == ("", [])
