# SPDX-License-Identifier: Apache-2.0
"""Reads Wavefront OBJ: polygons, with colors of materials, textures and vertices, which are as displayed."""

from array import array
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from obj_materials import ObjMaterial, ObjMaterials, Picture, text_of
from object_files import BadMesh, Neighbours
from object_parts import Part, to_linear

HARMLESS = {"o", "g", "s", "l", "p", "vp", "mg", "lod", "bevel", "c_interp", "d_interp", "shadow_obj", "trace_obj"}
"""Names, groups, and what has no surface or is of other programs' renderings. All other keywords mean something."""
PLAIN = 0.8
"""Brightness, as displayed, of a surface for which the file has no color."""


@dataclass
class _Lines:
    """What the lines say, number after number: lists of lists would take several times the memory.

    Attributes:
        positions, colors, uv, normals: 3, 3 (NaN: none), 2 and 3 numbers each.
        libraries: material files.
        faces: indices from 1, by material, what they are of (0 positions, 1 uv, 2 normals) and number of corners.
    """

    positions: "array[float]" = field(default_factory=lambda: array("d"))
    colors: "array[float]" = field(default_factory=lambda: array("d"))
    uv: "array[float]" = field(default_factory=lambda: array("d"))
    normals: "array[float]" = field(default_factory=lambda: array("d"))
    libraries: list[str] = field(default_factory=list)
    faces: "dict[tuple[str | None, tuple[int, ...], int], array[int]]" = field(default_factory=dict)


@dataclass(frozen=True)
class _Vertices:
    """positions [n, 3], uv [m, 2], normals [k, 3], linear colors [n, 3] (NaN: none)."""

    positions: NDArray[np.float64]
    uv: NDArray[np.float64]
    normals: NDArray[np.float32]
    colors: NDArray[np.float64]

    def check(self, corners: NDArray[np.int64]) -> None:
        """Refuses corners [..., 3] of which there are none."""
        lists = (("vertex", self.positions), ("texture coordinate", self.uv), ("normal", self.normals))
        for axis, (what, values) in enumerate(lists):
            if (most := corners[..., axis].max()) >= len(values):
                raise BadMesh(f"a face has {what} {most + 1}, but there are {len(values)}: export it again")


def read_obj(files: Neighbours, data: bytes) -> list[Part]:
    """The parts of all materials, in the file's coordinates.

    Raises:
        BadMesh: it is damaged, or has what is not understood; names the line or the material.
    """
    lines = _parse(text_of(data))
    materials = ObjMaterials(files, lines.libraries)
    read = {name: materials.read(name) for name in dict.fromkeys(key[0] for key in lines.faces)}
    vertices = _Vertices(
        np.array(lines.positions).reshape(-1, 3),
        np.array(lines.uv).reshape(-1, 2),
        np.array(lines.normals, dtype=np.float32).reshape(-1, 3),
        _colors(np.array(lines.colors).reshape(-1, 3)),
    )
    parts = []
    for name, columns in dict.fromkeys(key[:2] for key in lines.faces):
        triangles = []
        for key, indices in lines.faces.items():
            if key[:2] == (name, columns):
                numbers = np.array(indices).reshape(-1, key[2], len(columns))
                corners = np.full((*numbers.shape[:2], 3), -1)
                corners[..., list(columns)] = numbers - 1
                vertices.check(corners)
                triangles.append(_triangulated(corners, vertices.positions))
        parts.append(_part(vertices, read[name], name, np.concatenate(triangles)))
    return parts


def _parse(text: str) -> _Lines:
    lines = _Lines()
    material: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key, values = words[0], words[1:]
        if "#" in line and key in ("v", "vt", "vn", "f", "fo"):
            values = line.split("#", 1)[0].split()[1:]
        try:
            if key == "v":
                if len(values) not in (3, 4, 6):
                    raise BadMesh(f"its line {number} has {len(values)} numbers: write v x y z or v x y z r g b")
                lines.positions.extend(map(float, values[:3]))
                lines.colors.extend(map(float, values[3:]) if len(values) == 6 else [np.nan] * 3)
            elif key == "vt":
                lines.uv.extend([float(values[0]), float([*values, "0"][1])])
            elif key == "vn":
                lines.normals.extend([float(values[0]), float(values[1]), float(values[2])])
            elif key in ("f", "fo"):
                _add_face(lines, material, values)
            elif key == "usemtl":
                material = line.split(None, 1)[1].strip() if values else None
            elif key == "mtllib":
                lines.libraries.append(line.split(None, 1)[1].strip())
            elif key not in HARMLESS:
                raise BadMesh(f"its line {number} has the keyword {key!r}, which is not supported: remove it")
        except (ValueError, IndexError) as error:
            if isinstance(error, BadMesh):
                raise
            raise BadMesh(f"its line {number} can't be read, {line.strip()[:80]!r}: {error}") from error
    return lines


