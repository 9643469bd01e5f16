# SPDX-License-Identifier: Apache-2.0
"""Rows of scenes that the device has no room for: in host memory or in files, some of them in slots of a pool there.

A row moves with its moments and with the two counters that say which updates it has got; what is computed of it is
local to it. So where rows are, and when they move, changes no bit of a training.
"""

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from igae.scenes.config import Tier
from igae.scenes.row_adam import CHUNK, RowAdam
from igae.storage import writes_to

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGED_BYTES, STAGED_ROWS = 64 << 20, 16
"""Of the buffer between files and the device; its rows are read and written at the same time."""
Pair = tuple[int, int]
"""A row and a slot."""


@dataclass(frozen=True)
class Storage:
    """Where the rows of scenes and their moments are: all on the device, or elsewhere with slots for some there."""

    tier: Tier = "device"
    slots: int = 0
    folder: str = ""


class HostRows:
    """A tensor of rows in host memory, zeros at first. A GPU copies from and to it by itself."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        count = math.prod(shape)
        memory = mmap.mmap(-1, 4 * max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Processes that decode images are forks: what is pinned would be copied for each of them.
        memory.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(memory, dtype=torch.float32)[:count].view(*shape)
        if device.type == "cuda" and count:
            # Not pin_memory: it rounds up to a power of two.
            runtime, where = torch.cuda.cudart(), self.tensor.data_ptr()
            with torch.cuda.device(device):
                failure = int(runtime.cudaHostRegister(where, 4 * count, 0))
            if failure:
                raise ValueError(
                    f"{4 * count / 2**30:.1f} GiB of host memory can't be pinned for {device} (CUDA error {failure}): "
                    "set planes.storage=disk"
                )
            weakref.finalize(self, runtime.cudaHostUnregister, where).atexit = False

    def clear(self) -> None:
        self.tensor.zero_()

    def fetch(self, rows: Sequence[int], places: Iterable[Tensor]) -> None:
        """Copy rows to tensors of the device, on its current stream, which is not waited for."""
        for row, place in zip(rows, places, strict=True):
            place.copy_(self.tensor[row], non_blocking=True)

    def put(self, rows: Sequence[int], places: Iterable[Tensor]) -> None:
        """Copy tensors of the device or of the CPU to rows, on the current stream, which is not waited for."""
        for row, place in zip(rows, places, strict=True):
            self.tensor[row].copy_(place, non_blocking=True)


class FileRows:
    """As `HostRows`, in a sparse file. It has no name: the disk has its space back when this process ends, however.

    Raises (all methods):
        OSError: with a sentence that names the folder and what is left on its disk.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, folder: str) -> None:
        self._shape, self._folder, self._device = tuple(shape), folder, device
        self._size = 4 * math.prod(shape[1:])
        staged = max(1, min(STAGED_ROWS, shape[0], STAGED_BYTES // max(1, self._size)))
        self._stage = torch.empty(staged, *shape[1:], pin_memory=device.type == "cuda")
        self._bytes = [memoryview(row.view(-1).numpy()).cast("B") for row in self._stage]
        self._threads = ThreadPoolExecutor(staged, "igae-rows")
        with writes_to(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self.clear()

    @property
    def tensor(self) -> Tensor:
        """What is in the file, mapped into memory."""
        if math.prod(self._shape) == 0:
            return torch.zeros(self._shape)
        return torch.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=torch.float32).view(self._shape)

    def clear(self) -> None:
        with writes_to(self._folder):
            os.truncate(self._file.fileno(), 0)
            os.truncate(self._file.fileno(), self._shape[0] * self._size)

    def fetch(self, rows: Sequence[int], places: Iterable[Tensor]) -> None:
        for some in _batches(zip(rows, places, strict=True), len(self._stage)):
            list(self._threads.map(self._read, range(len(some)), [row for row, _ in some]))
            for staged, (_, place) in zip(self._stage, some, strict=False):
                place.copy_(staged, non_blocking=True)
            _wait(self._device)

    def put(self, rows: Sequence[int], places: Iterable[Tensor]) -> None:
        for some in _batches(zip(rows, places, strict=True), len(self._stage)):
            for staged, (_, place) in zip(self._stage, some, strict=False):
                staged.copy_(place, non_blocking=True)
            _wait(self._device)
            with writes_to(self._folder):
                list(self._threads.map(self._write, range(len(some)), [row for row, _ in some]))

    def _read(self, staged: int, row: int) -> None:
        left, place = self._bytes[staged], row * self._size
        while len(left) > 0:
            count = os.preadv(self._file.fileno(), [left], place)
            if count == 0:
                raise OSError(errno.EIO, f"a file of planes in {self._folder} ends too early")
            left, place = left[count:], place + count

    def _write(self, staged: int, row: int) -> None:
        left, place = self._bytes[staged], row * self._size
        while len(left) > 0:
            count = os.pwrite(self._file.fileno(), left, place)
            left, place = left[count:], place + count


class RowPool:
    """Rows of N scenes with their moments, in a tier below the device, and a pool of slots that steps work on.

    An optimizer has a row for each slot. Rows come into slots when they are located, in the place of those that were
    used least recently. A thread moves them; on a GPU it works with two streams of its own (out and in), and events
    keep it from a slot that a step still uses, and a step from a slot that is not there yet. Counters are small: those
    of all rows are where the optimizer has its own, and follow on the stream of the steps.

    Attributes:
        parameters: float32 [slots, *shape] on the device.

    Args:
        shape: of a row.
        count: of the rows, N.
    """

    def __init__(self, shape: Sequence[int], count: int, storage: Storage, device: torch.device) -> None:
        self._shape, self._device, self._storage = (count, *shape), device, storage
        self.slots = min(count, storage.slots)
        self.parameters = torch.empty(self.slots, *shape, device=device)
        self._tiers: dict[str, HostRows | FileRows] = {"planes": self._allocate()}
        self._adam: RowAdam | None = None
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # the row that was used least recently comes first
        self._free = list(range(self.slots))
        self._dirty: set[int] = set()  # rows whose slot may be newer than their tier
        self._held: set[int] = set()  # rows that were located last
        self._coming: dict[int, Future[Any]] = {}
        self._jobs: deque[Future[Any]] = deque()
        self._uses, self._used = 0, [0] * self.slots  # calls of locate, and the last of each slot
        self._events: deque[tuple[int, Any]] = deque(maxlen=4)  # when the device is through with a use
        self._on_gpu = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "igae-tiers")
        self._out = torch.cuda.Stream(device) if self._on_gpu else None
        self._in = torch.cuda.Stream(device) if self._on_gpu else None

    def _allocate(self) -> HostRows | FileRows:
        if self._storage.tier == "host":
            return HostRows(self._shape, self._device)
        return FileRows(self._shape, self._device, self._storage.folder)

    # --- in the steps ---

    def locate(self, rows: Sequence[int]) -> list[int]:
        """Slots of distinct rows, for a step that may change them. No more than there are slots."""
        assert len(rows) <= self.slots, "checked before training"
        self._bring(rows, set(rows))
        for job in {self._coming.pop(row) for row in rows if row in self._coming}:
            event = job.result()
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
        self._uses += 1
        slots = [self._slot_of[row] for row in rows]
        for slot in slots:
            self._used[slot] = self._uses
        self._held = set(rows)
        self._dirty |= self._held
        return slots

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to move rows into slots, as far as there is room beside those that were located last."""
        self._bring(rows, self._held.union(rows))

    def _bring(self, rows: Sequence[int], spared: set[int]) -> None:
        """Begin to move those rows into slots that are in none, in the place of others than ``spared``."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()  # raises what went wrong
        if self._on_gpu:
            if self._events and self._events[-1][0] == self._uses:
                self._events.pop()
            self._events.append((self._uses, torch.cuda.current_stream(self._device).record_event()))
        for row in rows:
            if row in self._slot_of:
                self._slot_of.move_to_end(row)
        missing = [row for row in rows if row not in self._slot_of]
        others = (row for row in self._slot_of if row not in spared)
        leaving = list(islice(others, max(0, len(missing) - len(self._free))))
        left = [(row, self._slot_of.pop(row)) for row in leaving]
        self._free += [slot for _, slot in left]
        placed = [(row, self._free.pop()) for row in missing[: len(self._free)]]
        if not placed:
            return
        saved = [pair for pair in left if pair[0] in self._dirty]
        self._dirty.difference_update(leaving)
        self._copy_counters(saved, out=True)
        self._copy_counters(placed, out=False)
        last = max(self._used[slot] for _, slot in placed)
        after = next((event for use, event in self._events if use >= last), None) if last > 0 else None
        job = self._submit(saved, placed, after)
        self._slot_of.update(placed)
        for row in leaving:
            self._coming.pop(row, None)
        self._coming.update((row, job) for row, _ in placed)

    def _submit(self, saved: list[Pair], placed: list[Pair], after: Any) -> "Future[Any]":
        job = self._thread.submit(self._move, saved, placed, after)
        self._jobs.append(job)
        return job

    def _move(self, saved: list[Pair], placed: list[Pair], after: Any) -> Any:
        """In the thread: rows out of slots, then others into slots; an event that says when they are there."""
        out, into = self._out, self._in
        with torch.cuda.device(self._device) if self._on_gpu else nullcontext(), torch.no_grad():
            if out is None or into is None:
                self._copy(saved, out=True)
                return self._copy(placed, out=False)
            if after is not None:
                out.wait_event(after)
            with torch.cuda.stream(out):
                self._copy(saved, out=True)
            into.wait_stream(out)
            with torch.cuda.stream(into):
                self._copy(placed, out=False)
                return into.record_event()

    def _copy(self, pairs: list[Pair], out: bool) -> None:
        rows = [row for row, _ in pairs]
        for name, pool in self._tensors(self._adam, self.parameters).items():
            tier = self._tiers[name]
            (tier.put if out else tier.fetch)(rows, [pool[slot] for _, slot in pairs])

    @staticmethod
    def _tensors(adam: RowAdam | None, parameters: Tensor) -> dict[str, Tensor]:
        """What of an optimizer moves with a row."""
        moments = {} if adam is None else {"exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
        return {"planes": parameters, **moments}

    def _copy_counters(self, pairs: list[Pair], out: bool) -> None:
        if self._adam is None or not pairs:
            return
        table = torch.tensor(pairs).T
        if self._adam.updated.is_cuda:  # a copy of pageable memory would wait for all work before it
            table = table.contiguous().pin_memory().to(self._device, non_blocking=True)
        rows, slots = table
        for own, of_slots in ((self._updated, self._adam.updated), (self._visited, self._adam.visited)):
            if out:
                own[rows] = of_slots[slots]
            else:
                of_slots[slots] = own[rows]

    # --- between steps: these wait for the device ---

    def flush(self) -> None:
        """Wait for all moves, and bring the tier up to date."""
        pairs = [(row, self._slot_of[row]) for row in sorted(self._dirty)]
        self._copy_counters(pairs, out=True)
        after = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._submit(pairs, [], after)
        while self._jobs:
            self._jobs.popleft().result()
        for stream in (self._out, self._in):
            if stream is not None:
                stream.synchronize()
        self._dirty.clear()

    def _empty(self) -> None:
        """Forget what is in the slots, after :meth:`flush`."""
        self._slot_of.clear()
        self._coming.clear()
        self._held = set()
        self._free = list(range(self.slots))

    def start_optimizer(self, adam: RowAdam | None) -> None:
        """Take another optimizer, whose moments are zero, of the slots. None: drop that which is there."""
        self.flush()  # after it, both streams wait for the zeros to be written
        self._empty()
        self._adam = adam
        if adam is not None:
            for name in MOMENTS:
                if name in self._tiers:
                    self._tiers[name].clear()
                else:
                    self._tiers[name] = self._allocate()
            self._updated, self._visited = (adam.updated.new_zeros(self._shape[0]) for _ in range(2))

    def catch_up(self, rows: Tensor) -> None:
        """Apply the deferred updates of rows, in the same groups as an optimizer of all rows does."""
        self.flush()
        adam = self._adam
        if adam is None:
            return
        where = rows.to(self._updated.device)
        rows = rows[adam.deferred(self._updated[where], self._visited[where]).cpu() > 0]
        if len(rows) == 0:
            return
        room = torch.empty(min(CHUNK, len(rows)), *self._shape[1:], device=self._device)
        other = type(adam)(room, adam.betas, adam.eps)
        other.load_state({**other.state(), "learning_rates": adam.state()["learning_rates"]})
        tensors = self._tensors(other, room)
        counters = ((self._updated, other.updated), (self._visited, other.visited))
        for chunk in rows.split(CHUNK):
            count, where = len(chunk), chunk.to(self._updated.device)
            for own, of_room in counters:
                of_room[:count] = own[where]
            for name, tensor in tensors.items():
                self._tiers[name].fetch(chunk.tolist(), tensor[:count])
            other.catch_up(torch.arange(count))
            for name, tensor in tensors.items():
                self._tiers[name].put(chunk.tolist(), tensor[:count])
            for own, of_room in counters:
                own[where] = of_room[:count]
        _wait(self._device)  # others may read the tier on their streams
        self._empty()

    def read(self, rows: Tensor, catch_up: bool) -> Tensor:
        """Copies of rows on the device, up to date or as they were last written."""
        self.flush()
        if catch_up:
            self.catch_up(rows)
        found = torch.empty(len(rows), *self._shape[1:], device=self._device)
        self._tiers["planes"].fetch(rows.tolist(), found)
        return found

    def state(self) -> dict[str, Tensor]:
        """All rows, as `RowAdam.state` with the parameters as ``planes``. Not copies: good until the next step."""
        self.flush()
        state = {name: tier.tensor for name, tier in self._tiers.items()}
        if self._adam is None:
            return {"planes": state["planes"]}
        counters = {"updated": self._updated, "visited": self._visited}
        return {**state, **counters, "learning_rates": self._adam.state()["learning_rates"]}

    def load(self, state: dict[str, Tensor], start: int = 0) -> None:
        """Take back what is given of :meth:`state`, of the rows from ``start`` on."""
        self.flush()
        self._empty()
        for name, rows in state.items():
            if name in self._tiers:
                self._tiers[name].put(range(start, start + len(rows)), rows)
            elif name != "learning_rates":
                {"updated": self._updated, "visited": self._visited}[name][start : start + len(rows)] = rows
        _wait(self._device)  # others may read the tier on their streams


def _wait(device: torch.device) -> None:
    """Until copies on the current stream are made."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
