# SPDX-License-Identifier: Apache-2.0
"""Gradients of several ranks, in buckets that are sent while the backward pass goes on, against their mean."""

from typing import Any, NamedTuple

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

from igae.distributed import rank
from igae.engine import Engine
from igae.exchange import Exchange

WORLD = 3
SIZES = {"first": (3, 4), "kernel": (6, 5, 3, 3), "unused": (7,), "twice": (4, 4), "scalar": (), "last": (2,)}


class Sent(NamedTuple):
    gradients: dict[str, Tensor]
    early: int
    """Collectives that were called before `finish`."""
    calls: int
    buckets: int
    flags: list[float]


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name, size in SIZES.items()}
    made["kernel"].data = made["kernel"].data.contiguous(memory_format=torch.channels_last)
    return made


def backward(own: dict[str, nn.Parameter], of_rank: int, micro: int) -> None:
    """Uses one parameter twice, one not at all, and one in the second backward pass alone."""
    used = ["first", "kernel", "scalar", *(["last"] if micro else [])]
    total = torch.stack([(i + 2 + of_rank) * own[name].sin().sum() for i, name in enumerate(used)]).sum()
    total = total + (own["twice"] @ own["twice"]).square().sum() * (1 + of_rank + micro)
    total.backward()  # type: ignore[no-untyped-call]


def exchanged(bucket: int) -> list[Sent]:
    """What two steps of two backward passes give."""
    engine, own, calls = Engine(), parameters(), 0
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*arguments, **options)

    dist.all_reduce = counted
    exchange, found = Exchange(list(own.values()), bucket), []
    for step in range(2):
        for parameter in own.values():
            parameter.grad = None
        backward(own, rank(), 0)
        assert calls == 0
        exchange.active = True
        backward(own, rank(), 1)
        early = calls
        flags = exchange.finish([torch.tensor(float(x)) for x in (1, rank() > 0, step)]).tolist()
        gradients = {name: p.grad.clone() for name, p in own.items() if p.grad is not None}
        found.append(Sent(gradients, early, calls, len(exchange._buckets), flags))
        calls = 0
    exchange.close()
    exchange.active = True
    backward(own, rank(), 1)
    assert calls == 0  # nothing is sent any more
    engine.close()
    return found


@pytest.mark.parametrize("bucket", [1, 64, 10**6])
def test_the_mean_over_three_ranks(bucket: int) -> None:
    expected: dict[str, Tensor] = {}
    for of_rank in range(WORLD):
        own = parameters(torch.float64)
        for micro in (0, 1):
            backward(own, of_rank, micro)
        for name, parameter in own.items():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + parameter.grad / WORLD
    results = ranks.run(exchanged, WORLD, bucket)
    for found in results:
        for step, sent in enumerate(found):
            assert sent.gradients.keys() == expected.keys() == SIZES.keys() - {"unused"}
            for name, gradient in sent.gradients.items():
                assert gradient.stride() == parameters()[name].stride()
                assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-6  # measured 7e-8
                assert torch.equal(gradient, results[0][step].gradients[name])
            assert sent.flags == pytest.approx([1, 2 / 3, step])
            assert sent.calls == sent.buckets == {1: 6, 64: 3, 10**6: 1}[bucket]
            # One that is not reached holds back those before it, and the last one waits for the flags.
            assert sent.early == {1: 3, 64: 1, 10**6: 0}[bucket]
