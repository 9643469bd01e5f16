# SPDX-License-Identifier: Apache-2.0
"""Reads meshes (glTF 2.0 and OBJ, by trimesh) into parts that can be drawn: triangles in the scene's world, with the
colors that the file means.

glTF is rewritten a little before trimesh reads it, for what trimesh would drop without a word: a GLB becomes a glTF
whose buffer is kept aside, materials get their index as name, so that it can be seen which texture got lost, and a
primitive without material gets an empty one, which keeps its vertex colors as they are in the file.
"""

import io
import json
import struct
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import numpy as np
import trimesh
from demo_objects import BALL, CUBE
from numpy.typing import NDArray
from object_files import BadMesh, Mesh, Neighbours
from PIL import Image

Floats = NDArray[np.float32]

UNDERSTOOD = {
    "EXT_texture_webp",
    "KHR_lights_punctual",
    "KHR_materials_clearcoat",
    "KHR_materials_emissive_strength",
    "KHR_materials_ior",
    "KHR_materials_iridescence",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_sheen",
    "KHR_materials_specular",
    "KHR_materials_transmission",
    "KHR_materials_unlit",
    "KHR_materials_variants",
    "KHR_materials_volume",
    "KHR_texture_transform",
}
"""glTF extensions that a file may require: its shape is right and its diffuse colors are too."""
FAN, INTEGERS = 6, (5121, 5123)
BUFFER = "igae:buffer"
PLAIN = 0.8
"""Brightness, as displayed, of an OBJ surface for which the file has no color."""
Y_UP_TO_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


@dataclass(frozen=True)
class Material:
    """Colors are linear, images are encoded as sRGB.

    Attributes:
        base: RGBA factor of the base color.
        base_image, emission_image: textures, or None for white ones.
        emission: RGB light that the surface sends by itself.
        cutoff: smallest alpha that is drawn; 0 draws all of an opaque surface, None blends.
        unlit: shown in its base color, without light.
    """

    base: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    base_image: Image.Image | None = None
    emission: tuple[float, ...] = (0.0, 0.0, 0.0)
    emission_image: Image.Image | None = None
    cutoff: float | None = 0.0
    unlit: bool = False


@dataclass(frozen=True)
class Part:
    """Triangles of one material.

    Attributes:
        positions: [vertices, 3] in the world.
        triangles: [triangles, 3] vertices.
        normals: [vertices, 3] unit length; None: the triangles are flat.
        uv: [vertices, 2], (0, 0) is the lower left corner of a texture.
        colors: [vertices, 4] linear RGBA.
    """

    positions: NDArray[np.float64]
    triangles: NDArray[np.uint32]
    normals: Floats | None
    uv: Floats
    colors: Floats
    material: Material


def to_linear(color: Any) -> NDArray[np.float64]:
    """The inverse of sRGB's transfer function (IEC 61966-2-1), for values in [0, 1]."""
    color = np.asarray(color, dtype=np.float64)
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def load(mesh: Mesh, fs: fsspec.AbstractFileSystem | None = None) -> tuple[list[Part], NDArray[np.float64]]:
    """Reads a mesh and moves it to where the cameras look.

    Args:
        fs: what its files are read from; that of `mesh.given` if left out.

    Returns:
        (parts, [4, 4] that takes the file's coordinates to the world): y up becomes z up, the center of the bounding
        box becomes the origin, and the object is as large as it can be in the cube of half the side CUBE and in the
        ball of radius BALL, which all cameras see whole.

    Raises:
        BadMesh: the file or one that it refers to is missing or damaged, nothing in it is a surface, ...
    """
    fs = fs or fsspec.core.url_to_fs(mesh.given)[0]
    data = fs.cat_file(mesh.path)
    try:
        read = _read_obj if mesh.path.lower().endswith(".obj") else _read_gltf
        parts = read(fs, mesh.path, data)
    except (BadMesh, MemoryError):
        raise
    except Exception as error:  # parsers raise whatever damaged files make them raise
        text = " ".join(str(error).split())[:300]
        raise BadMesh(f"it can't be read: {type(error).__name__}{': ' + text if text else ''}") from error
    if not parts:
        raise BadMesh("there are no triangles in it")
    used = np.concatenate([part.positions[np.unique(part.triangles)] for part in parts])
    if not np.isfinite(used).all():
        raise BadMesh("it has vertices with NaN or infinite coordinates")
    center = (used.max(axis=0) + used.min(axis=0)) / 2
    half = np.abs(used - center).max()
    if not half > 0:
        raise BadMesh("all its vertices are one point")
    scale = min(CUBE / half, BALL / np.linalg.norm(used - center, axis=1).max())
    to_world = Y_UP_TO_Z_UP @ np.diag([scale, scale, scale, 1.0])
    to_world[:3, 3] = -to_world[:3, :3] @ center
    return [_transformed(part, to_world) for part in parts], to_world


