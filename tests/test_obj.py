# SPDX-License-Identifier: Apache-2.0
"""What an OBJ and its material files mean, and the names of what is refused."""

import os
import sys
from pathlib import Path

import mesh_files
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("trimesh", reason="pip install -e '.[objects]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_tools"))

from object_files import BadMesh, find_meshes  # noqa: E402
from object_meshes import Part, load  # noqa: E402

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0.25 0.5\n"
FACE = "f 1/1 2/1 3/1\n"


def read(folder: Path, text: str | bytes, **materials: str | bytes) -> list[Part]:
    """The parts of an OBJ beside material files of these names."""
    for name, content in {"m.obj": text, **{f"{name}.mtl": content for name, content in materials.items()}}.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load(find_meshes([str(folder / "m.obj")])[0])[0]


def shape(folder: Path, text: str) -> list[np.ndarray]:
    """The triangles' corners [triangles, 3, 3] of each part, in the file's coordinates."""
    read(folder, text)
    parts, to_world = load(find_meshes([str(folder / "m.obj")])[0])
    inverse = np.linalg.inv(to_world)
    return [part.positions[part.triangles] @ inverse[:3, :3].T + inverse[:3, 3] for part in parts]


def material(folder: Path, lines: str) -> Part:
    """A textured triangle of one material; there are pictures red.png and gray.png."""
    Image.new("RGB", (2, 2), (200, 30, 40)).save(folder / "red.png")
    Image.fromarray(np.array([[0, 65535], [0x8080, 0x1234]], dtype=np.uint16)).save(folder / "gray.png")
    (part,) = read(folder, f"mtllib a.mtl\n{TRIANGLE}usemtl a\n{FACE}", a=f"newmtl a\n{lines}\n")
    return part


def test_relative_indices_count_back_from_their_line(tmp_path):
    """Of positions, coordinates and normals; lists and faces may take turns, and faces may come first."""
    text = "f 4 5 6\n"
    for x in (0, 10):
        text += "".join(f"v {x + a} {b} 0\nvt {x + a} {b}\n" for a, b in ((0, 0), (1, 0), (0, 1)))
        text += f"vn 0 0 {1 if x else -1}\nf -3/-3/-1 -2/-2/-1 -1/-1/-1\n"
    first, both = shape(tmp_path, text)
    triangle = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert first == pytest.approx(triangle[None] + [10, 0, 0], abs=1e-9)
    assert both == pytest.approx(np.stack([triangle, triangle + [10, 0, 0]]), abs=1e-9)
    part = read(tmp_path, text)[1]
    assert part.uv[part.triangles] == pytest.approx(both[..., :2])
    assert part.normals[part.triangles][:, 0] == pytest.approx(np.array([[0, 1, 0], [0, -1, 0]]))  # y up to z up


def test_polygons_that_go_in(tmp_path):
    """A comb in a tilted plane: its triangles cover it once, and nothing beside it."""
    outline = [(0, 0), (5, 0), (5, 3), (4, 3), (4, 1), (3, 1), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)]
    for turn in (1, -1):
        corners = "".join(f"v {x} {y} {x + 2 * y}\n" for x, y in outline[::turn])
        (found,) = shape(tmp_path, corners + "f " + " ".join(map(str, range(1, 13))) + "\n")
        a, b, c = found[:, 0, :2], found[:, 1, :2], found[:, 2, :2]
        areas = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
        assert len(found) == 10 and (areas * turn >= -1e-9).all()
        assert areas.sum() * turn == pytest.approx(11)  # 15 less two gaps of 1 x 2
        inside = (a + b + c) / 3
        gaps = (inside[:, 1] > 1) & (np.floor(inside[:, 0]) % 2 == 1)
        assert not gaps.any()


