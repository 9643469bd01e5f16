# SPDX-License-Identifier: Apache-2.0
"""Mutations of files, each with a seed of its own, and what must hold of a reader whatever it is given.

A reader refuses what it can't read in one sentence, or reads it right. It raises nothing else, takes neither long nor
much memory, opens nothing outside of the folder, connects to nothing and starts nothing.
"""

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

COUNT = int(os.environ.get("IGAE_FUZZ", "300"))
"""Mutations of each fuzzer."""
SECONDS = 5.0
"""Of CPU for one mutation, at most."""
MEMORY = 600 << 20
"""Bytes by which the process may grow while all mutations of a fuzzer are read."""
Files = dict[str, bytes]

ROOT = Path(__file__).parent.parent
EXTREMES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**9, 10**18, int("9" * 400), "9" * 400, "", " "),
    *(1e39, -1e39, 1e300, 1e-300, 5e-324, 1e-39, 0.5, -0.5, float("nan"), float("inf"), -float("inf"), [], {}, [[]]),
    *("../outside.png", "../outside.json", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", "a/../../b"),
    *("\0", "a\nb", "ü", "\ud800", "nan", "1e400", "~", "${HOME}", "__class__", "." * 300, "s3://bucket/x", "x" * 5000),
]


def nested(text: str, most: int = 10**6) -> str:
    """A text with the lists and mappings that stand for deep ones: as values they would be too deep for Python.

    Args:
        most: levels.
    """

    def deep(match: re.Match[str]) -> str:
        levels, is_list = min(int(match[1]), most), match[2] == "["
        return ("[" if is_list else '{"a": ') * levels + "1" + ("]" if is_list else "}") * levels

    return re.sub(r"""["']@(\d+)(\[|\{)@["']""", deep, text)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a tree but the tree itself."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree: Any, rng: random.Random) -> Any:
    """A tree with a value of another type, out of range, missing, doubled, moved or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = list(places(tree))
        if not found:
            return rng.choice(EXTREMES)
        # All depths alike: most values of a file are numbers of matrices.
        depth = rng.choice(sorted({len(path) for path in found}))
        *path, key = rng.choice([path for path in found if len(path) == depth])
        into = tree
        for part in path:
            into = into[part]
        _change(into, key, tree, rng)
    return tree


def _change(into: Any, key: Any, tree: Any, rng: random.Random) -> None:
    value, way = into[key], rng.randrange(10)
    if way <= 3:
        into[key] = rng.choice(EXTREMES)
    elif way == 4 and isinstance(value, int | float):
        into[key] = rng.choice([-value, value * 1e-30, value * 1e30, value + 1, str(value), [value]])
    elif way == 5:
        del into[key]
    elif way == 6:
        if isinstance(into, list):
            into.insert(key, copy.deepcopy(value))
        else:
            into[rng.choice(["x", "a.b", "", str(key).upper(), "__proto__"])] = copy.deepcopy(value)
    elif way == 7:
        into[key] = f"@{rng.choice([2, 30, 300, 900, 20_000])}{rng.choice('[{')}@"
    elif way == 8:
        other = tree
        for part in rng.choice(list(places(tree))):
            other = other[part]
        into[key] = copy.deepcopy(other)
    elif isinstance(into, dict):
        other_key = rng.choice(list(into))
        into[key], into[other_key] = into[other_key], into[key]
    else:
        rng.shuffle(into)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are flipped, cut, doubled, swapped, or others."""
    if not data:
        return rng.randbytes(16)
    way, place = rng.randrange(8), rng.randrange(len(data))
    end = min(len(data), place + rng.choice([1, 4, 64, 512]))
    if way <= 1:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if way == 2:
        return data[:place]
    if way == 3:
        return data[:place] + data[end:]
    if way == 4:
        return data[:end] + data[place:]
    if way == 5:
        return data[:place] + rng.choice([b"\0", b"\xff", b"[", b"{", b'"', b"9", b" "]) * (end - place) + data[end:]
    if way == 6:
        other = rng.randrange(len(data))
        return data[:place] + data[other : other + end - place] + data[end:]
    return rng.choice([b"", b"\0" * 64, b"[" * 50_000, b'{"a":' * 100_000, b"null", b"[]", b"\xff\xfe", data * 2])


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file's content, changed as what it is or as bytes."""
    if name.endswith((".json", ".yaml")) and rng.random() < 0.8:
        if name.endswith(".yaml"):
            return nested(yaml.safe_dump(changed(yaml.safe_load(data), rng)), 100).encode()  # PyYAML takes seconds
        text = json.dumps(changed(json.loads(data), rng))
        if rng.random() < 0.1 and '": ' in text:  # a key that is there twice
            head, tail = text.split('": ', 1)
            text = f'{head}": {json.dumps(rng.choice(EXTREMES))}, {head.rpartition("{")[2]}": {tail}'
        return nested(text).encode(errors="surrogatepass")
    return damaged(data, rng)[: 5000 if name.endswith(".yaml") else None]


