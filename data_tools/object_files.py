# SPDX-License-Identifier: Apache-2.0
"""Mesh files where users have them: found by file, glob, folder or URL, and the files that they refer to."""

import contextlib
import glob
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from igae.errors import redact, say
from igae.storage import list_files

SUFFIXES = (".glb", ".gltf", ".obj")


class BadMesh(ValueError):
    """One sentence about a mesh that can't be rendered."""


@dataclass(frozen=True)
class Mesh:
    """A mesh file: the name of its scene, what the user called its place, and its path in that file system."""

    name: str
    given: str
    path: str

    @property
    def source(self) -> str:
        """The file, without credentials: as it is shown and written down."""
        fs, _ = fsspec.core.url_to_fs(self.given)
        return redact(fs.unstrip_protocol(self.path)).removeprefix("file://")


def find_meshes(arguments: Sequence[str]) -> list[Mesh]:
    """Finds the meshes that files, globs, folders (searched recursively) and URLs of these name, in a stable order.

    A scene has the name of its file; where several files have one name (`model.obj`), the folders up to the argument's
    own are put before it (`chair_17_model`).

    Raises:
        ValueError: an argument names no mesh, or two files would still have one name.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for given in arguments:
        fs, path = fsspec.core.url_to_fs(given)
        path = path.rstrip("/")
        if fs.isfile(path):
            files, root = [path], posixpath.dirname(path)
        elif fs.isdir(path):
            below, problems = list_files(given, lambda file: file.lower().endswith(SUFFIXES))
            for problem in problems:
                say(problem)
            files, root = list(below), path
        else:
            root = posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
            while fs.isdir(deeper := posixpath.join(root, path[len(root) :].lstrip("/").split("/")[0])):
                root = deeper  # its brackets are its name
            files = matching(fs, root, path[len(root) :].lstrip("/"))
        files = sorted(file for file in files if file.lower().endswith(SUFFIXES))
        if not files:
            raise ValueError(f"there is no .glb, .gltf or .obj file in {redact(given)}")
        for file in files:
            inside = file.removeprefix(root).lstrip("/").rsplit(".", 1)[0]
            key = fs.unstrip_protocol(file)
            if isinstance(fs, LocalFileSystem):  # a folder counts once, whatever links lead to it
                key = posixpath.join(os.path.realpath(posixpath.dirname(file)), posixpath.basename(file))
            found.setdefault(key, (given, file, inside))
    stems = Counter(posixpath.basename(inside) for _, _, inside in found.values())
    meshes: dict[str, Mesh] = {}
    for given, file, inside in found.values():
        stem = posixpath.basename(inside)
        mesh = Mesh(stem if stems[stem] == 1 else inside.replace("/", "_"), given, file)
        if mesh.name in meshes:
            other = meshes[mesh.name].source
            raise ValueError(f"{other} and {mesh.source} would both be the scene {mesh.name!r}: rename one of them")
        meshes[mesh.name] = mesh
    return list(meshes.values())


def matching(fs: fsspec.AbstractFileSystem, folder: str, pattern: str) -> list[str]:
    """The files in a folder, whose own name may have brackets, that a glob finds; `**` stands for all below.

    Links of local folders are followed, except for those that lead back to a folder that they are in.

    Raises:
        ValueError: a folder can't be read.
    """
    if not isinstance(fs, LocalFileSystem):
        return fs.find(folder) if pattern == "**" else fs.glob(f"{glob.escape(folder)}/{pattern}")
    fits = re.compile(glob_translate(pattern))
    depth = math.inf if "**" in pattern else pattern.count("/") + 1
    return [path for path in _below(folder, depth, ()) if fits.match(path[len(folder) :].lstrip("/"))]


def _below(folder: str, depth: float, above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if depth == 0 or real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(
            f"{folder} can't be read ({error.strerror}): change its permissions, or leave it out"
        ) from error
    for path in (posixpath.join(folder, name) for name in names):
        if os.path.isdir(path):
            yield from _below(path, depth - 1, (*above, real))
        else:
            yield path


class Neighbours:
    """The files beside a mesh that it refers to.

    What the mesh says is not trusted: whatever it names is looked for in its folder and at most one above, where other
    machines' absolute paths and backslashes are taken for what they meant.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._folder = posixpath.dirname(path)

    def get(self, name: str) -> bytes:
        """Content of a file; BadMesh where there is none."""
        if (path := self._find(name)) is None:
            raise BadMesh(f"{name!r}, which it refers to, is missing: put it beside the mesh")
        content: bytes = self._fs.cat_file(path)
        return content

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._find(name) is not None

    def _find(self, name: str) -> str | None:
        return next((path for path in self._candidates(name) if self._fs.isfile(path)), None)

    def _candidates(self, name: str) -> list[str]:
        above = posixpath.dirname(self._folder)
        places = []
        names = [name.strip(), unquote(name.strip())]
        with contextlib.suppress(UnicodeError):  # files whose names are encoded as the mesh is, in Latin-1
            names.append(os.fsdecode(name.strip().encode("latin-1")))
        for text in dict.fromkeys(names):
            text = text.replace("\\", "/")
            if not re.match(r"/|[A-Za-z][A-Za-z0-9+.\-]*:", text):
                path = posixpath.normpath(posixpath.join(self._folder, text))
                if path.startswith(above.rstrip("/") + "/"):
                    places.append(path)
            places.append(posixpath.join(self._folder, posixpath.basename(text)))
        return places
