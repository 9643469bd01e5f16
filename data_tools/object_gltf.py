# SPDX-License-Identifier: Apache-2.0
"""Reads glTF 2.0 as its specification says: the scene's nodes, with skins, morph targets and instances as they are at
rest, and the colors of surfaces that scatter light evenly."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from gltf_file import GltfFile
from numpy.typing import NDArray
from object_files import BadMesh, Neighbours
from object_parts import CLAMP, MIRROR, REPEAT, Material, Part, Sampler, transformed
from PIL import Image

TRIANGLES, STRIP, FAN = 4, 5, 6
NEAREST = 9728
GLOSS = "KHR_materials_pbrSpecularGlossiness"
INSTANCING = "EXT_mesh_gpu_instancing"
Matrices = NDArray[np.float64]
Attributes = dict[str, NDArray[Any]]
Dressed = tuple[Material, dict[str, Any] | None, dict[str, Any] | None]
"""A material, and the glTF's textureInfo of its base color and of its emission."""


def read_gltf(files: Neighbours, data: bytes) -> list[Part]:
    """The parts of the default scene, in the file's coordinates.

    Raises:
        BadMesh: it is damaged, or has what is not understood; names the element.
    """
    file = GltfFile(files, data)
    worlds = _worlds(file)
    dressed = cache(lambda index: _material(file, index))
    meshes = cache(lambda index, weights: list(_primitives(file, index, weights, dressed)))
    parts = []
    for index in _visible(file):
        node = file.one("nodes", index)
        if "mesh" not in node:
            continue
        mesh = file.one("meshes", node["mesh"])
        places = _instances(file, index, worlds[index])
        for part, attributes in meshes(node["mesh"], tuple(node.get("weights") or mesh.get("weights") or ())):
            if "skin" in node:  # which puts the vertices where the joints are, wherever the node is
                places = [_skinned(file, index, worlds, attributes)]
            parts += [transformed(part, place) for place in places]
    return parts


