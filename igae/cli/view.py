# SPDX-License-Identifier: Apache-2.0
"""Look at scenes in a browser: ``python -m igae.view CHECKPOINT|RUN|EXPORT``.

Of a run's folder the newest complete checkpoint is shown, and each newer one as soon as it is there.
"""

import argparse
import ipaddress
import logging
import sys
import threading

import torch

from igae.errors import log_to_stderr, say
from igae.viewer import Followed, Viewer

log = logging.getLogger("igae")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 ended with Ctrl-C, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m igae.view", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or URL of a run, a checkpoint or an export")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; default: this machine only")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080; 0 is any that is free")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=SHARDS")
    arguments = parser.parse_args(argv)
    log_to_stderr()
    log.setLevel(logging.INFO)
    try:
        followed = Followed(
            arguments.model, arguments.overrides, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        viewer = Viewer(followed, arguments.host, arguments.port)
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {error}")
        return 2
    if not _is_loopback(arguments.host):
        say("everybody who can reach this address can look: there is no password")
    say(f"{viewer.url} shows {viewer.subject.title} ({len(viewer.subject.names)} scenes); Ctrl-C ends it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    viewer.close()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
