# SPDX-License-Identifier: Apache-2.0
"""Loss terms against closed forms, and LPIPS against a slow implementation of its definition."""

import math
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from igae.evaluation import psnr
from igae.models import LPIPS
from igae.models.losses import coverage_bounds, kl_divergence, opacity_loss, total_variation

# Places of VGG16's convolutions among torchvision's `features`, their channels, and the layers before the pooling.
CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
TAPS = (2, 7, 14, 21, 28)


def double(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.floats(1e-3, 2.0), st.sampled_from([1.0, 2.0, 255.0]), st.integers(1, 3))
def test_psnr_of_a_constant_difference(difference: float, data_range: float, images: int) -> None:
    truth = torch.zeros(images, 3, 4, 5)
    found = psnr(truth + difference, truth, data_range)
    expected = min(20 * math.log10(data_range / difference), 100.0)
    assert found.shape == (images,)
    assert found.tolist() == pytest.approx([expected] * images, abs=1e-4)  # measured 3e-6


def test_psnr_is_of_each_image() -> None:
    x, y = torch.zeros(3, 3, 2, 2), torch.zeros(3, 3, 2, 2)
    x[1] += 0.2
    x[2, 0, 0, 0] = 2.0  # one of twelve values is off by the whole range
    found = psnr(x, y)
    assert found[0] == 100.0  # equal images: finite
    assert found[1:].tolist() == pytest.approx([20.0, 10 * math.log10(12)], abs=1e-5)
    assert torch.equal(psnr(y, x), found)


@pytest.mark.parametrize(("shape", "dims"), [((2, 3, 5, 7), (-2, -1)), ((2, 3, 6, 4, 5), (2, 3))])
def test_total_variation_does_not_change_with_batch_size(shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    x = double(0, *shape)
    once = total_variation(x, dims)
    for times in (2, 5):
        # float64, measured 2e-16
        assert total_variation(x.repeat(times, *[1] * (len(shape) - 1)), dims).item() == pytest.approx(
            once.item(), rel=1e-14
        )


def test_total_variation_with_weights_counts_entries_more_than_once() -> None:
    x, index = double(3, 4, 3, 5, 6, 2), torch.tensor([2, 0, 2, 2, 3])
    weights = torch.bincount(index, minlength=4).double() / len(index)
    assert total_variation(x, (2, 3), weights).item() == pytest.approx(total_variation(x[index], (2, 3)).item(), 1e-14)


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(2, 9), st.integers(2, 9))
def test_total_variation_of_a_ramp(a: float, b: float, height: int, width: int) -> None:
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    ramp = a * rows + b * columns
    # At every resolution: the sum of the squared slopes.
    assert total_variation(ramp.expand(2, 3, -1, -1), (-2, -1)).item() == pytest.approx(a * a + b * b, abs=1e-12)
    planes = ramp[None, None, :, :, None].expand(2, 3, -1, -1, 4)
    assert total_variation(planes, (2, 3)).item() == pytest.approx(a * a + b * b, abs=1e-12)


def test_total_variation_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]).view(1, 1, 2, 3)
    # Down: 4 + 1 + 1 over 3; along: 1 + 4 + 0 + 0 over 4.
    assert total_variation(x, (-2, -1)).item() == pytest.approx(6 / 3 + 5 / 4)
    assert total_variation(torch.full((2, 3, 4, 4), 7.0), (-2, -1)) == 0


def test_total_variation_does_not_cross_scenes_planes_or_features() -> None:
    steps = torch.arange(2 * 3 * 5).double().view(2, 3, 1, 1, 5)
    assert total_variation(steps.expand(-1, -1, 4, 4, -1), (2, 3)) == 0


def test_kl_divergence_is_that_of_normal_distributions() -> None:
    mean, logvar = double(1, 4, 8, 3, 3), double(2, 4, 8, 3, 3)
    normal = torch.distributions.Normal(mean, logvar.div(2).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(normal, unit).mean()
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-13)  # measured 2e-16
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    # Per element: neither the batch nor the number of latents changes it.
    assert kl_divergence(mean.repeat(2, 1, 1, 3), logvar.repeat(2, 1, 1, 3)).item() == pytest.approx(expected.item())


