# SPDX-License-Identifier: Apache-2.0
"""Captures as input: COLMAP (MVImgNet) and CO3D, with the geometry measured in packed images."""

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from capture_files import BALLS, Shot, annotate, draw, save, shots, write_co3d, write_colmap
from PIL import Image

from igae.data import Manifest, PackOptions, find_scenes, pack
from igae.data.sources import read_scene
from igae.data.sources.scene import BadInput, View


def views_of(root: Path | str, number: int = 0) -> Sequence[View]:
    return read_scene(find_scenes(str(root))[1][number])


def refusal(root: Path | str) -> str:
    with pytest.raises(BadInput) as caught:
        views_of(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(root: Path, out: Path, **options: Any) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and the packed files by name: cameras, or images [h, w, 3]."""
    manifest, left_out = pack(str(out), PackOptions(scenes=str(root), **options))
    assert left_out == []
    content: dict[str, Any] = {}
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".json"):
                    content[member.name.removesuffix(".json")] = json.loads(data)
                else:
                    content[member.name] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return manifest, content


def check_geometry(manifest: Manifest, content: Mapping[str, Any], ordered: Sequence[Shot]) -> None:
    """Balls are where the packed cameras see their centers, in the image of each shot."""
    (scene,) = manifest.scenes
    assert scene.normalization is not None and scene.views + scene.heldout == len(ordered)
    *origin, scale = scene.normalization
    errors = []
    for index, shot in enumerate(ordered):
        image, camera = content[f"{scene.name}/{index:03d}.png"], content[f"{scene.name}/{index:03d}"]
        assert (image == draw(shot)).all()
        world_to_camera = np.linalg.inv(np.array(camera["cam2world"]))
        for center, _, color in BALLS:
            hit = (image == color).all(-1)
            if hit.sum() < 25:  # behind another ball
                continue
            alone = (draw(shot, [(center, 0.15, color)]) == color).all(-1)
            if (hit != alone).any():
                continue
            point = world_to_camera[:3, :3] @ (scale * (center - np.array(origin))) + world_to_camera[:3, 3]
            u, v, _ = np.array(camera["intrinsics"]) @ point / point[2]
            rows, columns = np.nonzero(hit)
            errors.append((u * shot.w - columns.mean() - 0.5, v * shot.h - rows.mean() - 0.5))
    assert len(errors) > 2 * len(ordered)
    assert np.abs(errors).max() < 0.3 and np.abs(np.mean(errors, 0)).max() < 0.05


def named_shots(count: int = 12) -> dict[str, Shot]:
    """Images in a folder, listed from the last to the first."""
    return {f"cam a/{i:03d}.png": shot for i, shot in reversed(list(enumerate(shots(count))))}


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_geometry(tmp_path: Path, binary: bool) -> None:
    named = named_shots()
    named["cam a/003.png"] = shots(fx=90.0, fy=95.0, cx=60.0)[3]
    write_colmap(tmp_path / "in/mug", named, binary)
    save(tmp_path / "in/mug/images/cam a/unposed.png", draw(named["cam a/003.png"]))
    manifest, content = packed(tmp_path / "in", tmp_path / "out")
    assert manifest.scenes[0].name == "mug" and manifest.image_size == (96, 128)
    check_geometry(manifest, content, [named[name] for name in sorted(named)])


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_reads_what_pycolmap_writes(tmp_path: Path, binary: bool) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    named = {name.replace(" ", "_"): shot for name, shot in named_shots().items()}
    write_colmap(tmp_path / "in/mug", named, model="text")
    (tmp_path / "in/mug/text/points3D.txt").write_text("")
    reconstruction = pycolmap.Reconstruction(tmp_path / "in/mug/text")
    target = tmp_path / "in/mug/sparse/0"
    target.mkdir(parents=True)
    (reconstruction.write_binary if binary else reconstruction.write_text)(target)
    assert (target / ("images.bin" if binary else "images.txt")).is_file()
    check_geometry(*packed(tmp_path / "in", tmp_path / "out"), [named[name] for name in sorted(named)])


def test_colmap_on_an_object_store_lists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_colmap(tmp_path / "mug", named_shots(3), binary=True)
    root = f"memory://{tmp_path.name}-colmap"
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/mug", f"{root}/mug", recursive=True)
    (ref,) = find_scenes(root)[1]
    calls: list[str] = []
    for name in ("find", "exists", "info", "cat_file"):
        original = getattr(type(fs), name)
        monkeypatch.setattr(
            type(fs), name, lambda self, *a, _name=name, _do=original, **k: (calls.append(_name), _do(self, *a, **k))[1]
        )
    views = read_scene(ref)
    assert [view.file for view in views] == [f"images/cam a/00{i}.png" for i in range(3)]
    assert calls.count("find") == 1 and calls.count("cat_file") == 2 and "exists" not in calls


@pytest.mark.parametrize("beside", [0, 255])
def test_inverted_mask_files_are_told(tmp_path: Path, beside: int, caplog: pytest.LogCaptureFixture) -> None:
    named = named_shots(3)
    write_colmap(tmp_path / "in/mug", named)
    mask = np.full((96, 128), beside, np.uint8)
    mask[20:80, 30:100] = 255 - beside
    for name in named:
        save(tmp_path / f"in/mug/masks/{name}.png", mask)
    packed(tmp_path / "in", tmp_path / "out")
    assert ("the masks seem to be inverted" in caplog.text) == (beside == 255)


LENS = {"w": 128.0, "h": 96.0, "fl_x": 110.0, "fl_y": 110.0, "cx": 70.0, "cy": 41.0}


@pytest.mark.parametrize(
    ("model", "parameters", "lens", "distortion"),
    [
        ("SIMPLE_PINHOLE", "110 70 41", LENS, {}),
        ("PINHOLE", "110 118 70 41", LENS | {"fl_y": 118.0}, {}),
        ("SIMPLE_RADIAL", "110 70 41 .1", LENS, {"k1": 0.1}),
        ("RADIAL", "110 70 41 .1 -.2", LENS, {"k1": 0.1, "k2": -0.2}),
        ("OPENCV", "110 118 70 41 .1 0 .3 .4", LENS | {"fl_y": 118.0}, {"k1": 0.1, "p1": 0.3, "p2": 0.4}),
        (
            "FULL_OPENCV",
            "110 118 70 41 .1 .2 .3 .4 .5 .6 .7 .8",
            LENS | {"fl_y": 118.0},
            {"k1": 0.1, "k2": 0.2, "p1": 0.3, "p2": 0.4, "k3": 0.5, "k4": 0.6, "k5": 0.7, "k6": 0.8},
        ),
    ],
)
def test_colmap_camera_models(tmp_path: Path, model: str, parameters: str, lens: Any, distortion: Any) -> None:
    numbers = [float(number) for number in parameters.split()]
    kind = "SIMPLE_PINHOLE PINHOLE SIMPLE_RADIAL RADIAL OPENCV - FULL_OPENCV".split().index(model)
    for suffix in ("txt", "bin"):
        folder = tmp_path / suffix
        write_colmap(folder / "mug", {"a.png": shots()[0], "b.png": shots()[1]}, binary=suffix == "bin")
        cameras = folder / "mug/sparse/0" / f"cameras.{suffix}"
        if suffix == "txt":
            cameras.write_text("".join(f"{i} {model} 128 96 {parameters}\n" for i in (1, 2)))
        else:
            one = [struct.pack(f"<IiQQ{len(numbers)}d", i, kind, 128, 96, *numbers) for i in (1, 2)]
            cameras.write_bytes(struct.pack("<Q", 2) + b"".join(one))
        for view in views_of(folder):
            assert dict(view.lens) == lens and dict(view.distortion) == distortion


def test_colmap_other_models_are_refused_by_name(tmp_path: Path) -> None:
    for number, model in {5: "OPENCV_FISHEYE", 7: "FOV", 10: "THIN_PRISM_FISHEYE", 99: "number 99"}.items():
        for suffix in ("txt", "bin"):
            folder = tmp_path / f"{number}{suffix}"
            write_colmap(folder / "mug", {"a.png": shots()[0]}, binary=suffix == "bin")
            cameras = folder / "mug/sparse/0" / f"cameras.{suffix}"
            if suffix == "txt":
                cameras.write_text(f"1 {model.replace(' ', '')} 128 96 110 70 41 .1 .2 .3 .4 .5 .6\n")
            else:
                cameras.write_bytes(struct.pack("<QIiQQ8d", 1, 1, number, 128, 96, *[1.0] * 8))
            text = refusal(folder)
            assert f"sparse/0/cameras.{suffix}: camera 1 has the model {model[:6]}" in text, text
            assert "image_undistorter" in text and "'mug'" in text


def test_colmap_takes_the_largest_of_several(tmp_path: Path) -> None:
    named = named_shots(6)
    write_colmap(tmp_path / "in/mug", dict(list(named.items())[:2]))
    write_colmap(tmp_path / "in/mug", named, model="sparse/1")
    write_colmap(tmp_path / "in/mug", dict(list(named.items())[:3]), model="colmap/sparse/0")
    assert len(views_of(tmp_path / "in")) == 6


@pytest.mark.parametrize("place", ["sparse", "colmap/sparse/0"])
def test_colmap_places(tmp_path: Path, place: str) -> None:
    write_colmap(tmp_path / "in/mug", named_shots(3), model=place)
    assert len(views_of(tmp_path / "in")) == 3


def test_a_transforms_file_comes_before_a_reconstruction(tmp_path: Path) -> None:
    write_colmap(tmp_path / "in/mug", named_shots(3))
    assert find_scenes(str(tmp_path / "in"))[1][0].format == "colmap"
    (tmp_path / "in/mug/transforms.json").write_text("{}")
    assert find_scenes(str(tmp_path / "in"))[1][0].format == "transforms"


def test_mvimgnet_folders_are_categories(tmp_path: Path) -> None:
    for scene in ("7/0a01", "7/0a02", "12/1b00"):
        write_colmap(tmp_path / "mvi" / scene, {"001.png": shots()[0]}, binary=True)
    dataset, refs, _ = find_scenes(str(tmp_path / "mvi"))
    assert dataset == "mvi" and {ref.name: ref.category for ref in refs} == {"0a01": "7", "0a02": "7", "1b00": "12"}


@pytest.mark.parametrize("name", ["a.jpg.png", "a.png"])
def test_colmap_masks(tmp_path: Path, name: str) -> None:
    write_colmap(tmp_path / "in/mug", {"x/a.jpg": shots()[0], "x/b.jpg": shots()[1]})
    assert [view.mask for view in views_of(tmp_path / "in")] == [None, None]
    save(tmp_path / "in/mug/masks/x" / name, np.full((96, 128), 255, np.uint8))
    assert "masks/x/b.jpg.png is missing: give a mask for every image" in refusal(tmp_path / "in")
    save(tmp_path / "in/mug/masks/x" / name.replace("a", "b"), np.full((96, 128), 255, np.uint8))
    assert [view.mask for view in views_of(tmp_path / "in")] == [f"masks/x/{name}", f"masks/x/{name.replace('a', 'b')}"]


@pytest.mark.parametrize("file", ["cameras", "images"])
@pytest.mark.parametrize("binary", [False, True])
def test_colmap_damaged_files_are_refused(tmp_path: Path, file: str, binary: bool) -> None:
    write_colmap(tmp_path / "in/mug", named_shots(4), binary)
    path = tmp_path / f"in/mug/sparse/0/{file}.{'bin' if binary else 'txt'}"
    whole = path.read_bytes()
    for cut in (3, 60, len(whole) // 2, len(whole) - 3) if binary else (40,):
        path.write_bytes(whole[:cut])
        assert f"sparse/0/{path.name} is damaged: write it again with COLMAP" in refusal(tmp_path / "in")
    if binary:
        # Counts that nothing can have: of images or cameras, and of the points that the last image sees.
        path.write_bytes(b"\xff" * 8 + whole[8:])
        assert "is damaged" in refusal(tmp_path / "in")
        path.write_bytes(whole[: whole.rindex(b".png") + 5] + b"\xff" * 8 if file == "images" else whole[:8])
        assert "is damaged" in refusal(tmp_path / "in")
    path.unlink()
    expected = f"sparse/0/{path.name} is missing" if file == "cameras" else "there is no sparse/0/images.bin"
    assert expected in refusal(tmp_path / "in")


def test_colmap_refusals(tmp_path: Path) -> None:
    write_colmap(tmp_path / "in/mug", named_shots(3))
    images = tmp_path / "in/mug/sparse/0/images.txt"
    text = images.read_text()
    lost = tmp_path / "in/mug/images/cam a/001.png"
    data = lost.read_bytes()
    lost.unlink()
    assert "images/cam a/001.png is missing: put the images that sparse/0 was made of" in refusal(tmp_path / "in")
    lost.write_bytes(data)
    images.write_text(text.replace(" 2 cam a", " 9 cam a"))
    assert "images/cam a/001.png has camera 9, which cameras.txt lacks" in refusal(tmp_path / "in")
    for pose in ("0 0 0 0 1 2 3", "1 0 0 0 1 nan 3"):
        images.write_text(f"1 {pose} 1 cam a/002.png\n\n")
        assert "the pose of images/cam a/002.png has no finite numbers" in refusal(tmp_path / "in")
    images.write_text("1 1 0 0 0 1 2 1 cam_a/002.png\n\n")  # a number is gone
    assert "sparse/0/images.txt is damaged" in refusal(tmp_path / "in")
    images.write_text("# nothing\n")
    assert "sparse/0 has no images: the scene is empty" in refusal(tmp_path / "in")


@pytest.mark.parametrize("format", ["ndc_isotropic", "ndc_norm_image_bounds", None])
@pytest.mark.parametrize("size", [{}, {"w": 96, "h": 128, "cx": 41.0, "cy": 70.0}], ids=["wide", "high"])
def test_co3d_geometry(tmp_path: Path, format: str | None, size: dict[str, Any]) -> None:
    write_co3d(tmp_path / "in", format=format, **size)
    check_geometry(*packed(tmp_path / "in", tmp_path / "out"), shots(**size))


def test_co3d_names_order_masks_and_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = write_co3d(tmp_path / "co3d", ["110_1_2", "189_3_4"])
    frames[0]["viewpoint"] = None
    annotate(tmp_path / "co3d", frames)
    readings: list[int] = []
    unpack = gzip.GzipFile.read
    count_reading = lambda file, size=-1: (readings.append(size), unpack(file, size))[1]  # noqa: E731
    monkeypatch.setattr(gzip.GzipFile, "read", count_reading)
    dataset, refs, _ = find_scenes(str(tmp_path / "co3d"))
    assert dataset == "co3d"
    assert [(ref.name, ref.category, ref.format) for ref in refs] == [
        ("110_1_2", "apple", "co3d"),
        ("189_3_4", "apple", "co3d"),
    ]
    for ref, count in zip(refs, (12, 11), strict=True):  # without the frame that has no camera
        views = read_scene(ref)
        names = [f"frame{3 * i + 1:06d}.png" for i in range(count)]
        assert [view.file for view in views] == [f"images/{name}" for name in names]
        assert [view.mask for view in views] == [f"masks/{name}" for name in names]
        assert [view.index for view in views] == list(range(count))
    assert len(readings) == 1
    annotate(tmp_path / "co3d", frames[:-2])  # a file that changed is read again
    assert len(read_scene(refs[0])) == 10 and len(readings) == 2
    # A category's folder alone.
    assert [ref.name for ref in find_scenes(str(tmp_path / "co3d/apple"))[1]] == ["110_1_2", "189_3_4"]


def change(frame: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        frame = frame[key]
    if value is None:
        del frame[last]
    else:
        frame[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("viewpoint.intrinsics_format", "ndc_unheard", "in the format 'ndc_unheard', which is neither"),
        ("viewpoint.R", [[1, 0, 0], [0, 1, 0], [0, 0, 2]], "R of images/frame000034.png is no rotation"),
        ("viewpoint.T", [0, 0, float("nan")], "viewpoint.T.2 of frame 34: Input should be a finite number"),
        ("viewpoint.focal_length", None, "viewpoint.focal_length of frame 34: Field required"),
        ("image", None, "image of frame 34: Field required"),
        ("image.size", [96], "image.size.1 of frame 34: Field required"),
        ("image.path", "apple/other/images/a.png", "'apple/other/images/a.png' is not in the folder of the sequence"),
        ("image.path", "apple/110_1_2/../../a.png", "is not in the folder of the sequence"),
        ("mask.path", "a.png", "'a.png' is not in the folder of the sequence"),
        ("mask", None, "frame 34 has no mask, but others have"),
    ],
)
def test_co3d_refuses_frames(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    frames = write_co3d(tmp_path / "in")
    change(frames[0], path, value)
    annotate(tmp_path / "in", frames)
    text = refusal(tmp_path / "in")
    assert expected in text and text.startswith("scene '110_1_2': frame_annotations.jgz"), text


def test_co3d_refuses_files(tmp_path: Path) -> None:
    frames = write_co3d(tmp_path / "in")
    file = tmp_path / "in/apple/frame_annotations.jgz"
    whole = file.read_bytes()
    damaged = {"plain": b"[]", "cut": whole[: len(whole) // 2], "flipped": whole[:40] + b"\xff\xff" + whole[42:]}
    damaged |= {"json": gzip.compress(b"{"), "list": gzip.compress(b"{}"), "entries": gzip.compress(b"[1]")}
    damaged["bomb"] = gzip.compress(b"[" + b" " * 10_000_000 + b"]")
    for data in damaged.values():
        file.write_bytes(data)
        assert "frame_annotations.jgz is no readable gzip file of JSON (" in refusal(tmp_path / "in")
    annotate(tmp_path / "in", [{**frame, "sequence_name": "other"} for frame in frames])
    assert "has no frames with a camera of 110_1_2: the scene is empty" in refusal(tmp_path / "in")
    (ref,) = find_scenes(str(tmp_path / "in"))[1]
    file.unlink()
    with pytest.raises(BadInput, match=r"frame_annotations\.jgz is missing: put it beside"):
        read_scene(ref)
