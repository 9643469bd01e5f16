# SPDX-License-Identifier: Apache-2.0
"""The distortion of rays. Also test_rendering.py (slow_renderer) and test_cuda_emulated.py (kernels)."""

import pytest
import torch
from test_cuda_renderer import setup
from torch import Tensor

from igae.rendering import RenderOptions, render
from igae.rendering.ray_marching import composite, distortion_of

F64 = torch.float64


def double_sum(t: Tensor, w: Tensor) -> Tensor:
    """The definition, O(K^2)."""
    middle = (t[:, 1:] + t[:, :-1]) / 2
    apart = (middle[:, :, None] - middle[:, None]).abs()
    return (w[:, :, None] * w[:, None] * apart).sum((1, 2)) + (w.square() * t.diff(dim=1)).sum(1) / 3


@pytest.mark.parametrize("count", [2, 3, 96, 257])
def test_prefix_sums_are_the_double_sum(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    t = torch.rand(20, count, dtype=F64, generator=g).sort(1).values + 1
    w = torch.rand(20, count - 1, dtype=F64, generator=g).pow(8).requires_grad_()
    found, expected = distortion_of(t, w), double_sum(t, w)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)  # measured: 5e-15
    slopes = [torch.autograd.grad(x.sum(), w)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=0)  # measured: 2e-15
    assert torch.autograd.gradcheck(lambda w: distortion_of(t[:3, :9], w), (w[:3, :8],))


def test_thin_layers_far_away_are_exact_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    t = 3 + 1e-3 * torch.rand(20, 96, generator=g).sort(1).values
    w = torch.softmax(torch.randn(20, 95, generator=g), 1)
    torch.testing.assert_close(
        distortion_of(t, w).double(), double_sum(t.double(), w.double()), rtol=1e-5, atol=0
    )  # measured: 2e-7


def test_one_layer_and_two() -> None:
    t = torch.tensor([[1.0, 1.3, 2.1, 2.5]], dtype=F64)
    for w, expected in (
        ([0.0, 0.6, 0.0], 0.36 * 0.8 / 3),
        ([0.5, 0.0, 0.3], 2 * 0.5 * 0.3 * (2.3 - 1.15) + (0.25 * 0.3 + 0.09 * 0.4) / 3),
    ):
        assert distortion_of(t, torch.tensor([w], dtype=F64)).item() == pytest.approx(expected, rel=1e-14)


def test_samples_in_any_order_with_gradients_of_densities() -> None:
    g = torch.Generator().manual_seed(1)
    t, density = torch.rand(3, 12, dtype=F64, generator=g) + 1, torch.randn(3, 12, dtype=F64, generator=g).mul(3)
    color = torch.rand(3, 12, 2, dtype=F64, generator=g)
    assert composite(t, density, color)[3] is None
    assert torch.autograd.gradcheck(lambda density: composite(t, density, color, True)[3], (density.requires_grad_(),))


def test_units_and_areas() -> None:
    """Of a box twice as large, seen from twice as far, it is the same, where opacities are."""
    found = []
    for scale in (1.0, 2.0):
        args = setup(size=(2, 3), resolution=9, features=8, colors=3, device="cpu", box=scale, rays_per_pixel=2)
        args["cameras"].cam2world[:, :3, 3] *= scale
        options: RenderOptions = args["options"]
        with torch.no_grad():
            args["mlp"].w2[0] = 0
            args["mlp"].b2[0] = 30.0 / scale + 1  # softplus(x - 1) = x - 1 up here
            out = render(**args, backend="torch", distortion=True)
        assert options.box == scale and out.distortion is not None and out.distortion.shape == (5, 2, 3)
        found.append(out.distortion)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert (found[0] > 1e-3).any() and render(**args, backend="torch").distortion is None
