# SPDX-License-Identifier: Apache-2.0
"""The machinery of streams: a thread that reads raw samples in order, and workers that decode them."""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader
from webdataset import filters

from igae.data.columns import Shard
from igae.data.decoding import B, Decoder, ViewBatch
from igae.data.shards import RawSample, ShardError, ShardReader, seeded
from igae.errors import LostWorker
from igae.storage import File

warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: most of them wait

READ_AHEAD = 8
"""Batches of raw samples that the reading thread keeps ready."""


@dataclass
class StreamState:
    """Where a stream is: `position` samples of epoch `epoch` have been yielded."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Plan:
    """What is read, in which order.

    Attributes:
        reader: reads the shards.
        shards: those that are read, in the order of the manifest.
        counts: samples of each shard that are wanted, at least one.
        scenes: names of the scenes that are wanted; None: all.
        parts: numbers of the samples that are wanted, of those in each shard; None: all.
        seed, shuffle, repeat: as in `igae.data.view_loader`.
    """

    reader: ShardReader
    shards: Sequence[Shard]
    counts: dict[str, int]
    scenes: frozenset[str] | None
    parts: dict[str, range] | None
    seed: int
    shuffle: int
    repeat: bool

    @property
    def samples(self) -> int:
        """Number of samples of an epoch."""
        return sum(self.counts.values())

    def read(self, state: StreamState) -> Iterator[RawSample]:
        """Raw samples from `state` on, endless with `repeat`."""
        skip = state.position
        visits = self._visits(state.epoch)
        visit = next(visits, None)
        opening: Future[File] | None = None
        while visit is not None:
            (epoch, shard), visit = visit, next(visits, None)
            if skip >= self.counts[shard.name]:
                skip -= self.counts[shard.name]
                continue
            samples, opening = self._read_shard(shard, epoch, opening), None
            for sample in samples:
                if opening is None and visit is not None:
                    opening = self.reader.open(visit[1])
                if skip:
                    skip -= 1
                else:
                    yield sample

    def _visits(self, start: int) -> Iterator[tuple[int, Shard]]:
        """Epochs, and the shards in their order."""
        for epoch in count(start) if self.repeat else [start]:
            shards = list(self.shards)
            if self.shuffle:
                seeded(self.seed, f"{epoch}/").shuffle(shards)
            for shard in shards:
                yield epoch, shard

    def _read_shard(self, shard: Shard, epoch: int, opening: "Future[File] | None") -> Iterator[RawSample]:
        wanted = None if self.scenes is None else self.scenes.__contains__
        part = None if self.parts is None else self.parts[shard.name]
        samples = self.reader.read(shard, wanted, part, opening)
        if self.shuffle < 2:
            return samples
        rng = seeded(self.seed, f"{epoch}/{shard.name}")
        shuffled: Iterator[RawSample] = filters.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(samples)
        return shuffled


class _Batches:
    """Batches of raw samples, read ahead by a thread; the batch sampler of a DataLoader.

    The thread starts at the first `next`, which is after the DataLoader has forked its workers.

    An error ends the batches and is kept. Raised here, it would leave a DataLoader behind that is only half made, whose
    workers nobody can tell to end.

    Attributes:
        error: what went wrong while reading, after the batches that were given out.
        interrupt: what was raised while this process waited for a batch.
        waiting: whether it does.
    """

    def __init__(self, samples: Iterator[RawSample], batch_size: int) -> None:
        self._samples, self._batch_size = samples, batch_size
        self.error: BaseException | None = None
        self.interrupt: BaseException | None = None
        self.waiting = False
        self._ready: queue.Queue[list[RawSample] | None] = queue.Queue(READ_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[list[RawSample]]:
        while (batch := self._wait()) is not None:
            yield batch

    def _wait(self) -> list[RawSample] | None:
        try:
            if self._thread is None:
                self._thread = threading.Thread(target=self._read, name="igae-read-ahead", daemon=True)
                self._thread.start()
            self.waiting = True
            return self._ready.get()
        except BaseException as error:  # a signal
            self.interrupt = error
            return None
        finally:
            self.waiting = False

    def _read(self) -> None:
        batch: list[RawSample] = []
        try:
            for sample in self._samples:
                batch.append(sample)
                if len(batch) == self._batch_size:
                    if not self._put(batch):
                        return
                    batch = []
            if batch:
                self._put(batch)
        except BaseException as error:  # whatever it is, who waits for a batch has to hear of it
            self.error = error
        self._put(None)

    def _put(self, item: list[RawSample] | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):  # the thread may wait for room
            while True:
                self._ready.get_nowait()
        if self._thread is not None:
            self._thread.join(timeout=2)  # it is a daemon: a read that hangs does not keep the process
            self._thread = None


def _ignore_signals(_: int) -> None:
    # Schedulers send SIGTERM, more than once, or SIGUSR1 to each process of a job, and a terminal sends SIGINT, but
    # training needs its workers to end its step. Only a SIGTERM of the training process itself ends them.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), name="igae-signals", daemon=True).start()


def _obey(parent: int) -> None:
    # Also without its parent a worker ends, and soon: it has inherited the sockets of its rank, and other ranks hear
    # that one was killed when the last process that holds them ends.
    while os.getppid() == parent:
        signalled = signal.sigtimedwait({signal.SIGTERM}, 0.3)
        if signalled is not None and signalled.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)


def _watch(of: "weakref.ref[Loader[Any]]", ended: threading.Event, pause: float) -> None:
    # A thread: whatever waits for a stopped worker, its answers or its shared memory, does so for ever.
    last_waited = 0.0  # for a store, which has limits of its own
    while not ended.wait(pause):
        loader = of()
        if loader is None or loader._is_late(last_waited):
            return
        if loader._batches.waiting:
            last_waited = time.monotonic()
        del loader


_open: "weakref.WeakSet[Loader[Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:  # before multiprocessing's exit, which sends workers a SIGTERM and waits for them
    for loader in list(_open):
        loader.close()
    # Workers left over where a signal interrupted the making of a DataLoader: only this process can end them.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Loader(Generic[B]):
    """An iterator over batches; `state` is where it is after the batch that was yielded last.

    Attributes:
        plan: what it reads.
        timeout: seconds after which a worker that was given a batch to decode is taken for lost.
    """

    timeout: float = 600.0

    def __init__(self, plan: Plan, decoder: Decoder[B], batch_size: int, workers: int, state: StreamState | None):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1")
        self.plan = plan
        self._state = replace(state) if state else StreamState()
        if self._state.epoch < 0 or not 0 <= self._state.position <= plan.samples:
            raise ValueError(f"{self._state} does not fit this stream, which has {plan.samples} samples an epoch")
        self._batches = _Batches(plan.read(replace(self._state)), batch_size)
        self._loader: DataLoader[B] = DataLoader(
            decoder,
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=lambda batch: batch,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork" if workers else None,
            # An own generator: a DataLoader would otherwise draw from the global one.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[B | ShardError] | None = None
        self._closed, self._ended = False, threading.Event()
        self._asked: float | None = None  # since when a batch is waited for
        self._late = False
        _open.add(self)

    @property
    def state(self) -> StreamState:
        """A copy of the state; a new loader with it yields what this one would yield next."""
        return replace(self._state)

    def __iter__(self) -> "Loader[B]":
        return self

    def __next__(self) -> B:
        if self._closed:
            raise StopIteration
        try:
            if self._iterator is None:
                # Workers inherit it: torch starts threads in them before they call _ignore_signals.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                try:
                    self._iterator = iter(self._loader)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if self._loader.num_workers:
                    watch = (weakref.ref(self), self._ended, self.timeout / 8)
                    threading.Thread(target=_watch, args=watch, name="igae-workers", daemon=True).start()
            batch = self._next(self._iterator)
            if self._batches.interrupt is not None:
                raise self._batches.interrupt
            if batch is None:
                raise self._batches.error or StopIteration
            if isinstance(batch, ShardError):
                raise batch
        except BaseException:
            self.close()
            raise
        self._advance(len(batch.images if isinstance(batch, ViewBatch) else batch))
        return batch

    def _next(self, iterator: Iterator[B | ShardError]) -> B | ShardError | None:
        self._asked = time.monotonic()
        try:
            return next(iterator, None)
        except (OSError, EOFError, RuntimeError) as error:
            if self._late:
                raise LostWorker(f"killed, it had not decoded a batch in {self.timeout:g} s") from error
            # A worker that dies while it hands over a batch breaks the connection: one of several errors. An error
            # raised inside a worker arrives with its traceback as text.
            if isinstance(error, RuntimeError) or self._loader.num_workers == 0 or str(error).startswith("Caught "):
                raise
            raise LostWorker(str(error) or type(error).__name__) from error
        finally:
            self._asked = None

    def _is_late(self, not_before: float) -> bool:
        """Whether a batch that was asked for has not come in ``timeout`` seconds, of which those before a time don't
        count; if so, workers are killed."""
        asked = self._asked
        if asked is None or time.monotonic() - max(asked, not_before) < self.timeout:
            return False
        self._late = True
        self._kill()
        return True

    def _kill(self) -> None:
        """End workers that may be stopped, which hear of nothing else."""
        for worker in getattr(self._iterator, "_workers", ()):
            worker.kill()

    def _advance(self, number: int) -> None:
        epochs, position = divmod(self._state.position + number, self.plan.samples)
        if self.plan.repeat:
            self._state = StreamState(self._state.epoch + epochs, position)
        else:
            self._state.position += number

    def close(self) -> None:
        """Ends the thread and the workers; the loader yields nothing more."""
        self._closed = True
        self._ended.set()
        self._batches.close()
        # The iterator's destructor does this too, but an exception's traceback may keep the iterator.
        if (shutdown := getattr(self._iterator, "_shutdown_workers", None)) is not None:
            shutdown()
            self._kill()  # those that did not hear of it
        self._iterator = None

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
