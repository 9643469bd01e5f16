# SPDX-License-Identifier: Apache-2.0
"""Which keys and extensions of a glTF are understood: each that is in no list here is refused with its name."""

import re
from collections.abc import Iterator
from typing import Any

from object_files import BadMesh

HONORED = {
    "EXT_mesh_gpu_instancing",
    "EXT_texture_avif",
    "EXT_texture_webp",
    "KHR_materials_emissive_strength",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_unlit",
    "KHR_mesh_quantization",
    "KHR_node_visibility",
    "KHR_texture_transform",
}
"""Extensions that are drawn as they say."""
HARMLESS = {
    "AGI_articulations",
    "AGI_stk_metadata",
    "CESIUM_primitive_outline",
    "EXT_instance_features",
    "EXT_lights_ies",
    "EXT_lights_image_based",
    "EXT_mesh_features",
    "EXT_structural_metadata",
    "FB_geometry_metadata",
    "GODOT_single_root",
    "KHR_animation_pointer",
    "KHR_audio_emitter",
    "KHR_implicit_shapes",
    "KHR_interactivity",
    "KHR_lights_punctual",
    "KHR_materials_anisotropy",
    "KHR_materials_clearcoat",
    "KHR_materials_diffuse_transmission",
    "KHR_materials_dispersion",
    "KHR_materials_ior",
    "KHR_materials_iridescence",
    "KHR_materials_sheen",
    "KHR_materials_specular",
    "KHR_materials_transmission",
    "KHR_materials_variants",
    "KHR_materials_volume",
    "KHR_node_hoverability",
    "KHR_node_selectability",
    "KHR_physics_rigid_bodies",
    "KHR_xmp",
    "KHR_xmp_json_ld",
    "MOZ_hubs_components",
    "MSFT_audio_emitter",
    "MSFT_lod",
    "MSFT_packing_normalRoughnessMetallic",
    "MSFT_packing_occlusionRoughnessMetallic",
    "OMI_collider",
    "OMI_physics_body",
    "OMI_physics_shape",
}
"""Extensions that change neither the shape nor the base color: lights, sounds, physics, metadata, what happens when
somebody does something, and how a surface reflects or lets light through, which is not drawn."""
FALLBACK = {"KHR_texture_basisu", "MSFT_texture_dds"}
"""Other encodings of a texture that has an ordinary one too, unless they are required."""

KEYS = {
    "": "asset scene scenes nodes meshes accessors bufferViews buffers materials textures images samplers skins "
    "animations cameras extensionsUsed extensionsRequired",
    "scenes": "nodes",
    "nodes": "camera children skin matrix mesh rotation scale translation weights",
    "meshes": "primitives weights",
    "primitives": "attributes indices material mode targets",
    "accessors": "bufferView byteOffset componentType normalized count type max min sparse",
    "sparse": "count indices values",
    "bufferViews": "buffer byteOffset byteLength byteStride target",
    "buffers": "uri byteLength",
    "materials": "pbrMetallicRoughness normalTexture occlusionTexture emissiveTexture emissiveFactor alphaMode "
    "alphaCutoff doubleSided",
    "pbrMetallicRoughness": "baseColorFactor baseColorTexture metallicFactor roughnessFactor metallicRoughnessTexture",
    "baseColorTexture": "index texCoord",
    "diffuseTexture": "index texCoord",
    "specularGlossinessTexture": "index texCoord",
    "emissiveTexture": "index texCoord",
    "textures": "sampler source",
    "images": "uri mimeType bufferView",
    "samplers": "magFilter minFilter wrapS wrapT",
    "skins": "inverseBindMatrices skeleton joints",
    "KHR_materials_pbrSpecularGlossiness": "diffuseFactor diffuseTexture specularFactor glossinessFactor "
    "specularGlossinessTexture",
    "KHR_materials_emissive_strength": "emissiveStrength",
    "KHR_texture_transform": "offset rotation scale texCoord",
    "KHR_node_visibility": "visible",
    "EXT_mesh_gpu_instancing": "attributes",
}
"""The keys that an element can have, besides ANYWHERE."""
ANYWHERE = {"name", "extras", "extensions"}
ATTRIBUTES = re.compile(r"(POSITION|NORMAL|TANGENT|(TEXCOORD|COLOR|JOINTS|WEIGHTS)_\d+|_.*)")
INSTANCES = re.compile(r"(TRANSLATION|ROTATION|SCALE|_.*)")


def check_keys(header: dict[str, Any]) -> None:
    """Refuses what could change shape or color and is not understood.

    Raises:
        BadMesh: it is no glTF 2.0, or one of its keys or extensions is in none of the lists.
    """
    version = str(header.get("asset", {}).get("version", "without a version"))
    if version.split(".")[0] != "2":
        raise BadMesh(f"it is glTF {version}: only version 2 is supported")
    if unknown := sorted(set(header.get("extensionsRequired", ())) - HONORED - HARMLESS):
        raise BadMesh(f"it needs the glTF extension {unknown[0]}, which is not supported: export it without")
    for place, kind, element in _elements("", "", header):
        for name in element.get("extensions", {}):
            if name not in HONORED | HARMLESS | FALLBACK:
                raise BadMesh(
                    f"its {place or 'root'} has the extension {name}, which is not supported: export it without"
                )
        unknown = []
        if kind in ("attributes", "targets"):
            known = INSTANCES if place.endswith("EXT_mesh_gpu_instancing.attributes") else ATTRIBUTES
            unknown = [key for key in element if not known.fullmatch(key)]
        elif kind in KEYS:
            unknown = [key for key in element if key not in ANYWHERE and key not in KEYS[kind].split()]
        if unknown:
            raise BadMesh(f"its {place or 'root'} has the key {unknown[0]!r}, which is not known: remove it")


def _elements(place: str, kind: str, value: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, key that it is found under, element) of all objects, except for those that mean nothing here."""
    if isinstance(value, dict):
        yield place, kind, value
        for key, inner in value.items():
            if key not in HARMLESS and key not in ("extras", "animations", "cameras", "asset"):
                yield from _elements(f"{place}.{key}" if place else key, key, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if isinstance(inner, dict):
                yield from _elements(f"{place}[{index}]", kind, inner)