_watched: list[Path] = []
_seen: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "pickle.find_class"):
        _seen.append(f"{event} {args[1:]}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path, flags = os.path.realpath(os.fsdecode(args[0])), args[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = f"{path}{os.sep}".startswith(str(_watched[0]) + os.sep)  # it is opened itself, to sync its names
        ours = path.startswith((sys.prefix, sys.base_prefix, str(ROOT), "/proc/", "/sys/", "/dev/null", "/usr/"))
        if not inside and (not ours or writes and "__pycache__" not in path and path != "/dev/null"):
            _seen.append(f"{'write' if writes else 'read'} {path}")


sys.addaudithook(_audit)


class TooLong(BaseException):
    pass


def _too_long(*_: Any) -> None:
    raise TooLong


@contextmanager
def _watching(folder: Path) -> Iterator[None]:
    """Everything that is opened is below `folder`, temporary files too."""
    before, timer = tempfile.tempdir, signal.signal(signal.SIGVTALRM, _too_long)
    tempfile.tempdir = str(folder)
    _watched.append(folder)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _watched.clear()
        signal.signal(signal.SIGVTALRM, timer)
        tempfile.tempdir = before


def _is_sentence(error: Exception) -> bool:
    """Whether a command ends with it as the project's errors do: no error of a library comes through."""
    own = type(error) is ValueError or type(error).__module__.startswith("igae.") or isinstance(error, OSError)
    return own and bool(text := str(error)) and "\n" not in text and len(text) < 2000


def fuzz(
    name: str,
    whole: Mapping[str, bytes],
    folder: Path,
    read: Callable[[Path], object],
    finish: Callable[[Files, str], None] = lambda files, changed: None,
    count: int = COUNT,
    change: Callable[[str, bytes, random.Random], bytes] = mutated,
) -> int:
    """Reads `count` mutations of a folder of files; AssertionError with the first that are not read as they must be.

    Args:
        name: of the fuzzer; with its number it is a mutation's seed.
        whole: path -> content of the files.
        folder: gets `data`, with the files.
        read: reads all of the folder, and asserts that it is right.
        finish: mends checksums of a file that was changed, so that what is behind them is reached.

    Returns:
        How many were refused.
    """
    data, faults, refused = folder.resolve() / "data", list[str](), 0
    (folder / "outside.json").write_text("{}")
    names = sorted(whole)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(-1, count):
        rng, files = random.Random(f"{name}/{number}"), dict(whole)
        chosen = rng.choice(names)
        if number >= 0:
            other = rng.choice(names)
            if rng.random() < 0.03:
                files[chosen], files[other] = files[other], files[chosen]
            else:
                files[chosen] = change(chosen, files[chosen], rng)
            if rng.random() < 0.9:
                finish(files, chosen)
        shutil.rmtree(data, ignore_errors=True)
        for path, content in files.items():
            (data / path).parent.mkdir(parents=True, exist_ok=True)
            (data / path).write_bytes(content)
        fault, start = "", time.process_time()
        try:
            with _watching(data):
                read(data)
        except Exception as error:
            refused += 1
            if not _is_sentence(error) or number < 0:
                fault = "".join(traceback.format_exception(error)[-6:])
        except TooLong:
            fault = f"took more than {SECONDS} s: {traceback.format_exc()[-1500:]}"
        fault = "; ".join(_seen) or fault
        _seen.clear()
        if time.process_time() - start > SECONDS and not fault:
            fault = f"took {time.process_time() - start:.1f} s"
        if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) - peak > MEMORY >> 10:
            fault, peak = fault or f"took {(grown - peak) >> 10} MB", grown
        if fault:
            shown = files[chosen][:300]
            faults.append(f"{name}/{number} of {chosen} {shown!r}:\n{fault}")
        if len(faults) >= 8:
            break
    assert not faults, "\n\n".join(faults)
    return refused
