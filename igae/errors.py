# SPDX-License-Identifier: Apache-2.0
"""What a user is told: progress, errors that end a command, in one sentence, and text without credentials."""

import argparse
import difflib
import functools
import io
import logging
import os
import re
import reprlib
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tqdm import tqdm

if TYPE_CHECKING:
    from pydantic import ValidationError

from igae.ranks import OfAllRanks, rank, world_size

T = TypeVar("T")
QUIET, EVERY = 5.0, 60.0
"""Seconds after which something is told of in a log that takes its time, and between two lines of it."""
MASK = "***"
Key = tuple[str, ...]
COMMAND_LINE = "command line"
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's names of a key that does not exist

# What follows a scheme. A chain of file systems (zip://...::s3://...) is several URLs. A Path of a URL has one slash.
_URL = re.compile(r"(?:(?<=://)|(?<=\w:/)(?!/))(?:(?!::[A-Za-z][A-Za-z0-9+.\-]*://)\S)+")
_NAME = (
    r"[\w.\-]*(?:secret|token|passw(?:or)?d|passphrase|signature|credential|authorization|(?:api|access|account)[\-_]?key)"
    r"[\w.\-]*|\bsig"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'&,;)}\]]+)"""
# name=value, 'name': 'value'. Not name: value, which is how sentences about such things look.
_NAMED = re.compile(rf"""((?<![\w.\-])(?:{_NAME})(?:\s*=\s*|["']\s*[:=]\s*))({_VALUE})""", re.IGNORECASE)
_HEADER = re.compile(r"(Authorization\s*:\s*(?:[\w\-]+\s+)?)[^\s\"']+", re.IGNORECASE)
# user:password@host without a scheme, as clients quote what they take for the name of a bucket.
_USER = re.compile(r"""(?<![\w/.:@])[\w.+%\-]+:[^\s/@"']+@(?=[\w\[])""")
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def redact(text: str) -> str:
    """Masks what may be a credential in a URL or in a text with URLs.

    Masked are user and password (`s3://***@bucket`, `***@bucket`), all values of a query (`?X-Amz-Signature=***`),
    values with a name such as secret, token or password (`token=***`), authorization headers and access key ids of AWS.
    In doubt more is masked than needed. A text without any of these, and one that was masked before, comes back as it
    is. A credential with blanks or `://` in it, which no URL can have, or one that begins with the mask, is not
    recognized.
    """
    text = _URL.sub(lambda match: _hide_in_url(match[0]), text)
    text = _USER.sub(MASK + "@", text)
    text = _HEADER.sub(lambda match: match[1] + MASK, text)
    text = _NAMED.sub(lambda match: match[0] if match[2].startswith(MASK) else match[1] + MASK, text)
    return _ACCESS_KEY.sub(MASK, text)


def _hide_in_url(rest: str) -> str:
    """`rest` is what follows `scheme://`."""
    head, at, tail = rest.rpartition("@")
    if at and ":" in head:  # a password may have any character in it, "/" and "@" too
        rest = f"{MASK}@{tail}"
    elif at and (at_host := re.match(r"[^/?#]*@", rest)):
        rest = f"{MASK}@{rest[at_host.end() :]}"
    start = re.search(r"\?|#(?=.*=)", rest)
    if start is None:
        return rest
    query = rest[start.end() :]
    closing = re.search(r"""["'),:]*$""", query)  # of the sentence around the URL
    assert closing is not None
    parts = [part.partition("=") for part in query[: closing.start()].split("&")]
    hidden = [name + "=" + MASK if equals else name and MASK for name, equals, _ in parts]
    return rest[: start.end()] + "&".join(hidden) + closing[0]


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):  # bars on a terminal make room
            super().emit(record)


