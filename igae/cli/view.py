# SPDX-License-Identifier: Apache-2.0
"""Look at scenes in a browser: ``igae view CHECKPOINT|RUN|EXPORT``.

Of a run's folder the newest complete checkpoint is shown, and each newer one as soon as it is there.
"""

import contextlib
import ipaddress
import logging
import threading

from igae.errors import Parser, command, log_to_stderr, say
from igae.ranks import use_share


@command
def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0 ended with Ctrl-C, 1 failed, 2 wrong input."""
    parser = Parser(prog="igae view", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or URL of a run, a checkpoint or an export")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; default: this machine only")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080; 0 is any that is free")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. data.root=SHARDS")
    arguments = parser.parse_args(argv)
    log_to_stderr()
    logging.getLogger("igae").setLevel(logging.INFO)
    from igae.models import import_diffusers

    import_diffusers()
    import torch

    from igae.viewer import Followed, Viewer

    use_share()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    viewer = Viewer(Followed(arguments.model, arguments.overrides, device), arguments.host, arguments.port)
    if not _is_loopback(arguments.host):
        say("anyone who can reach this address can use the page: there is no password")
    with contextlib.suppress(KeyboardInterrupt):
        say(f"{viewer.url} shows {viewer.subject.title} ({len(viewer.subject.names)} scenes); Ctrl-C ends it")
        threading.Event().wait()
    viewer.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
