# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against the float64 reference: images, every gradient, and how they live with the rest of torch."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from igae.rendering import DecodingMLP, Rendered, RenderOptions, cuda, render

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and cuda.INSTALLED), reason="needs a CUDA device and cuda-core"),
]

DEVICES = [f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))] or ["cuda:0"]


def setup(
    views: int = 5,
    scenes: int = 2,
    size: tuple[int, int] = (7, 9),
    resolution: int = 33,
    features: int = 32,
    colours: int = 16,
    density: float = 3.0,
    pixel_background: bool = False,
    device: str = "cuda:0",
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `render`, in float32, for cameras around the box; density scales the density's weights."""
    g = torch.Generator().manual_seed(0)
    position = F.normalize(torch.randn(views, 3, generator=g), dim=-1) * 1.3
    z = F.normalize(-position + 0.1 * torch.randn(views, 3, generator=g), dim=-1)
    x = F.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0]).expand_as(z)), dim=-1)
    pose = torch.eye(4).repeat(views, 1, 1)
    pose[:, :3] = torch.stack((x, torch.linalg.cross(z, x), z, position), -1)
    intrinsics = torch.tensor([[1.1, 0.02, 0.5], [0, 1.2, 0.45], [0, 0, 1]]).repeat(views, 1, 1)
    mlp = DecodingMLP(features, colours, generator=g)
    with torch.no_grad():
        mlp.w2[0] *= density
        mlp.b1.normal_(generator=g)
        mlp.b2.normal_(generator=g)
    background = torch.rand((*size, colours) if pixel_background else (colours,), generator=g)
    args = {
        "planes": torch.randn(scenes, 3, resolution, resolution, features, generator=g),
        "cam2world": pose,
        "intrinsics": intrinsics,
        "background": background,
        "scene": torch.arange(views) % scenes,
    }
    args = {name: tensor.to(device) for name, tensor in args.items()}
    return args | {"mlp": mlp.to(device), "size": size, "options": RenderOptions(**options)}


def gradients(args: dict[str, Any], **how: Any) -> tuple[dict[str, Tensor], Rendered]:
    """Images and the gradients of planes, MLP and background for fixed random cotangents, by name."""
    args = args | {name: args[name].detach().clone().requires_grad_() for name in ("planes", "background")}
    out = render(**args, **how)
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g).to(o)).sum() for o in out)
    leaves = {name: args[name] for name in ("planes", "background")} | dict(args["mlp"].named_parameters())
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {f"g_{name}": grad.double() for name, grad in zip(leaves, found, strict=True)}, out


def double(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64."""
    mlp = DecodingMLP(args["mlp"].in_channels, args["mlp"].out_channels)
    mlp.load_state_dict(args["mlp"].state_dict())
    cast = {name: args[name].double() for name in ("planes", "cam2world", "intrinsics", "background")}
    return args | cast | {"mlp": mlp.to(args["planes"].device, torch.float64)}


def errors(args: dict[str, Any], **how: Any) -> dict[str, float]:
    """Relative errors (norm of the difference over the norm) of images and gradients against float64."""
    backend = how.pop("backend", "cuda")
    grads, out = gradients(args, backend=backend, **how)
    true_grads, true_out = gradients(double(args), backend="torch", **how)
    got = grads | {name: image.detach().double() for name, image in out._asdict().items()}
    true = true_grads | {name: image.detach() for name, image in true_out._asdict().items()}
    return {name: float((got[name] - true[name]).norm() / true[name].norm().clamp(min=1e-30)) for name in true}


def check(found: dict[str, float], forward: float, backward: float) -> None:
    print({name: f"{error:.1e}" for name, error in found.items()})
    wrong = {n: e for n, e in found.items() if not e < (backward if n.startswith("g_") else forward)}
    assert not wrong


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "box of 64": {"resolution": 64, "size": (16, 16), "views": 4},
    "published": {"axes": "eg3d", "resolution": 40},
    "product": {"reduce": "product", "density": 10.0},
    "product published": {"reduce": "product", "axes": "eg3d", "features": 48, "colours": 4},
    "disparity": {"spacing": "disparity"},
    "numbers": {"near": 0.4, "far": 2.5},  # most samples outside the planes
    "numbers disparity": {"near": 0.4, "far": 2.5, "spacing": "disparity"},
    "coarse only": {"fine_samples": 0, "coarse_samples": 33},
    "few": {"coarse_samples": 16, "fine_samples": 16, "features": 8, "colours": 1, "size": (1, 1)},
    "uneven": {"coarse_samples": 19, "fine_samples": 37, "features": 24, "colours": 3, "resolution": 17},
    "three colours": {"features": 16, "colours": 3},
    "many": {"coarse_samples": 128, "fine_samples": 128, "features": 64, "colours": 32, "size": (3, 5)},
    "wide": {"features": 56, "colours": 31, "size": (13, 2)},
    "background image": {"pixel_background": True},
    "one scene": {"scenes": 1, "views": 3},
    "dense": {"density": 100.0},
    "thin": {"density": 0.01},
    "small box": {"box": 0.4},  # many rays miss it
    "tiny plane": {"resolution": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_images_and_gradients_equal_the_reference(name: str, precision: str) -> None:
    args = setup(**CASES[name], precision=precision)
    found = errors(args, seed=5)
    check(found, *((1e-5, 1e-4) if precision == "fp32" else (2e-3, 2e-3)))
