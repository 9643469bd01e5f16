# SPDX-License-Identifier: Apache-2.0
"""Single properties of meshes and of how they are drawn, and processes that die."""

import ctypes.util
import itertools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mesh_files
import numpy as np
import pytest
from PIL import Image

from igae.data import ItemFailed, ProcessPool, ProgressCallback

pytest.importorskip("trimesh", reason="pip install -e '.[objects]'")
pytest.importorskip("moderngl", reason="pip install -e '.[objects]'")
for library in ("EGL", "GL"):
    if ctypes.util.find_library(library) is None:
        pytest.skip(f"lib{library} is not installed: apt-get install libegl1 libgl1", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_tools"))

from make_demo import FOCAL, RADIUS  # noqa: E402
from object_files import BadMesh, find_meshes  # noqa: E402
from object_meshes import Material, Part, load  # noqa: E402
from object_parts import CLAMP, MIRROR, REPEAT, Sampler  # noqa: E402
from object_renderer import AMBIENT, LIGHTS, Renderer  # noqa: E402

FRONT = np.array([[1.0, 0, 0, 0], [0, 0, 1, -1.3], [0, -1, 0, 0], [0, 0, 0, 1]])  # from -y, with z up
SQUARE = {
    "POSITION": np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype="f4"),
    "TEXCOORD_0": (mesh_files.UV * [1, -1] + [0, 1]).astype("f4"),
    "indices": np.array([0, 1, 2, 0, 2, 3], dtype="u2"),
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(32, 4)


def square(material: Material, depth: float = 0.0, colors: Any = None) -> Part:
    """A square of side 0.8 across the view from the front, `depth` behind the origin."""
    positions = np.array([[-0.4, depth, -0.4], [0.4, depth, -0.4], [0.4, depth, 0.4], [-0.4, depth, 0.4]])
    shown = np.ones((4, 4)) if colors is None else np.array(colors)
    return Part(positions, SQUARE["indices"].reshape(2, 3).astype("u4"), None, mesh_files.UV, shown, material)


def middle(renderer: Renderer, *parts: Part) -> np.ndarray:
    """RGB and coverage of the pixels inside squares, which are of one color; rounding: 0.002."""
    picture = renderer.render(parts, FRONT[None])[0, 10:22, 10:22] / 255
    assert np.ptp(picture, axis=(0, 1)).max() < 0.005
    return picture.mean(axis=(0, 1))


def test_supersampling_is_the_mean_of_a_larger_picture():
    part = square(Material(base=(0.1, 0.5, 0.9, 1)))
    pose = FRONT.copy()
    pose[:3, :3] = pose[:3, :3] @ [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]
    fine = Renderer(128, 1).render([part], pose[None])[0].astype(float)
    coarse = Renderer(32, 4).render([part], pose[None])[0]
    mean = fine.reshape(32, 4, 32, 4, 4).mean(axis=(1, 3))
    assert np.abs(coarse - mean).max() < 0.51  # rounding
    assert len(np.unique(coarse[..., 3])) > 5  # its edges are soft


def test_unlit_and_emitted_colors_are_those_of_the_file(renderer):
    color = np.array([0.1, 0.4, 0.7])
    shown = mesh_files.displayed(color)
    unlit = middle(renderer, square(Material(base=(*color, 1), unlit=True)))
    glowing = middle(renderer, square(Material(base=(0, 0, 0, 1), emission=tuple(color))))
    for seen in (unlit, glowing):
        assert seen == pytest.approx([*shown, 1], abs=0.003)


def test_alpha(renderer):
    """A share of the samples; at 0.5 and 0.25 all numbers are exact: 8 and 4 of 16."""
    gray = mesh_files.displayed(np.array(0.2))
    half = Material(base=(0.2, 0.2, 0.2, 0.5), cutoff=None, unlit=True)
    assert middle(renderer, square(half)) == pytest.approx([*[(gray + 1) / 2] * 3, 0.5], abs=0.003)
    # Two behind each other: the second covers a part of what the first leaves open, not the same samples again.
    both = middle(renderer, square(half), square(replace(half, base=(0.2, 0.2, 0.2, 0.25)), depth=0.1))
    assert 0.55 < both[3] < 0.76
    assert middle(renderer, square(replace(half, cutoff=0.6)))[3] == 0
    assert middle(renderer, square(replace(half, cutoff=0.4)))[3] == 1
    assert middle(renderer, square(replace(half, cutoff=0.0)))[3] == 1  # an opaque material's alpha means nothing


def test_textures_are_filtered_as_linear_values(renderer):
    """A chessboard finer than the samples is as bright as its mean light, not as its mean gray value."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    seen = middle(renderer, square(Material(base_image=Image.fromarray(board), unlit=True)))
    assert np.abs(seen[:3] - mesh_files.displayed(np.array(0.5))).max() < 0.01  # 0.735, not 0.5


def test_both_sides_are_lit_from_their_own_side(renderer):
    part = square(Material(base=(0.5, 0.5, 0.5, 1)))
    back = FRONT.copy()
    back[:3] = np.diag([-1, -1, 1]) @ FRONT[:3]
    front_seen, back_seen = renderer.render([part], np.stack([FRONT, back]))[:, 16, 16] / 255
    normals = np.broadcast_to(np.array([[0.0, 1, 0]], dtype="f4"), (4, 3))
    turned = renderer.render([replace(part, normals=normals)], FRONT[None])[0, 16, 16] / 255
    for seen, normal in ((front_seen, [0, -1, 0]), (back_seen, [0, 1, 0]), (turned, [0, -1, 0])):
        expected = mesh_files.displayed(0.5 * mesh_files.light(np.array(normal, dtype=float), AMBIENT, LIGHTS))
        assert np.abs(seen[:3] - expected).max() < 0.003
    assert abs(front_seen[0] - back_seen[0]) > 0.02


@pytest.mark.parametrize("glow", [False, True])
def test_textures_beyond_their_edges(renderer, glow):
    """Along u and v in each of three ways: a square of 8 x 8 texels, each of 2.7 pixels, of a texture of 4 x 4."""
    colors = np.zeros((4, 4, 4), dtype=np.uint8) + np.uint8(255)
    colors[..., :2] = np.stack(np.meshgrid([0, 80, 160, 240], [10, 90, 170, 250]), axis=-1)
    folds = {
        REPEAT: lambda x: np.mod(x, 4),
        MIRROR: lambda x: np.minimum(np.mod(x, 8), 7 - np.mod(x, 8)),
        CLAMP: lambda x: np.clip(x, 0, 3),
    }
    uv = mesh_files.UV * 2 - 0.5
    texels = np.arange(-2, 6)
    for along_u, along_v in itertools.product(folds, folds):
        image, sampler = Image.fromarray(colors), Sampler((along_u, along_v), nearest=True)
        if glow:
            black = Material(base=(0, 0, 0, 1), emission=(1, 1, 1), emission_image=image, emission_sampler=sampler)
            part = replace(square(black), uv=np.zeros((4, 2)), emission_uv=uv)
        else:
            part = replace(square(Material(base_image=image, base_sampler=sampler, unlit=True)), uv=uv)
        picture = renderer.render([part], FRONT[None])[0]
        columns, rows = folds[along_u](texels), 3 - folds[along_v](texels)  # v goes up
        expected = colors[rows[::-1, None], columns[None]]
        side = 2 * 0.4 * FOCAL / RADIUS * 32  # of the square in pixels
        at = (16 + side * ((np.arange(8) + 0.5) / 8 - 0.5)).astype(int)
        assert np.abs(picture[at[:, None], at].astype(int) - expected)[..., :2].max() <= 1, (
            along_u,
            along_v,
        )  # rounding


def test_texels_are_squares_where_the_file_says_so(renderer):
    """Two texels: black and white halves, or a slope between them."""
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    seen = [
        renderer.render([square(Material(base_image=image, base_sampler=sampler, unlit=True))], FRONT[None])[
            0, 16, 8:24
        ]
        for sampler in (Sampler((CLAMP, CLAMP), nearest=True), Sampler((CLAMP, CLAMP)))
    ]
    assert len(np.unique(seen[0][:, 0])) == 2 and len(np.unique(seen[1][:, 0])) > 8


def test_the_file_says_how_textures_are_read(tmp_path):
    def wrapped(header: dict) -> None:
        header["samplers"] = [{"wrapS": CLAMP, "wrapT": MIRROR, "magFilter": 9728}]
        header["textures"][0]["sampler"] = 0

    assert read(tmp_path, wrapped)[0].material.base_sampler == Sampler((CLAMP, MIRROR), nearest=True)
    assert read(tmp_path)[0].material.base_sampler == Sampler((REPEAT, REPEAT), nearest=False)


def read(tmp_path: Path, change: Callable[[dict], None] = lambda header: None, **arrays: np.ndarray) -> list[Part]:
    """The parts of a textured square after a change of its header; the picture is in the file."""
    header, buffer = mesh_files.gltf_header(SQUARE | arrays, primitive={"material": 0})
    picture = mesh_files.texture_bytes()
    header["bufferViews"].append({"buffer": 0, "byteOffset": len(buffer), "byteLength": len(picture)})
    buffer += picture + b"\0" * (-len(picture) % 4)
    header["buffers"] = [{"byteLength": len(buffer)}]
    header["images"] = [{"bufferView": len(header["bufferViews"]) - 1, "mimeType": "image/png"}]
    header["textures"] = [{"source": 0}]
    header["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    change(header)
    (tmp_path / "square.glb").write_bytes(mesh_files.glb(header, buffer))
    return load(find_meshes([str(tmp_path / "square.glb")])[0])[0]


def texture(header: dict) -> dict:
    return header["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]


def test_texture_transform_and_second_coordinates(tmp_path):
    """KHR_texture_transform of a point, by the extension's own equations; v of the file goes down."""
    offset, scale, angle = np.array([0.1, 0.2]), np.array([2.0, 0.5]), 0.4
    change = {"offset": offset.tolist(), "scale": scale.tolist(), "rotation": angle}
    (part,) = read(tmp_path, lambda h: texture(h).update(extensions={"KHR_texture_transform": change}))
    scaled = SQUARE["TEXCOORD_0"] * scale
    turned = np.stack([
        np.cos(angle) * scaled[:, 0] + np.sin(angle) * scaled[:, 1],
        -np.sin(angle) * scaled[:, 0] + np.cos(angle) * scaled[:, 1],
    ], axis=1)  # fmt: skip
    assert part.uv == pytest.approx((turned + offset) * [1, -1] + [0, 1], abs=1e-6)
    other = np.array([[0.3, 0.1]] * 4, dtype="f4")
    (part,) = read(tmp_path, lambda h: texture(h).update(texCoord=1), TEXCOORD_1=other)
    assert part.uv == pytest.approx(other * [1, -1] + [0, 1])
    assert part.material.base_image is not None and part.material.cutoff == 0


def test_what_a_mesh_can_not_be(tmp_path):
    def damaged_texture(header: dict) -> None:
        header["images"][0]["bufferView"] = 0  # coordinates instead of a picture

    def compressed(header: dict) -> None:
        del header["accessors"][0]["bufferView"]
        header["extensionsUsed"] = ["KHR_draco_mesh_compression"]

    def short(header: dict) -> None:
        header["bufferViews"][0]["byteLength"] = 8

    far, endless = SQUARE["indices"].copy(), SQUARE["POSITION"].copy()
    far[2], endless[1, 0] = 9, np.nan
    cases: list[tuple[Callable[[dict], None], dict[str, np.ndarray], str]] = [
        (damaged_texture, {}, r"its texture images\[0\] can't be read"),
        (lambda h: h["images"][0].update(uri="away.png") or h["images"][0].pop("bufferView"), {}, "'away.png', which"),
        (compressed, {}, r"accessors\[0\] has no data, as if compressed"),
        (short, {}, r"bufferViews\[0\] is too short"),
        (lambda h: h.update(extensionsRequired=["EXT_meshopt_compression"]), {}, "extension EXT_meshopt_compression"),
        (lambda h: h["meshes"][0]["primitives"][0].update(mode=1), {}, "no triangles"),
        (lambda h: h["scenes"][0].update(nodes=[]), {}, "no triangles"),
        (
            lambda h: h["meshes"][0]["primitives"][0]["attributes"].update(POSITION=77),
            {},
            r"accessors\[77\], but has 3",
        ),
        (lambda h: None, {"indices": far}, "a triangle has vertex 9, but there are 4"),
        (lambda h: None, {"POSITION": endless}, "NaN"),
        (lambda h: None, {"POSITION": np.ones((4, 3), dtype="f4")}, "one point"),
    ]
    for change, arrays, sentence in cases:
        with pytest.raises(BadMesh, match=sentence):
            read(tmp_path, change, **arrays)
    assert len(read(tmp_path)) == 1


def test_an_obj_does_not_read_beyond_the_folder_above(tmp_path):
    (tmp_path / "secret.png").write_bytes(mesh_files.texture_bytes())
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    faces = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n"
    (folder / "m.obj").write_text(faces)
    mesh = find_meshes([str(folder / "m.obj")])[0]
    for name in ("../../secret.png", str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png"):
        (folder / "m.mtl").write_text(f"newmtl m\nmap_Kd {name}\n")
        with pytest.raises(BadMesh, match="which it refers to, is missing"):
            load(mesh)
    (folder / "secret.png").write_bytes(b"no picture")  # where a path of another machine is looked for
    with pytest.raises(BadMesh, match="its texture .* can't be read"):
        load(mesh)
    (folder / "secret.png").write_bytes(mesh_files.texture_bytes())
    assert load(mesh)[0][0].material.base_image is not None


def begin(good: bool) -> Callable[[int, ProgressCallback], int]:
    if not good:
        raise ValueError("not here")
    return work


def work(item: int, progress: ProgressCallback) -> int:
    progress(2)
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 4:
        raise MemoryError("no room")
    if item == 5:
        os._exit(0)
    return item * item


@pytest.mark.parametrize("number", [1, 3])
def test_a_process_that_dies_takes_its_item_along_and_nothing_else(number):
    seen: list[int] = []
    with ProcessPool(number, begin, (True,)) as pool:
        results = dict(pool.run(list(range(9)), seen.append))
        assert sorted(pool.run([6, 7])) == [(0, 36), (1, 49)]  # by the same processes
    failed = {item: results.pop(item) for item in (3, 4, 5)}
    assert results == {item: item * item for item in (0, 1, 2, 6, 7, 8)}
    assert all(isinstance(result, ItemFailed) for result in failed.values())
    assert "died: SIGKILL" in str(failed[3]) and str(failed[4]) == "MemoryError: no room"
    assert str(failed[5]).endswith("died: exit code 0") and failed[5].error is None
    assert isinstance(failed[4].error, RuntimeError) and "in work" in str(failed[4].error)  # with the traceback
    assert 14 <= sum(seen) <= 18  # what a process said just before it died may be lost


def test_processes_that_can_not_start_end_the_run():
    with ProcessPool(2, begin, (False,)) as pool, pytest.raises(ValueError, match="not here"):
        list(pool.run([1, 2, 3]))
    with ProcessPool(2, begin, (True,)) as pool:
        assert list(pool.run([])) == []


def test_no_processes_work_in_this_one():
    with ProcessPool(0, begin, (True,)) as pool:
        assert list(pool.run([1, 2])) == [(0, 1), (1, 4)]
        with pytest.raises(MemoryError):
            list(pool.run([4]))
