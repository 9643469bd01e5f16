# SPDX-License-Identifier: Apache-2.0
"""Gradients of several ranks, in buckets that are sent while the backward pass goes on, against their mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ranks
import runs
import torch
from torch import Tensor, nn

from igae import config
from igae.ranks import rank
from igae.training import DDP, BucketedAllReduce, Engine, Recipe, Trainer

WORLD = 3
SIZES = {"first": (3, 4), "kernel": (6, 5, 3, 3), "unused": (7,), "twice": (4, 4), "scalar": (), "last": (2,)}


class Sent(NamedTuple):
    gradients: dict[str, Tensor]
    early: int
    """Collectives that were called before `finish`."""
    calls: int
    at_once: int
    """Of them those that nothing was to be computed beside."""
    flags: list[float]
    arrived: tuple[str, ...]
    """Parameters, in the order in which they had their gradients."""


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name, size in SIZES.items()}
    made["kernel"].data = made["kernel"].data.contiguous(memory_format=torch.channels_last)
    return made


def backward(own: dict[str, nn.Parameter], of_rank: int, micro: int, mixed: bool = False) -> None:
    """Uses one parameter twice, one not at all, and one in the second backward pass alone; `mixed`: gradients arrive in
    another order on odd ranks."""
    used = list(enumerate(["first", "kernel", "scalar", *(["last"] if micro else [])]))
    if mixed and of_rank % 2:
        used.reverse()
    total = torch.stack([(i + 2 + of_rank) * own[name].sin().sum() for i, name in used]).sum()
    total = total + (own["twice"] * own["twice"].T).square().sum() * (1 + of_rank + micro)
    total.backward()  # type: ignore[no-untyped-call]


def exchanged(bucket: int, last: int, small: int, sent_as: torch.dtype, reverse: bool, mixed: bool) -> list[Sent]:
    """What two steps of two backward passes give."""
    engine, calls, at_once = Engine(), 0, 0
    own = {name: nn.Parameter(parameter.detach().to(engine.device)) for name, parameter in parameters().items()}
    mean = BucketedAllReduce.mean

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls, at_once
        calls += 1
        at_once += not more["overlap"]
        return mean(*arguments, **more)

    BucketedAllReduce.mean = counted  # type: ignore[method-assign]
    order = list(own.values())[::-1] if reverse else list(own.values())
    exchange, found, arrived = BucketedAllReduce(order, bucket, last, small, sent_as), [], list[str]()
    for name, parameter in own.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    for step in range(2):
        for parameter in own.values():
            parameter.grad = None
        backward(own, rank(), 0, mixed)
        assert calls == 0
        exchange.expect()
        arrived.clear()
        backward(own, rank(), 1, mixed)
        early = calls
        given = [torch.tensor(float(x), device=engine.device) for x in (1, rank() > 0, step)]
        flags = exchange.finish(given).tolist()
        gradients = {name: p.grad.clone().cpu() for name, p in own.items() if p.grad is not None}
        found.append(Sent(gradients, early, calls, at_once, flags, tuple(arrived)))
        calls = at_once = 0
    exchange.close()
    exchange.expect()
    backward(own, rank(), 1)
    assert calls == 0  # nothing is sent any more
    engine.close()
    return found


@pytest.mark.parametrize(
    # The tensors that arrive in a backward pass have 8, 4, 64, 28 (not reached: those behind it wait), 2160 and 48
    # bytes. One call is for the small ones and the flags, and none for a bucket that is not reached.
    ("bucket", "last", "small", "calls", "early"),
    [
        (1, 48, 0, 6, 3),
        (1, 48, 5, 5, 2),
        (64, 48, 0, 4, 1),
        (10**6, 48, 64, 3, 2),
        (10**6, 0, 100, 2, 1),
        (10**6, 10**6, 29, 2, 1),
        (10**6, 10**6, 10**6, 1, 0),
    ],
)
@pytest.mark.parametrize("sent_as", [torch.float32, torch.bfloat16])
def test_the_mean_over_three_ranks(
    bucket: int, last: int, small: int, calls: int, early: int, sent_as: torch.dtype
) -> None:
    for step in means(WORLD, bucket, last, small, sent_as):
        assert (step.calls, step.at_once, step.early) == (calls, 1, early)


def test_buckets_that_are_full_out_of_turn_follow_in_turn() -> None:
    """The first bucket has what arrives last; the third one is not reached."""
    for step in means(WORLD, 1, 48, 0, torch.float32, reverse=True):
        assert (step.calls, step.at_once, step.early) == (5, 1, 2)


def test_ranks_whose_gradients_arrive_in_different_orders() -> None:
    steps = means(WORLD, 1, 48, 0, torch.float32, mixed=True)
    assert {(step.calls, step.at_once) for step in steps} == {(6, 1)}
    assert len({step.arrived for step in steps}) == 2


def means(
    world: int, bucket: int, last: int, small: int, sent_as: torch.dtype, reverse: bool = False, mixed: bool = False
) -> list[Sent]:
    """What each of some ranks has in two steps, after a look at it."""
    expected: dict[str, Tensor] = {}
    for of_rank in range(world):
        own = parameters(torch.float64)
        for micro in (0, 1):
            backward(own, of_rank, micro)
        for name, parameter in own.items():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + parameter.grad / world
    results = ranks.run(exchanged, world, bucket, last, small, sent_as, reverse, mixed)
    for found in results:
        for step, sent in enumerate(found):
            assert sent.gradients.keys() == expected.keys() == SIZES.keys() - {"unused"}
            for name, gradient in sent.gradients.items():
                assert gradient.stride() == parameters()[name].stride()
                assert gradient.dtype == torch.float32
                rounded = sent_as == torch.bfloat16 and 4 * gradient.numel() >= small
                limit = 4e-3 if rounded else 1e-6  # measured 2.5e-3 and 7e-8
                assert float((gradient - expected[name]).norm() / expected[name].norm()) < limit
                assert torch.equal(gradient, results[0][step].gradients[name])
            assert sent.flags == pytest.approx([1, 1 - 1 / world, step])
    return [step for found in results for step in found]


def halved(small: int) -> list[float]:
    """Gradients of parameters whose gradients share memory, where an exchange halves all that it gets."""
    engine = Engine()
    own = {name: nn.Parameter(torch.ones(4, 5)) for name in ("further back", "one", "other")}
    exchange = BucketedAllReduce(list(own.values()), 1, 0, small)

    def mean(vector: Tensor, overlap: bool) -> Callable[[], None]:
        vector.mul_(0.5)
        return lambda: None

    exchange.mean = mean  # type: ignore[method-assign]
    exchange.expect()
    deep, one, other = own.values()
    ((2 * deep).view(-1) + one.view(-1) + other.view(-1)).sum().backward()  # type: ignore[no-untyped-call]
    exchange.finish([torch.tensor(1.0)])
    engine.close()
    return [float(p.grad.mean()) for p in own.values() if p.grad is not None]


@pytest.mark.parametrize("small", [0, 10**6])
def test_gradients_that_share_memory_are_each_sent_once(small: int) -> None:
    assert ranks.run(halved, 2, small) == [[1.0, 0.5, 0.5]] * 2


def after_a_failure() -> list[float]:
    """Gradients of a step that comes after one whose backward pass has failed."""
    engine = Engine()
    one, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    exchange = BucketedAllReduce([one, other], 1, 0, 0)

    def fail(gradient: Tensor) -> Tensor:
        raise ArithmeticError

    exchange.expect()
    hidden = one * 1
    hidden.register_hook(fail)
    with pytest.raises(ArithmeticError):
        (100 * other + hidden).sum().backward()  # type: ignore[no-untyped-call]
    one.grad = other.grad = None
    exchange.expect()
    (one + 2 * other).sum().backward()  # type: ignore[no-untyped-call]
    exchange.finish([torch.tensor(1.0)])
    engine.close()
    return [float(p.grad.mean()) for p in (one, other) if p.grad is not None]


def test_a_failed_backward_pass_leaves_nothing_behind() -> None:
    assert ranks.run(after_a_failure, 2) == [[1.0, 2.0]] * 2


def precision_sent(recipe_file: str, precision: str) -> str:
    trainer = Trainer(config.load(Recipe, recipe_file, [f"train.precision={precision}", f"experiment={precision}"]))
    strategy = trainer.engine._strategy
    assert isinstance(strategy, DDP)
    exchange = strategy.all_reduce([nn.Parameter(torch.zeros(3))])
    trainer.engine.close()
    return str(exchange._sent_as)


def test_bf16_runs_send_bfloat16(tmp_path: Path) -> None:
    recipe_file = str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))
    assert ranks.run(precision_sent, 2, recipe_file, "bf16") == ["torch.bfloat16"] * 2
    assert ranks.run(precision_sent, 2, recipe_file, "fp32") == ["torch.float32"] * 2
