# SPDX-License-Identifier: Apache-2.0
"""Packing: layout, reproducible bytes, bad input."""

import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_files import picture, write_data, write_scene

from igae.data import Manifest, PackOptions, Refused, find_scenes, pack, verify_packed

TOOL = Path(__file__).parent.parent / "data_tools" / "pack_shards.py"
SMALL = 20_000  # bytes: a few of the tests' scenes


def members(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    content: dict[str, bytes] = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in content
                content[member.name] = file.read()
    return content


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tool(*arguments: object, **keywords: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", images=7)


def sources(data: Path) -> dict[str, str]:
    return {"scenes": str(data / "scenes"), "subset": "square16", "images": str(data / "natural_images")}


def test_layout(data, tmp_path, caplog):
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(**sources(data), shard_size=SMALL))
    assert left_out == [] and manifest == Manifest.load(str(tmp_path / "out"))
    assert manifest.image_size == (16, 16) and manifest.dataset == "toys" and manifest.images == 7
    # Held out: n // 10, at least one of more than one.
    found = [(scene.name, scene.category, scene.views, scene.heldout) for scene in manifest.scenes]
    assert found == [
        ("scene_0", "toys", 11, 1),
        ("scene_1", "cars", 4, 1),
        ("scene_2", "cars", 1, 0),
        ("scene_3", "toys", 18, 2),
    ]
    assert "2 scenes with fewer than 10 views: " in caplog.text
    assert len([shard for shard in manifest.shards if shard.kind == "scenes"]) > 1
    train, heldout = members(tmp_path / "out", "scenes-*"), members(tmp_path / "out", "heldout-*")
    expected_heldout = {"scene_0/000", "scene_1/000", "scene_3/000", "scene_3/001"}
    assert {name.partition(".")[0] for name in heldout} == expected_heldout
    views = {f"scene_{i}/{v:03d}" for i, n in enumerate((12, 5, 1, 20)) for v in range(n)}
    assert {name.partition(".")[0] for name in train} == views - expected_heldout
    for key in views:
        scene, view = key.split("/")
        both = {**train, **heldout}
        assert both[f"{key}.png"] == (data / "scenes/square16" / scene / f"images/{view}.png").read_bytes()
        transforms = json.loads((data / "scenes/square16" / scene / "transforms_opencv.json").read_text())
        camera = json.loads(both[f"{key}.json"])
        assert camera["cam2world"] == transforms["frames"][int(view)]["transform_matrix"]
        assert camera["intrinsics"] == [[70 / 64, 0, 0.5], [0, 70 / 64, 0.5], [0, 0, 1]]
    natural_images = sorted(members(tmp_path / "out", "images-*").values())
    assert natural_images == sorted(path.read_bytes() for path in (data / "natural_images").rglob("*.jpg"))
    for shard in manifest.shards:
        raw = (tmp_path / "out" / shard.name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard.bytes, shard.sha256)
        # A scene is in one shard only.
        assert sum(shard.scenes.values()) == (0 if shard.kind == "images" else shard.samples)
    names = [name for shard in manifest.shards if shard.kind == "scenes" for name in shard.scenes]
    assert len(names) == len(set(names))
    assert manifest.cameras is not None and manifest.cameras.mean_focal == pytest.approx(70 / 64)
    for distance in (manifest.cameras.min_distance, manifest.cameras.mean_distance, manifest.cameras.max_distance):
        assert distance == pytest.approx(1.3, abs=1e-6)


def test_views_of_a_shard_are_interleaved(data, tmp_path):
    pack(str(tmp_path / "out"), PackOptions(scenes=str(data / "scenes"), subset="square16"))
    order = [name.split("/")[0] for name in members(tmp_path / "out", "scenes-*") if name.endswith("png")]
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes > len(set(order))  # stored scene after scene there would be 3 changes


def test_bytes_depend_on_input_and_seed_only(data, tmp_path):
    for name, keywords in {"a": {"workers": 1}, "b": {"workers": 2}, "c": {"seed": 1}}.items():
        pack(str(tmp_path / name), PackOptions(**sources(data), shard_size=SMALL, **keywords))
        for path in data.rglob("*.png"):
            os.utime(path, (time.time(), time.time() + 1000))
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b and len(a) > 5
    assert a["scenes-00000.tar"] != c["scenes-00000.tar"]
    assert members(tmp_path / "a", "scenes-*") == members(tmp_path / "c", "scenes-*")


def test_opengl_and_opencv_give_the_same_cameras(tmp_path):
    for opengl in (False, True):
        write_scene(tmp_path / str(opengl) / "thing", 12, opengl=opengl)
        pack(
            str(tmp_path / f"out{opengl}"),
            PackOptions(scenes=str(tmp_path / str(opengl)), normalize="none", heldout="first"),
        )
    cv, gl = members(tmp_path / "outFalse"), members(tmp_path / "outTrue")
    assert list(cv) == list(gl) and len(cv) == 24
    for name in cv:
        if name.endswith("json"):
            one, other = json.loads(cv[name]), json.loads(gl[name])
            assert one["cam2world"] == other["cam2world"]
            # The field of view goes through an arc tangent.
            np.testing.assert_allclose(one["intrinsics"], other["intrinsics"], rtol=1e-14)
        else:
            assert cv[name] == gl[name]


def test_categories(data):
    def names(categories):
        return [ref.name for ref in find_scenes(str(data / "scenes"), "square16", categories)[1]]

    assert names(None) == ["scene_0", "scene_1", "scene_2", "scene_3"]
    assert names({"toys": (1, 3)}) == ["scene_1", "scene_2"]
    assert names({"cars": (1, 99), "toys": (0, 1)}) == ["scene_2", "scene_0"]
    with pytest.raises(ValueError, match="unknown category 'car'; did you mean 'cars'"):
        names({"car": (0, 1)})


def test_manifest_select(data, tmp_path):
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(**sources(data)))

    def names(categories):
        return [scene.name for scene in manifest.select(categories)]

    assert names(None) == names({"toys": (0, 1000)}) == ["scene_0", "scene_1", "scene_2", "scene_3"]
    assert names({"cars": (0, 1)}) == ["scene_1"] and names({"cars": (1, 9), "toys": (0, 1)}) == ["scene_0", "scene_2"]
    with pytest.raises(ValueError, match="did you mean 'toys'"):
        manifest.select({"tois": (0, 1)})


