# SPDX-License-Identifier: Apache-2.0
"""How the CUDA backend is tied to torch, without a GPU: stand-ins for the two kernels do what the reference does."""

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cuda_renderer import call_of
from torch import Tensor

from igae import kernels
from igae.rendering import Cameras, DecodingMLP, RenderOptions, build, cuda, render
from igae.rendering.ray_marching import render_torch


def tensor_at(address: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Library(kernels.Library):
    """Stands in for compiled kernels, on tensors of the CPU.

    Attributes:
        launched: names of the kernels that ran.
    """

    launched: list[str] = []

    def __init__(
        self, source: Path, defines: dict[str, int], device: torch.device, names: Sequence[str], shared: int = 0
    ) -> None:
        self._variant = build.Variant(*(defines[name] for name in build.MACROS))

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    @staticmethod
    def architecture(device: torch.device) -> int:
        return 90

    def resident_blocks(self, name: str, threads: int) -> int:
        return 3

    def launch(self, name: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        self.launched.append(name)
        # Autograd is switched off, thread by thread, where an operator's kernel is called.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._run, name, params).result()

    def _run(self, name: str, p: Any) -> None:
        """The kernels' definition by way of `render_torch`."""
        made, size = self._variant, (p.height, p.width)
        views, hidden, out = p.rays // math.prod(size) // made.side**2, build.HIDDEN, 1 + made.colors
        scene = tensor_at(p.scene, views, dtype=torch.int64)
        planes = tensor_at(p.planes, int(scene.max()) + 1, 3, p.resolution, p.resolution, made.features)
        weights = {
            "w1": tensor_at(p.w1, hidden, made.features), "b1": tensor_at(p.b1, hidden),
            "w2": tensor_at(p.w2, out, hidden), "b2": tensor_at(p.b2, out),
        }  # fmt: skip
        leaves = {name: x.clone().requires_grad_() for name, x in {"planes": planes, **weights}.items()}
        mlp = DecodingMLP(made.features, made.colors)

        def decode(features: Tensor) -> Any:
            return torch.func.functional_call(mlp, {name: leaves[name] for name in weights}, (features,))

        cameras = Cameras(tensor_at(p.cam2world, views, 4, 4), tensor_at(p.intrinsics, views, 3, 3), size)
        options = RenderOptions(
            near=p.near if p.far > 0 else "auto", far=p.far if p.far > 0 else "auto", box=p.box,
            coarse_samples=made.coarse, fine_samples=made.fine, rays_per_pixel=made.side,
            axes="eg3d" if made.eg3d else "orthogonal",
            spacing="disparity" if made.disparity else "depth", reduce="product" if made.product else "sum",
        )  # fmt: skip
        assert p.background_stride in (0, made.colors)
        background = tensor_at(p.background, *(size if p.background_stride else ()), made.colors)
        seed = (None, p.seed_value, p.jitter == 2 and tensor_at(p.seed, dtype=torch.int64))[p.jitter]
        images = render_torch(leaves["planes"], decode, cameras, options, background, scene, seed, made.distortion)  # type: ignore[arg-type]
        kept = tensor_at(p.kept, p.rays, build.kept_size(made)) if p.kept else None
        if name == "render_forward":
            for address, image in zip((p.features, p.depth, p.opacity, p.distortion), images, strict=True):
                if image is None:
                    continue
                tensor_at(address, *image.shape).copy_(image.detach())
            if kept is not None:
                kept.fill_(1)
            return
        assert kept is not None and (kept == 1).all()  # the forward pass kept it
        given = zip((p.g_features, p.g_depth, p.g_opacity, p.g_distortion), images, strict=True)
        pairs = [(image, tensor_at(address, *image.shape)) for address, image in given if address]
        outputs, cotangents = zip(*pairs, strict=True)
        g_planes, *rest = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        tensor_at(p.g_planes, *planes.shape).add_(g_planes)
        tensor_at(p.partial, p.partials, build.partial_size(made))[-1].add_(torch.cat([x.flatten() for x in rest]))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "launched", [])
    monkeypatch.setitem(kernels.LIBRARIES, "cpu", Library)


def setup(**options: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, :3, 3] = torch.tensor([[0.0, 0.1, -1.5], [0.2, 0.0, -1.2], [-0.1, 0.2, -1.4]])
    intrinsics = torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]).repeat(3, 1, 1)
    return {
        "planes": torch.randn(2, 3, 6, 6, 8, generator=g).requires_grad_(),
        "mlp": DecodingMLP(8, 3, generator=g),
        "cameras": Cameras(pose, intrinsics, (4, 5)),
        "options": RenderOptions(coarse_samples=6, fine_samples=5, **options),
        "background": torch.rand(3, generator=g).requires_grad_(),
        "scene": torch.tensor([0, 1, 0]),
    }


