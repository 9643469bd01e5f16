# SPDX-License-Identifier: Apache-2.0
"""Calls a function for many items, in this process or in several, with a progress bar."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], None]


class Run(Protocol):
    """Calls `function(item, progress)` for all items; `progress(n)` says that n of `total` units are done."""

    def __call__(
        self, what: str, function: Callable[[T, Progress], R], items: Sequence[T], total: int | None = None
    ) -> list[R]:
        """Returns the results in the order of the items."""
        ...


@contextmanager
def processes(number: int) -> Iterator[Run]:
    """Gives a `Run` over `number` processes; with 1 everything happens in this one."""

    def here(what: str, function: Callable[[T, Progress], R], items: Sequence[T], total: int | None = None) -> list[R]:
        with tqdm(desc=what, total=total or len(items), disable=None) as bar:
            return [function(item, bar.update) for item in items]

    def there(what: str, function: Callable[[T, Progress], R], items: Sequence[T], total: int | None = None) -> list[R]:
        counter.value = 0
        pending = futures = {pool.submit(_call, function, item): i for i, item in enumerate(items)}
        with tqdm(desc=what, total=total or len(items), disable=None) as bar:
            while pending:
                done, left = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # a failure ends the run at once
                pending = {future: futures[future] for future in left}
                bar.update(counter.value - bar.n)
        return [future.result() for future in futures]

    if number == 1:
        yield here
        return
    # spawn: the clients of object stores have threads, which a forked process would miss.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(number, context, _start, (counter,))
    try:
        yield there
    finally:
        pool.shutdown(cancel_futures=True)


_counter: Any = None


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def _count(number: int) -> None:
    with _counter.get_lock():
        _counter.value += number


def _call(function: Callable[[T, Progress], R], item: T) -> R:
    return function(item, _count)