def test_manifest_errors(data, tmp_path):
    with pytest.raises(ValueError, match="pack the data first with data_tools/pack_shards.py"):
        Manifest.load(str(tmp_path / "nothing"))
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(**sources(data)))
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    for key, value, match in (
        ("format", 99, "format 99"),
        ("images", "many", "images"),
        ("shards", [{**content["shards"][0], "name": "../scenes-00000.tar"}], "shard name"),
        ("scenes", content["scenes"][1:], "ids"),
        ("shards", content["shards"][1:], "training views"),
    ):
        file.write_text(json.dumps({**content, key: value}))
        with pytest.raises(ValueError, match=match):
            Manifest.load(str(tmp_path / "out"))
    file.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        Manifest.load(str(tmp_path / "out"))


@pytest.mark.parametrize("subset", [None, "square32"])
def test_the_subset_that_has_the_scenes_is_told(subset, data, tmp_path):
    (data / "scenes" / "empty").mkdir()
    with pytest.raises(ValueError, match="has none of the scenes, which are in --subset square16$"):
        pack(str(tmp_path / "out"), PackOptions(scenes=str(data / "scenes"), subset=subset))


def test_resize(data, tmp_path, caplog):
    big = data / "scenes/square16/scene_0/images/003.png"
    big.write_bytes(picture(1, size=64, mode="RGBA"))
    (data / "natural_images" / "wide.png").write_bytes(picture(2, size=40))
    Image.open(data / "natural_images" / "wide.png").crop((0, 0, 40, 24)).save(data / "natural_images" / "wide.png")
    with pytest.raises(Refused) as refused:
        pack(str(tmp_path / "out"), PackOptions(**sources(data)))
    assert len(refused.value.problems) == 2
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(**sources(data), resize=16))
    content = members(tmp_path / "out")
    assert {Image.open(io.BytesIO(c)).size for name, c in content.items() if not name.endswith("json")} == {(16, 16)}
    assert Image.open(io.BytesIO(content["scene_0/003.png"])).mode == "RGBA"
    # What has the size already is copied as it is.
    assert content["scene_0/004.png"] == (data / "scenes/square16/scene_0/images/004.png").read_bytes()
    assert manifest.images == 8
    pack(str(tmp_path / "out8"), PackOptions(**sources(data), resize=8))
    for name, body in members(tmp_path / "out8").items():
        assert name.endswith("json") or Image.open(io.BytesIO(body)).size == (8, 8)
    assert "most autoencoders" not in caplog.text
    pack(str(tmp_path / "out20"), PackOptions(images=str(data / "natural_images"), resize=20))
    assert "images of 20 x 20 pixels don't suit most autoencoders" in caplog.text and "--resize 16, or" in caplog.text


