# SPDX-License-Identifier: Apache-2.0
"""Who may talk to the page's server, and how much: every page that is open in a browser can try to."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

MAX_MESSAGE = 2 << 20  # bytes; viser sends files in smaller parts
MAX_UPLOAD, MAX_PARTS = 16 << 20, 1000  # bytes and parts


def is_from_the_page(headers: Any, names: Collection[str]) -> bool:
    """Whether a request is for this machine, and of no other page than the server's own.

    A page of another site has another origin; one whose name was made to lead here has a foreign host.

    Args:
        headers: of the request, as `websockets` has them.
        names: what this machine may be called, besides localhost and addresses.
    """
    hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
    if len(hosts) != 1 or any(urlsplit(origin).netloc != hosts[0] for origin in origins):
        return False
    try:
        name = urlsplit(f"//{hosts[0]}").hostname or ""
        return name in ("localhost", *names) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


@contextlib.contextmanager
def guarded(host: str) -> Iterator[None]:
    """A server that viser starts meanwhile answers nobody else, nor messages of any size; it has no option for that."""
    from websockets.asyncio import server

    serve, names = server.serve, {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    def serve_guarded(*arguments: Any, process_request: Callable[..., Any], **options: Any) -> Any:
        def check(connection: Any, request: Any) -> Any:
            if is_from_the_page(request.headers, names):
                return process_request(connection, request)
            return connection.respond(403, "open the page by this machine's name or address, localhost as a rule\n")

        return serve(*arguments, process_request=check, **{**options, "max_size": MAX_MESSAGE})

    server.serve = serve_guarded  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        server.serve = serve  # type: ignore[misc]


class Uploads(dict[str, Any]):
    """What viser keeps of a page's uploads until they are complete: the newest alone, and of that what is allowed.

    Args:
        refuse: called where a file is too large.
    """

    def __init__(self, refuse: Callable[[], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __setitem__(self, key: str, state: dict[str, Any]) -> None:
        self.clear()
        if state["total_bytes"] > MAX_UPLOAD:
            self._refuse()
        else:
            super().__setitem__(key, {**state, "parts": _Parts()})


class _Parts(dict[int, bytes]):
    size = 0

    def __setitem__(self, index: int, content: bytes) -> None:
        self.size += len(content)
        if self.size <= MAX_UPLOAD and len(self) < MAX_PARTS:
            super().__setitem__(index, content)