def everything(out: Any, args: dict[str, Any]) -> list[Tensor]:
    """Images and all gradients."""
    images = [image for image in out if image is not None]
    loss = sum(image.square().sum() for image in images)
    leaves = [args["planes"], args["background"], *args["mlp"].parameters()]
    return [*images, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axes": "eg3d", "reduce": "product"},
        {"near": 0.7, "far": 2.0, "spacing": "disparity", "box": 1.5},
        {"rays_per_pixel": 3},
    ],
    ids=["default", "published", "numbers", "areas"],
)
@pytest.mark.parametrize("jitter", ["none", "number", "negative", "tensor"])
@pytest.mark.parametrize("distortion", [False, True])
def test_arguments_and_gradients_arrive(options: dict[str, Any], jitter: str, distortion: bool) -> None:
    args = setup(**options) | {"distortion": distortion}
    how: dict[str, Any] = {
        "none": {}, "number": {"seed": 2**40 + 5}, "negative": {"seed": -3}, "tensor": {"seed": torch.tensor(9)},
    }[jitter]  # fmt: skip
    expected = everything(render(**args, **how, backend="torch"), args)
    for a, b in zip(everything(render(**args, **how, backend="cuda"), args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_background_images_get_their_gradient() -> None:
    args = setup()
    args["background"] = torch.rand(4, 5, 3).requires_grad_()
    expected = everything(render(**args, backend="torch"), args)
    for a, b in zip(everything(render(**args, backend="cuda"), args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiles_to_one_graph_with_its_gradients() -> None:
    args = setup() | {"distortion": True}
    seed = torch.tensor(7)
    compiled = torch.compile(
        lambda seed: render(**args, seed=seed, backend="cuda"), fullgraph=True, backend="aot_eager"
    )
    expected = everything(render(**args, seed=seed, backend="torch"), args)
    for a, b in zip(everything(compiled(seed), args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_operator_passes_torch_checks() -> None:
    args = setup()
    inputs = call_of(args, 1, ("planes", "w1", "b1", "w2", "b2", "background"))
    found = torch.ops.igae.render(*inputs)[:3]
    assert all(torch.equal(a, b) for a, b in zip(found, render(**args, seed=1, backend="cuda")[:3], strict=True))
    names = [argument.name for argument in torch.ops.igae.render.default._schema.arguments]
    assert tuple(names) == cuda.Call._fields
    torch.library.opcheck(torch.ops.igae.render.default, tuple(inputs))


def test_only_one_result_is_used() -> None:
    args = setup()
    for which in ("features", "depth", "opacity", "distortion"):
        found = [
            torch.autograd.grad(getattr(render(**args, backend=backend, distortion=True), which).sum(), args["planes"])[
                0
            ]
            for backend in ("cuda", "torch")
        ]
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_frozen_inputs_cost_no_backward() -> None:
    args = setup()
    args["planes"].requires_grad_(False)
    args["mlp"].requires_grad_(False)
    out = render(**args, backend="cuda")
    (grad,) = torch.autograd.grad(out.features.sum(), args["background"])
    assert grad.all()
    assert Library.launched == ["render_forward"]