def edit(folder: Path, change) -> None:
    file = folder / "transforms_opencv.json"
    transforms = json.loads(file.read_text())
    change(transforms)
    file.write_text(json.dumps(transforms))


def set_pose(index: int, value: float):
    def change(transforms):
        transforms["frames"][3]["transform_matrix"][0][index] = value

    return change


def bomb() -> bytes:
    """A PNG whose header says 20000 x 20000 pixels."""
    out = bytearray(picture(0))
    out[16:24] = struct.pack(">II", 20000, 20000)
    out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    return bytes(out)


def bad_bytes(content: bytes, file: str = "images/003.png"):
    return lambda folder: (folder / file).write_bytes(content)


def swap(transforms):
    transforms["frames"][3]["file_path"] = "../scene_0/images/003.png"


def repeat_file(transforms):
    transforms["frames"][3]["file_path"] = "./images/002.png"


BAD_SCENES = {
    "missing image": (lambda folder: (folder / "images/003.png").unlink(), "images/003.png"),
    "truncated image": (bad_bytes(picture(7)[:-200]), "images/003.png"),
    "flipped byte": (bad_bytes(picture(7)[:300] + b"\xaa\xbb\xcc" + picture(7)[303:]), "images/003.png"),
    "no image": (bad_bytes(b"hello"), "images/003.png"),
    "held-out image": (bad_bytes(b"hello", "images/000.png"), "images/000.png"),
    "other size": (bad_bytes(picture(7, size=17)), "images/003.png is 17x17"),
    "bomb": (bad_bytes(bomb()), "images/003.png"),
    "16 bit": (lambda f: Image.fromarray(np.zeros((16, 16), np.uint16)).save(f / "images/003.png"), "images/003.png"),
    "NaN pose": (lambda folder: edit(folder, set_pose(1, math.nan)), r"frame 3 \(images/003.png\) has NaN"),
    "scaled pose": (lambda folder: edit(folder, set_pose(0, 1.7)), r"frame 3 \(images/003.png\) is no rigid"),
    "no matrix": (lambda f: edit(f, lambda t: t["frames"][3].pop("transform_matrix")), "frame 3"),
    "matrix of words": (lambda f: edit(f, lambda t: t["frames"][3].update(transform_matrix=[["a"]])), "frame 3"),
    "empty": (lambda folder: edit(folder, lambda t: t.update(frames=[])), "is empty"),
    "no json": (lambda folder: (folder / "transforms_opencv.json").write_text("{'frames'"), "not readable JSON"),
    "no file": (lambda folder: (folder / "transforms_opencv.json").unlink(), "no transforms_opencv.json"),
    "outside": (lambda folder: edit(folder, swap), "does not stay"),
    "same image twice": (lambda folder: edit(folder, repeat_file), "images/002.png"),
    "distorted": (lambda f: edit(f, lambda t: t.update(camera_model="OPENCV_FISHEYE")), "OPENCV_FISHEYE"),
    "no focal": (lambda f: edit(f, lambda t: t.pop("fl_x")), "images/000.png: there is neither fl_x"),
}


