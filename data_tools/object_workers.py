# SPDX-License-Identifier: Apache-2.0
"""Calls a function for many items in processes that may die: what one of them was at is reported, the others go on."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

T = TypeVar("T")
CONTEXT = multiprocessing.get_context("spawn")  # a library that has threads or a GPU does not survive a fork


class Failed(Exception):
    """One sentence about why there is no result for an item."""


def in_processes(
    number: int, start: Callable[..., Callable[[T], Any]], arguments: tuple[Any, ...], items: Sequence[T]
) -> Iterator[tuple[T, Any]]:
    """Yields (item, result or Failed), in the order in which they end.

    Args:
        number: processes.
        start: called once in each process, with the arguments; it returns the function that is called for items.
        items: what the function gets, one at a time.

    Raises:
        ValueError: `start` raised one.
        Failed: a process died in `start`.
    """
    waiting = list(reversed(items))
    running: dict[Connection, tuple[SpawnProcess, T | None]] = {}
    try:
        for _ in range(min(number, len(items))):
            running |= _start(start, arguments)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, item = running[connection]
                try:
                    kind, answer = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    del running[connection]
                    reason = Failed(f"the process that had it died: {_cause(process.exitcode)}")
                    if item is None:
                        raise Failed(f"a process died before it began: {_cause(process.exitcode)}") from None
                    if waiting:
                        running |= _start(start, arguments)
                    yield item, reason
                    continue
                if kind == "refused":
                    raise ValueError(answer)
                following = waiting.pop() if waiting else None
                with contextlib.suppress(BrokenPipeError):  # it died: the next answer is the end of its connection
                    connection.send(following)  # before the answer is dealt with: nobody waits meanwhile
                if following is None:
                    del running[connection]
                else:
                    running[connection] = (process, following)
                if item is not None:
                    yield item, Failed(answer) if kind == "failed" else answer
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _start(start: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[Connection, tuple[SpawnProcess, None]]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs, start, arguments), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen
    return {ours: (process, None)}


def _serve(connection: Connection, start: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    try:
        function = start(*arguments)
    except ValueError as error:
        connection.send(("refused", str(error)))
        return
    connection.send(("ready", None))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the first process is gone
        while (item := connection.recv()) is not None:
            try:
                answer = ("done", function(item))
            except ValueError as error:
                answer = ("failed", str(error))
            except Exception as error:
                answer = ("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            connection.send(answer)


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}{', which is how the system ends what takes too much memory' if name == 'SIGKILL' else ''}"
