# SPDX-License-Identifier: Apache-2.0
"""What a process does to a folder, recorded by strace, and what a disk may hold of that after a power cut.

The disk promises what POSIX does and no more. Bytes of a file are there up to its last fsync; of later ones nothing,
a part, or zeros in their place. A name that is made, renamed or removed is sure after an fsync of its folder; until
then each such change may have reached the disk or not, also a later one before an earlier one.
"""

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

CALLS = (
    "?open,openat,write,pwrite64,writev,pwritev,truncate,ftruncate,fallocate,lseek,fsync,fdatasync,?rename,"
    "?renameat,renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?mkdir,mkdirat,?rmdir,sendfile,"
    "copy_file_range"
)
STRACE = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-e", "signal=none"]
SAME = {"fdatasync": "fsync", "openat": "open", "renameat": "rename", "renameat2": "rename"}
SAME |= {"unlinkat": "unlink", "mkdirat": "mkdir"}
LINE = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\((.*?)| resumed>(.*?))(?: <unfinished \.\.\.>|\) += (-?\d+).*)")
PATH_OR_TEXT = re.compile(r'<((?:\\x..)*)>|"((?:\\x..)*)"')


class Call(NamedTuple):
    """A call of the system that succeeded: paths are absolute, texts are its strings as they were given."""

    name: str
    arguments: str
    paths: list[str]
    """Of open descriptors, the current folder's included."""
    texts: list[bytes]
    result: int


def can_record() -> bool:
    """Whether strace is there and may trace."""
    try:
        return subprocess.run([*STRACE, "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def read_calls(log: Path) -> Iterator[Call]:
    """The calls in a file of strace's, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        found = LINE.fullmatch(line)
        if found is None:
            assert re.match(r"\d+ +(\+\+\+|---|<\.\.\. )|\d+ +\w+\(.*= \?", line), line[:300]
            continue
        process, name, first, rest, result = found.groups()
        arguments = first if first is not None else begun.pop(process) + rest
        if result is None:
            begun[process] = arguments
        elif int(result) >= 0:
            places = PATH_OR_TEXT.findall(arguments)
            paths = [_bytes(path).decode() for path, _ in places if path]
            texts = [_bytes(found.group(2)) for found in PATH_OR_TEXT.finditer(arguments) if found.group(2) is not None]
            yield Call(name, PATH_OR_TEXT.sub("", arguments), paths, texts, int(result))


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


@dataclass
class File:
    sure: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Position and what was written there; None cuts or fills up the file to that many bytes."""
    now: bytes = b""
    position: int = 0

    def change(self, position: int, data: bytes | None) -> None:
        self.pending.append((position, data))
        self.now = _changed(self.now, position, data)

    def sync(self) -> None:
        self.sure, self.pending = self.now, []

    def after_cut(self, rng: random.Random) -> bytes:
        content, zeros = self.sure, rng.random() < 0.4
        there = rng.choice([0, len(self.pending), rng.randint(0, len(self.pending))])
        for number, (position, data) in enumerate(self.pending[: there + 1]):
            if data is not None and number == there:
                data = data[: rng.randint(0, len(data))]
            if number < there or data:
                content = _changed(content, position, bytes(len(data)) if zeros and data else data)
        return content


def _changed(content: bytes, position: int, data: bytes | None) -> bytes:
    if data is None:
        return content[:position].ljust(position, b"\0")
    return content[:position].ljust(position, b"\0") + data + content[position + len(data) :]


@dataclass
class Folder:
    sure: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)
    """Changes of names, each of which is done as a whole: a rename within a folder is of two names."""

    def sync(self) -> None:
        self.sure, self.pending = self.names(lambda change: True), []

    def names(self, there: Callable[[object], bool]) -> dict[str, "File | Folder"]:
        names: dict[str, File | Folder | None] = dict(self.sure)
        for change in filter(there, self.pending):
            names |= change
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """A folder that was empty, on a disk. :meth:`apply` takes calls and leaves out those elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root, self._top = root, Folder()

    def _find(self, path: str) -> "File | Folder | None":
        """None where it is outside, or removed while a descriptor was still open."""
        if not Path(path).is_relative_to(self.root):
            return None
        node: File | Folder | None = self._top
        for part in Path(path).relative_to(self.root).parts:
            node = node.names(lambda change: True).get(part) if isinstance(node, Folder) else None
        return node

    def _parent(self, path: str) -> tuple[Folder | None, str]:
        folder = self._find(str(Path(path).parent))
        assert folder is None or isinstance(folder, Folder)
        return folder, Path(path).name

    def apply(self, call: Call) -> bool:
        """Whether it changed something, or made sure of it."""
        kind = SAME.get(call.name, call.name)
        if kind == "fsync":
            node = self._find(call.paths[0])
            if node is not None:
                node.sync()
            return node is not None
        if kind in ("write", "pwrite64", "writev", "lseek", "ftruncate"):
            file = self._find(call.paths[0])
            return isinstance(file, File) and self._write(file, kind, call)
        given = [text.decode() for text in call.texts]
        bases = call.paths if len(call.paths) == len(given) else [""] * len(given)
        paths = [str(Path(base, path)) for base, path in zip(bases, given, strict=True)]
        below = [path for path in paths if Path(path).is_relative_to(self.root)]
        if not below:
            return False
        if kind == "open":
            return self._open(paths[0], call.arguments)
        folder, name = self._parent(paths[0])
        assert folder is not None, call
        if kind in ("mkdir", "unlink", "rmdir"):
            folder.pending.append({name: Folder() if kind == "mkdir" else None})
        else:
            assert kind == "rename" and len(below) == 2 and call.arguments.count("RENAME_") == 0, call
            target, new = self._parent(paths[1])
            node = self._find(paths[0])
            assert target is not None and node is not None, call
            if target is folder:
                folder.pending.append({name: None, new: node})
            else:
                target.pending.append({new: node})
                folder.pending.append({name: None})
        return True

    def _open(self, path: str, flags: str) -> bool:
        file = self._find(path)
        assert not isinstance(file, Folder) or "O_WRONLY" not in flags
        if file is None and "O_CREAT" in flags:
            folder, name = self._parent(path)
            assert folder is not None, path
            file = File()
            folder.pending.append({name: file})
        elif not isinstance(file, File) or not re.search("O_WRONLY|O_RDWR", flags):
            return False
        elif "O_TRUNC" in flags:
            file.change(0, None)
        file.position = len(file.now) if "O_APPEND" in flags else 0
        return True

    def _write(self, file: File, kind: str, call: Call) -> bool:
        """Files have one writer at a time, so a position is the file's."""
        if kind == "lseek":
            file.position = call.result
            return False
        numbers = [int(number) for number in re.findall(r"\d+", call.arguments)]
        if kind == "ftruncate":
            file.change(numbers[-1], None)
            return True
        data = b"".join(call.texts)[: call.result]
        file.change(numbers[-1] if kind == "pwrite64" else file.position, data)
        if kind != "pwrite64":
            file.position += len(data)
        return True

    def write(self, target: Path, cut: random.Random | None = None) -> None:
        """Make a folder of what is there, or what may be there after a power cut."""

        def put(node: File | Folder, path: Path) -> None:
            if isinstance(node, File):
                path.write_bytes(node.now if cut is None else node.after_cut(cut))
                return
            path.mkdir()
            often = 1.0 if cut is None else cut.choice([0.0, 0.5, 1.0])
            for name, child in node.names(lambda change: cut is None or cut.random() < often).items():
                put(child, path / name)

        put(self._top, target)
