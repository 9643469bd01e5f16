# SPDX-License-Identifier: Apache-2.0
"""What is measured of steps: their losses, gradients, time and memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from igae.errors import LostRank
from igae.ranks import Channel

GIB = 2.0**30


class Outcome:
    """How a step went, without waiting for the device. The arguments are those of `StepOutput`."""

    def __init__(self, losses: dict[str, Tensor], applied: Tensor, stop: Tensor, norms: dict[str, Tensor]) -> None:
        self.losses, self.norms = losses, norms
        self._flags = torch.stack([applied, stop])
        self._ready: torch.cuda.Event | None = None
        if self._flags.is_cuda:
            self._flags = torch.empty(2, pin_memory=True).copy_(self._flags, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self, timeout: float | None = None) -> tuple[bool, bool]:
        """Whether the step was applied, and whether to stop; waits until the device has made it.

        Args:
            timeout: seconds after which the device is taken to wait for a rank that does not answer. (A collective in
                a CUDA graph waits forever: NCCL's watchdog does not see it.)

        Raises:
            LostRank: the time is over.
        """
        if self._ready is not None and timeout is not None:
            start = time.perf_counter()
            while not self._ready.query():
                if time.perf_counter() - start > timeout:
                    raise LostRank(f"a step did not end in {timeout:g} s")
                time.sleep(1e-4)
        elif self._ready is not None:
            self._ready.synchronize()
        applied, stop = self._flags.tolist()
        return applied > 0, stop > 0


class Meter:
    """Measures the steps of a stage between two records, and waits for no device and no rank until :meth:`read`.

    Attributes:
        losses: the newest of each name.
        data_wait: seconds in which this rank waited for data.
        times_steps: whether the time of steps is measured until they wait for other ranks.

    Args:
        ranks: those that train together; 1 where each trains alone.
        replicated: each rank holds all of the shared gradients, not a part of them.
    """

    def __init__(self, device: torch.device, ranks: int, replicated: bool) -> None:
        self._device, self._ranks, self._replicated = device, ranks, replicated
        self.times_steps = ranks > 1
        self.losses: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self.restart(0)

    def restart(self, taken: int) -> None:
        """Forget the time so far. ``taken``: views that this rank has taken until now."""
        self._taken, self.data_wait = taken, 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._start = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    def begin(self) -> None:
        """A step begins."""
        if self.times_steps:
            self._begun = self._now()

    def end(self) -> None:
        """From here on the step may wait for other ranks."""
        if self.times_steps:
            self._spans.append((self._begun, self._now()))

    def _now(self) -> Any:
        """A time on the device's clock; it is read later."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, outcome: Outcome) -> Outcome:
        """Keep the newest of each loss and norm: with alternating batches a step has not all of them."""
        self.losses |= outcome.losses
        self._norms |= outcome.norms
        return outcome

    def read(self, taken: int, channel: Channel) -> dict[str, float]:
        """Metrics of the steps since the last call (they are in docs/tracking.md), the same on all ranks. Collective;
        waits for the device.

        Args:
            taken: views that this rank has taken until now.
        """
        names = list(self.losses)
        losses = torch.stack([self.losses[name].detach() for name in names]).tolist() if names else []
        squares = {part: float(norms.double().square().sum()) for part, norms in self._norms.items()}
        seconds = time.perf_counter() - self._start
        own = (losses, squares, taken - self._taken, self.data_wait / seconds, self._busy(), self._memory())
        self.restart(taken)
        everyone = channel.gather(own)
        of_losses, of_squares, of_taken, waits, busy, of_memory = zip(*everyone, strict=True)
        count = len(everyone)
        metrics = {f"loss/{name}": sum(row[i] for row in of_losses) / count for i, name in enumerate(names)}
        for part in sorted(set().union(*of_squares)):  # a rank may hold nothing of a part
            # A rank's plane gradients are of its own loss, of scenes that no other rank has.
            share = self._ranks**2 if part == "planes" else self._ranks if self._replicated else 1
            metrics[f"grad_norm/{part}"] = (sum(of_rank.get(part, 0.0) for of_rank in of_squares) / share) ** 0.5
        metrics |= {"views_per_second": sum(of_taken) / seconds, "data_wait": sum(waits) / count}
        if self._ranks > 1:
            metrics["data_wait_max"] = max(waits)
            if mean := sum(busy) / count:
                slowest = max(range(count), key=lambda i: busy[i])
                metrics |= {"slowest_rank": slowest, "straggler_factor": busy[slowest] / mean}
        return metrics | {name: max(of_rank[name] for of_rank in of_memory) for name in of_memory[0]}

    def _busy(self) -> float:
        """Seconds of the spans so far."""
        if not self._spans or self._device.type != "cuda":
            return float(sum(end - begin for begin, end in self._spans))
        self._spans[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1e3

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        measured = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
        return {f"gpu_memory/{name}": measure(self._device) / GIB for name, measure in measured.items()}