@pytest.mark.parametrize("scale", [1, 255])
def test_colors_of_vertices(tmp_path, scale):
    """To 1 or to 255, as displayed; a material without texture tints them."""
    lines = "".join(f"v {x} {y} 0 {0.5 * scale} {0.25 * scale} {scale}\n" for x, y in ((0, 0), (1, 0), (0, 1)))
    (part,) = read(tmp_path, lines + "f 1 2 3\n")
    assert mesh_files.displayed(part.colors[:, :3]) == pytest.approx(np.array([[0.5, 0.25, 1]] * 3), abs=1e-6)
    assert part.material.base == (1, 1, 1, 1)
    text = "mtllib a.mtl\n" + lines + "usemtl a\nf 1 2 3\n"
    (part,) = read(tmp_path, text, a="newmtl a\nKd 0.5 1 1\n")
    assert part.material.base[0] == pytest.approx(mesh_files.linear(0.5)) and part.colors[0, 2] == 1
    assert read(tmp_path, text, a="newmtl a\nNs 1\n")[0].material.base == (1, 1, 1, 1)


def test_without_any_color_it_is_light_gray(tmp_path):
    for text in (TRIANGLE + FACE, f"mtllib a.mtl\n{TRIANGLE}usemtl a\n{FACE}"):
        (part,) = read(tmp_path, text, a="newmtl a\nNs 1\n")
        assert part.material.base == pytest.approx([*mesh_files.linear([0.8] * 3), 1])


def test_names_in_latin_1_and_with_spaces(tmp_path):
    picture = tmp_path / os.fsdecode("Grün.png".encode("latin-1"))
    Image.new("RGB", (2, 2), (1, 200, 3)).save(picture, "PNG")
    text = f"mtllib my colors.mtl\no Körper\n{TRIANGLE}usemtl Maß 1\n{FACE}usemtl Grün\n{FACE}".encode("latin-1")
    mtl = "newmtl Maß 1\r\nKd 0.8 0 0\r\nnewmtl Grün\r\nmap_Kd Grün.png\r\n".encode("latin-1")
    red, green = read(tmp_path, text, **{"my colors": mtl})
    assert red.material.base == pytest.approx(mesh_files.linear([0.8, 0, 0]).tolist() + [1])
    assert green.material.base_image.getpixel((0, 0)) == (1, 200, 3, 255)


def test_several_material_files(tmp_path):
    text = f"mtllib a.mtl b.mtl\nmtllib c.mtl\n{TRIANGLE}" + "".join(f"usemtl {n}\n{FACE}" for n in "abc")
    parts = read(tmp_path, text, a="newmtl a\nKd 1 0 0\n", b="newmtl b\nKd 0 1 0\n", c="newmtl c\nKd 0 0 1\n")
    assert [part.material.base[:3] for part in parts] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


def test_alpha_emission_and_light_of_materials(tmp_path):
    assert material(tmp_path, "Kd 1 1 1\nd 0.25").material.base[3] == 0.25
    assert material(tmp_path, "Kd 1 1 1\nTr 0.25").material.base[3] == 0.75
    clear = material(tmp_path, "map_Kd red.png\nd 0.5\nTr 0.5").material
    assert clear.cutoff is None and clear.base == (1, 1, 1, 0.5)
    opaque = material(tmp_path, "Kd 1 1 1\nd 1\nKe 0.5 0 0\nillum 2").material
    assert opaque.cutoff == 0 and opaque.emission == pytest.approx(mesh_files.linear([0.5, 0, 0])) and not opaque.unlit
    assert material(tmp_path, "Kd 1 1 1\nillum 0").material.unlit
    glowing = material(tmp_path, "map_Kd red.png\nmap_Ke -o 1 1 gray.png")
    assert glowing.material.emission == (1, 1, 1) and glowing.material.base_image.getpixel((0, 0)) == (200, 30, 40, 255)
    assert glowing.material.emission_image.getpixel((1, 1)) == (18, 18, 18, 255)  # 16 bits
    assert glowing.uv[0] == pytest.approx([0.25, 0.5]) and glowing.emission_uv[0] == pytest.approx([1.25, 1.5])


