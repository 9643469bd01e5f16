# SPDX-License-Identifier: Apache-2.0
"""Latent pixels of patches of rendered ones: closed forms, patches as areas of pixels, and the map in training.

Also test_export.py, test_view.py, test_evaluator.py, test_fit.py and test_ranks_equal.py, whose models have patches.
"""

from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor

from igae import checkpoint, config
from igae.data import orbit
from igae.models import IGAE, LossWeights, PatchHead, Views
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.training import Recipe, Trainer

SIZES = pytest.mark.parametrize(("channels", "patch"), [(1, 2), (3, 3), (4, 2), (2, 4)])


def head_of(channels: int, patch: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> PatchHead:
    """With a random weight."""
    head = PatchHead(channels, patch).to(dtype)
    head.weight.data = scale * torch.randn(head.weight.shape, dtype=dtype, generator=generator(7))
    return head


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fine_image(channels: int, patch: int) -> Tensor:
    """Two views of 3 x 2 latent pixels."""
    return torch.randn(2, 3 * patch, 2 * patch, channels, dtype=torch.float64, generator=generator(3))


def mean_of(fine: Tensor, patch: int) -> Tensor:
    """Of each patch: [B, h g, w g, ...] -> [B, h, w, ...]."""
    return fine.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).mean((2, 4))


@SIZES
def test_it_starts_as_the_mean(channels: int, patch: int) -> None:
    head, fine = PatchHead(channels, patch).double(), fine_image(channels, patch)
    assert head.weight.shape == (channels, patch * patch * channels) and head.weight.count_nonzero() == 0
    assert head(fine).shape == (2, 3, 2, channels)
    torch.testing.assert_close(head(fine), mean_of(fine, patch), rtol=0, atol=1e-15)  # measured 4e-16


@SIZES
def test_it_is_its_definition(channels: int, patch: int) -> None:
    head, fine = head_of(channels, patch), fine_image(channels, patch)
    found = head(fine)
    for b, y, x in [(0, 0, 0), (1, 2, 0), (1, 1, 1)]:
        pixels = [fine[b, patch * y + i, patch * x + j] for i in range(patch) for j in range(patch)]
        mean = torch.stack(pixels).mean(0)
        expected = mean.clone()
        for k in range(channels):
            for place, pixel in enumerate(pixels):
                for c in range(channels):
                    expected[k] += head.weight[k, channels * place + c].item() * (pixel[c] - mean[c])
        torch.testing.assert_close(found[b, y, x], expected, rtol=0, atol=1e-12)  # measured 3e-15


@SIZES
def test_nothing_is_added_where_a_patch_is_of_one_color(channels: int, patch: int) -> None:
    coarse = torch.randn(2, 3, 2, channels, dtype=torch.float64, generator=generator(1))
    fine = coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    torch.testing.assert_close(head_of(channels, patch, 100.0)(fine), coarse, rtol=0, atol=1e-12)  # measured 1e-13


@SIZES
def test_a_weight_can_choose_a_pixel(channels: int, patch: int) -> None:
    fine = fine_image(channels, patch)
    for i, j in ((0, 0), (0, patch - 1), (patch - 1, 0)):
        head = PatchHead(channels, patch).double()
        for c in range(channels):
            head.weight.data[c, (i * patch + j) * channels + c] = 1.0
        torch.testing.assert_close(head(fine), fine[:, i::patch, j::patch], rtol=0, atol=1e-14)  # measured 4e-16


@SIZES
def test_gradients_are_those_of_differences(channels: int, patch: int) -> None:
    head, fine = head_of(channels, patch), fine_image(channels, patch)[:1].requires_grad_()

    def of(fine: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (fine,))

    assert torch.autograd.gradcheck(of, (fine, head.weight.detach().requires_grad_()))


# --- In the model --------------------------------------------------------------------------------------------------


def build(size: tuple[int, int] = (16, 24), **options: int) -> IGAE:
    planes = PlanesConfig(resolution=6, features=8)
    settings = RenderOptions(coarse_samples=5, fine_samples=4, **options)  # type: ignore[arg-type]
    model = IGAE(runs.create_autoencoder("AutoencoderKL", scale=0.3), planes, settings, size, seed=3)
    model.mlp.b2.data[0] += 2.0  # so that there are surfaces
    model.refresh_background()
    return model


