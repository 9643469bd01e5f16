# SPDX-License-Identifier: Apache-2.0
"""What glTF 2.0 means, by its specification's own equations: shapes, and the keys that are refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mesh_files
import numpy as np
import pytest

pytest.importorskip("trimesh", reason="pip install -e '.[objects]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_tools"))

from object_files import BadMesh, find_meshes  # noqa: E402
from object_meshes import Part, load  # noqa: E402

Change = Callable[[dict[str, Any]], Any]
CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0.5]], dtype="f4")
SQUARE = {"POSITION": CORNERS, "indices": np.array([0, 1, 2, 0, 2, 3], dtype="u2")}
TURN = [0.0, 0.0, np.sin(0.3), np.cos(0.3)]  # by 0.6 around z
TURNED = np.array([[np.cos(0.6), -np.sin(0.6), 0], [np.sin(0.6), np.cos(0.6), 0], [0, 0, 1]])


def read(tmp_path: Path, change: Change = lambda header: None, **arrays: np.ndarray) -> list[Part]:
    """The parts of a square after a change of its header."""
    header, buffer = mesh_files.gltf_header(SQUARE | arrays)
    change(header)
    (tmp_path / "square.glb").write_bytes(mesh_files.glb(header, buffer))
    return load(find_meshes([str(tmp_path / "square.glb")])[0])[0]


def shape(tmp_path: Path, change: Change = lambda header: None, **arrays: np.ndarray) -> np.ndarray:
    """The triangles' corners [triangles, 3, 3] of all parts, in the file's coordinates."""
    read(tmp_path, change, **arrays)
    parts, to_world = load(find_meshes([str(tmp_path / "square.glb")])[0])
    corners = np.concatenate([part.positions[part.triangles] for part in parts])
    inverse = np.linalg.inv(to_world)
    return corners @ inverse[:3, :3].T + inverse[:3, 3]


def drawn(positions: np.ndarray) -> np.ndarray:
    """What `shape` gives for a square with these corners."""
    return positions[SQUARE["indices"].reshape(2, 3)]


def at(header: dict, name: str) -> int:
    """The accessor of an array."""
    index: int = header["meshes"][0]["primitives"][0]["attributes"][name]
    return index


def matrices(*rows: np.ndarray) -> np.ndarray:
    return np.stack([row.T.ravel() for row in rows]).astype("f4")


def placed(turn: Any, move: Any = (0, 0, 0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn, move
    return matrix


BIND = [placed(np.diag([2.0, 1, 1]), (0.1, 0.2, 0.3)), placed(np.diag([1.0, 3, 1]), (-1, 0, 0))]
SKIN = {
    "JOINTS_0": np.array([[0, 1, 0, 0]] * 4, dtype="u1"),
    "WEIGHTS_0": np.array([[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0, 1, 0, 0], [0.5, 0.25, 0, 0]], dtype="f4"),
    "JOINTS_1": np.array([[1, 0, 0, 0]] * 4, dtype="u1"),
    "WEIGHTS_1": np.array([[0, 0, 0, 0]] * 3 + [[0.25, 0, 0, 0]], dtype="f4"),
    "_BIND": matrices(*BIND),
}


def skin(header: dict) -> None:
    header["nodes"] = [
        {"mesh": 0, "skin": 0, "scale": [100, 100, 100], "rotation": TURN},  # which means nothing: the joints count
        {"children": [2], "scale": [2, 2, 2]},
        {"children": [3], "translation": [0, 3, 0]},
        {"rotation": TURN},
    ]
    header["scenes"][0]["nodes"] = [0, 1]
    header["skins"] = [{"joints": [2, 3], "inverseBindMatrices": at(header, "_BIND")}]


def test_skins_are_at_rest(tmp_path):
    """Each vertex is the weighted mean of joint x inverse bind x vertex; normals follow the inverse transposed."""
    first = placed(2 * np.eye(3), (0, 6, 0))
    bones = [first @ BIND[0], first @ placed(TURNED) @ BIND[1]]
    shares = np.array([[1, 0], [0.25, 0.75], [0, 1], [0.5, 0.5]])
    expected, turned = [], []
    for corner, share in zip(CORNERS, shares, strict=True):
        matrix = sum(s * bone for s, bone in zip(share, bones, strict=True))
        expected.append((matrix @ [*corner, 1])[:3])
        normal = np.linalg.inv(matrix[:3, :3]).T @ [0.6, 0.0, 0.8]
        turned.append(normal / np.linalg.norm(normal))
    assert shape(tmp_path, skin, **SKIN) == pytest.approx(drawn(np.array(expected)), abs=1e-5)
    (part,) = read(tmp_path, skin, **SKIN, NORMAL=np.array([[0.6, 0, 0.8]] * 4, dtype="f4"))
    assert part.normals == pytest.approx(np.array(turned)[:, [0, 2, 1]] * [1, -1, 1], abs=1e-6)  # y up to z up

    def unbound(header: dict) -> None:
        skin(header)
        del header["skins"][0]["inverseBindMatrices"]  # identities

    bones = [first, first @ placed(TURNED)]
    moved = [sum(s * bone for s, bone in zip(share, bones, strict=True)) for share in shares]
    expected = [(matrix @ [*corner, 1])[:3] for matrix, corner in zip(moved, CORNERS, strict=True)]
    assert shape(tmp_path, unbound, **SKIN) == pytest.approx(drawn(np.array(expected)), abs=1e-5)


def test_instances(tmp_path):
    """EXT_mesh_gpu_instancing: node x (translation, rotation, scale) for each; rotations may be integers."""
    turns = np.round(np.array([[0, 0, 0, 1], TURN]) * 32767).astype("i2")
    arrays = {
        "_T": np.array([[0, 0, 0], [5, 1, 2]], dtype="f4"),
        "_R": turns,
        "_S": np.array([[1, 1, 1], [1, 2, 3]], dtype="f4"),
    }

    def instances(header: dict) -> None:
        attributes = {
            "TRANSLATION": at(header, "_T"),
            "ROTATION": at(header, "_R"),
            "SCALE": at(header, "_S"),
            "_ID": 0,
        }
        header["nodes"][0].update(extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}}, scale=[2, 2, 2])

    second = 2 * ((CORNERS * [1, 2, 3]) @ TURNED.T + [5, 1, 2])
    expected = np.concatenate([drawn(2 * CORNERS), drawn(second)])
    assert shape(tmp_path, instances, **arrays) == pytest.approx(expected, abs=1e-3)  # 1 / 32767, times 10


def test_morph_targets_have_the_weights_of_the_file(tmp_path):
    arrays = {"_A": np.array([[0, 1, 0]] * 4, dtype="f4"), "_B": np.array([[0, 0, 4]] * 4, dtype="f4")}

    def morphed(header: dict) -> None:
        header["meshes"][0]["primitives"][0]["targets"] = [{"POSITION": at(header, n)} for n in ("_A", "_B")]
        header["meshes"][0]["weights"] = [0.5, 0.25]

    def by_node(header: dict) -> None:
        morphed(header)
        header["nodes"] += [{"mesh": 0, "weights": [0, 1]}]
        header["scenes"][0]["nodes"] = [0, 1]

    assert shape(tmp_path, morphed, **arrays) == pytest.approx(drawn(CORNERS + [0, 0.5, 1]), abs=1e-6)
    both = np.concatenate([drawn(CORNERS + [0, 0.5, 1]), drawn(CORNERS + [0, 0, 4])])
    assert shape(tmp_path, by_node, **arrays) == pytest.approx(both, abs=1e-6)


def test_sparse_and_quantized_accessors(tmp_path):
    arrays = {"_AT": np.array([1, 3], dtype="u1"), "_TO": np.array([[9, 0, 0], [0, 9, 0]], dtype="f4")}

    def sparse(header: dict) -> None:
        view, codes = [header["accessors"][at(header, name)]["bufferView"] for name in ("_AT", "_TO")], 5121
        indices, values = {"bufferView": view[0], "componentType": codes}, {"bufferView": view[1]}
        header["accessors"][0]["sparse"] = {"count": 2, "indices": indices, "values": values}

    expected = CORNERS.copy()
    expected[1], expected[3] = [9, 0, 0], [0, 9, 0]
    assert shape(tmp_path, sparse, **arrays) == pytest.approx(drawn(expected), abs=1e-6)
    small = np.array([[-127, 0, 0], [127, 0, 0], [127, 64, 0], [0, 64, 9]], dtype="i1")  # 3 bytes and no padding
    for normalized, scale in ((True, 127), (False, 1)):
        change: Change = lambda h, n=normalized: h["accessors"][0].update(normalized=n)  # noqa: E731
        assert shape(tmp_path, change, POSITION=small) == pytest.approx(drawn(small / scale), abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "triangles"),
    [(4, [[0, 1, 2]]), (5, [[0, 1, 2], [1, 3, 2], [2, 3, 0]]), (6, [[1, 2, 0], [2, 3, 0], [3, 0, 0]])],
)
def test_lists_strips_and_fans(tmp_path, mode, triangles):
    """p_i = {v_i, v_(i + 1 + i % 2), v_(i + 2 - i % 2)} of a strip, {v_(i + 1), v_(i + 2), v_0} of a fan."""
    found = shape(
        tmp_path,
        lambda h: h["meshes"][0]["primitives"][0].update(mode=mode),
        indices=np.array([0, 1, 2, 3, 0], dtype="u1"),
    )
    assert found == pytest.approx(CORNERS[triangles], abs=1e-6)


def test_hidden_nodes_and_other_scenes_are_not_drawn(tmp_path):
    def hidden(header: dict) -> None:
        off = {"KHR_node_visibility": {"visible": False}}
        header["nodes"] = [{"mesh": 0}, {"extensions": off, "children": [2]}, {"mesh": 0}, {"mesh": 0}]
        header["scenes"] = [{"nodes": [3]}, {"nodes": [0, 1]}]
        header["scene"] = 1

    assert len(read(tmp_path, hidden)) == 1


def extended(place: Callable[[dict], dict], name: str, value: Any) -> Change:
    return lambda header: place(header).setdefault("extensions", {}).update({name: value})


def primitive(header: dict) -> dict:
    found: dict = header["meshes"][0]["primitives"][0]
    return found


NAMED: list[tuple[Change, str]] = [
    (extended(lambda h: h, "EXT_any", {}), "its root has the extension EXT_any, .*: export it without"),
    (extended(lambda h: h["nodes"][0], "EXT_any", {}), r"its nodes\[0\] has the extension EXT_any"),
    (extended(primitive, "KHR_draco_mesh_compression", {}), r"primitives\[0\] has the extension KHR_draco_mesh_comp"),
    (extended(lambda h: h["bufferViews"][0], "EXT_meshopt_compression", {}), r"bufferViews\[0\] .* EXT_meshopt_comp"),
    (lambda h: h.update(extensionsRequired=["KHR_texture_basisu"]), "extension KHR_texture_basisu"),
    (lambda h: h["nodes"][0].update(wobble=1), r"its nodes\[0\] has the key 'wobble', which is not known"),
    (lambda h: h["accessors"][0].update(packed=True), r"its accessors\[0\] has the key 'packed'"),
    (lambda h: primitive(h)["attributes"].update(OFFSET=0), r"attributes has the key 'OFFSET'"),
    (lambda h: h.update(materials=[{"technique": 0}]), r"its materials\[0\] has the key 'technique'"),
    (lambda h: h.update(materials=[{"alphaMode": "DITHER"}]) or primitive(h).update(material=0), "'DITHER'"),
    (lambda h: h["asset"].update(version="1.0"), "it is glTF 1.0: only version 2"),
    (lambda h: h["nodes"][0].update(children=[0]), r"nodes\[0\] is below itself"),
    (lambda h: h.update(nodes=[{"children": [2]}, {"children": [2]}, {}]), r"nodes\[2\] has two parents"),
    (lambda h: h["nodes"][0].update(mesh=3), r"meshes\[3\], but has 1 meshes"),
    (lambda h: skin(h) or h["skins"][0].update(joints=[2, 3, 1]), "3 joints but 2 inverse bind matrices"),
    (lambda h: skin(h) or h["skins"][0].update(joints=[2]), "a vertex of joint 1, but 1 joints"),
    (
        lambda h: skin(h) or [primitive(h)["attributes"].pop(f"JOINTS_{n}") for n in "01"],
        "vertices that no joint moves",
    ),
    (lambda h: skin(h) or extended(lambda h: h["nodes"][0], "EXT_mesh_gpu_instancing", {})(h), "exclude each other"),
]


@pytest.mark.parametrize(("change", "sentence"), NAMED, ids=[sentence for _, sentence in NAMED])
def test_what_is_not_understood_is_named(tmp_path, change, sentence):
    with pytest.raises(BadMesh, match=sentence) as caught:
        read(tmp_path, change, **SKIN)
    assert "\n" not in str(caught.value)


def test_what_means_nothing_here_is_no_reason_to_refuse(tmp_path):
    def harmless(header: dict) -> None:
        extended(lambda h: h["nodes"][0], "KHR_lights_punctual", {"light": 0, "any": {"extensions": {"X": 1}}})(header)
        header["nodes"][0].update(name="n", extras={"extensions": {"EXT_any": {}}})
        header.update(extensionsUsed=["EXT_any"], animations=[{"channels": [{"any": 1}]}], cameras=[{"any": 1}])
        primitive(header)["attributes"]["_OFFSET"] = 0

    assert shape(tmp_path, harmless) == pytest.approx(drawn(CORNERS), abs=1e-6)
