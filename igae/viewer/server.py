# SPDX-License-Identifier: Apache-2.0
"""The server of the page: open pages, a thread that draws for them, and one that follows a run."""

import contextlib
import io
import logging
import math
import socket
import threading
import traceback
import warnings
from typing import TYPE_CHECKING

import torch

from igae.viewer.guard import guarded
from igae.viewer.session import Session
from igae.viewer.subject import Followed

if TYPE_CHECKING:
    import viser

MAX_PAGES = 32
WARM_UP = 30.0
"""Seconds at most in which the first scene is read and drawn before a page can be opened: its picture comes at once."""
log = logging.getLogger("igae")


class Viewer:
    """Serves the page until :meth:`close`.

    Args:
        host: address to listen on, at `port`; port 0 is any that is free.
        poll: seconds between looks for a newer checkpoint.

    Attributes:
        sessions: open pages, by viser's ids.
        url: of the page.

    Raises:
        ValueError: the address can't be used, viser is not installed, or there is no scene to show.
    """

    def __init__(self, followed: Followed, host: str = "127.0.0.1", port: int = 8080, poll: float = 2.0) -> None:
        if not followed.subject.names:
            raise ValueError(f"{followed.subject.title} has no scenes to show")
        _check_address(host, port)
        self.subject = followed.subject
        self.sessions: dict[int, Session] = {}
        self._wake, self._stop, self._ready = threading.Event(), threading.Event(), threading.Event()
        self._server = _start(host, port)
        camera = self._server.initial_camera
        front, up = self.subject.front(self.subject.names[0])
        camera.position, camera.up = front[:3, 3].numpy(), up.numpy()
        camera.look_at = torch.zeros(3).numpy()
        camera.fov = math.radians(self.subject.angle)
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)
        self._threads = [threading.Thread(target=self._draw, daemon=True)]
        if followed.is_run:
            self._threads.append(threading.Thread(target=self._follow, args=(followed, poll), daemon=True))
        for thread in self._threads:
            thread.start()
        self._ready.wait(WARM_UP)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.get_port()}"

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        with _quiet():
            self._server.stop()
        for thread in self._threads:
            thread.join(10)
        if self.subject.truth is not None:
            self.subject.truth.close()

    def _connect(self, client: "viser.ClientHandle") -> None:
        if len(self.sessions) >= MAX_PAGES:
            client.add_notification("too many pages", f"{MAX_PAGES} are open: close some of them", color="red")
            return
        client.gui.main_panel.dock_right()
        self.sessions[client.client_id] = Session(client, self.subject, self._wake.set)
        if client.client_id not in self._server.get_clients():  # closed meanwhile
            self._disconnect(client)

    def _disconnect(self, client: "viser.ClientHandle") -> None:
        session = self.sessions.pop(client.client_id, None)
        if session is not None:
            session.close()

    def _draw(self) -> None:
        more, threads, measured = False, torch.get_num_threads(), None
        while not self._stop.is_set():
            if measured is not self.subject:
                measured = self.subject
                with contextlib.suppress(ValueError, OSError, RuntimeError):  # drawing tells it
                    measured.choose_threads(threads)
                self._ready.set()
            self._wake.wait(0.05 if more else 1.0)
            self._wake.clear()
            more = False
            for session in list(self.sessions.values()):
                try:
                    if session.subject is not self.subject:
                        session.show(self.subject)
                    more = session.update() or more
                except Exception as error:  # of whatever kind: other pages stay open
                    if not isinstance(error, (ValueError, OSError)):
                        log.error("%s", traceback.format_exc())
                    session.fail(error)

    def _follow(self, followed: Followed, poll: float) -> None:
        while not self._stop.wait(poll):
            subject = followed.check()
            if subject is not None:
                log.info("now showing %s", subject.title)
                self.subject = subject
                self._wake.set()


def _check_address(host: str, port: int) -> None:
    """Raises ValueError if the address can't be listened on."""
    try:
        if not 0 <= port < 1 << 16:  # which would be taken modulo 2^16
            raise OSError("a port is a number up to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} can't be used ({error.strerror or error}): choose another --port or --host"
        ) from None


def _start(host: str, port: int) -> "viser.ViserServer":
    try:
        import viser
    except ImportError as error:
        raise ValueError(f"the viewer needs viser ({error}): pip install -e '.[viewer]'") from None

    class Server(viser.ViserServer):
        def request_share_url(self, verbose: bool = True) -> str | None:
            """None: no page gets a public address of this server."""
            return None

    # A page may be closed while a picture is drawn for it.
    warnings.filterwarnings("ignore", "Queued a .* on a closed connection")
    with _quiet(), guarded(host):
        server = Server(host=host, port=port, label="igae", verbose=False)
    if port not in (0, server.get_port()):  # it takes the next one where another process was quicker
        server.stop()
        raise ValueError(f"{host}:{port} has just been taken: choose another --port")
    server.gui.configure_theme(show_logo=False, show_share_button=False, control_width="medium")
    return server


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Discards what viser prints: its own addresses, and that it stops."""
    return contextlib.redirect_stdout(io.StringIO())
