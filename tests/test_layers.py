# SPDX-License-Identifier: Apache-2.0
"""Layers that are computed in other ways give what diffusers' and torch's give."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from runs import KL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from igae.models import layers
from igae.models.layers import GroupNorm, keep_dtypes, skip_products


def test_group_norm_keeps_bfloat16_under_autocast() -> None:
    ours = nn.GroupNorm(2, 8)
    keep_dtypes(ours)
    assert type(ours) is GroupNorm
    x = torch.randn(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    expected = F.group_norm(x.float(), 2, ours.weight, ours.bias).detach()
    assert float((y.detach().float() - expected).abs().max()) < 2e-2  # measured 8e-3: half a bfloat16 unit at 2 to 4


def test_a_network_without_products_that_come_twice_is_the_same_network() -> None:
    torch.manual_seed(1)
    plain = AutoencoderKL(**KL)
    fast = copy.deepcopy(plain)
    skip_products(fast)
    assert {n: p.shape for n, p in fast.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found, flop = [], []
    for net in (plain, fast):
        with FlopCounterMode(display=False) as counter:
            decoded = net.decode(net.encode(images).latent_dist.mean).sample
        loss = (decoded - images).square().mean()
        names = [n for n, _ in net.named_parameters() if not n.endswith("to_k.bias")]  # their gradient is 0
        parameters = dict(net.named_parameters())
        found.append([decoded.detach(), *torch.autograd.grad(loss, [parameters[n] for n in names])])
        flop.append(counter.get_total_flops())
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    print("W", worst)
    assert worst < 1e-4  # measured 6e-6
    assert flop[1] < flop[0]


def test_attention_of_many_pixels_has_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention, used = Attention(32, heads=1, dim_head=32), list[Any]()
    monkeypatch.setattr(layers, "sdpa_kernel", lambda backend: used.append(backend) or nullcontext())
    few, many = torch.randn(1, 32, 32, 32), torch.randn(1, 32, 32, 33)
    expected = [attention(x) for x in (few, many)]
    attention.set_processor(layers.Matrices())
    for x, y, count in ((few, expected[0], 1), (many, expected[1], 1)):
        assert torch.equal(attention(x), y) and len(used) == count


@pytest.mark.parametrize("fast", [False, True])
def test_matrices_have_gradients_of_bfloat16_under_autocast(fast: bool) -> None:
    """So they lose nothing where an exchange sends them as such; but those that are sums of some."""
    torch.manual_seed(0)
    net: Any = AutoencoderKL.from_config(KL)
    keep_dtypes(net)
    if fast:
        skip_products(net)
    with torch.autocast("cpu", torch.bfloat16):
        image = net.decode(net.encode(torch.randn(2, 3, 16, 16)).latent_dist.mean).sample
    image.float().square().mean().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.ndim > 1}
    assert len(found) > 10
    others = [name for name, grad in found.items() if not torch.equal(grad, grad.bfloat16().float())]
    assert [name for name in others if not fast or "upsamplers" not in name] == []