def _add_face(lines: _Lines, material: str | None, values: list[str]) -> None:
    """Adds a face; indices below 0 count back from what the file has had so far. Written for speed."""
    values = [value.rstrip("/") for value in values]
    slashes, skips = values[0].count("/"), "//" in values[0]
    if len(values) < 3:
        raise ValueError("a face needs 3 corners")
    if not all(value.count("/") == slashes and ("//" in value) == skips for value in values):
        raise ValueError("its corners have different kinds of indices")
    columns = (0, 2) if skips else (0, 1, 2)[: slashes + 1]
    numbers = list(map(int, " ".join(values).replace("/", " ").split()))
    if len(numbers) != len(values) * len(columns):
        raise ValueError("its corners have different kinds of indices")
    if min(numbers) <= 0:
        have = len(lines.positions) // 3, len(lines.uv) // 2, len(lines.normals) // 3
        for at, number in enumerate(numbers):
            if number < 0:
                numbers[at] += have[columns[at % len(columns)]] + 1
            if numbers[at] <= 0:
                raise ValueError(f"there is no {number}")
    lines.faces.setdefault((material, columns, len(values)), array("q")).extend(numbers)


def _colors(colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear colors of vertices [n, 3], NaN for those without, of numbers to 1 or to 255."""
    if np.isnan(colors).all():
        return colors
    least, most = np.nanmin(colors), np.nanmax(colors)
    if least < 0 or most > 255 or 1.001 < most < 2:
        raise BadMesh(f"its vertices have colors from {least:g} to {most:g}: write them from 0 to 1 or from 0 to 255")
    return to_linear(colors / 255 if most >= 2 else np.minimum(colors, 1))


def _part(vertices: _Vertices, read: ObjMaterial, name: str | None, corners: NDArray[np.int64]) -> Part:
    """A part of triangles [triangles, 3, 3], whose corners that are equal become one vertex."""
    flat = corners.reshape(-1, 3)
    # In two steps, as a product of three lengths can be more than 64 bits hold.
    _, pairs = np.unique(flat[:, 0] * (len(vertices.uv) + 1) + flat[:, 1] + 1, return_inverse=True)
    keys = pairs * (len(vertices.normals) + 1) + flat[:, 2] + 1
    _, first, triangles = np.unique(keys, return_index=True, return_inverse=True)
    at, uv_at, normal_at = flat[first].T
    colors, material = vertices.colors[at], read.material
    if (blank := np.isnan(colors).any(axis=1)).all():
        colors = np.ones_like(colors)
        if not read.colored:
            material = replace(material, base=(*to_linear([PLAIN] * 3), material.base[3]))
    elif blank.any():
        where = "" if name is None else f" (material {name!r})"
        raise BadMesh(f"some of its vertices{where} have a color and some have none: give all of them one")
    has_uv, has_normals = uv_at.min() >= 0, normal_at.min() >= 0
    if (read.base or read.emission) and not has_uv:
        raise BadMesh(
            f"faces of its material {name!r} have no texture coordinates, which its texture needs: unwrap them"
        )
    uv = vertices.uv[uv_at] if has_uv else np.zeros((len(at), 2))
    return Part(
        vertices.positions[at],
        triangles.reshape(-1, 3).astype(np.uint32),
        vertices.normals[normal_at] if has_normals else None,
        _placed(uv, read.base),
        np.concatenate([colors, np.ones((len(at), 1))], axis=1).astype(np.float32),
        material,
        None if read.emission is None else _placed(uv, read.emission),
    )


def _placed(uv: NDArray[np.float64], picture: Picture | None) -> NDArray[np.float32]:
    return (uv if picture is None else uv * picture.scale + picture.offset).astype(np.float32)


def _triangulated(corners: NDArray[np.int64], positions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Triangles [triangles, 3, 3] of polygons [polygons, n, 3] of corners, whose first column is their position."""
    count = corners.shape[1]
    points = positions[corners[..., 0]]
    points = points - points[:, :1]
    normals = np.cross(points, np.roll(points, -1, axis=1)).sum(axis=1)
    edges = np.roll(points, -1, axis=1) - points
    turns = np.einsum("mni,mi->mn", np.cross(np.roll(edges, 1, axis=1), edges), normals)
    convex = (turns >= -1e-9 * (normals**2).sum(axis=1, keepdims=True)).all(axis=1)
    fan = np.stack([[0 * i, i, i + 1] for i in range(1, count - 1)])
    found = [corners[convex][:, fan].reshape(-1, 3, 3)]
    for polygon, shape, normal in zip(corners[~convex], points[~convex], normals[~convex], strict=True):
        axis = np.abs(normal).argmax()
        flat = np.delete(shape, axis, axis=1) * [1, 1 if (normal[axis] > 0) == (axis != 1) else -1]
        found.append(polygon[_ears(flat)])
    return np.concatenate(found)


def _ears(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Triangles [n - 2, 3] of a polygon [n, 2] that goes round counter-clockwise and may have corners that go in."""

    def turn(a: int, b: int, c: int) -> float:
        (x, y), (u, v) = points[b] - points[a], points[c] - points[a]
        return float(x * v - y * u)

    left, found = list(range(len(points))), []
    while len(left) > 3:
        for at in range(len(left)):
            a, b, c = left[at - 1], left[at], left[(at + 1) % len(left)]
            if turn(a, b, c) > 0 and not any(
                turn(a, b, p) > 0 and turn(b, c, p) > 0 and turn(c, a, p) > 0 for p in left if p not in (a, b, c)
            ):
                break
        found.append((a, b, c))  # of a polygon that crosses itself, or has no area: whichever was last
        left.remove(b)
    return np.array([*found, left], dtype=np.int64)
