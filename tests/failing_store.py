# SPDX-License-Identifier: Apache-2.0
"""An S3 server's proxy in a process of its own, in which something is done to one request, or from one on."""

import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import object_store

FORK = multiprocessing.get_context("fork")
SLOW, WHILE = 2.0, 5
"""Seconds of a slow answer, and requests that a fault lasts that passes."""
ANSWERS: dict[str, tuple[str, int]] = {
    "an error": ("500", 1),
    "is busy for a while": ("503", WHILE),
    "is refused": ("403", 1),
    "is refused from then on": ("403", 10**9),
    "fails from then on": ("500", 10**9),
    "is closed": ("close", 1),
    "is reset": ("reset", 1),
    "is cut off": ("short", 1),
    "is slow": ("slow", WHILE),
    "kills before": ("kill", 1),
    "kills after": ("kill after", 1),
}
"""What is done -> how, and to how many requests."""


class _Handler(object_store._Handler):
    server: "_Proxy"

    def setup(self) -> None:
        super().setup()
        # An answer is two writes: header and body.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def _answered(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault_of(self.command, self.path)
        if fault == "kill":
            os.kill(int(self.server.victim.read_text()), signal.SIGKILL)
            fault = "close"
        if fault == "close":
            self._close()
            return
        if fault in ("403", "500", "503"):
            self._send(int(fault), {}, object_store.XML.format(object_store.CODES[int(fault)]).encode())
            return
        if fault == "slow":
            time.sleep(SLOW)
        status, headers, answer, length = self.server.ask(self.command, self.path, dict(self.headers), body)
        if fault == "kill after":
            os.kill(int(self.server.victim.read_text()), signal.SIGKILL)
        cut = len(answer) // 2 if fault in ("reset", "short") else len(answer)
        if fault in ("reset", "short") and not answer:  # what has no body is answered with nothing
            self._cut(fault)
            return
        self._send(status, headers, answer[:cut], length)
        if fault in ("reset", "short"):
            self._cut(fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answered

    def _cut(self, fault: str) -> None:
        if fault == "reset":
            time.sleep(0.02)  # what was sent has to arrive before the reset discards it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close(linger=fault == "reset")


class _Proxy(object_store.Proxy):
    def __init__(self, upstream: int, log: Path, victim: Path, method: str, position: int, what: str) -> None:
        super().__init__(upstream)
        self.RequestHandlerClass = _Handler
        self.log, self.victim, self.method, self.position = log.open("a", buffering=1), victim, method, position
        self.how, self.lasts = ANSWERS.get(what, ("", 0))
        self.counts, self.struck, self.lock = Counter[str](), 0, threading.Lock()

    def fault_of(self, method: str, path: str) -> str:
        """Count a request; what is done to it. What lasts is done to requests of all methods."""
        with self.lock:
            self.counts[method] += 1
            begins = method == self.method and self.counts[method] == self.position
            strikes = begins or 0 < self.struck < self.lasts
            self.struck += strikes
            self.log.write(f"{'! ' if strikes else ''}{method} {path.split('?')[0]}\n")
            return self.how if strikes else ""

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes, int]:
        """The server's status, headers, body, and length of the body as it is told."""
        import http.client

        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        kept = {name: value for name, value in headers.items() if name.lower() not in ("connection", "expect")}
        upstream.request(method, path, body=body, headers=kept)
        response = upstream.getresponse()
        answer = response.read()
        upstream.close()
        skipped = ("connection", "content-length", "transfer-encoding", "date", "server")
        told = {name: value for name, value in response.getheaders() if name.lower() not in skipped}
        return response.status, told, answer, int(response.headers.get("Content-Length", len(answer)))


def _serve(answer: Connection, *arguments: Any) -> None:
    with _Proxy(*arguments) as proxy:
        answer.send(proxy.port)
        proxy.serve_forever(poll_interval=0.05)


@contextmanager
def between(
    upstream: int, log: Path, victim: Path, method: str = "", position: int = 0, what: str = ""
) -> Iterator[int]:
    """The port of a proxy.

    Args:
        upstream: port of the server.
        log: gets a line for each request, which begins with "! " if something is done to it.
        victim: a file with the id of the process to kill.
        method, position: the request among those of its method, from 1.
        what: one of ANSWERS; nothing if left out.
    """
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve, args=(send, upstream, log, victim, method, position, what))
    process.start()
    try:
        yield receive.recv()
    finally:
        process.kill()
        process.join()