def log_to_stderr() -> None:
    """Send what commands and libraries log to stderr, with credentials masked."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Masked("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def say(text: str) -> None:
    """Print to stderr, without credentials."""
    print(redact(text), file=sys.stderr)


class _Lines(io.StringIO):
    def write(self, text: str) -> int:
        if text.strip():
            print(redact(text.strip()), file=sys.stderr, flush=True)
        return len(text)


def progress(label: str, total: int | None, unit: str, items: Iterable[T] = (), **more: Any) -> "tqdm[T]":
    """How far something is that takes its time, with elapsed time and ETA: a bar on a terminal, elsewhere a line after
    QUIET seconds and then one in EVERY. The first rank shows it. Iterate over it, or ``update`` it in a ``with`` block.

    Args:
        total: what there is to do, in units such as "views".
        more: further arguments of tqdm.
    """
    line = "{desc}: {n_fmt} of {total_fmt} {unit}, elapsed {elapsed}, ETA {remaining}{postfix}"
    looks: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.2}
    if not (terminal := sys.stderr.isatty()):
        looks = {"file": _Lines(), "delay": QUIET, "mininterval": EVERY, "bar_format": line}
    more = {"leave": False, "miniters": 1, "smoothing": 0, "disable": rank() > 0, "unit": unit, **looks, **more}
    bar = tqdm(items, label, total, **more)
    if not terminal:
        bar.last_print_t = 0.0  # the first line waits for QUIET alone
    return bar


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments without credentials: it quotes them, and they may be URLs. Expands `~` where a
    shell does not: in `--output=~/x` and `outputs=~/x`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        path = re.compile(r"\A((?:[\w.\-]+=)?)((?:\./)?~.*)", re.DOTALL)
        expanded = [path.sub(lambda match: match[1] + expand_home(match[2]), text) for text in given]
        return super().parse_known_args(expanded, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def local_path(text: str) -> Path:
    """Reads an argument that is a path on this machine (a `type` of :class:`Parser`): a URL would become a folder."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{redact(text)} is a URL: give a path on this machine")
    return Path(text)


def expand_home(text: str) -> str:
    """A path or URL with the folder that a leading `~` or `~user` means. What is expanded stays so: it is absolute, as
    is a folder that is called `~`."""
    return os.path.abspath(text) if text.startswith("./~") else os.path.expanduser(text)


CLIENTS = {"aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests"}
"""Clients of stores: what they raise is no OSError, and says what a store has answered."""


class LostRank(RuntimeError):
    """Another rank does not answer any more."""


class TrainingError(RuntimeError):
    """Training can't go on, on all ranks alike; the text says why and what to do."""


class LostWorker(RuntimeError):
    """A process that decodes images for this rank has ended; the text says what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"a process that decodes images has ended ({reason.strip()}): if the machine's or the job's memory was "
            "full, ask for more or set data.workers lower"
        )


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank does not answer any more."""
    signs = r"onnection (closed by peer|was likely closed|reset|refused)|im(ed |e)out|NCCL|watchdog"
    return world_size() > 1 and (isinstance(error, LostRank) or re.search(signs, str(error)) is not None)


def in_one_sentence(error: RuntimeError) -> str | None:
    """What to tell of an error that ends a command; None where it takes a traceback."""
    if str(error).startswith("DataLoader worker"):  # torch's signal handler raises it, wherever the program is
        before = error.__context__  # why it was killed, if this process did it
        error = before if isinstance(before, LostWorker) else LostWorker(str(error))
    if isinstance(error, (TrainingError, LostWorker)) or type(error).__name__ == "OutOfMemoryError":
        return str(error)
    if "can't allocate memory" in str(error):  # torch's on the CPU
        return f"there is not enough memory ({str(error).splitlines()[0]}): set sizes such as planes.resolution lower"
    if is_lost_rank(error):
        said = str(error).splitlines()[0]
        return (
            f"rank {rank()} has lost another rank ({said}): its own error says why; training that is started again "
            "resumes from the newest checkpoint"
        )
    return None


def counted(number: int, what: str) -> str:
    """`1 scene`, `2 scenes`: a number and a word that has an s in the plural."""
    return f"{number} {what}{'s' * (number != 1)}"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean NAME?" with the known name nearest to a misspelled one, or "" where none is near.

    Args:
        cutoff: similarity in [0, 1] that the nearest must have; 0 always names one.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _of_path(error: Exception) -> str | None:
    """What to do about a path that the system refuses."""
    if not isinstance(error, OSError) or error.filename is None or error.errno is None:
        return None
    return f"{error.filename2 or error.filename} can't be used ({error.strerror}): mend it, or choose another path"


