# SPDX-License-Identifier: Apache-2.0
"""An S3 server on this machine, and a proxy in front of it that makes its answers fail."""

import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest

XML = '<?xml version="1.0"?><Error><Code>{}</Code><Message>at fault on purpose</Message></Error>'
CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied", 400: "InvalidRequest"}


@contextmanager
def moto() -> Iterator[int]:
    """Runs a server with empty buckets; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)


def options(port: int, **config: Any) -> dict[str, Any]:
    """Options of fsspec's S3 client for the server on a port; `config` is botocore's."""
    return {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "testing",
        "secret": "testing",
        "config_kwargs": config,
    }


def use(monkeypatch: pytest.MonkeyPatch, port: int, **config: Any) -> None:
    """Makes s3:// mean this server."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", options(port, **config))


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a port of this machine, and spoils the answers that it is told to.

    `faults` has an entry for each of the next GET requests, and `head_faults` for each HEAD request (which has no body
    to spoil): None, or

        an HTTP status   this answer instead
        "close"          the connection is closed without an answer
        "reset"          it is reset in the middle of the body
        "short"          it is closed in the middle of the body, of which the header gives the full length
        "fewer"          half of the body, and the header says so
        "stall"          nothing comes after half of the body
        "more"           twice the body

    When they are used up, `after` is what happens to all.
    """

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.reset()

    def reset(self) -> None:
        self.faults: deque[int | str | None] = deque()
        self.head_faults: deque[int | str | None] = deque()
        self.after: int | str | None = None
        self.seen: list[tuple[str, str, int | str | None]] = []
        """Method, path, and what was done to it."""
        self.sent: list[tuple[str, str, str, int]] = []
        """User agent, method, path, and bytes of the body that was sent, of the answers that came from upstream."""
        self.released = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, *_: Any) -> None:
        pass  # clients leave: that is what is tested

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self.server.faults)

    def do_HEAD(self) -> None:
        self._answer(self.server.head_faults)

    def _answer(self, faults: deque[int | str | None]) -> None:
        fault = faults.popleft() if faults else self.server.after
        if self.command == "HEAD" and not isinstance(fault, int) and fault != "close":
            fault = None
        self.server.seen.append((self.command, self.path, fault))
        if fault == "close":
            self._close()
            return
        if isinstance(fault, int):
            self._send(fault, {}, XML.format(CODES[fault]).encode())
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, headers=headers)
        response = upstream.getresponse()
        body = response.read()
        kept = ("content-type", "content-range", "accept-ranges", "etag", "last-modified")
        headers = {name: value for name, value in response.getheaders() if name.lower() in kept}
        upstream.close()
        length = int(response.headers.get("content-length", len(body)))
        if fault == "fewer":
            body = body[: len(body) // 2]
            length = len(body)
        elif fault == "more":
            body += body
            length = len(body)
        cut = len(body) // 2 if fault in ("reset", "short", "stall") else len(body)
        self.server.sent.append((self.headers.get("User-Agent", ""), self.command, self.path, cut))
        self._send(response.status, headers, body[:cut], length)
        if fault == "stall":
            self.server.released.wait(30)
        if fault == "reset":
            time.sleep(0.02)  # what was sent has to arrive before the reset discards it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("reset", "short", "stall"):
            self._close(linger=fault == "reset")

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def _close(self, linger: bool = False) -> None:
        self.close_connection = True
        if not linger:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
