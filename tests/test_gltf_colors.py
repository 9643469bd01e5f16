# SPDX-License-Identifier: Apache-2.0
"""What a glTF says about colors: factors, textures of all kinds, where they lie and how they are read."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import mesh_files
import numpy as np
import pytest
from PIL import Image, features

pytest.importorskip("trimesh", reason="pip install -e '.[objects]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_tools"))

from object_files import BadMesh, find_meshes  # noqa: E402
from object_meshes import Part, load  # noqa: E402

REPEAT, MIRROR, CLAMP, NEAREST = 10497, 33648, 33071, 9728
SQUARE = {
    "POSITION": np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype="f4"),
    "TEXCOORD_0": np.array([[0, 1], [1, 1], [1, 0], [0, 0]], dtype="f4"),
    "TEXCOORD_1": np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]], dtype="f4"),
    "indices": np.array([0, 1, 2, 0, 2, 3], dtype="u2"),
}
RED = Image.new("RGB", (2, 2), (200, 30, 40))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def read(tmp_path: Path, material: dict[str, Any], *pictures: bytes, **more: Any) -> Part:
    """A square of a material; picture i is `images[i]`, a file of its own, and that of `textures[i]`."""
    header, buffer = mesh_files.gltf_header(SQUARE | more.pop("arrays", {}), primitive={"material": 0})
    header["buffers"][0]["uri"] = "square.buffer"
    (tmp_path / "square.buffer").write_bytes(buffer)
    for index, picture in enumerate(pictures):
        (tmp_path / f"{index}.picture").write_bytes(picture)
    header["images"] = [{"uri": f"{index}.picture"} for index in range(len(pictures))]
    header["textures"] = [{"source": index, "sampler": index} for index in range(len(pictures))]
    header["samplers"] = [{} for _ in pictures]
    header["materials"] = [material]
    for key, value in more.items():
        header[key] = [{**old, **new} for old, new in zip(header[key], value, strict=True)]
    (tmp_path / "square.gltf").write_text(json.dumps(header))
    ((part,), _) = load(find_meshes([str(tmp_path / "square.gltf")])[0])
    return part


def plain(**texture: Any) -> dict[str, Any]:
    return {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0, **texture}}}


def up(uv: Any) -> np.ndarray:
    return np.asarray(uv) * [1, -1] + [0, 1]


def test_factors_are_exact(tmp_path):
    part = read(tmp_path, {"pbrMetallicRoughness": {"baseColorFactor": [0.002, 0.5, 1, 0.25]}, "alphaMode": "BLEND"})
    assert part.material.base == (0.002, 0.5, 1, 0.25) and part.material.cutoff is None


def test_emission_has_its_factor_strength_and_coordinates(tmp_path):
    green = Image.new("RGB", (2, 2), (0, 255, 0))
    change = {"KHR_texture_transform": {"offset": [0.5, 0.25], "scale": [2, 3]}}
    material = plain() | {
        "emissiveFactor": [0.1, 0.2, 0.3],
        "emissiveTexture": {"index": 1, "texCoord": 1, "extensions": change},
        "extensions": {"KHR_materials_emissive_strength": {"emissiveStrength": 4}},
    }
    samplers = [{"wrapS": CLAMP}, {"wrapT": MIRROR, "magFilter": NEAREST}]
    part = read(tmp_path, material, encoded(RED), encoded(green), samplers=samplers)
    assert part.material.emission == pytest.approx([0.4, 0.8, 1.2])
    assert part.material.emission_image.getpixel((0, 0)) == (0, 255, 0, 255)
    assert part.material.base_image.getpixel((0, 0)) == (200, 30, 40, 255)
    assert part.uv == pytest.approx(up(SQUARE["TEXCOORD_0"]))
    assert part.emission_uv == pytest.approx(up(SQUARE["TEXCOORD_1"] * [2, 3] + [0.5, 0.25]), abs=1e-6)
    base, glow = part.material.base_sampler, part.material.emission_sampler
    assert (base.wrap, base.nearest) == ((CLAMP, REPEAT), False)
    assert (glow.wrap, glow.nearest) == ((REPEAT, MIRROR), True)
    # The factor is black where there is none, and unlit surfaces send no light.
    black = {key: value for key, value in material.items() if key != "emissiveFactor"}
    unlit = material | {"extensions": {"KHR_materials_unlit": {}}}
    for dark in (black, unlit):
        assert read(tmp_path, dark, encoded(RED), encoded(green)).material.emission == (0, 0, 0)


def test_pictures_of_all_kinds(tmp_path):
    """16 bits are scaled, not cut off; what is transparent stays so; the name says nothing about the kind."""
    gray = Image.fromarray(np.array([[0, 0x1234], [0x8000, 0xFFFF]], dtype=np.uint16))
    buffer = io.BytesIO()
    gray.save(buffer, "PNG", transparency=0x8000)
    cases = [
        (encoded(gray), [[0, 255], [18, 255], [128, 255], [255, 255]]),
        (buffer.getvalue(), [[0, 255], [18, 255], [128, 0], [255, 255]]),
        (encoded(Image.new("1", (2, 2), 1)), [[255, 255]] * 4),
        (encoded(Image.new("LA", (2, 2), (7, 9))), [[7, 9]] * 4),
    ]
    for picture, expected in cases:
        image = read(tmp_path, plain(), picture).material.base_image
        assert np.asarray(image)[..., [0, 3]].reshape(4, 2).tolist() == expected and image.mode == "RGBA"
    cmyk = read(tmp_path, plain(), encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "JPEG")).material.base_image
    assert np.abs(np.array(cmyk.getpixel((0, 0))) - (255, 0, 0, 255)).max() < 3  # JPEG's own loss
    with pytest.raises(BadMesh, match=r"'0.picture' has values of 32 bits: save it with 8 or 16 bits"):
        read(tmp_path, plain(), encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_other_encodings_of_textures(tmp_path):
    """The extension's picture where it can be read, the ordinary one beside it otherwise, and a name without both."""
    for name, kind in (("EXT_texture_webp", "WEBP"), ("EXT_texture_avif", "AVIF")):
        if not features.check(kind.lower()):
            continue
        other = encoded(Image.new("RGB", (8, 8), (10, 200, 10)), kind)
        extension = {"extensions": {name: {"source": 1}}}
        part = read(tmp_path, plain(), encoded(RED), other, textures=[extension, {}])
        assert np.abs(np.array(part.material.base_image.getpixel((4, 4))) - (10, 200, 10, 255)).max() < 10
    compressed = {"extensions": {"KHR_texture_basisu": {"source": 1}}}
    part = read(tmp_path, plain(), encoded(RED), b"ktx", textures=[compressed, {}])
    assert part.material.base_image.getpixel((0, 0)) == (200, 30, 40, 255)
    with pytest.raises(BadMesh, match=r"textures\[0\] is given as KHR_texture_basisu: export it with PNG"):
        read(tmp_path, plain(), encoded(RED), b"ktx", textures=[compressed | {"source": None}, {}])


