# SPDX-License-Identifier: Apache-2.0
"""Formats of rendered objects: Zero-1-to-3, G-Objaverse, ShapeNet of SRN, EG3D.

Each is written from its definition for a scene of balls, and packed cameras must show the balls where the images do.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from ball_scenes import SIZE, WRITERS, Camera, members, offsets, write_eg3d, write_srn, write_zero123

from igae.data import PackOptions, Refused, find_scenes, pack
from igae.data.sources import eg3d
from igae.storage import base_name, file_system, in_archive, join, split


@pytest.mark.parametrize("format", WRITERS)
def test_packed_cameras_show_what_the_images_do(tmp_path, format):
    for scene in ("cars/one", "cars/two", "chairs/three"):
        WRITERS[format](tmp_path / "data", scene)
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "data")))
    assert left_out == [] and manifest.image_size == (SIZE, SIZE) and manifest.dataset == "data"
    found = [(scene.name, scene.category, scene.views, scene.heldout) for scene in manifest.scenes]
    assert found == [("one", "cars", 10, 1), ("two", "cars", 10, 1), ("three", "chairs", 10, 1)]
    heldout = {name for name in members(tmp_path / "out", "heldout*") if name.endswith("png")}
    assert heldout == {f"{scene}/005.png" for scene in ("one", "two", "three")}
    away = offsets(tmp_path / "out", manifest)
    assert len(away) > 60 and max(away) < 0.35  # measured: 0.26
    # What is in the box by the format's definition stays where it is.
    assert all((scene.normalization is None) == (format != "eg3d") for scene in manifest.scenes)


@pytest.mark.parametrize("format", WRITERS)
def test_from_an_object_store(tmp_path, format, monkeypatch):
    """With one listing of a scene for reading it."""
    WRITERS[format](tmp_path / "data", "one", 4)
    WRITERS[format](tmp_path / "data", "two", 4)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "data"), f"/{format}/data", recursive=True)
    listed: list[str] = []
    find = type(fs).find
    monkeypatch.setattr(type(fs), "find", lambda self, path, **more: listed.append(path) or find(self, path, **more))
    for name, url in (("a", str(tmp_path / "data")), ("b", f"memory://{format}/data")):
        pack(str(tmp_path / name), PackOptions(scenes=url))
    assert members(tmp_path / "a") == members(tmp_path / "b") and len(members(tmp_path / "a")) == 16
    assert len(listed) == 6  # by the plan, for sizes, and by the one job: three for each of two scenes


def zipped(folder: Path, file: Path, top: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as out:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                out.write(path, top + str(path.relative_to(folder)))
    return file


@pytest.mark.parametrize("format", ["eg3d", "srn"])
def test_zip_files_are_folders(tmp_path, format, monkeypatch):
    for scene in ("one", "two"):
        WRITERS[format](tmp_path / "data", scene, 4)
    plain, _ = pack(str(tmp_path / "plain"), PackOptions(scenes=str(tmp_path / "data")))
    file = zipped(tmp_path / "data", tmp_path / "data.zip")
    (tmp_path / "tops").mkdir()
    deeper = zipped(tmp_path / "data", tmp_path / "tops" / "data.zip", "cars/")
    with zipfile.ZipFile(deeper, "a") as out:  # as macOS packs
        out.writestr("__MACOSX/cars/one/rgb/._000000.png", b"")
        out.writestr("__MACOSX/cars/one/pose/._000000.txt", b"")
        out.writestr("cars/one/rgb/._000000.png" if format == "srn" else "cars/one/._img00000000.png", b"")
    opened: list[Any] = []
    begin = zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *args, **more: opened.append(args) or begin(*args, **more))
    for name, options in {
        "a": {"scenes": str(file)},
        "b": {"scenes": f"zip://cars::{deeper}"},
        "c": {"scenes": str(deeper), "subset": "cars"},
        "d": {"scenes": str(deeper)},
    }.items():
        manifest, left_out = pack(str(tmp_path / name), PackOptions(**options))
        assert left_out == [] and manifest.dataset == ("cars" if name == "b" else "data")
        assert [scene.category for scene in manifest.scenes] == [("cars" if name in "bd" else "data")] * 2
        assert members(tmp_path / name) == members(tmp_path / "plain")
    assert len(opened) == 2  # its directory is read once
    WRITERS[format](tmp_path / "data", "three", 4)
    zipped(tmp_path / "data", file)
    assert len(pack(str(tmp_path / "e"), PackOptions(scenes=str(file)))[0].scenes) == 3


def test_paths_of_archives(tmp_path):
    assert join("zip://::/x/y.zip", "a", "b.png") == "zip://a/b.png::/x/y.zip"
    assert join("zip://a::s3://x/y.zip", "b.png") == "zip://a/b.png::s3://x/y.zip"
    assert join("https://x/a?q=1", "b") == "https://x/a/b?q=1" and join("/a/", "b") == "/a/b"
    for url in ("zip://a/b::/x/y.zip", "zip://a::s3://x/y.zip", "s3://x/y", "/x/y", "https://x/a/b?q=1/2", "a/b"):
        assert join(*split(url)) == url
    assert split("zip://a::/x/y.zip") == ("zip://::/x/y.zip", "a")
    assert in_archive("/x/y.ZIP") == "zip://::/x/y.ZIP" and in_archive("/x/y") == "/x/y"
    assert in_archive("zip://a::/x/y.zip") == "zip://a::/x/y.zip"
    file = tmp_path / "some.name.zip"
    zipfile.ZipFile(file, "w").writestr("a/b", b"")
    assert base_name(f"zip://::{file}") == "some.name" and base_name(f"zip://a/::{file}") == "a"
    assert base_name(f"{tmp_path}/") == tmp_path.name
    assert file_system(f"zip://a/b::{file}")[1] == "a/b"
    (tmp_path / "none.zip").write_bytes(b"no zip")
    for name, what in (("none.zip", "not a zip file"), ("away.zip", "FileNotFoundError")):
        with pytest.raises(ValueError, match=rf"{name} cannot be used: .*{what}"):
            pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / name)))


def test_dataset_json_is_read_once(tmp_path, monkeypatch):
    for index in range(5):
        write_eg3d(tmp_path / "data", f"{index:05d}", 3)
    read = json.loads
    seen: list[int] = []
    monkeypatch.setattr(eg3d.json, "loads", lambda text: seen.append(len(text)) or read(text))
    eg3d._read_labels.cache_clear()
    assert len(pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "data")))[0].scenes) == 5
    assert seen.count((tmp_path / "data" / "dataset.json").stat().st_size) == 1
    write_eg3d(tmp_path / "data", "00005", 3)  # another file is not taken for it
    assert len(pack(str(tmp_path / "again"), PackOptions(scenes=str(tmp_path / "data")))[0].scenes) == 6


def change_json(file: str, **values: Any) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        content = json.loads((root / file).read_text())
        content |= {key: value for key, value in values.items() if value is not None}
        kept = {key: value for key, value in content.items() if values.get(key, "") is not None}
        (root / file).write_text(json.dumps(kept))

    return change


def change_label(change: Callable[[list[Any]], object]) -> Callable[[Path], object]:
    """Changes the first label of scene `two`."""

    def changed(root: Path) -> None:
        content = json.loads((root / "dataset.json").read_text())
        change(next(label for label in content["labels"] if label[0].startswith("two/")))
        (root / "dataset.json").write_text(json.dumps(content))

    return changed


def put(file: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def drop(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink() if (root / file).is_file() else shutil.rmtree(root / file)


def put_array(file: str, array: Any) -> Callable[[Path], object]:
    return lambda root: np.save(root / file, array, allow_pickle=True)


def swap(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text((root / file).read_text().replace(old, new, 1))


def copy(file: str, to: str) -> Callable[[Path], object]:
    return lambda root: shutil.copy(root / file, root / to)


G, N = "two/campos_512_v4/00001/00001", float("nan")
ONE = np.eye(4)[:3]
BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "z-camera": ("zero123", drop("two/001.npy"), r"001\.png has no camera"),
    "z-image": ("zero123", drop("two/001.png"), r"001\.npy has no image"),
    "z-other": ("zero123", copy("two/001.png", "two/front.png"), r"front\.png has no camera"),
    "z-both": ("zero123", copy("two/001.png", "two/001.jpg"), r"001\.jpg and 001\.png are the same view"),
    "z-shape": ("zero123", put_array("two/001.npy", np.eye(4)), r"001\.npy does not have 3 x 4 numbers"),
    "z-words": ("zero123", put_array("two/001.npy", np.full((3, 4), "x")), r"001\.npy does not have 3 x 4 numbers"),
    "z-pickle": ("zero123", put_array("two/001.npy", np.array(ONE, object)), r"001\.npy is no readable \.npy file"),
    "z-cut": ("zero123", put("two/001.npy", b"\x93NUMPY\1\0v\0{'descr"), r"001\.npy is no readable \.npy file"),
    "z-nan": ("zero123", put_array("two/001.npy", ONE * N), r"001\.npy has NaN or infinite"),
    "z-scale": ("zero123", put_array("two/001.npy", 2 * ONE), r"001\.npy is no rigid motion"),
    "z-lens": ("zero123", put("two/intrinsics.npy", b""), r"intrinsics\.npy is none of Zero-1-to-3's files"),
    "z-json": ("zero123", put("two/cameras.json", "{}"), r"cameras\.json is none of Zero-1-to-3's files"),
    "g-camera": ("gobjaverse", drop(f"{G}.json"), r"00001/00001\.png has no camera"),
    "g-image": ("gobjaverse", drop(f"{G}.png"), r"00001/00001\.json has no image"),
    "g-both": ("gobjaverse", lambda root: (drop(f"{G}.json")(root), drop(f"{G}.png")(root)), "has neither 00001.json"),
    "g-json": ("gobjaverse", put(f"{G}.json", "{"), r"00001/00001\.json is not readable JSON"),
    "g-list": ("gobjaverse", put(f"{G}.json", "[]"), r"00001/00001\.json lacks x, y, z, origin, x_fov"),
    "g-key": ("gobjaverse", change_json(f"{G}.json", x_fov=None), r"00001/00001\.json lacks x_fov: download"),
    "g-new": ("gobjaverse", change_json(f"{G}.json", shift_x=0.1), r"00001\.json has an unknown key 'shift_x'"),
    "g-angle": ("gobjaverse", change_json(f"{G}.json", y_fov="wide"), r"00001\.json: y_fov is no number"),
    "g-degrees": ("gobjaverse", change_json(f"{G}.json", x_fov=39.6), r"00001\.png: camera_angle_x .* \(radians\)"),
    "g-short": ("gobjaverse", change_json(f"{G}.json", origin=[1, 2]), r"00001\.json does not have 4 x 3 numbers"),
    "g-left": ("gobjaverse", change_json(f"{G}.json", x=[2, 0, 0]), r"00001\.json is no rigid motion"),
    "s-camera": ("srn", drop("two/pose/000001.txt"), r"rgb/000001\.png has no camera"),
    "s-image": ("srn", drop("two/rgb/000001.png"), r"pose/000001\.txt has no image"),
    "s-poses": ("srn", drop("two/pose"), r"rgb/000000\.png has no camera"),
    "s-images": ("srn", drop("two/rgb"), r"pose/000000\.txt has no image"),
    "s-empty": ("srn", lambda root: [path.unlink() for path in (root / "two").glob("*/*")], "there are no views"),
    "s-lens": ("srn", drop("two/intrinsics.txt"), r"intrinsics\.txt is missing"),
    "s-lines": ("srn", put("two/intrinsics.txt", "88 32 32 0."), r"intrinsics\.txt does not have the lines"),
    "s-matrix": ("srn", put("two/intrinsics.txt", "88 0 32 0\n0 88 32 0\n0 0 1 0\n0 0 0 1"), "does not have the lines"),
    "s-four": ("srn", put("two/intrinsics.txt", "88 88 32 32\n0 0 0\n1\n64 64"), "has to begin with 'f cx cy 0'"),
    "s-nan": ("srn", put("two/intrinsics.txt", "nan 32 32 0\n0 0 0\n1\n64 64"), "does not have the lines"),
    "s-size": ("srn", put("two/intrinsics.txt", "88 32 32 0\n0 0 0\n1\n0 64"), "to give a positive focal length"),
    "s-short": ("srn", put("two/pose/000001.txt", "1 2 3"), r"pose/000001\.txt does not have 16 numbers"),
    "s-words": ("srn", put("two/pose/000001.txt", "one " * 16), r"pose/000001\.txt does not have 16 numbers"),
    "s-pose": ("srn", put("two/pose/000001.txt", "inf " * 16), r"pose/000001\.txt has NaN or infinite"),
    "e-image": ("eg3d", drop("two/img00000001.png"), r"label of two/img00000001\.png in dataset\.json has no image"),
    "e-label": ("eg3d", copy("two/img00000001.png", "two/a.png"), r"a\.png has no camera"),
    "e-24": ("eg3d", change_label(lambda label: label[1].pop()), r"two/img00000000\.png .*does not have 25 numbers"),
    "e-none": ("eg3d", change_label(lambda label: label.__setitem__(1, None)), "does not have 25 numbers"),
    "e-pose": ("eg3d", change_label(lambda label: label[1].__setitem__(0, 9)), r"two/img00000000\.png .*no rigid"),
    "e-nan": ("eg3d", change_label(lambda label: label[1].__setitem__(3, N)), r"two/img0.*has NaN or infinite"),
    "e-lens": ("eg3d", change_label(lambda label: label[1].__setitem__(16, N)), "does not end with the intrinsics"),
    "e-skew": ("eg3d", change_label(lambda label: label[1].__setitem__(17, 0.1)), "does not end with the intrinsics"),
    "e-pixels": ("eg3d", change_label(lambda label: label[1].__setitem__(18, 32)), "principal point is outside"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_scene_is_refused_by_name(tmp_path, case):
    format, damage, sentence = BAD[case]
    for scene in ("one", "two"):
        WRITERS[format](tmp_path / "data", scene, 3)
    damage(tmp_path / "data")
    options: dict[str, Any] = {"scenes": str(tmp_path / "data")}
    with pytest.raises(Refused) as refused:
        pack(str(tmp_path / "out"), PackOptions(**options))
    (problem,) = refused.value.problems
    assert problem.startswith("scene 'two': ")
    assert re.search(sentence, problem) and "\n" not in problem
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(**options, skip_bad=True))
    assert [scene.name for scene in manifest.scenes] == ["one"] and left_out == [problem]


def labels_of(*files: str) -> str:
    return json.dumps({"labels": [[file, [0.0] * 25] for file in files]})


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "json": (put("dataset.json", "{"), "dataset.json is not readable JSON"),
    "list": (put("dataset.json", "[]"), "dataset.json has no labels"),
    "null": (put("dataset.json", '{"labels": null}'), "dataset.json has no labels"),
    "classes": (put("dataset.json", '{"labels": [["one/a.png", 3, 4]]}'), "label 0 is no pair"),
    "twice": (put("dataset.json", labels_of("one/a.png", "one/a.png")), "has two labels of one/a.png"),
    "new": (change_json("dataset.json", convention="opengl"), "unknown keys.*: convention; remove"),
    "folder": (drop("two"), r"labels of 1 missing folder\(s\), first two"),
    "flat": (put("dataset.json", labels_of("a.png")), "of single images"),
    "single": (put("dataset.json", labels_of("one/a.png", "two/b.png")), "of single images"),
    "chunks": (put("dataset.json", labels_of(*(f"{i // 1000:05d}/img{i:08d}.png" for i in range(1200)))), "chunks of"),
    "beside": (copy("one/img00000000.png", "a.png"), "of single images"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_sets_of_eg3d(tmp_path, case):
    damage, sentence = BAD_DATA[case]
    for scene in ("one", "two"):
        write_eg3d(tmp_path / "data", scene, 3)
    damage(tmp_path / "data")
    with pytest.raises(Refused, match=sentence) as refused:
        pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "data")))
    assert all(problem.startswith("scene '") and "\n" not in problem for problem in refused.value.problems)


def test_a_thousand_views_with_other_names_are_a_scene():
    assert not eg3d._is_chunked({"car": {f"{i:03d}.png": [] for i in range(1000)}})
    assert not eg3d._is_chunked({"00000": {f"img{i:08d}.png": [] for i in range(12)}})


def test_poses_of_srn_that_are_world_to_camera(tmp_path):
    """The flag at the end of intrinsics.txt."""
    write_srn(tmp_path / "data", "one", 4)
    pack(str(tmp_path / "a"), PackOptions(scenes=str(tmp_path / "data")))
    for i in range(4):
        inverse = np.linalg.inv(Camera(i, 1.3).opencv())
        put(f"one/pose/{i:06d}.txt", "\n".join(" ".join(map(str, row)) for row in inverse))(tmp_path / "data")
    swap("one/intrinsics.txt", "512 512\n", "512 512\n1\n")(tmp_path / "data")
    pack(str(tmp_path / "b"), PackOptions(scenes=str(tmp_path / "data")))
    found = [members(tmp_path / name) for name in "ab"]
    poses = [
        [json.loads(content[name])["cam2world"] for name in sorted(content) if "json" in name] for content in found
    ]
    np.testing.assert_allclose(*poses, atol=1e-8)


def test_what_zero123_has_beside_views_is_left(tmp_path):
    write_zero123(tmp_path / "data", "one", 3)
    copy("one/001.png", "one/001_depth.png")(tmp_path / "data")
    put("one/metadata.json", "{}")(tmp_path / "data")
    assert pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "data")))[0].scenes[0].views == 2


def test_srn_scenes_that_eg3d_has_preprocessed_are_those_of_srn(tmp_path):
    write_srn(tmp_path / "data", "one", 4)
    put("dataset.json", labels_of("one/rgb/000000.png"))(tmp_path / "data")
    assert [ref.format for ref in find_scenes(str(tmp_path / "data"))[1]] == ["srn"]
