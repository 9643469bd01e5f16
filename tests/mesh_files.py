# SPDX-License-Identifier: Apache-2.0
"""Mesh files written byte by byte, and a ray tracer that says what pictures of them have to show."""

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The unit cube: for each face 4 corners, counter-clockwise from outside; uv (0, 0), (1, 0), (1, 1), (0, 1).
NORMALS = np.array([[s * (a == i) for i in range(3)] for a in range(3) for s in (-1.0, 1.0)])
UV = np.array([[0.0, 0.0], [1, 0], [1, 1], [0, 1]])
FACE_COLORS = np.array([[200, 30, 40], [20, 160, 60], [40, 60, 220], [220, 200, 30], [160, 40, 200], [240, 240, 240]])
QUADRANTS = np.array([[[230, 40, 30], [30, 200, 60]], [[40, 50, 220], [240, 230, 50]]])  # [row from the top, column]
MARGIN = 0.15  # of a quadrant, where its neighbor is blended in


def cube() -> np.ndarray:
    """Corners [6, 4, 3]."""
    faces = []
    for normal in NORMALS:
        axis = int(np.abs(normal).argmax())
        right, up = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3]
        if normal.sum() < 0:
            right, up = up, right
        middle = 0.5 + normal / 2
        faces.append([middle + (u - 0.5) * right + (v - 0.5) * up for u, v in UV])
    return np.array(faces)


TRIANGLES = np.concatenate([[[4 * f, 4 * f + 1, 4 * f + 2], [4 * f, 4 * f + 2, 4 * f + 3]] for f in range(6)])


def linear(color: Any) -> np.ndarray:
    c = np.asarray(color, dtype=float)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def displayed(color: np.ndarray) -> np.ndarray:
    return np.where(color <= 0.0031308, color * 12.92, 1.055 * np.maximum(color, 1e-9) ** (1 / 2.4) - 0.055)


@dataclass
class Surface:
    """A cube as it has to come out: [4, 4] of its corners to the file's coordinates, linear colors [6, 3] of its
    faces (NaN: the texture's), and what they are multiplied with."""

    matrix: np.ndarray
    colors: np.ndarray
    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def corners(self) -> np.ndarray:
        return cube() @ self.matrix[:3, :3].T + self.matrix[:3, 3]


def texture_bytes() -> bytes:
    image = np.repeat(np.repeat(QUADRANTS.astype(np.uint8), 8, axis=0), 8, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def gltf_header(arrays: dict[str, np.ndarray], **more: Any) -> tuple[dict[str, Any], bytes]:
    """A file with one mesh of one primitive, whose attributes and `indices` are the arrays, and its buffer.

    Arrays of other things, such as matrices [n, 16] column by column, can be attributes of the user's: `_BIND`.
    """
    codes = {"float32": 5126, "uint32": 5125, "uint16": 5123, "int16": 5122, "uint8": 5121, "int8": 5120}
    accessors, views, buffer = [], [], b""
    for array in arrays.values():
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[1 if array.ndim == 1 else array.shape[1]]
        accessor = {"componentType": codes[array.dtype.name], "count": len(array), "type": kind}
        colors = array.dtype.kind == "u" and array.ndim > 1
        accessors.append({"bufferView": len(views), "normalized": colors, **accessor})
        views.append({"buffer": 0, "byteOffset": len(buffer), "byteLength": array.nbytes})
        buffer += array.tobytes() + b"\0" * (-array.nbytes % 4)
    attributes = {name: index for index, name in enumerate(arrays) if name != "indices"}
    primitive = {"attributes": attributes, "indices": list(arrays).index("indices"), **more.pop("primitive", {})}
    header = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(buffer)}],
        **more,
    }
    return header, buffer


def glb(header: dict[str, Any], buffer: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(buffer), b"BIN\0") + buffer
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def write_glb(path: Path) -> list[Surface]:
    """Two cubes of one mesh below a turned and moved node: vertex colors of 16 bits, normals, no material."""
    colors = np.repeat(FACE_COLORS, 4, axis=0)
    arrays = {
        "POSITION": cube().reshape(24, 3).astype("f4"),
        "NORMAL": np.repeat(NORMALS, 4, axis=0).astype("f4"),
        "COLOR_0": np.concatenate([colors * 257, np.full((24, 1), 65535)], axis=1).astype("u2"),
        "indices": TRIANGLES.ravel().astype("u4"),
    }
    axis, angle = np.array([1.0, 2.0, 3.0]) / np.sqrt(14), 0.7
    second = np.eye(4)
    second[:3, :3] = [[0.6, 0.2, 0], [0, 0.5, 0.1], [0, 0, 0.8]]  # sheared
    second[:3, 3] = 0.4, 1.3, -0.2
    nodes = [
        {"translation": [2, -1, 0.5], "rotation": [*np.sin(angle / 2) * axis, np.cos(angle / 2)], "children": [1, 2]},
        {"mesh": 0, "scale": [2, 1, 0.5]},
        {"mesh": 0, "matrix": second.T.ravel().tolist(), "camera": 0},
    ]
    lens = {"type": "perspective", "perspective": {"yfov": 1, "znear": 1, "aspectRatio": 1}}
    path.write_bytes(glb(*gltf_header(arrays, nodes=nodes, cameras=[lens])))
    # Rodrigues' formula.
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    parent = np.eye(4)
    parent[:3, :3] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    parent[:3, 3] = 2, -1, 0.5
    return [Surface(parent @ child, FACE_COLORS / 255) for child in (np.diag([2, 1, 0.5, 1]), second)]