def command(body: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Make a command's body a function of its arguments (None: those of the process) that returns its exit code.

    0: done; 1: it failed, told in one sentence or with a traceback; 2: wrong input, one sentence; 130: Ctrl-C. What all
    ranks raise alike is told by the first.
    """

    @functools.wraps(body)
    def main(argv: list[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may be no UTF-8
        try:
            return body(argv) or 0
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            code, text = 1, traceback.format_exc()
            if isinstance(error, ValueError | OSError | ImportError):
                code, text = 2, f"error: {_of_path(error) or error}"
            elif isinstance(error, RuntimeError):
                text = text if (sentence := in_one_sentence(error)) is None else f"error: {sentence}"
            elif type(error).__module__.partition(".")[0] in CLIENTS:
                code, text = 2, f"error: {type(error).__name__}: {' '.join(str(error).split())}"
            if not (isinstance(error, OfAllRanks) and rank() > 0):
                say(text)
            return code

    return main


def end(code: int) -> NoReturn:
    """End the process with an exit code, also where other ranks do not answer any more."""
    if code and world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # exit handlers would wait for the other ranks
    sys.exit(code)


class ConfigError(ValueError):
    """A mistake in a configuration; its text is one line that names the key (dotted), the mistake and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


# ---- Mistakes in a configuration, as pydantic finds them


def explain(error: "ValidationError", cls: Any, data: Any, origins: Mapping[Key, str], fallback: str) -> ConfigError:
    """The most telling of pydantic's errors: an unknown key first, else the deepest, alternatives of a union joined."""
    found = [(_position(item["loc"], data, item["type"]), item) for item in error.errors(include_url=False)]
    unknown = [key for key, item in found if item["type"] in UNKNOWN]
    key = unknown[0] if unknown else max((key for key, _ in found), key=len)
    where, name = origin_of(key, origins, fallback), ".".join(key)
    if unknown:
        return ConfigError(f"{where}: unknown key {name}; {_nearest(cls, key)}")
    items = [item for position, item in found if position == key]
    first = items[0]
    value = first["input"]
    got = "got nothing" if value is None else f"got {_SHORT.repr(value)} ({kind_of(value)})"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return ConfigError(f"{where}: {'.'.join(key[:-1])}: {got}, expected more than {key[-1]} entries")
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{where}: missing key {name}; set it in the file or on the command line ({name}=...)")
    if first["type"] in ("value_error", "assertion_error"):
        return ConfigError(f"{where}: {name + ': ' if name else ''}{first['msg'].split(', ', 1)[-1]}")
    choices = re.findall(r"'([^']*)'", " ".join(str(item.get("ctx", {}).get("expected")) for item in items))
    hint = did_you_mean(str(value), choices)
    expected = " or ".join(dict.fromkeys(_expected(item["type"], item["msg"]) for item in items))
    return ConfigError(f"{where}: {name}: {got}, expected {expected}{hint}")


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redact(x), level)  # before it is cut: half a URL is not recognized


_SHORT = _Short()
_EXPECTED = {
    **dict.fromkeys(("model_type", "dataclass_type"), "a section (keys and values)"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "dict_type": "keys and values",
    "string_type": "text",
    "path_type": "a path",
    "none_required": "null",
}


def _expected(kind: str, message: str) -> str:
    if kind == "string_pattern_mismatch":
        return message.replace("String should match pattern", "text that matches", 1)
    return _EXPECTED.get(kind) or re.sub(r"^\w+ should (be|have) | after validation, not .*$", "", message)


def _position(loc: tuple[int | str, ...], data: Any, kind: str) -> Key:
    """The keys of an error's location without the names of union members, which pydantic puts among them."""
    key: list[str] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (last and kind.startswith("missing")):
            continue
        key.append(str(part))
    return tuple(key)


def origin_of(key: Key, origins: Mapping[Key, str], fallback: str) -> str:
    return next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), fallback)


def kind_of(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a map"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _nearest(cls: Any, key: Key) -> str:
    siblings = {(*key[:-1], name) for kind in sections_at(cls, key[:-1]) for name in _fields(kind)}
    for candidates in (siblings, set(all_keys(cls, ()))):
        names = sorted({candidate[-1] for candidate in candidates})
        near = difflib.get_close_matches(key[-1], names, n=1)
        if near:
            same = [candidate for candidate in candidates if candidate[-1] == near[0]]
            path = max(sorted(same), key=lambda other: difflib.SequenceMatcher(None, other, key).ratio())
            return f"did you mean {'.'.join(path)}?"
    here = ".".join(key[:-1])
    return f"the keys {'of ' + here if here else 'here'} are: {', '.join(sorted(name for *_, name in siblings))}"


def sections_at(cls: Any, key: Key) -> list[Any]:
    """The types that a key of a section has: more than one where they are alternatives."""
    level = [cls]
    for part in key:
        level = [deeper for kind in level for deeper in _children(kind, part)]
    return level


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, `Annotated` unwrapped."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif hasattr(annotation, "__metadata__"):
        yield from _members(annotation.__origin__)
    else:
        yield annotation


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and hasattr(kind, "model_fields"):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind) if isinstance(kind, type) and is_dataclass(kind) else {}


def _children(kind: Any, name: str) -> list[Any]:
    fields, inside = _fields(kind), [a for a in get_args(kind) if a is not Ellipsis]
    return list(_members(fields[name])) if name in fields else list(_members(inside[-1])) if inside else []


def all_keys(kind: Any, prefix: Key = ()) -> Iterator[Key]:
    """All keys of a section, those of inner sections too."""
    for name, annotation in _fields(kind).items():
        yield (*prefix, name)
        for member in _members(annotation):
            if len(prefix) < 8:  # a section that contains itself must end somewhere
                yield from all_keys(member, (*prefix, name))
