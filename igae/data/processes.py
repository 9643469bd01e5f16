# SPDX-License-Identifier: Apache-2.0
"""Calls a function for many items in several processes. One that dies takes its item along and nothing else."""

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")  # threads and GPUs do not survive a fork
ProgressCallback = Callable[[int], None]
ItemFunction = Callable[[Any, ProgressCallback], Any]


class ItemFailed(OSError):
    """Why there is no result for an item, in one sentence.

    `error` is what the function raised (a ValueError, an OSError, or a RuntimeError with the traceback of any other);
    None where the process died.
    """

    error: Exception | None = None


class ProcessPool:
    """Processes that are started with the first items and end with the `with` block.

    Args:
        number: of processes; 0 calls the function in this one, where its errors are raised as they are.
        start: called once in each process, with the arguments; returns the function that is called with each item and a
            callback for its progress.
    """

    def __init__(self, number: int, start: Callable[..., ItemFunction], arguments: Sequence[Any] = ()) -> None:
        self._number, self._start, self._arguments = number, start, arguments
        self._processes: dict[Connection, SpawnProcess] = {}
        self._idle: list[Connection] = []

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if connection not in self._idle:
                process.kill()
        for process in self._processes.values():
            process.join()

    def run(self, items: Sequence[Any], progress: ProgressCallback = lambda _: None) -> Iterator[tuple[int, Any]]:
        """Yields (place in `items`, result or ItemFailed) in the order in which they end.

        Args:
            progress: gets the numbers that the function gives its callback, some at a time.

        Raises:
            ValueError: `start` raised one.
            ItemFailed: a process died in `start`.
        """
        if not self._number:
            function = self._start(*self._arguments)
            yield from ((index, function(item, progress)) for index, item in enumerate(items))
            return
        waiting = list(enumerate(items))[::-1]
        busy: dict[Connection, int | None] = {}  # None: it starts
        while waiting and self._idle:
            busy |= self._send(self._idle.pop(), waiting)
        for _ in range(min(self._number - len(self._processes), len(waiting))):
            busy[self._launch()] = None
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                try:
                    kind, answer = connection.recv()
                except (EOFError, ConnectionError):
                    index = busy.pop(connection)
                    cause = self._cause_of_death(connection)
                    if index is None:
                        raise ItemFailed(f"a process died before it began: {cause}") from None
                    if waiting:
                        busy[self._launch()] = None
                    yield index, ItemFailed(f"the process that had it died: {cause}")
                    continue
                if kind == "refused":
                    raise ValueError(answer)
                if kind == "progress":
                    progress(answer)
                    continue
                index = busy.pop(connection)
                busy |= self._send(connection, waiting)  # before the answer is dealt with: nobody waits meanwhile
                if index is not None:
                    yield index, answer

    def _launch(self) -> Connection:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs, self._start, self._arguments), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen
        self._processes[ours] = process
        return ours

    def _send(self, connection: Connection, waiting: list[tuple[int, Any]]) -> dict[Connection, int | None]:
        if not waiting:
            self._idle.append(connection)
            return {}
        index, item = waiting.pop()
        with contextlib.suppress(BrokenPipeError):  # it died: the next answer is the end of its connection
            connection.send(item)
        return {connection: index}

    def _cause_of_death(self, connection: Connection) -> str:
        process = self._processes.pop(connection)
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGKILL:
            return "SIGKILL, which is how the system ends what takes too much memory"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _serve(connection: Connection, start: Callable[..., ItemFunction], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    done, due = 0, 0.0

    def progress(number: int) -> None:
        nonlocal done, due
        done += number
        if time.monotonic() >= due:
            connection.send(("progress", done))
            done, due = 0, time.monotonic() + 0.1

    with contextlib.suppress(EOFError, ConnectionError):  # the first process needs no more, or is gone
        try:
            function = start(*arguments)
        except ValueError as error:
            connection.send(("refused", str(error)))
            return
        answer: Any = None
        while True:
            connection.send(("done", answer))
            item = connection.recv()
            try:
                answer = function(item, progress)
            except Exception as error:
                answer = _failed(error)
            due = 0.0
            progress(0)


def _failed(error: Exception) -> ItemFailed:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    failed = ItemFailed(str(error) if isinstance(error, ValueError) else text)
    # Some libraries' errors can't be sent to another process.
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), None)
    failed.error = kind(str(error)) if kind else RuntimeError(traceback.format_exc())
    return failed
