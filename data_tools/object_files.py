# SPDX-License-Identifier: Apache-2.0
"""Mesh files where users have them: found by file, glob, folder or URL, and the files that they refer to."""

import io
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import fsspec
from PIL import Image

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
            files, root = fs.glob(path), posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
        files = sorted(file for file in files if file.lower().endswith(SUFFIXES))
        if not files:
            raise ValueError(f"there is no .glb, .gltf or .obj file in {redact(given)}")
        for file in files:
            inside = file.removeprefix(root).lstrip("/").rsplit(".", 1)[0]
            found.setdefault(fs.unstrip_protocol(file), (given, file, inside))
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


class Neighbours:
    """The files beside a mesh that it refers to, as trimesh asks for them (`trimesh.resolvers.Resolver`).

    What the mesh says is not trusted: whatever it names is looked for in its folder and at most one above, where other
    machines' absolute paths and backslashes are taken for what they meant.

    Attributes:
        problems: sentences about files that are missing, and images that are none.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, data: dict[str, bytes]) -> None:
        self._fs, self._data = fs, data
        self._folder = posixpath.dirname(path)
        self.problems: list[str] = []

    def get(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""
        if name in self._data:
            return self._data[name]
        for candidate in self._candidates(name):
            if self._fs.isfile(candidate):
                content: bytes = self._fs.cat_file(candidate)
                if not name.lower().endswith((".mtl", ".bin")):
                    self._check_image(name, content)
                return content
        self.problems.append(f"{name!r}, which it refers to, is missing")
        raise FileNotFoundError(f"{name!r}, which it refers to, is missing")

    __getitem__ = get

    def _candidates(self, name: str) -> list[str]:
        above = posixpath.dirname(self._folder)
        places = []
        for text in dict.fromkeys((name.strip(), unquote(name.strip()))):
            text = text.replace("\\", "/")
            if not re.match(r"/|[A-Za-z][A-Za-z0-9+.\-]*:", text):
                path = posixpath.normpath(posixpath.join(self._folder, text))
                if path.startswith(above.rstrip("/") + "/"):
                    places.append(path)
            places.append(posixpath.join(self._folder, posixpath.basename(text)))
        return places

    def _check_image(self, name: str, content: bytes) -> None:
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
        except Exception as error:  # decoders raise whatever a damaged file makes them raise
            self.problems.append(f"its texture {name!r} can't be read: {error}")
