# SPDX-License-Identifier: Apache-2.0
"""Layers that are computed in other ways give what diffusers' and torch's give."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from functorch.compile import make_boxed_func
from runs import KL
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from igae.models.channels_last import GroupNorm, keep_dtypes, to_channels_last


def pair(channels: int, groups: int, dtype: torch.dtype) -> tuple[nn.GroupNorm, nn.GroupNorm]:
    plain = nn.GroupNorm(groups, channels).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    ours = copy.deepcopy(plain).to(dtype)
    keep_dtypes(ours)
    assert type(ours) is GroupNorm
    return plain, ours


def results(module: Any, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 12, 11)], ids=["image", "tokens"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_group_norm_is_that_of_torch(shape: tuple[int, ...], last: bool, mean: float) -> None:
    torch.manual_seed(0)
    plain, ours = pair(12, 4, torch.float32)
    x = (torch.randn(shape) + mean).float()
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    cotangent = torch.randn(shape, dtype=torch.float64)
    expected = results(plain, x.double(), cotangent)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = results(compiled, x, cotangent.float())
    assert found[0].stride() == x.stride() and found[1].stride() == x.stride()
    print("E", [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    for a, b in zip(found, expected, strict=True):
        # Measured: 2e-7; with a mean of 1000, which leaves 14 bits for the rest, 3e-5 (torch's own: 6e-5).
        assert float((a - b).norm() / b.norm()) < (1e-6 if mean == 0 else 1e-4)


def test_group_norm_keeps_bfloat16_under_autocast() -> None:
    _, ours = pair(8, 2, torch.float32)
    x = torch.randn(2, 8, 4, 4).bfloat16()
    for module in (ours, torch.compile(ours, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        expected = F.group_norm(x.float(), 2, ours.weight, ours.bias).detach()
        assert (
            float((y.detach().float() - expected).abs().max()) < 2e-2
        )  # measured 8e-3: half a bfloat16 unit at 2 to 4


def convolutions(seen: list[tuple[torch.Size, bool]]) -> Any:
    """A compiler that notes shape and layout of what convolutions take and give."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if "convolution" in str(node.target):
                for value in (*node.args[: 3 if "backward" in str(node.target) else 2], node):
                    made = value.meta["val"]
                    for x in made if isinstance(made, (list, tuple)) else [made]:
                        if x is not None and x.ndim == 4:
                            seen.append((x.shape, x.is_contiguous(memory_format=torch.channels_last)))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def test_a_network_with_channels_last_is_the_same_network() -> None:
    torch.manual_seed(1)
    plain = AutoencoderKL(**KL)
    fast = copy.deepcopy(plain)
    keep_dtypes(fast)
    to_channels_last(fast)
    assert {n: p.shape for n, p in fast.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = []
    for net in (plain, fast):
        if net is fast:
            net.encoder.compile(backend=convolutions(seen := []), fullgraph=True)
            net.decoder.compile(backend=convolutions(seen), fullgraph=True)
        decoded = net.decode(net.encode(images).latent_dist.mean).sample
        loss = (decoded - images).square().mean()
        names = [n for n, _ in net.named_parameters() if not n.endswith("to_k.bias")]  # their gradient is 0
        parameters = dict(net.named_parameters())
        found.append([decoded.detach(), *torch.autograd.grad(loss, [parameters[n] for n in names])])
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    print("W", worst)
    assert worst < 1e-4  # measured 6e-6
    # No convolution, forward or backward, gets its pixels or weights in another layout; but the images come in one.
    assert len(seen) > 50 and [shape for shape, last in seen if not last] == [images.shape] * 2


@pytest.mark.parametrize("last", [False, True])
def test_matrices_have_gradients_of_bfloat16_under_autocast(last: bool) -> None:
    """So they lose nothing where an exchange sends them as such."""
    torch.manual_seed(0)
    net: Any = AutoencoderKL.from_config(KL)
    keep_dtypes(net)
    if last:
        to_channels_last(net)
    with torch.autocast("cpu", torch.bfloat16):
        image = net.decode(net.encode(torch.randn(2, 3, 16, 16)).latent_dist.mean).sample
    image.float().square().mean().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.ndim > 1}
    assert len(found) > 10
    assert [name for name, grad in found.items() if not torch.equal(grad, grad.bfloat16().float())] == []