def rows_and_views() -> tuple[Tensor, Views]:
    rows = torch.randn(2, 3, 6, 6, 8, generator=generator(1)).mul(2)
    lens = torch.tensor([[1.1, 0.0, 0.5], [0.0, 1.4, 0.5], [0.0, 0.0, 1.0]]).expand(3, 3, 3)
    images = torch.randint(0, 256, (3, 3, 16, 24), generator=generator(2), dtype=torch.uint8)
    return rows, Views(torch.tensor([0, 1, 0]), orbit(3, 1.3, 0.3), lens, images)


@torch.no_grad()
def test_patches_without_a_weight_are_areas() -> None:
    """Images of any other shape than squares, over a background that is another one in each latent pixel."""
    (rows, views), areas, patches = rows_and_views(), build(rays_per_pixel=2), build(patch=2)
    assert areas.head is None and patches.head is not None and areas.background.flatten(0, 1).std(0).max() > 1e-4
    expected, found = areas.render(rows, views, None), patches.render(rows, views, None)
    assert expected[0].shape == found[0].shape == (3, 4, 8, 12)
    assert [image.shape for image in found[1:]] == [(3, 16, 24)] * 2
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)  # measured 2e-7
    for fine, mean in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mean_of(fine, 2), mean, rtol=0, atol=1e-6)  # measured 2e-7
    assert 0.1 < expected[2].mean() < 0.95
    # Losses of them, too: opacities are compared with masks at the resolution where they are rendered.
    weights = LossWeights(latent=1.0, rgb=1.0, distortion=1.0)
    losses = [model(rows, views, None, weights, False, None) for model in (areas, patches)]
    for name in losses[0]:
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=1e-5), name  # measured 2e-7
    # With a weight, latents are others, and depth and opacity are not.
    patches.head.weight.normal_(generator=generator(5))
    other = patches.render(rows, views, None)
    assert (other[0] - found[0]).abs().mean() > 1e-2
    assert torch.equal(other[1], found[1]) and torch.equal(other[2], found[2])


@torch.no_grad()
def test_the_background_is_not_changed() -> None:
    (rows, views), model = rows_and_views(), build(patch=2)
    assert model.head is not None
    model.head.weight.normal_(generator=generator(5))
    model.mlp.b2[0] = -1e4
    features, _, opacity = model.render(rows, views, 3)
    assert opacity.count_nonzero() == 0
    expected = (model.background * 2 - 1).permute(2, 0, 1).expand_as(features)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)  # measured 0


@pytest.mark.parametrize("patch", [3, 4])
def test_a_patch_that_does_not_divide_the_downscale_factor_is_refused(patch: int) -> None:
    with pytest.raises(ValueError, match=f"render.patch is {patch}: it must divide the autoencoder's downscale 2"):
        build(patch=patch)
    assert build(patch=2).head is not None and build(patch=1).head is None


@pytest.mark.parametrize("patch", [0, -1, 17])
def test_options_refuse(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch is {patch}; it must be from 1 to 16"):
        RenderOptions(patch=patch)


@pytest.mark.usefixtures("one_run_a_process")
def test_it_is_trained_with_the_mlp_and_saved(tmp_path: Path) -> None:
    """Adam's first step moves what has a gradient by the learning rate."""
    recipe = str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))
    rates = ["train.warmup.learning_rates={planes: 1.0e-2, mlp: 3.0e-3}", "train.joint.learning_rates={planes: 1.0e-2}"]
    first = ["train.warmup.epochs=0.1", "train.joint.epochs=0.1", "train.warmup.decay=1.0"]
    trainer = Trainer(config.load(Recipe, recipe, [*rates, *first, "train.joint.natural_images=0"] + NO_NATURAL))
    head = trainer.model.head
    assert head is not None and head.weight.count_nonzero() == 0
    trainer.run("warmup")
    moved = head.weight.detach().abs()
    assert moved.max() == pytest.approx(3e-3, rel=1e-3) and (moved > 2.9e-3).float().mean() > 0.9
    trainer.run("joint")  # which freezes the MLP
    assert torch.equal(head.weight.detach().abs(), moved) and trainer.progress.finished
    newest = checkpoint.list_complete(str(trainer.folder / "checkpoints"))[-1]
    loaded = checkpoint.load_checkpoint(newest)
    assert torch.equal(loaded.shared["head.weight"], head.weight)


NO_NATURAL = ["train.joint.weights={latent: 1, opacity: 0.1}"]