@pytest.mark.parametrize("kind", BAD_SCENES)
def test_bad_scene(kind, data, tmp_path):
    damage, words = BAD_SCENES[kind]
    damage(data / "scenes/square16/scene_1")
    out = tmp_path / "out"
    with pytest.raises(Refused, match=f"scene 'scene_1': .*{words}") as refused:
        pack(str(out), PackOptions(**sources(data)))
    assert len(refused.value.problems) == 1 and "\n" not in refused.value.problems[0]
    assert not out.exists() or list(out.iterdir()) == []

    manifest, left_out = pack(str(out), PackOptions(**sources(data), skip_bad=True, shard_size=SMALL))
    assert left_out == refused.value.problems
    assert [scene.name for scene in manifest.scenes] == ["scene_0", "scene_2", "scene_3"]
    assert [scene.id for scene in manifest.scenes] == [0, 1, 2]
    content = members(out)
    assert not [name for name in content if name.startswith("scene_1/")]
    assert len([name for name in content if name.endswith("json")]) == 12 + 1 + 20
    assert verify_packed(str(out)) == [] and not list(out.glob("*.partial"))


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\nb", "..", "", "__meta__", "x" * 200])
def test_bad_names(name, data, tmp_path):
    lists = {"toys": ["scene_0", name, "scene_2"]}
    (data / "scenes/dataset_map.json").write_text(json.dumps(lists))
    with pytest.raises(Refused) as refused:
        pack(str(tmp_path / "out"), PackOptions(**sources(data)))
    assert repr(name) in refused.value.problems[0] and "\n" not in refused.value.problems[0]
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(**sources(data), skip_bad=True))
    assert [scene.name for scene in manifest.scenes] == ["scene_0", "scene_2"] and len(left_out) == 1


def test_duplicate_scene(data, tmp_path):
    (data / "scenes/dataset_map.json").write_text(json.dumps({"toys": ["scene_0", "scene_1", "scene_0"]}))
    with pytest.raises(Refused, match="scene 'scene_0': it is listed twice"):
        pack(str(tmp_path / "out"), PackOptions(**sources(data)))
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(**sources(data), skip_bad=True))
    assert [scene.name for scene in manifest.scenes] == ["scene_0", "scene_1"] and len(left_out) == 1


def test_bad_natural_image(data, tmp_path):
    (data / "natural_images/class_1/1.jpg").write_bytes(picture(1, kind="JPEG")[:-100])
    (data / "natural_images/class_1/other.jpg").write_bytes(picture(1, kind="JPEG", size=20))
    with pytest.raises(Refused) as refused:
        pack(str(tmp_path / "out"), PackOptions(images=str(data / "natural_images")))
    assert sorted(p.split()[2] for p in refused.value.problems) == ["class_1/1.jpg", "class_1/other.jpg"]
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(images=str(data / "natural_images"), skip_bad=True))
    assert manifest.images == 6 and len(left_out) == 2 and manifest.scenes == [] and manifest.cameras is None
    assert verify_packed(str(tmp_path / "out")) == []


def test_overwrite(data, tmp_path):
    out = tmp_path / "out"
    pack(str(out), PackOptions(**sources(data), shard_size=SMALL))
    before = digests(out)
    with pytest.raises(ValueError, match="manifest.json already"):
        pack(str(out), PackOptions(**sources(data)))
    assert digests(out) == before
    (data / "natural_images/class_1/1.jpg").write_bytes(b"")
    with pytest.raises(Refused):
        pack(str(out), PackOptions(**sources(data), overwrite=True))
    assert digests(out) == before  # refusing leaves what was there
    pack(str(out), PackOptions(scenes=str(data / "scenes"), subset="square16", overwrite=True))
    assert sorted(digests(out)) == ["heldout-00000.tar", "manifest.json", "scenes-00000.tar"]
    assert verify_packed(str(out)) == []


def test_command(data, tmp_path):
    """The command as users give it, its exit codes and its one-line errors."""
    out = tmp_path / "out"
    base = ["--scenes", data / "scenes", "--subset", "square16", "--output", out, "--workers", 1]
    wrong = tool(*base, "--categories", "toyz: [0, 2]")
    assert wrong.returncode == 2 and wrong.stderr == "error: unknown category 'toyz'; did you mean 'toys'?\n"
    (data / "scenes/square16/scene_3/images/011.png").unlink()
    refused = tool(*base)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and not out.exists()
    assert "scene 'scene_3': images/011.png is missing" in refused.stderr.splitlines()
    done = tool(
        *base, "--images", data / "natural_images", "--categories", "toys: [1, 4]", "--skip-bad", "--shard-size", "1MB"
    )
    assert done.returncode == 0, done.stderr
    assert "2 scenes with 5 training and 1 held-out views, 7 natural images" in done.stdout
    assert "left out 1:\nscene 'scene_3': images/011.png is missing" in done.stderr
    assert tool("--verify", out).returncode == 0
    raw = bytearray((out / "heldout-00000.tar").read_bytes())
    raw[700] ^= 4
    (out / "heldout-00000.tar").write_bytes(raw)
    damaged = tool("--verify", out)
    assert damaged.returncode == 1 and "heldout-00000.tar" in damaged.stderr