def test_where_textures_lie(tmp_path):
    part = material(tmp_path, "map_Kd -blendu on -s 2 4 1 -o 0.5 -clamp off red.png")
    assert part.uv == pytest.approx(np.array([[0.25 * 2 + 0.5, 0.5 * 4]] * 3))
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "sub" / "near.png")
    (tmp_path / "sub" / "s.mtl").write_text("newmtl a\nmap_Kd near.png\n")
    (part,) = read(tmp_path, f"mtllib sub/s.mtl\n{TRIANGLE}usemtl a\n{FACE}")
    assert part.material.base_image.getpixel((0, 0)) == (9, 8, 7, 255)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("disp bumps.png", "its material 'a' in a.mtl has disp, which is not supported: remove that line"),
        ("Kd spectral red.rfl", "has Kd spectral red.rfl, which is not supported: write 3 numbers from 0 to 1"),
        ("Kd 200 30 40", "has Kd 200 30 40, which is not from 0 to 1: divide"),
        ("Kd 1 1 1\nd 1\nTr 1", "has d 1 and Tr 1, which contradict each other"),
        ("map_Kd -clamp on red.png", "has the texture option -clamp"),
        ("d -halo 0.5", "has d -halo 0.5, which is not supported"),
        ("map_Kd red.png\nmap_d gray.png", "has its alpha in another file, map_d"),
        ("map_Kd -mm 0.5 2 red.png", "has the texture option -mm, which is not supported: remove it"),
        ("map_Kd gone.png", "'gone.png', which it refers to, is missing"),
    ],
)
def test_materials_that_are_not_understood_are_named(tmp_path, lines, sentence):
    with pytest.raises(BadMesh, match=sentence):
        material(tmp_path, lines)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"mtllib a.mtl\n{TRIANGLE}usemtl b\n{FACE}", r"its material 'b' is in no material file \(a.mtl\): add it"),
        (f"{TRIANGLE}usemtl b\n{FACE}", r"its material 'b' is in no material file \(it names none\)"),
        (f"mtllib a.mtl\n{TRIANGLE}usemtl a\nf 1 2 3\n", "faces of its material 'a' have no texture coordinates"),
        (f"{TRIANGLE}curv 0 1 1 2\n", "its line 5 has the keyword 'curv', which is not supported: remove it"),
        (f"{TRIANGLE}f 0 1 2\n", r"its line 5 can't be read, 'f 0 1 2': there is no 0"),
        (f"{TRIANGLE}f -4 1 2\n", "its line 5 .*: there is no -4"),
        (f"{TRIANGLE}f 1/1 2 3\n", "its line 5 .*: its corners have different kinds of indices"),
        (f"{TRIANGLE}f 1/1/1 2 3/1\n", "its line 5 .*: its corners have different kinds of indices"),
        (f"{TRIANGLE}f /1 /1 /1\n", "its line 5 .*: its corners have different kinds of indices"),
        (f"{TRIANGLE}f 1 2\n", "its line 5 .*: a face needs 3 corners"),
        (f"{TRIANGLE}f 1/2 2/2 3/2\n", "a face has texture coordinate 2, but there are 1"),
        ("v 0 0\n", "its line 1 has 2 numbers: write v x y z or v x y z r g b"),
        ("v 0 0 0 1 0 0 1\n", "its line 1 has 7 numbers"),
        ("v 0 0 zero\n", "its line 1 can't be read"),
        ("v 0 0 0 1.5 0 0\nv 1 0 0 0 0 0\nv 0 1 0 1 1 1\nf 1 2 3\n", "its vertices have colors from 0 to 1.5: write"),
        (
            "v 0 0 0 1 0 0\nv 1 0 0 0 0 0\nv 0 1 0\nf 1 2 3\n",
            "some of its vertices have a color",
        ),
    ],
)
def test_lines_that_are_not_understood_are_named(tmp_path, text, sentence):
    Image.new("RGB", (2, 2)).save(tmp_path / "red.png")
    with pytest.raises(BadMesh, match=sentence):
        read(tmp_path, text, a="newmtl a\nmap_Kd red.png\n")


def test_lines_that_mean_nothing_here_are_no_reason_to_refuse(tmp_path):
    text = f"\ufeff# made\n\ng group\ns off\n{TRIANGLE}l 1 2\np 1\n\tf  1/ \\\n 2/\t3/ # face\n"
    (part,) = read(tmp_path, text.encode())
    assert len(part.triangles) == 1