def _transformed(part: Part, matrix: NDArray[np.float64]) -> Part:
    turn = matrix[:3, :3]
    normals = None
    if part.normals is not None:
        # The cofactors are the inverse transposed, up to a factor, and exist for flattening matrices too.
        cofactors = np.stack([np.cross(turn[1], turn[2]), np.cross(turn[2], turn[0]), np.cross(turn[0], turn[1])])
        normals = part.normals @ cofactors.T
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        normals = (normals / np.where(length > 0, length, 1)).astype(np.float32)
    return replace(part, positions=part.positions @ turn.T + matrix[:3, 3], normals=normals)


def _read_obj(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> list[Part]:
    files = Neighbours(fs, path, {})
    scene = trimesh.load_scene(io.BytesIO(data), file_type="obj", resolver=files, process=False)
    if files.problems:
        raise BadMesh(files.problems[0])
    parts = []
    for geometry in scene.geometry.values():
        if not isinstance(geometry, trimesh.Trimesh) or not len(geometry.faces):
            continue
        # Colors of an OBJ are as displayed, those of a glTF are linear.
        visual, colors = geometry.visual, None
        if visual.kind == "vertex":
            colors = visual.vertex_colors / 255.0
        material = Material()
        if visual.kind == "texture" and visual.material.image is not None:
            image = visual.material.image  # as most programs do: without the factor Kd, which is often black
            material = Material(base_image=image, cutoff=None if image.has_transparency_data else 0.0)
        elif visual.kind == "texture" and "kd" in visual.material.kwargs:
            material = Material(base=(*to_linear(visual.material.diffuse[:3] / 255.0), 1.0))
        elif colors is None:
            material = Material(base=(*to_linear([PLAIN] * 3), 1.0))
        if colors is not None:
            colors[:, :3] = to_linear(colors[:, :3])
        uv = visual.uv if visual.kind == "texture" else None
        parts.append(_part(geometry, uv, colors, material))
    return parts


def _read_gltf(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> list[Part]:
    buffer = None
    if data[:4] == b"glTF":
        data, buffer = _chunks(data)
    header = json.loads(data)
    if not isinstance(header, dict):
        raise BadMesh("it is no glTF")
    if unknown := sorted(set(header.get("extensionsRequired", ())) - UNDERSTOOD):
        raise BadMesh(f"it needs the glTF extension {unknown[0]}, which is not supported")
    if buffer is not None and header.get("buffers") and "uri" not in header["buffers"][0]:
        header["buffers"][0]["uri"] = BUFFER
    materials = header.setdefault("materials", [])
    materials.append({})
    described = [dict(material) for material in materials]
    for index, material in enumerate(materials):
        material["name"] = str(index)
    for entry in header.get("meshes", ()):
        for primitive in entry["primitives"]:
            _check_primitive(header, primitive)
            primitive.setdefault("material", len(materials) - 1)
            texture = described[primitive["material"]].get("pbrMetallicRoughness", {}).get("baseColorTexture", {})
            attributes = primitive["attributes"]
            if channel := _transform(texture).get("texCoord", texture.get("texCoord", 0)):
                attributes["TEXCOORD_0"] = attributes[f"TEXCOORD_{channel}"]
    for node in header.get("nodes", ()):
        node.pop("camera", None)  # trimesh leaves out the nodes below one
    files = Neighbours(fs, path, {BUFFER: buffer or b""})
    text = json.dumps(header).encode()
    scene = trimesh.load_scene(io.BytesIO(text), file_type="gltf", resolver=files, process=False)
    parts = []
    for node in sorted(scene.graph.nodes_geometry):
        matrix, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or not len(geometry.faces):
            continue
        material, uv_matrix = _material(geometry.visual.material, described)
        uv = geometry.visual.uv
        if uv is not None and uv_matrix is not None:
            # The file's v goes down, trimesh's goes up.
            down = np.stack([uv[:, 0], 1 - uv[:, 1], np.ones(len(uv))]).T @ uv_matrix.T
            uv = np.stack([down[:, 0], 1 - down[:, 1]], axis=1)
        colors = geometry.visual.vertex_attributes.get("color")
        if colors is not None:
            if colors.dtype.kind == "u":
                colors = colors / np.iinfo(colors.dtype).max
            if colors.shape[1] == 3:
                colors = np.concatenate([colors, np.ones((len(colors), 1))], axis=1)
        parts.append(_transformed(_part(geometry, uv, colors, material), matrix))
    return parts


def _chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """JSON and, where there is one, buffer of a GLB."""
    _, version, length, json_length, _ = struct.unpack_from("<4sIIII", data)
    if version != 2:
        raise BadMesh(f"it is glTF {version}: only version 2 is supported")
    if len(data) < length:
        raise BadMesh(f"it has {len(data)} bytes of {length}: it was not downloaded whole")
    start = 20 + json_length
    if start + 8 > length:
        return data[20:start], None
    size, _ = struct.unpack_from("<II", data, start)
    return data[20:start], data[start + 8 : start + 8 + size]


def _check_primitive(header: dict[str, Any], primitive: dict[str, Any]) -> None:
    """Refuse what trimesh reads as something else, or not at all."""
    if primitive.get("mode") == FAN:
        raise BadMesh("it has triangle fans, which are not supported")
    for name, index in {**primitive["attributes"], "indices": primitive.get("indices")}.items():
        if index is None:
            continue
        accessor = header["accessors"][index]
        if "sparse" in accessor:
            raise BadMesh(f"its {name} is sparse, which is not supported")
        if "bufferView" not in accessor:
            raise BadMesh(f"its {name} is compressed, which is not supported")
        if name.startswith("TEXCOORD") and accessor["componentType"] in INTEGERS:
            raise BadMesh("its texture coordinates are integers, which is not supported")


def _transform(texture: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = texture.get("extensions", {}).get("KHR_texture_transform", {})
    return found


def _material(read: Any, described: list[dict[str, Any]]) -> tuple[Material, NDArray[np.float64] | None]:
    """The material that trimesh read, completed by its description in the file, and what is done to its uv."""
    description = described[int(read.name)]
    gloss = description.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
    texture = description.get("pbrMetallicRoughness", {}).get("baseColorTexture") or gloss.get("diffuseTexture")
    glow = description.get("emissiveTexture")
    for wanted, image in ((texture, read.baseColorTexture), (glow, read.emissiveTexture)):
        if wanted is not None and image is None:
            raise BadMesh(f"texture {wanted.get('index')} of it is missing, damaged or of an unknown format")
    base = (1.0,) * 4 if read.baseColorFactor is None else tuple(read.baseColorFactor / 255.0)
    emission = np.zeros(3) if read.emissiveFactor is None else read.emissiveFactor
    modes: dict[str, float | None] = {"OPAQUE": 0.0, "MASK": description.get("alphaCutoff", 0.5), "BLEND": None}
    material = Material(
        base=base,
        base_image=read.baseColorTexture,
        emission=tuple(emission),
        emission_image=read.emissiveTexture,
        cutoff=modes[read.alphaMode or "OPAQUE"],
        unlit="KHR_materials_unlit" in description.get("extensions", {}),
    )
    if not (change := _transform(texture or {})):
        return material, None
    (x, y), (sx, sy), angle = change.get("offset", (0, 0)), change.get("scale", (1, 1)), change.get("rotation", 0)
    # KHR_texture_transform: offset, rotation and scale, applied from right to left.
    cosine, sine = np.cos(angle), np.sin(angle)
    return material, np.array([[cosine * sx, sine * sy, x], [-sine * sx, cosine * sy, y], [0, 0, 1]])


def _part(geometry: trimesh.Trimesh, uv: Any, colors: Any, material: Material) -> Part:
    # Asked for, trimesh would make normals up that are smooth over the edges of a box: only those of the file count.
    normals = geometry.vertex_normals if "vertex_normals" in geometry._cache else None
    count, triangles = len(geometry.vertices), geometry.faces
    if triangles.min() < 0 or triangles.max() >= count:
        raise BadMesh(f"a triangle has vertex {int(triangles.max())}, but there are {count}")
    for what, values in (("normals", normals), ("texture coordinates", uv), ("colors", colors)):
        if values is not None and len(values) != count:
            raise BadMesh(f"it has {len(values)} {what} for {count} vertices")
    if uv is None:
        material = replace(material, base_image=None, emission_image=None)
    return Part(
        np.asarray(geometry.vertices, dtype=np.float64),
        np.asarray(triangles, dtype=np.uint32),
        None if normals is None else np.asarray(normals, dtype=np.float32),
        np.zeros((count, 2), dtype=np.float32) if uv is None else np.asarray(uv, dtype=np.float32),
        np.ones((count, 4), dtype=np.float32) if colors is None else np.asarray(colors, dtype=np.float32),
        material,
    )