def write_gltf(path: Path) -> list[Surface]:
    """A textured cube without normals; buffer and picture are files of their own. v of glTF goes down."""
    arrays = {
        "POSITION": (cube().reshape(24, 3) * [3, 1, 2]).astype("f4"),
        "TEXCOORD_0": (np.tile(UV, (6, 1)) * [1, -1] + [0, 1]).astype("f4"),
        "indices": TRIANGLES.ravel().astype("u2"),
    }
    factor = (0.8, 0.5, 1.0)
    material = {"pbrMetallicRoughness": {"baseColorFactor": [*factor, 1], "baseColorTexture": {"index": 0}}}
    more = {"materials": [material], "textures": [{"source": 0}], "images": [{"uri": "my%20crate.png"}]}
    header, buffer = gltf_header(arrays, primitive={"material": 0}, **more)
    header["buffers"][0]["uri"] = "crate.bin"
    path.write_text(json.dumps(header))
    (path.parent / "crate.bin").write_bytes(buffer)
    (path.parent / "my crate.png").write_bytes(texture_bytes())
    return [Surface(np.diag([3.0, 1, 2, 1]), np.full((6, 3), np.nan), factor)]


def write_obj(path: Path) -> list[Surface]:
    """A cube of quads, three faces textured and three of one color; the picture is in the folder above."""
    lines = ["mtllib sofa.mtl"]
    lines += ["v {} {} {}".format(*corner) for corner in (cube().reshape(24, 3) * [1, 2, 1] - 5)]
    lines += ["vt {} {}".format(*uv) for uv in UV]
    for face in range(6):
        lines += ["usemtl wood"] * (face == 0) + ["usemtl paint"] * (face == 3)
        lines.append("f " + " ".join(f"{4 * face + i + 1}/{i + 1}" for i in range(4)))
    path.write_text("\n".join(lines) + "\n")
    mtl = "newmtl wood\nKd 0 0 0\nmap_Kd ..\\textures\\wood.png\nnewmtl paint\nKd 0.2 0.6 0.9\n"
    path.with_name("sofa.mtl").write_text(mtl)
    textures = path.parent.parent / "textures"
    textures.mkdir()
    (textures / "wood.png").write_bytes(texture_bytes())
    matrix = np.diag([1.0, 2, 1, 1])
    matrix[:3, 3] = -5
    painted = linear([0.2, 0.6, 0.9])
    return [Surface(matrix, np.where(np.arange(6)[:, None] < 3, np.nan, painted))]


def light(normals: np.ndarray, ambient: float, lights: Any) -> np.ndarray:
    total = np.full(normals.shape[:-1], ambient)
    for direction, strength in lights:
        unit = np.array(direction) / np.linalg.norm(direction)
        total += strength * np.maximum(normals @ unit, 0)
    return total


def trace(
    surfaces: list[Surface], to_world: np.ndarray, frame: dict[str, Any], ambient: float, lights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a view shows, ray by ray through the pixels' centers.

    Returns:
        (displayed colors [h, w, 3] in [0, 1], hit [h, w], sure [h, w]: the ray passes no edge nearer than 1 % of a
        face, and the texture is of one color there).
    """
    pose, side = np.array(frame["transform_matrix"]), int(frame["w"])
    j, i = np.meshgrid(np.arange(side), np.arange(side))
    x, y = (j + 0.5 - frame["cx"]) / frame["fl_x"], (i + 0.5 - frame["cy"]) / frame["fl_y"]
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ pose[:3, :3].T
    eye = pose[:3, 3]
    nearest = np.full((side, side), np.inf)
    colors = np.ones((side, side, 3))
    sure = np.ones((side, side), dtype=bool)
    for surface in surfaces:
        for corners, color in zip(surface.corners(), surface.colors, strict=True):
            corners = corners @ to_world[:3, :3].T + to_world[:3, 3]
            origin, a, b = corners[0], corners[1] - corners[0], corners[3] - corners[0]  # a parallelogram
            normal = np.cross(a, b)
            normal /= np.linalg.norm(normal)
            with np.errstate(divide="ignore", invalid="ignore"):
                depth = ((origin - eye) @ normal) / (rays @ normal)
            place = eye + rays * depth[..., None] - origin
            u, v = np.einsum("hwc,kc->khw", place, np.linalg.pinv(np.stack([a, b]).T))
            inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1) & (depth > 0)
            edge = np.minimum.reduce([np.abs(u), np.abs(1 - u), np.abs(v), np.abs(1 - v)])
            near = (u > -0.01) & (u < 1.01) & (v > -0.01) & (v < 1.01)
            front = depth < nearest
            nearest = np.where(inside & front, depth, nearest)
            seen = normal if (eye - origin) @ normal > 0 else -normal
            steep = np.abs(rays @ normal) < 0.35 * np.linalg.norm(rays, axis=-1)
            if np.isnan(color).any():
                column, row = (u > 0.5).astype(int), (v < 0.5).astype(int)
                base = linear(QUADRANTS[row, column] / 255) * surface.factor
                inner = np.minimum.reduce([np.abs(u - 0.5), np.abs(v - 0.5), edge]) > MARGIN
                plain = inner & ~steep
            else:
                base, plain = np.broadcast_to(color, colors.shape), np.ones_like(sure)
            shown = displayed(np.clip(base * light(seen, ambient, lights), 0, 1))
            colors = np.where((inside & front)[..., None], shown, colors)
            sure = np.where(inside & front, plain & (edge > 0.01), sure & ~(near & front & (edge < 0.01)))
    return colors, np.isfinite(nearest), sure