def test_colors_of_vertices_and_coordinates_may_be_integers(tmp_path):
    """Colors are linear fractions, whether the file says so or not; coordinates are as it says."""
    arrays = {
        "COLOR_0": np.array([[255, 0, 51]] * 4, dtype="u1"),
        "TEXCOORD_0": np.array([[0, 65535], [65535, 65535], [65535, 0], [0, 0]], dtype="u2"),
    }
    part = read(tmp_path, plain(), encoded(RED), arrays=arrays)
    assert part.colors == pytest.approx(np.array([[1, 0, 0.2, 1]] * 4))
    assert part.uv == pytest.approx(up(SQUARE["TEXCOORD_0"]))


def test_specular_and_glossiness(tmp_path):
    """Without a specular color, the base color is the diffuse one over 1 - 0.04, as in Khronos' conversion."""
    gloss = {"diffuseFactor": [0.48, 0.24, 0.12, 0.5], "specularFactor": [0, 0, 0]}
    part = read(tmp_path, {"extensions": {"KHR_materials_pbrSpecularGlossiness": gloss}})
    assert part.material.base == pytest.approx([0.5, 0.25, 0.125, 0.5], abs=1e-5)
    gloss["diffuseTexture"] = {"index": 0}
    part = read(tmp_path, {"extensions": {"KHR_materials_pbrSpecularGlossiness": gloss}}, encoded(RED))
    shown = mesh_files.linear(np.array(part.material.base_image.getpixel((0, 0))[:3]) / 255)
    expected = mesh_files.linear(np.array([200, 30, 40]) / 255) * [0.5, 0.25, 0.125]
    assert shown == pytest.approx(expected, abs=0.004) and part.material.base[:3] == (1, 1, 1)  # 8 bits
    two = {"diffuseTexture": {"index": 0}, "specularGlossinessTexture": {"index": 1, "texCoord": 1}}
    with pytest.raises(BadMesh, match=r"Glossiness of its materials\[0\] has two textures that lie differently"):
        read(tmp_path, {"extensions": {"KHR_materials_pbrSpecularGlossiness": two}}, encoded(RED), encoded(RED))


def test_what_a_texture_needs_is_named(tmp_path):
    with pytest.raises(BadMesh, match=r"meshes\[0\].primitives\[0\] has no TEXCOORD_2, which its texture needs"):
        read(tmp_path, plain(texCoord=2), encoded(RED))
    with pytest.raises(BadMesh, match=r"samplers\[0\] wraps by 33069, which is not known"):
        read(tmp_path, plain(), encoded(RED), samplers=[{"wrapS": 33069}])
    with pytest.raises(BadMesh, match=r"baseColorTexture has the extension EXT_any, which"):
        read(tmp_path, plain(extensions={"EXT_any": {}}), encoded(RED))
    with pytest.raises(BadMesh, match=r"KHR_texture_transform has the key 'shear', which is not known"):
        read(tmp_path, plain(extensions={"KHR_texture_transform": {"shear": 1}}), encoded(RED))
    (tmp_path / "away").mkdir()
    with pytest.raises(BadMesh, match=r"'gone.png', which it refers to, is missing: put it beside the mesh"):
        read(tmp_path / "away", plain(), encoded(RED), images=[{"uri": "gone.png"}])


def test_pictures_that_are_not_drawn_may_be_missing(tmp_path):
    material = plain() | {"normalTexture": {"index": 1}, "occlusionTexture": {"index": 1}}
    assert read(tmp_path, material, encoded(RED), b"damaged").material.base_image is not None
