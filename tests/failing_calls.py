# SPDX-License-Identifier: Apache-2.0
"""Calls of the system that fail on purpose, in this process: what failing_calls.c does, for Python."""

import ctypes
import errno
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ACTIONS = ("nothing", "fails", "fails though it is done", "is cut short", "kills before", "kills after")
NAMED = ("EACCES", "EDQUOT", "EINTR", "EIO", "EMFILE", "ENOSPC", "EROFS", "ESTALE")


def build(folder: Path) -> str:
    """Compile the library, which has to be in LD_PRELOAD of a process that is to be armed."""
    library = folder / "failing_calls.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return str(library)


def arm(
    folder: Path,
    log: Path,
    call: str = "",
    position: int = 0,
    action: str = "nothing",
    error: str = "",
    lasts: bool = False,
) -> None:
    """From now on, do something at a call of this process below a folder, and log all such calls.

    Args:
        call: one of those in failing_calls.c; `log` has a line for each, "CALL /PATH BELOW".
        position: of the call among those of its kind, from 1. Its line in the log begins with "! ".
        action: one of ACTIONS, with the error that it fails with.
        lasts: the same happens to all later calls of the kind.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = getattr(errno, error) if error else 0
    ctypes.CDLL(None).arm(
        os.path.realpath(folder).encode(),
        descriptor,
        call.encode(),
        ctypes.c_long(position),
        ACTIONS.index(action),
        number,
        int(lasts),
    )


def calls(log: Path) -> list[tuple[str, str]]:
    """Those of a log: kind and path below the folder."""
    lines = [line.removeprefix("! ") for line in log.read_text(errors="replace").splitlines()]
    return [(kind, path) for kind, _, path in (line.partition(" ") for line in lines)]


def struck(log: Path) -> list[str]:
    """The lines of calls to which something was done."""
    return [line[2:] for line in log.read_text(errors="replace").splitlines() if line.startswith("! ")]
