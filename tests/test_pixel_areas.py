# SPDX-License-Identifier: Apache-2.0
"""A pixel as the mean of S x S rays. Also test_rendering.py (slow_renderer) and test_cuda_emulated.py (kernels)."""

from typing import Any

import pytest
import torch
from test_cuda_renderer import double, setup
from torch import Tensor

from igae.rendering import RenderOptions, cuda, render
from igae.rendering.rays import pixel_rays


def mean_of_parts(image: Tensor, side: int) -> Tensor:
    """[B, h * side, w * side, ...] -> [B, h, w, ...]."""
    return image.unflatten(2, (-1, side)).unflatten(1, (-1, side)).mean((2, 4))


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("options", [{}, {"near": 0.4, "far": 2.5, "spacing": "disparity"}, {"box": 0.4}])
def test_an_area_is_the_mean_of_a_finer_image(side: int, options: dict[str, Any]) -> None:
    size = {"coarse_samples": 7, "fine_samples": 6, "resolution": 9, "features": 8, "colors": 3, "device": "cpu"}
    args = double(setup(**size, size=(3, 4), pixel_background=True, rays_per_pixel=side, **options))
    fine = double(setup(**size, size=(3 * side, 4 * side), pixel_background=True, **options)) | {
        "mlp": args["mlp"],
        "planes": args["planes"],
    }
    leaves = [args["planes"].requires_grad_(), args["background"].requires_grad_(), *args["mlp"].parameters()]
    fine["background"] = args["background"].repeat_interleave(side, 0).repeat_interleave(side, 1)
    images = [mean_of_parts(image, side) for image in render(**fine, distortion=True)], render(**args, distortion=True)
    found = []
    for some in images:
        loss = sum((image * torch.linspace(-1, 1, image.numel()).view(image.shape)).sum() for image in some)
        found.append([*some, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(a.detach().abs().max()))  # measured: 1.4e-14


def test_rays_go_through_the_middles_of_the_parts() -> None:
    cameras = setup(device="cpu")["cameras"]._replace(size=(3, 5))
    origins, directions = pixel_rays(cameras, torch.float64, 4)
    assert origins.shape == directions.shape == (5 * 3 * 5 * 16, 3)
    view, i, j, a, b = 2, 1, 3, 3, 1
    ray = (((view * 3 + i) * 5 + j) * 4 + a) * 4 + b
    pose, intrinsics = cameras.cam2world[view].double(), cameras.intrinsics[view].double()
    place = intrinsics @ (pose[:3, :3].T @ directions[ray])
    expected = torch.tensor([(j + (b + 0.5) / 4) / 5, (i + (a + 0.5) / 4) / 3], dtype=torch.float64)
    torch.testing.assert_close(place[:2] / place[2], expected, rtol=0, atol=1e-6)  # the pose is of float32


def test_too_many_rays_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda what, tensor: None)
    args = setup(device="cpu", rays_per_pixel=8)
    options: RenderOptions = args["options"]
    assert cuda.unsupported(args["planes"], args["mlp"], options, 2**24 - 1) is None
    assert cuda.unsupported(args["planes"], args["mlp"], options, 2**24) == (
        "there are 1073741824 rays; the kernels take fewer than 2^30 at a time"
    )


@pytest.mark.parametrize("side", [0, 9, -1])
def test_options_refuse(side: int) -> None:
    with pytest.raises(ValueError, match=f"rays_per_pixel is {side}; it must be from 1 to 8"):
        RenderOptions(rays_per_pixel=side)