def random_vgg(path: Path) -> Path:
    """Write a VGG16 with random weights, as torchvision stores it."""
    generator = torch.Generator().manual_seed(5)
    state = {"classifier.0.weight": torch.zeros(4, 4)}
    for index, (inputs, outputs) in CONVOLUTIONS.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        state[f"features.{index}.weight"] = weight * math.sqrt(2 / (9 * inputs))
        state[f"features.{index}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vgg(tmp_path_factory.mktemp("vgg") / "vgg16.pth")


@pytest.fixture(scope="module")
def lpips(vgg_file: Path) -> LPIPS:
    return LPIPS(vgg_file)


def slow_lpips(vgg: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Zhang et al. 2018, equation 1, image by image in float64; images in [-1, 1]."""
    path = files("torchmetrics") / "functional/image/lpips_models/vgg.pth"
    heads = torch.load(str(path), map_location="cpu", weights_only=True)

    def features(image: Tensor) -> list[Tensor]:
        unit = (image + 1) / 2
        z = torch.stack(
            [(unit[c] - m) / s for c, (m, s) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))]
        )
        z, found = z[None], []
        for index in CONVOLUTIONS:
            if index - 3 in TAPS:
                z = F.max_pool2d(z, 2, 2)
            weight, bias = vgg[f"features.{index}.weight"].double(), vgg[f"features.{index}.bias"].double()
            z = F.conv2d(z, weight, bias, padding=1).clamp_min(0)
            if index in TAPS:
                found.append(z[0])
        return found

    distances = []
    for a, b in zip(x.double(), y.double(), strict=True):
        total = 0.0
        for level, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
            head = heads[f"lin{level}.model.1.weight"].double().view(-1)
            f, g = f / (f.square().sum(0).sqrt() + 1e-10), g / (g.square().sum(0).sqrt() + 1e-10)
            _, height, width = f.shape
            total += float((head[:, None, None] * (f - g) ** 2).sum()) / (height * width)
        distances.append(total)
    return sum(distances) / len(distances)


def test_lpips_is_the_definition(lpips: LPIPS, vgg_file: Path) -> None:
    x, y = double(3, 2, 3, 32, 24).clamp(-1, 1), double(4, 2, 3, 32, 24).clamp(-1, 1)
    y[1] = 0.9 * x[1] + 0.1 * y[1]
    expected = slow_lpips(torch.load(vgg_file, weights_only=True), x, y)
    found = lpips(x.float(), y.float())
    assert found.shape == () and expected > 0.01
    assert found.item() == pytest.approx(expected, rel=1e-5)  # measured 2e-7
    near, far = lpips(x[1:].float(), y[1:].float()), lpips(x[:1].float(), y[:1].float())
    assert 0 < near < far
    assert (near + far).item() / 2 == pytest.approx(expected, rel=1e-5)
    # The distance of each image is what it has alone; measured 1e-7.
    assert lpips.distances(x.float(), y.float()).tolist() == pytest.approx([far.item(), near.item()], rel=1e-5)


def test_lpips_of_equal_images_is_zero(lpips: LPIPS) -> None:
    x = double(5, 2, 3, 16, 16).float()  # 16 is the least size
    assert lpips(x, x.clone()) == 0
    flat = torch.zeros(1, 3, 16, 16)
    assert lpips(flat, flat) == 0


def test_lpips_has_gradients_of_images_only(lpips: LPIPS) -> None:
    x = double(6, 1, 3, 16, 16).float().requires_grad_()
    lpips(x, torch.zeros_like(x)).backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()
    assert [name for name, p in lpips.named_parameters() if p.requires_grad] == []


def sentence_of(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_missing_weights_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pth", tmp_path):  # a folder is no file either
        with pytest.raises(ValueError) as error:
            LPIPS(path)
        assert str(path) in sentence_of(error) and "train.lpips_weights" in sentence_of(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        {"weight": torch.zeros(3)},
        torch.zeros(3),
        [1, 2],
        "no-bias",
        "misshaped",
        nn.Linear(2, 2),
    ],
    ids=["empty", "text", "other", "tensor", "list", "no-bias", "misshaped", "module"],
)
def test_files_that_are_no_vgg16_are_refused(content: object, vgg_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        state = torch.load(vgg_file, weights_only=True)
        if content == "no-bias":
            del state["features.28.bias"]
        else:
            state["features.28.weight"] = torch.zeros(512, 256, 3, 3)
        torch.save(state, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        LPIPS(path)
    assert "train.lpips_weights" in sentence_of(error)


def test_an_unreachable_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("name resolution failed")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError) as error:
        LPIPS()
    text = sentence_of(error)
    assert "vgg16-397923af.pth" in text and "train.lpips_weights" in text and "natural_lpips" in text


def test_downloaded_weights_are_used(vgg_file: Path, lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, **_: object) -> dict[str, Tensor]:
        assert url == "https://download.pytorch.org/models/vgg16-397923af.pth"
        state: dict[str, Tensor] = torch.load(vgg_file, weights_only=True)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    x, y = double(7, 1, 3, 16, 16).float(), double(8, 1, 3, 16, 16).float()
    assert torch.equal(LPIPS()(x, y), lpips(x, y))


def slow_coverage(mask: Tensor, has_alpha: bool, size: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """Bounds of each cell, by a walk from cell to cell."""
    high, wide = mask.shape[0] // size[0], mask.shape[1] // size[1]
    around = F.pad(mask.double(), (1, 1, 1, 1), value=255)
    beside = torch.stack([around[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)])
    inner = mask.double() if has_alpha else beside.amin(0)

    def cell(values: Tensor, i: int, j: int) -> Tensor:
        return values[i * high : (i + 1) * high, j * wide : (j + 1) * wide].double()

    least = [[cell(inner, i, j).mean().item() / 255 for j in range(size[1])] for i in range(size[0])]
    if has_alpha:
        return [[(value, value) for value in row] for row in least]
    todo = [(i, j) for i in range(size[0]) for j in range(size[1]) if i in (0, size[0] - 1) or j in (0, size[1] - 1)]
    reached = set()
    while todo:
        i, j = todo.pop()
        if (i, j) in reached or not (0 <= i < size[0] and 0 <= j < size[1]) or cell(mask, i, j).any():
            continue
        reached.add((i, j))
        todo += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return [[(value, 0.0 if (i, j) in reached else 1.0) for j, value in enumerate(row)] for i, row in enumerate(least)]


@given(st.integers(0, 10_000), st.booleans(), st.floats(0.1, 0.9))
def test_coverage_is_bounded_by_masks(seed: int, has_alpha: bool, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(6, 5, generator=generator) < share).repeat_interleave(4, 0).repeat_interleave(2, 1)
    mask = (torch.randint(0, 256, cells.shape, generator=generator) * cells).to(torch.uint8)
    found = coverage_bounds(mask[None], torch.tensor([has_alpha]), (6, 5))
    assert found.shape == (1, 2, 6, 5)
    expected = torch.tensor(slow_coverage(mask, has_alpha, (6, 5)))
    assert torch.allclose(found[0].permute(1, 2, 0), expected, atol=1e-6)  # measured 6e-8


def test_opacity_loss_is_the_distance_to_the_bounds() -> None:
    opacity = torch.tensor([[[0.2, 0.9, 0.5, 0.0]]])
    bounds = torch.tensor([[[[0.3, 0.3, 0.3, 0.0]], [[1.0, 0.4, 1.0, 0.0]]]])
    assert opacity_loss(opacity, bounds).item() == pytest.approx((0.1**2 + 0.5**2) / 4)
