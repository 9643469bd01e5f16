# SPDX-License-Identifier: Apache-2.0
"""How the CUDA backend is tied to torch, without a GPU: stand-ins for the two kernels do what the reference does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from igae.rendering import DecodingMLP, RenderOptions, build, cuda, render
from igae.rendering.reference import render_torch

INPUTS = 21  # of the operator; the first five are planes and weights, number 7 is the background


def reference(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operator's definition by way of `render_torch`."""
    planes, w1, b1, w2, b2, cam2world, intrinsics, background, scene, seed, coarse, fine, value, jitter = inputs[:14]
    height, width, near, far, box, _, variant = inputs[14:]
    mlp = DecodingMLP(w1.shape[1], w2.shape[0] - 1)
    weights = dict(zip(("w1", "b1", "w2", "b2"), (w1, b1, w2, b2), strict=True))

    def decode(features: Tensor) -> Any:
        return torch.func.functional_call(mlp, weights, (features,))

    made = build.Variant(*variant[:4], *map(bool, variant[4:]))
    options = RenderOptions(
        near=near if far > 0 else "auto", far=far if far > 0 else "auto", box=box, coarse_samples=made.coarse,
        fine_samples=made.fine, axes="eg3d" if made.eg3d else "orthogonal",
        spacing="disparity" if made.disparity else "depth", reduce="product" if made.product else "sum",
    )  # fmt: skip
    given = {cuda._HALF: None, cuda._VALUE: value, cuda._TENSOR: seed, cuda._NOISE: None}[jitter]
    noise = (coarse, fine) if jitter == cuda._NOISE else None
    return tuple(
        render_torch(planes, decode, cam2world, intrinsics, (height, width), options, background, scene, given, noise)  # type: ignore[arg-type]
    )


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, depth, opacity = (x.contiguous() for x in reference(inputs))
    keep, variant = inputs[19:]
    return (
        features,
        depth,
        opacity,
        torch.zeros(opacity.numel() if keep else 0, build.kept_size(cuda._variant(variant))),
    )


def gradients(
    g_features: Tensor | None, g_depth: Tensor | None, g_opacity: Tensor | None, kept: Tensor, *inputs: Any
) -> Any:
    assert len(kept) == inputs[5].shape[0] * inputs[14] * inputs[15]  # they were kept
    inputs = (*inputs[:-1], True, inputs[-1])

    def run() -> Any:
        leaves = [x.detach().requires_grad_() for x in inputs[:5]]
        out = reference((*leaves, *inputs[5:]))
        pairs = [(o, g) for o, g in zip(out, (g_features, g_depth, g_opacity), strict=True) if g is not None]
        return torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])

    # Autograd is switched off, thread by thread, where an operator's kernel is called.
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run).result()
    return found[0].float(), torch.cat([x.flatten() for x in found[1:]])


cuda._operator.register_kernel("cpu", forward)
cuda._operator_backward.register_kernel("cpu", gradients)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "unsupported", lambda *args: None)
    monkeypatch.setattr("igae.rendering.api.unsupported", lambda *args: None)
    monkeypatch.setattr(cuda, "_forward", forward)
    monkeypatch.setattr(cuda, "_gradients", gradients)
    yield


def setup(**options: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, :3, 3] = torch.tensor([[0.0, 0.1, -1.5], [0.2, 0.0, -1.2], [-0.1, 0.2, -1.4]])
    return {
        "planes": torch.randn(2, 3, 6, 6, 8, generator=g).requires_grad_(),
        "mlp": DecodingMLP(8, 3, generator=g),
        "cam2world": pose,
        "intrinsics": torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]).repeat(3, 1, 1),
        "size": (4, 5),
        "options": RenderOptions(coarse_samples=6, fine_samples=5, **options),
        "background": torch.rand(3, generator=g).requires_grad_(),
        "scene": torch.tensor([0, 1, 0]),
    }


def everything(out: Any, args: dict[str, Any]) -> list[Tensor]:
    """Images and all gradients."""
    loss = out.features.square().sum() + out.depth.sum() + out.opacity.square().sum()
    leaves = [args["planes"], args["background"], *args["mlp"].parameters()]
    return [*out, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    "options",
    [{}, {"axes": "eg3d", "reduce": "product"}, {"near": 0.7, "far": 2.0, "spacing": "disparity", "box": 1.5}],
    ids=["default", "published", "numbers"],
)
@pytest.mark.parametrize("jitter", ["none", "number", "negative", "tensor", "noise"])
def test_arguments_and_gradients_arrive(options: dict[str, Any], jitter: str) -> None:
    args = setup(**options)
    how: dict[str, Any] = {
        "none": {}, "number": {"seed": 2**40 + 5}, "negative": {"seed": -3}, "tensor": {"seed": torch.tensor(9)},
        "noise": {"noise": (torch.rand(60, 6), torch.rand(60, 5))},
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
    args = setup()
    seed = torch.tensor(7)
    compiled = torch.compile(
        lambda seed: render(**args, seed=seed, backend="cuda"), fullgraph=True, backend="aot_eager"
    )
    expected = everything(render(**args, seed=seed, backend="torch"), args)
    for a, b in zip(everything(compiled(seed), args), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_operator_passes_torch_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(cuda._Render, "apply", lambda *inputs: caught.append(inputs) or forward(*inputs))
    render(**setup(), seed=1, backend="cuda")
    assert len(caught[0]) == INPUTS
    inputs = tuple(x.detach().requires_grad_() if i < 5 or i == 7 else x for i, x in enumerate(caught[0]))
    torch.library.opcheck(torch.ops.igae.render.default, inputs)


def test_only_one_result_is_used() -> None:
    args = setup()
    for which in ("features", "depth", "opacity"):
        found = [
            torch.autograd.grad(getattr(render(**args, backend=backend), which).sum(), args["planes"])[0]  # type: ignore[arg-type]
            for backend in ("cuda", "torch")
        ]
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_frozen_inputs_cost_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_gradients", lambda *args: pytest.fail("ran"))
    args = setup()
    args["planes"].requires_grad_(False)
    args["mlp"].requires_grad_(False)
    out = render(**args, backend="cuda")
    (grad,) = torch.autograd.grad(out.features.sum(), args["background"])
    assert grad.all()