def _extension(element: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = element.get("extensions", {}).get(name, {})
    return found


def _placed(translation: Any = (0, 0, 0), rotation: Any = (0, 0, 0, 1), scale: Any = (1, 1, 1)) -> Matrices:
    """[4, 4] of a translation, a quaternion (x, y, z, w) and a scale."""
    *axis, w = np.asarray(rotation, dtype=np.float64)
    cross, square = np.cross(axis, np.eye(3)).T, np.dot(rotation, rotation)
    matrix = np.eye(4)
    if square > 0:
        matrix[:3, :3] += 2 / square * (w * cross + cross @ cross)
    matrix[:3, :3] *= scale
    matrix[:3, 3] = translation
    return matrix


def _worlds(file: GltfFile) -> list[Matrices]:
    """[4, 4] to the world for each node, whether it is in the scene or not: joints need not be."""
    nodes = file.all("nodes")
    parents: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for child in node.get("children", ()):
            file.one("nodes", child)
            if parents.setdefault(child, index) != index:
                raise BadMesh(f"its nodes[{child}] has two parents: export it again as a tree")
    worlds: list[Any] = [None] * len(nodes)
    queue = [index for index in range(len(nodes)) if index not in parents]
    for index in queue:
        node = nodes[index]
        if "matrix" in node:
            local = np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
        else:
            local = _placed(**{key: node[key] for key in ("translation", "rotation", "scale") if key in node})
        worlds[index] = worlds[parents[index]] @ local if index in parents else local
        queue += node.get("children", ())
    if len(queue) < len(nodes):
        lost = next(index for index, world in enumerate(worlds) if world is None)
        raise BadMesh(f"its nodes[{lost}] is below itself: export it again as a tree")
    return worlds


def _visible(file: GltfFile) -> list[int]:
    """The nodes of the default scene, without those that are hidden."""
    if not file.all("scenes"):
        return []
    found: list[int] = []
    queue = list(dict.fromkeys(file.one("scenes", file.header.get("scene", 0)).get("nodes", ())))
    for index in queue:
        node = file.one("nodes", index)
        if _extension(node, "KHR_node_visibility").get("visible", True):
            found.append(index)
            queue += [child for child in node.get("children", ()) if child not in queue]
    return sorted(found)


def _instances(file: GltfFile, index: int, world: Matrices) -> list[Matrices]:
    """[4, 4] to the world of each copy of a node's mesh."""
    node = file.one("nodes", index)
    if INSTANCING not in node.get("extensions", {}):
        return [world]
    if "skin" in node:
        raise BadMesh(f"its nodes[{index}] has a skin and {INSTANCING}, which exclude each other: export one of them")
    attributes = _extension(node, INSTANCING)["attributes"]
    known = [name for name in ("TRANSLATION", "ROTATION", "SCALE") if name in attributes]
    arrays = [file.numbers(attributes[name], normalized=True if name == "ROTATION" else None) for name in known]
    if len({len(array) for array in arrays}) > 1:
        raise BadMesh(f"{INSTANCING} of its nodes[{index}] has arrays of different lengths: export it again")
    count = len(arrays[0]) if arrays else file.one("accessors", next(iter(attributes.values())))["count"]
    names = [name.lower() for name in known]
    rows = zip(*arrays, strict=True) if arrays else [()] * count
    return [world @ _placed(**dict(zip(names, row, strict=True))) for row in rows]


def _skinned(file: GltfFile, index: int, worlds: list[Matrices], attributes: Attributes) -> Matrices:
    """[vertices, 4, 4]: the weighted mean of what the joints, as the nodes place them, do to each vertex."""
    skin = file.one("skins", file.one("nodes", index)["skin"])
    for joint in skin["joints"]:
        file.one("nodes", joint)
    bones = np.stack([worlds[joint] for joint in skin["joints"]])
    if "inverseBindMatrices" in skin:
        inverse = file.numbers(skin["inverseBindMatrices"])
        if len(inverse) < len(bones):
            few = f"{len(bones)} joints but {len(inverse)} inverse bind matrices"
            raise BadMesh(f"its nodes[{index}] has a skin of {few}: export it again")
        bones = bones @ inverse[: len(bones)]
    total, moved = np.zeros(len(attributes["POSITION"])), np.zeros((len(attributes["POSITION"]), 4, 4))
    sets = [name.removeprefix("JOINTS_") for name in attributes if name.startswith("JOINTS_")]
    for number in sets:
        joints, weights = attributes[f"JOINTS_{number}"], attributes[f"WEIGHTS_{number}"]
        if joints.max(initial=0) >= len(bones):
            raise BadMesh(
                f"its nodes[{index}] has a vertex of joint {joints.max()}, but {len(bones)} joints: export it again"
            )
        for joint, weight in zip(joints.T, weights.T, strict=True):
            moved += weight[:, None, None] * bones[joint]
            total += weight
    if not (total > 0).all():
        raise BadMesh(f"its nodes[{index}] has a skin, but vertices that no joint moves: apply the skin, or remove it")
    return moved / total[:, None, None]


def _primitives(
    file: GltfFile, index: int, weights: tuple[float, ...], dressed: Any
) -> Iterator[tuple[Part, Attributes]]:
    """The triangles of a mesh with morph targets of these weights; lines and points are left out."""
    for number, primitive in enumerate(file.one("meshes", index)["primitives"]):
        if (mode := primitive.get("mode", TRIANGLES)) not in (TRIANGLES, STRIP, FAN):
            continue
        place = f"meshes[{index}].primitives[{number}]"
        attributes = _attributes(file, place, primitive, weights)
        count = len(attributes["POSITION"])
        corners = file.numbers(primitive["indices"]) if "indices" in primitive else np.arange(count)
        triangles = _triangles(corners.astype(np.uint32), mode)
        if not len(triangles):
            continue
        material, base, glow = dressed(primitive.get("material"))
        colors = np.ones((count, 4), dtype=np.float32)
        if "COLOR_0" in attributes:
            colors[:, : attributes["COLOR_0"].shape[1]] = attributes["COLOR_0"]
        uv = np.zeros((count, 2), dtype=np.float32) if base is None else _uv(attributes, base, place)
        emission_uv = None if glow is None else _uv(attributes, glow, place)
        positions, normals = attributes["POSITION"].astype(np.float64), attributes.get("NORMAL")
        yield Part(positions, triangles, normals, uv, colors, material, emission_uv), attributes


def _attributes(file: GltfFile, place: str, primitive: dict[str, Any], weights: tuple[float, ...]) -> Attributes:
    normalized = {"COLOR": True, "WEIGHTS": True, "JOINTS": False}  # of the other integers, the file says it

    def values(name: str, index: int) -> NDArray[Any]:
        return file.numbers(index, normalized.get(name.split("_")[0]))

    given = primitive["attributes"].items()
    attributes = {name: values(name, index) for name, index in given if not name.startswith("_")}
    for weight, target in zip(weights, primitive.get("targets", ()), strict=False):
        for name, index in target.items() if weight else ():
            if name in attributes and name != "TANGENT":
                attributes[name] = attributes[name] + weight * values(name, index)
    if "POSITION" not in attributes:
        raise BadMesh(f"its {place} has no POSITION: export it again")
    count = len(attributes["POSITION"])
    for name, values in attributes.items():
        if len(values) != count:
            raise BadMesh(f"its {place} has {len(values)} {name} for {count} vertices: export it again")
    return attributes


def _triangles(corners: NDArray[np.uint32], mode: int) -> NDArray[np.uint32]:
    """[triangles, 3] of lists, strips and fans of corners."""
    if mode == TRIANGLES:
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    i = np.arange(max(len(corners) - 2, 0))
    if mode == FAN:
        return corners[np.stack([i + 1, i + 2, 0 * i], axis=1)]
    return corners[np.stack([i, i + 1 + i % 2, i + 2 - i % 2], axis=1)]


def _uv(attributes: Attributes, texture: dict[str, Any], place: str) -> NDArray[np.float32]:
    """[vertices, 2] where a texture is seen; v goes up, other than in the file."""
    change = _extension(texture, "KHR_texture_transform")
    name = f"TEXCOORD_{change.get('texCoord', texture.get('texCoord', 0))}"
    if name not in attributes:
        raise BadMesh(f"its {place} has no {name}, which its texture needs: unwrap it, or remove the texture")
    u, v = (attributes[name].astype(np.float64) * change.get("scale", (1, 1))).T
    # KHR_texture_transform: scale, rotation and offset, one after the other.
    cosine, sine = np.cos(change.get("rotation", 0)), np.sin(change.get("rotation", 0))
    x, y = change.get("offset", (0, 0))
    return np.stack([cosine * u + sine * v + x, 1 - (cosine * v - sine * u + y)], axis=1).astype(np.float32)


def _material(file: GltfFile, index: int | None) -> Dressed:
    described = {} if index is None else file.one("materials", index)
    if GLOSS in described.get("extensions", {}):
        base, image, texture = _glossy(file, f"materials[{index}]", _extension(described, GLOSS))
    else:
        plain = described.get("pbrMetallicRoughness", {})
        texture = plain.get("baseColorTexture")
        base, image = plain.get("baseColorFactor", (1.0,) * 4), _image(file, texture)
    modes: dict[str, float | None] = {"OPAQUE": 0.0, "MASK": described.get("alphaCutoff", 0.5), "BLEND": None}
    if (mode := described.get("alphaMode", "OPAQUE")) not in modes:
        raise BadMesh(f"its materials[{index}] has the alphaMode {mode!r}, which is not known: use {', '.join(modes)}")
    unlit = "KHR_materials_unlit" in described.get("extensions", {})
    strength = _extension(described, "KHR_materials_emissive_strength").get("emissiveStrength", 1.0)
    emission = np.array(described.get("emissiveFactor", (0, 0, 0)), dtype=np.float64) * (0 if unlit else strength)
    glow = described.get("emissiveTexture") if emission.any() else None
    material = Material(tuple(base), image, tuple(emission), _image(file, glow), modes[mode], unlit)
    samplers = {"base_sampler": _sampler(file, texture), "emission_sampler": _sampler(file, glow)}
    return replace(material, **samplers), texture, glow


def _glossy(file: GltfFile, place: str, gloss: dict[str, Any]) -> tuple[Any, Image.Image | None, dict[str, Any] | None]:
    """The base color of KHR_materials_pbrSpecularGlossiness: factor, texture and its textureInfo."""
    textures = [gloss[key] for key in ("diffuseTexture", "specularGlossinessTexture") if key in gloss]
    kinds = [({**texture, "index": 0}, _sampler(file, texture)) for texture in textures]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise BadMesh(
            f"{GLOSS} of its {place} has two textures that lie differently: convert it to metal and roughness"
        )
    from trimesh.visual.gloss import specular_to_pbr  # takes a second, and few files need it

    images = {key: _image(file, value) if key.endswith("Texture") else value for key, value in gloss.items()}
    read = specular_to_pbr(**images)
    return read.get("baseColorFactor", (1.0,) * 4), read.get("baseColorTexture"), textures[0] if textures else None


def _image(file: GltfFile, texture: dict[str, Any] | None) -> Image.Image | None:
    if texture is None:
        return None
    index, described = texture["index"], file.one("textures", texture["index"])
    sources = [_extension(described, name).get("source") for name in ("EXT_texture_webp", "EXT_texture_avif")]
    source = next((source for source in (*sources, described.get("source")) if source is not None), None)
    if source is None:
        names = ", ".join(described.get("extensions", {})) or "no image"
        raise BadMesh(f"its textures[{index}] is given as {names}: export it with PNG, JPEG or WebP")
    return file.image(source)


def _sampler(file: GltfFile, texture: dict[str, Any] | None) -> Sampler:
    described = {} if texture is None else file.one("textures", texture["index"])
    sampler = file.one("samplers", described["sampler"]) if "sampler" in described else {}
    wrap = sampler.get("wrapS", REPEAT), sampler.get("wrapT", REPEAT)
    if unknown := set(wrap) - {REPEAT, MIRROR, CLAMP}:
        raise BadMesh(
            f"its samplers[{described['sampler']}] wraps by {min(unknown)}, which is not known: export it again"
        )
    return Sampler(wrap, sampler.get("magFilter") == NEAREST)
