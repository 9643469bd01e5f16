# SPDX-License-Identifier: Apache-2.0
"""Scenes in host memory or on a disk, some of them on the device at a time: the same bits as all on the device."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igae.scenes import PlanesConfig, SceneStore, Storage, tiers

CPU = torch.device("cpu")
PLANES = PlanesConfig(resolution=4, features=4)
TIERS = ["host", "disk"]


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


def store(count: int, tier: str, slots: int, folder: str, seed: int | None = 0) -> SceneStore:
    ids = [3 * i + 1 for i in reversed(range(count))]  # rows are not in the order of the ids
    return SceneStore(PLANES, ids, seed, CPU, Storage(tier, slots, folder))  # type: ignore[arg-type]


def state_of(own: SceneStore) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in own.state_dict().items()}


def assert_same(a: SceneStore, b: SceneStore) -> None:
    left, right = state_of(a), state_of(b)
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def step(own: SceneStore, scenes: list[int], seed: int, apply: bool = True) -> Tensor:
    rows, index = own.locate(torch.tensor(scenes))
    copies = own.take(rows)
    gradient = torch.randn(copies.shape, generator=torch.Generator().manual_seed(seed))
    own.step(rows, gradient, 1e-2, scale=0.5, apply=torch.tensor(apply))
    return copies[index]


COUNT = 9
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=3), st.booleans()),
    st.tuples(st.just("prefetch"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT)),
    st.tuples(st.just("read"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True)),
    st.tuples(st.sampled_from(["catch_up", "save", "resume", "restart", "rows", "swap"])),
)


def run(plan: list[Any], own: SceneStore, other: Any) -> list[Tensor]:
    """What is seen of a store; ``other`` makes one that resumes from its state."""
    own.start_optimizer("torch")
    ids, found = own.ids.tolist(), list[Tensor]()
    for number, (what, *arguments) in enumerate(plan):
        scenes = [ids[place] for place in arguments[0]] if arguments else []
        if what == "step":
            found.append(step(own, scenes, number, arguments[1]))
        elif what == "prefetch":
            own.prefetch(torch.tensor(scenes))
        elif what == "read":
            found.append(own.read(scenes))
        elif what == "catch_up":
            own.catch_up()
        elif what == "rows":
            found.append(own.rows.clone())
        elif what == "save":
            found += state_of(own).values()
        elif what == "restart":
            own.start_optimizer("torch")
        else:
            state = state_of(own)
            own = other(own)
            own.start_optimizer("torch")
            for start in (0, 4):  # as a checkpoint is read, in parts
                rows = {k: v[start : start + 4 + start] for k, v in state.items() if k not in ("ids", "learning_rates")}
                own.load_state_dict(rows, start)
            own.load_state_dict({"learning_rates": state["learning_rates"]})
    return [*found, *state_of(own).values()]


@pytest.mark.parametrize("tier", TIERS)
@given(plan=st.lists(actions, max_size=14), slots=st.integers(3, COUNT))
@settings(max_examples=60, deadline=None)
def test_whatever_is_done_the_bits_are_those_of_rows_on_the_device(
    tier: str, folder: str, plan: list[Any], slots: int
) -> None:
    def again(own: SceneStore) -> SceneStore:
        return store(COUNT, tier, slots, folder, None)

    expected = run(plan, store(COUNT, "device", 0, folder), lambda own: store(COUNT, "device", 0, folder, None))
    found = run(plan, store(COUNT, tier, slots, folder), again)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tier", TIERS)
def test_many_rows_and_long_waits(tier: str, folder: str) -> None:
    """More rows than are caught up together, in a pool that is just as large as a step needs; some rest already."""
    own, plain = store(150, tier, 8, folder), store(150, "device", 0, folder)
    generator = torch.Generator().manual_seed(0)
    for each in (own, plain):
        each.start_optimizer("torch")
    for number in range(260):
        few = 150 if number < 40 else 20
        scenes = plain.ids[torch.randperm(few, generator=generator)[:8]].tolist()
        assert torch.equal(step(own, scenes, number), step(plain, scenes, number))
        own.prefetch(plain.ids[torch.randperm(few, generator=generator)[:8]])
        if number == 100:
            assert torch.equal(own.read(plain.ids[5:140].tolist()), plain.read(plain.ids[5:140].tolist()))
    assert_same(own, plain)
    for each in (own, plain):
        each.catch_up()
    assert_same(own, plain)
