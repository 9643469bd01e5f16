# SPDX-License-Identifier: Apache-2.0
"""Copies and steps on streams of a GPU that run in any order which events allow, without a GPU: the same bits."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from igae.scenes import Storage, tiers

CPU = torch.device("cpu")
COUNT, SLOTS, MOST, SHAPE = 12, 5, 3, (4,)


class Device:
    """Streams with what was launched and has not been done yet. `current` are those that a program launches on."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.streams = rng, list[Stream]()
        self.steps = Stream(self)
        self.current = [self.steps]

    def progress(self) -> None:
        """Do what is first in one of the streams that don't wait."""
        able = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
        assert able, "all streams wait for each other"
        self.rng.choice(able).queue.popleft()[1]()

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()


class Event:
    done = False

    def set(self) -> None:
        self.done = True


class Stream:
    def __init__(self, device: Device) -> None:
        self.device, self.queue = device, deque[tuple[Callable[[], bool], Callable[[], Any]]]()
        device.streams.append(self)

    def launch(self, action: Callable[[], Any]) -> None:
        self.queue.append((lambda: True, action))

    def record_event(self) -> Event:
        event = Event()
        self.launch(event.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append((lambda: event.done, lambda: None))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        while self.queue:
            self.device.progress()


class Rows(tiers.HostRows):
    """Copies are launched on the current stream."""

    launch: Callable[[Callable[[], Any]], None]

    def fetch(self, rows: Sequence[int], places: Any) -> None:
        for row, place in zip(rows, places, strict=True):
            self.launch(lambda row=row, place=place: place.copy_(self.tensor[row]))

    def put(self, rows: Sequence[int], places: Any) -> None:
        for row, place in zip(rows, places, strict=True):
            self.launch(lambda row=row, place=place: self.tensor[row].copy_(place))


class Optimizer:
    """Rows that remember their steps."""

    def __init__(self, count: int, rows: Tensor) -> None:
        self.rows = rows
        self.exp_avg, self.exp_avg_sq = torch.zeros(count, *SHAPE), torch.zeros(count, *SHAPE)
        self.updated, self.visited = (torch.zeros(count, dtype=torch.int64) for _ in range(2))

    def step(self, places: list[int], number: int) -> list[Tensor]:
        before = [self.rows[place].clone() for place in places]
        for place in places:
            self.exp_avg[place] = 0.5 * self.exp_avg[place] + number + self.rows[place]
            self.exp_avg_sq[place] += self.exp_avg[place] * (number - self.updated[place])
            self.rows[place] += 0.25 * self.exp_avg[place] + self.visited[place]
            self.updated[place], self.visited[place] = number, self.visited[place] + 1
        return before

    def state(self) -> dict[str, Tensor]:
        return {"learning_rates": torch.zeros(0)}


class Pool(tiers.RowPool):
    """As on a GPU."""

    def __init__(self, device: Device) -> None:
        super().__init__(SHAPE, COUNT, Storage("host", SLOTS), CPU)
        self._device_queue, self._on_gpu = device, True
        self._out, self._in = Stream(device), Stream(device)  # type: ignore[assignment]

    def _copy_counters(self, pairs: list[tuple[int, int]], out: bool) -> None:
        copy = super()._copy_counters
        self._device_queue.current[-1].launch(lambda: copy(pairs, out))

    def _submit(self, saved: Any, placed: Any, after: Any) -> "Future[Any]":
        job: Future[Any] = Future()
        job.set_result(self._move(saved, placed, after))
        self._jobs.append(job)
        return job


@given(
    plan=st.lists(st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=MOST), min_size=5, max_size=25),
    ahead=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_any_order_that_events_allow(plan: list[set[int]], ahead: int, seed: int) -> None:
    rng = random.Random(seed)
    device = Device(rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda *_: device.current[-1])
        patch.setattr(torch.cuda, "stream", device.on)
        patch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        patch.setattr(tiers, "HostRows", Rows)
        patch.setattr(Rows, "launch", lambda _, action: device.current[-1].launch(action), raising=False)
        pool = Pool(device)
        own, plain = Optimizer(SLOTS, pool.parameters), Optimizer(COUNT, torch.zeros(COUNT, *SHAPE))
        pool.parameters.fill_(float("nan"))
        pool.start_optimizer(own)  # type: ignore[arg-type]
        expected, found = list[list[Tensor]](), list[list[Tensor]]()
        for number, some in enumerate(plan, start=1):
            rows = sorted(some)
            slots = pool.locate(rows)
            expected.append(plain.step(rows, number))
            device.steps.launch(lambda slots=slots, number=number: found.append(own.step(slots, number)))
            for further in plan[number : number + rng.randint(0, ahead)]:
                pool.prefetch(sorted(further))
            for _ in range(rng.randint(0, 12)):
                if any(stream.queue for stream in device.streams):
                    device.progress()
        state = pool.state()
        device.steps.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sum(expected, []), sum(found, []), strict=True))
    for name, tensor in (("planes", plain.rows), ("exp_avg", plain.exp_avg), ("exp_avg_sq", plain.exp_avg_sq)):
        assert torch.equal(state[name], tensor), name
    assert torch.equal(state["updated"], plain.updated) and torch.equal(state["visited"], plain.visited)
