# SPDX-License-Identifier: Apache-2.0
"""Transforms files of nerfstudio, Blender and TRELLIS: cameras fit the pixels, splits, names of files, refusals."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from balls import (
    Lens,
    flat,
    kinds,
    lens,
    manifest_of,
    matrix,
    pack_and_look,
    poses,
    render,
    save,
    write_transforms,
)

from igae.data import PackOptions, Refused, pack

COUNT = 12
POSES = poses(COUNT)


def pixels(of: Lens, scale: float = 1.0) -> dict[str, float]:
    """A lens as nerfstudio writes it, of images `scale` times as large."""
    height, width = of.size
    found = {"fl_x": of.fx, "fl_y": of.fy, "cx": of.cx, "cy": of.cy, "w": width, "h": height}
    return {key: value * scale for key, value in found.items()}


def angle(of: Lens) -> float:
    return 2 * math.atan(of.size[1] / 2 / of.fx)


def write(folder: Path, lenses: list[Lens], per_frame=lambda i: {}, name="images/{:03d}.png", **shared) -> Path:
    """A scene `s` in a folder, an image each for the first poses."""
    frames = []
    for index, of in enumerate(lenses):
        file = name.format(index)
        save(render(POSES[index], of), folder / "s" / file)
        frames.append({"file_path": file, "transform_matrix": matrix(POSES[index]), **per_frame(index)})
    write_transforms(folder / "s", frames, **shared)
    return folder


def small(folder: Path, change=lambda content: None, count: int = 2, **shared) -> Path:
    """A scene for what is refused: `change` gets what the file has."""
    root = write(folder, [lens()] * count, **(shared or {"camera_angle_x": angle(lens())}))
    file = root / "s/transforms.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


def refusal(source: Path, **options) -> str:
    with pytest.raises(Refused) as refused:
        pack(str(source.parent / "out"), PackOptions(scenes=str(source), **options))
    (problem,) = refused.value.problems
    assert "\n" not in problem
    return problem


def test_nerfstudio(tmp_path):
    """A lens off the center, pixels that are not square, images at half the size that the file speaks of, and keys that
    nerfstudio and instant-ngp write beside it."""
    of = Lens(80.0, 92.0, 44.0, 35.5, (64, 96))
    extra = {"colmap_im_id": 3, "sharpness": 12.5, "depth_file_path": "depth/0.png"}
    shared = {"camera_model": "OPENCV", "k1": 0, "p1": 0.0, "ply_file_path": "cloud.ply", "aabb_scale": 16}
    turned = {"applied_transform": [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]], "orientation_override": "none"}
    source = write(tmp_path / "in", [of] * COUNT, lambda i: extra, **pixels(of, 2.0), **shared, **turned)
    views = pack_and_look(source)
    assert sorted(views) == [f"s/{i:03d}" for i in range(COUNT)]
    assert manifest_of(source).image_size == (64, 96) and manifest_of(source).scenes[0].normalization is not None
    for i in range(COUNT):  # nothing had to be done to the pixels
        assert views[f"s/{i:03d}"].file == (source / f"s/images/{i:03d}.png").read_bytes()


def test_a_frame_has_its_own_lens(tmp_path):
    """What is nearer to the frame wins, whichever of the two ways it is said in."""
    lenses = [lens((88.0, 60.0, 120.0)[i % 3]) for i in range(COUNT)]
    wrong = lens(176.0)
    cases = {
        "angles": (pixels(wrong), lambda i: {"camera_angle_x": angle(lenses[i])}),
        "angles_of_unknown_size": (
            {"fl_x": 176.0, "fl_y": 176.0, "cx": 64.0, "cy": 64.0},
            lambda i: {"camera_angle_x": angle(lenses[i])},
        ),
        "pixels": ({"camera_angle_x": angle(wrong), "camera_angle_y": 1.0}, lambda i: pixels(lenses[i])),
        "one_of_two": ({"fl_x": 176.0, "fl_y": 176.0, "w": 64, "h": 64}, lambda i: {"fl_x": lenses[i].fx}),
        "shared_center": ({"cx": 32.0, "cy": 32.0, "w": 64, "h": 64}, lambda i: {"fl_x": lenses[i].fx}),
    }
    for name, (shared, per_frame) in cases.items():
        pack_and_look(write(tmp_path / name, lenses, per_frame, **shared))


def test_a_shared_center_stays_with_the_frames_focal_lengths(tmp_path):
    lenses = [Lens(80.0 + i, 80.0 + i, 40.0, 26.0) for i in range(COUNT)]
    shared = {"cx": 80.0, "cy": 52.0, "w": 128, "h": 128}
    pack_and_look(write(tmp_path / "in", lenses, lambda i: {"fl_x": 2 * lenses[i].fx}, **shared))
    pack_and_look(write(tmp_path / "too", lenses, lambda i: {"camera_angle_x": angle(lenses[i])}, fl_x=99, **shared))


def listed(tmp_path: Path, **lists) -> Path:
    named = {f"{split}_filenames": [f"./images//{i:03d}.png" for i in chosen] for split, chosen in lists.items()}
    return small(tmp_path / "in", lambda content: content.update(named), count=6)


@pytest.mark.parametrize(
    ("lists", "train", "heldout"),
    [
        ({"train": [0, 3, 5], "val": [1], "test": [2, 4]}, [0, 3, 5], [1, 2, 4]),
        ({"train": [0, 3], "test": [4]}, [0, 3], [4]),  # what no list has is not used
        ({"train": [0, 3, 5, 1]}, [0, 1, 3, 5], [2, 4]),
        ({"test": [4, 1]}, [0, 2, 3, 5], [1, 4]),
    ],
)
def test_lists_of_filenames(lists, train, heldout, tmp_path):
    source = listed(tmp_path, **lists)
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source)))
    assert kinds(tmp_path / "out", "s") == (train, heldout)


def test_wrong_lists_of_filenames(tmp_path):
    assert "images/003.png is a training view and a held-out one" in refusal(listed(tmp_path, train=[0, 3], val=[3]))
    assert "train_filenames has images/077.png, which no frame has" in refusal(listed(tmp_path, train=[0, 77]))


def write_blender(folder: Path, per_split: int = 4, distance: float = 4.0) -> None:
    of, cameras = lens(), poses(3 * per_split, distance, seed=3)
    for number, split in enumerate(("train", "val", "test")):
        frames = []
        for i in range(per_split):
            pose = cameras[number * per_split + i]
            save(render(pose, of, scale=2.4), folder / split / f"r_{i}.png")
            save(render(pose, lens(30.0)), folder / split / f"r_{i}_depth_0001.png")
            frames.append({"file_path": f"./{split}/r_{i}", "rotation": 0.01, "transform_matrix": matrix(pose)})
        write_transforms(folder, frames, f"transforms_{split}.json", camera_angle_x=angle(of))


def test_blender(tmp_path):
    """The layout of NeRF-synthetic: views in the order train, val, test; only the first of these are trained."""
    write_blender(tmp_path / "in/lego")
    views = pack_and_look(tmp_path / "in", scale=2.4)
    assert kinds(tmp_path / "in-packed", "lego") == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11])
    names = [f"{split}/r_{i}.png" for split in ("train", "val", "test") for i in range(4)]
    for i, name in enumerate(names):
        assert views[f"lego/{i:03d}"].file == (tmp_path / "in/lego" / name).read_bytes()
    # The cameras are 4 away and come to where igae-data has them.
    normalization = manifest_of(tmp_path / "in").scenes[0].normalization
    assert normalization is not None and normalization[3] == pytest.approx(1.3 / 1.09375 / (4 / 1.375), rel=0.02)


def test_blender_with_a_split_that_repeats_another(tmp_path):
    folder = tmp_path / "in/lego"
    write_blender(folder)
    (folder / "transforms_val.json").write_bytes((folder / "transforms_test.json").read_bytes())
    pack_and_look(tmp_path / "in", scale=2.4)
    assert kinds(tmp_path / "in-packed", "lego") == ([0, 1, 2, 3], [4, 5, 6, 7])
    (folder / "transforms_val.json").write_bytes((folder / "transforms_train.json").read_bytes())
    assert "train/r_0.png is in both transforms_train.json and transforms_val.json" in refusal(tmp_path / "in")
    for split in ("val", "test"):  # nothing says what is held out, so some of the rest are
        (folder / f"transforms_{split}.json").unlink()
    pack(str(tmp_path / "alone"), PackOptions(scenes=str(tmp_path / "in")))
    train, heldout = kinds(tmp_path / "alone", "lego")
    assert (len(train), len(heldout)) == (3, 1)


def write_trellis(folder: Path, seed: int = 0, **more) -> None:
    frames = []
    for i, pose in enumerate(poses(6, 2.0, seed)):
        of = lens((88.0, 70.0, 120.0)[i % 3])
        save(render(pose, of), folder / f"{i:03d}.png")
        frames.append({"file_path": f"{i:03d}.png", "camera_angle_x": angle(of), "transform_matrix": matrix(pose)})
    shared = {"aabb": [[-0.5] * 3, [0.5] * 3], "scale": 1.1, "offset": [0.0, 0.1, 0.0]}
    write_transforms(folder, frames, **{**shared, **more})


@pytest.mark.parametrize("kind", ["renders", "renders_cond"])
def test_trellis(kind, tmp_path):
    """A field of view in each frame; the object is in the box already, so nothing is moved."""
    names = [letter * 64 for letter in "ab"]
    for seed, name in enumerate(names):
        write_trellis(tmp_path / kind / name, seed)
        if kind == "renders":
            (tmp_path / kind / name / "mesh.ply").write_bytes(b"ply")
    pack_and_look(tmp_path / kind)
    scenes = manifest_of(tmp_path / kind).scenes
    assert [(scene.name, scene.normalization) for scene in scenes] == [(name, None) for name in names]


def test_what_trellis_did_not_write(tmp_path):
    of = lens()
    source = write(tmp_path / "in", [of] * 3, name="{:03d}.png", camera_angle_x=angle(of))
    pack_and_look(source)  # neither hashes nor a mesh: some other renderer's
    (source / "s/mesh.ply").write_bytes(b"ply")
    assert "it has no aabb: pack with --format transforms" in refusal(source)
    write_trellis(tmp_path / "large/s", aabb=[[-1.0] * 3, [1.0] * 3])
    (tmp_path / "large/s/mesh.ply").write_bytes(b"ply")
    assert "another aabb" in refusal(tmp_path / "large")


def test_names_of_files(tmp_path):
    """Without an extension it is that of the file that is there."""
    of = lens()
    shared = {"camera_angle_x": angle(of)}
    for written, there in {
        "images/v1.{}": "images/v1.{}.png",
        "r_{}": "r_{}.PNG",
        ".//images//{}": "images/{}.jpg",
        "./a/{}": "a/{}.JPEG",
        "{}": "{}.webp",
        "b/{}.jpg": "b/{}.jpg",
        "c/{}.PNG": "c/{}.PNG",
        "plain/{}": "plain/{}",
    }.items():
        folder = tmp_path / there.replace("/", "_").replace("{}", "x")
        frames = []
        for i in range(3):
            kind = "JPEG" if there.lower().endswith(("jpg", "jpeg")) else "WEBP" if "webp" in there else "PNG"
            exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
            save(flat(render(POSES[i], of)), folder / "s" / there.format(i), format=kind, **exact)
            frames.append({"file_path": written.format(i), "transform_matrix": matrix(POSES[i])})
        write_transforms(folder / "s", frames, **shared)
        views = pack_and_look(folder)
        assert views["s/001"].file == (folder / "s" / there.format(1)).read_bytes(), written


def test_of_two_files_the_png_is_taken(tmp_path):
    source = small(tmp_path / "in", lambda content: content["frames"][1].update(file_path="images/001"))
    save(flat(render(POSES[0], lens())), source / "s/images/001.jpg")
    assert pack_and_look(source)["s/001"].file == (source / "s/images/001.png").read_bytes()


def test_a_byte_order_mark_and_matrices_of_three_rows(tmp_path):
    of = lens()
    source = write(tmp_path / "in", [of] * 4, camera_angle_x=angle(of))
    content = json.loads((source / "s/transforms.json").read_text())
    for frame in content["frames"][:3]:
        frame["transform_matrix"] = frame["transform_matrix"][:3]
    (source / "s/transforms.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert len(pack_and_look(source)) == 4


def frame(**values):
    return lambda content: content["frames"][1].update(values)


def pose(change):
    return frame(transform_matrix=change(np.array(matrix(POSES[1]))))


def with_columns(*factors: float):
    return pose(lambda rows: (rows * np.array([*factors, 1.0])).tolist())


REFUSALS = {
    "above": (frame(file_path="../one/images/001.png"), "does not stay in the scene's folder: move or link the images"),
    "above inside": (frame(file_path="images/../../x.png"), "does not stay in the scene's folder"),
    "absolute": (frame(file_path="/data/001.png"), "make it relative to that folder"),
    "a drive": (frame(file_path="C:/data/001.png"), "make it relative to that folder"),
    "URL": (frame(file_path="s3://data/001.png"), "make it relative to that folder"),
    "backslashes": (frame(file_path="images\\001.png"), "has backslashes: write it with /"),
    "no path": (lambda content: content["frames"][1].pop("file_path"), "frame 1: file_path is missing"),
    "path of another kind": (frame(file_path=3), "file_path 3 is no path of an image"),
    "other extension": (frame(file_path="images/001.jpg"), "images/001.jpg is missing"),
    "strings": (pose(lambda rows: [[str(x) for x in row] for row in rows]), "its numbers are strings"),
    "two rows": (pose(lambda rows: rows[:2].tolist()), "no transform_matrix of 4 x 4 numbers"),
    "scaled": (with_columns(2, 2, 2), "its rotation is scaled by 2, so divide"),
    "mirrored": (with_columns(-1, 1, 1), "it mirrors, so an axis has the wrong sign"),
    "transposed": (pose(lambda rows: rows.T.tolist()), "the matrix is transposed"),
    "sheared": (with_columns(1, 1.01, 1), "make the rotation orthonormal"),
    "is_fisheye": (lambda content: content.update(is_fisheye=True), "is a fisheye"),
    "fisheye": (lambda content: content.update(camera_model="OPENCV_FISHEYE"), "is OPENCV_FISHEYE"),
    "panorama": (frame(camera_model="EQUIRECTANGULAR"), r"frame 1 \(images/001.png\): .*is EQUIRECTANGULAR"),
    "unknown key": (lambda content: content.update(rolling_shutter=[0, 1]), "transforms.json has 'rolling_shutter'"),
    "unknown key of a frame": (frame(time=0.5), r"frame 1 \(images/001.png\) has 'time', which is not known"),
    "distortion of words": (lambda content: content.update(k1="0.1"), "the distortion k1 is '0.1'"),
    "NaN distortion": (lambda content: content.update(k2=math.nan), "the distortion k2 is nan"),
    "mask of one": (frame(mask_path="images/000.png"), "frame 0 has no mask_path, but others have"),
    "mask outside": (frame(mask_path="../m.png"), "mask_path '../m.png' does not stay"),
    "list of words": (lambda content: content.update(test_filenames="images/001.png"), "test_filenames is no list"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(kind, tmp_path):
    change, words = REFUSALS[kind]
    problem = refusal(small(tmp_path / "in", change))
    assert re.search(words, problem), problem


def test_the_layout_of_igae_data_may_have_any_key(tmp_path):
    source = small(tmp_path / "in", lambda content: content.update(whatever=1))
    assert "'whatever'" in refusal(source)
    os.rename(source / "s/transforms.json", source / "s/transforms_opencv.json")
    pack(str(tmp_path / "out"), PackOptions(scenes=str(source), normalize="none"))
