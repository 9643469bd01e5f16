# SPDX-License-Identifier: Apache-2.0
"""Where cameras are: the move into the box, matrices of other conventions, views that are held out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from igae.data import Manifest, PackOptions, Refused, pack
from igae.data.sources.heldout import split
from igae.data.sources.placement import MEANING, check_cameras, focus_of, normalization_of
from igae.data.sources.scene import BadInput, Normalization, SceneRef, View

SIZE = (64, 64)
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
seeds = st.integers(0, 2**32 - 1)


def capture(seed: int, views: int = 24, radius: float = 1.3, cap: bool = False, jitter: float = 0.05) -> np.ndarray:
    """cam2world [V, 4, 4], OpenCV, of cameras that look at the origin as people hold them: distances differ by a fifth,
    aims by some degrees, with roll; over the sphere, or a cap of it."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (views, 1, 1))
    for pose in poses:
        out = rng.normal(size=3)
        if cap:
            out = out / np.linalg.norm(out) * 0.6 + np.array([0.3, -0.8, 0.5])
        out /= np.linalg.norm(out)
        position = out * radius * rng.uniform(0.8, 1.2)
        forward = -position / np.linalg.norm(position) + rng.normal(size=3) * jitter
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, rng.normal(size=3) * 0.2 + np.array([0.0, 0.0, 1.0]))
        right /= np.linalg.norm(right)
        pose[:3, :4] = np.stack([right, np.cross(forward, right), forward, position], 1)
    return poses


def views_of(poses: np.ndarray, focal: float = 70.0, opengl: bool = False, **lens: float) -> list[View]:
    values = tuple({"fl_x": focal, **lens}.items())
    return [View(i, f"{i}.png", pose.tolist(), values, opengl=opengl) for i, pose in enumerate(poses)]


def move_of(views: list[View], size: tuple[int, int] = SIZE) -> Normalization | None:
    return normalization_of(views, size, check_cameras(views, size))


@settings(max_examples=200)
@given(seeds, st.integers(3, 60), st.floats(0.01, 1e4), st.booleans(), st.floats(0, 0.1))
def test_no_good_scene_is_refused(seed: int, views: int, radius: float, cap: bool, jitter: float) -> None:
    poses = capture(seed, views, radius, cap, jitter)
    poses[:, :3, 3] += np.random.default_rng(seed).normal(size=3) * radius * 10
    check_cameras(views_of(poses), SIZE)


@settings(max_examples=100)
@given(seeds, st.integers(8, 60), st.booleans(), st.sampled_from(list(MEANING)))
def test_matrices_of_another_convention_are_refused_with_theirs(seed: int, views: int, cap: bool, meant: str) -> None:
    """As a reader that takes what it finds for cam2world with OpenGL's axes has them."""
    poses = capture(seed, views, 1.5, cap)
    written = {
        "opencv": poses,
        "opengl": poses @ FLIP,
        "opencv-world2cam": np.linalg.inv(poses),
        "opengl-world2cam": np.linalg.inv(poses @ FLIP),
    }[meant]
    read = views_of(written @ FLIP, opengl=True)
    if meant == "opengl":
        check_cameras(read, SIZE)
    else:
        with pytest.raises(BadInput, match=f"--convention {meant}$"):
            check_cameras(read, SIZE)


@settings(max_examples=100)
@example(1, 0.03125, (0.0, 0.0, -100.0), False)
@given(seeds, st.floats(1e-2, 1e3), st.tuples(*[st.floats(-100, 100)] * 3), st.booleans())
def test_scenes_that_differ_by_place_and_scale_become_one(
    seed: int, scale: float, place: tuple[float, float, float], cap: bool
) -> None:
    poses = capture(seed, cap=cap)
    moved = poses.copy()
    moved[:, :3, 3] = scale * poses[:, :3, 3] + place
    found = [move_of(views_of(each)) for each in (poses, moved)]
    placed = []
    for each, normalization in zip((poses, moved), found, strict=True):
        assert normalization is not None
        *center, factor = normalization
        placed.append(factor * (each[:, :3, 3] - center))
    # measured: 1.4e-9 of 2,000, with places up to 100 / 0.01 times as far as the cameras
    assert np.abs(placed[0] - placed[1]).max() < 1e-6


def test_cameras_as_igae_data_has_them_stay(tmp_path: Path) -> None:
    poses = capture(0, 40, jitter=0.0)
    poses[:, :3, 3] *= 1.3 / np.linalg.norm(poses[:, :3, 3], axis=1, keepdims=True)
    x, y, z, scale = move_of(views_of(poses, focal=1.09375 * 64)) or (1, 1, 1, 0)
    assert max(abs(x), abs(y), abs(z), abs(scale - 1)) < 1e-9  # measured: 2e-16


@given(seeds)
def test_the_focus_is_the_nearest_point_to_all_axes(seed: int) -> None:
    poses = torch.from_numpy(capture(seed, 12, jitter=0.2))
    found = focus_of(poses)

    def cost(point: torch.Tensor) -> float:
        ray = point - poses[:, :3, 3]
        along = (ray * poses[:, :3, 2]).sum(-1, keepdim=True)
        return float((ray - along * poses[:, :3, 2]).square().sum())

    best = cost(found.point)
    steps = torch.eye(3, dtype=torch.float64) * 1e-3
    assert all(cost(found.point + step) > best and cost(found.point - step) > best for step in steps)


def test_parallel_axes_have_no_focus() -> None:
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3] = range(5)
    views = views_of(poses)
    check_cameras(views, SIZE)
    assert move_of(views) is None


def test_cameras_that_look_nowhere_in_common_are_refused() -> None:
    poses = capture(3, 30)
    poses[:, :3, 3] = np.random.default_rng(1).normal(size=(30, 3)) * 40
    with pytest.raises(BadInput, match="--normalize none"):
        check_cameras(views_of(poses), SIZE)
    check_cameras(views_of(poses), SIZE, one_place=False)


@pytest.mark.parametrize(
    ("lens", "said"),
    [
        ({"fl_x": 88 * 12.5, "cx": 400.0, "cy": 400.0}, "give w and h"),
        ({"fl_x": 88 * 12.5}, "give w and h"),
        ({"fl_x": 88 * 12.5, "w": 800.0, "h": 800.0}, None),
        ({"fl_x": 1.375, "cx": 0.5, "cy": 0.5}, "in image widths instead of pixels"),
        ({"fl_x": 88.0, "cx": -3.0, "w": 64.0, "h": 64.0}, "principal point"),
        ({"fl_x": 600.0, "w": 64.0, "h": 64.0}, None),  # 6 degrees, of a telephoto lens that says so
        ({"fl_x": 64 * 40.0, "w": 64.0, "h": 64.0}, "field of view"),
        ({"camera_angle_x": math.radians(175)}, "field of view"),
    ],
)
def test_lenses_that_cannot_be_meant(lens: dict[str, float], said: str | None) -> None:
    views = [View(i, "a.png", pose.tolist(), tuple(lens.items())) for i, pose in enumerate(capture(0, 8))]
    if said is None:
        check_cameras(views, SIZE)
    else:
        with pytest.raises(BadInput, match=said):
            check_cameras(views, SIZE)


@given(st.integers(1, 300), st.sampled_from(["auto", "first", "every", "random"]), seeds)
def test_a_tenth_is_held_out(count: int, how: str, seed: int) -> None:
    views = views_of(np.tile(np.eye(4), (count, 1, 1)))
    ref = SceneRef("thing", "toys", "", "transforms")
    training, heldout = split(ref, views, how, seed)  # type: ignore[arg-type]
    assert sorted(view.index for view in [*training, *heldout]) == list(range(count))
    assert len(heldout) == (0 if count == 1 else max(1, count // 10))
    assert [view.index for view in heldout] == sorted(view.index for view in heldout)
    if how in ("auto", "every") and heldout:  # each is near the middle of its part of the path
        part = count / len(heldout)
        assert all(abs(view.index - (i + 0.5) * part) <= 1 for i, view in enumerate(heldout))
    if how == "first":
        assert [view.index for view in heldout] == list(range(len(heldout)))
    again = split(ref, views, how, seed)  # type: ignore[arg-type]
    assert again == (training, heldout)


def test_what_the_source_lists_is_held_out() -> None:
    ref = SceneRef("thing", "toys", "", "transforms")
    views = [View(i, "", [], (), heldout=i in (2, 5)) for i in range(8)]
    assert [view.index for view in split(ref, views, "auto", 0)[1]] == [2, 5]
    assert len(split(ref, views, "every", 0)[1]) == 1
    for listed, said in ((None, "lists no held-out"), (True, "holds all of its views out")):
        with pytest.raises(BadInput, match=said):
            split(ref, [View(i, "", [], (), heldout=listed) for i in range(3)], "listed", 0)


# ---- Whole packing


def write_scene(folder: Path, poses: np.ndarray, axes: np.ndarray = FLIP, **top: object) -> None:
    """A folder with transforms.json; `axes` times the poses are written."""
    (folder / "images").mkdir(parents=True)
    frames = []
    for i, pose in enumerate(poses):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / "images" / f"{i}.png")
        frames.append({"file_path": f"images/{i}.png", "transform_matrix": (pose @ axes).tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames, **top}))


def test_packing_moves_a_scene_and_says_how(tmp_path: Path) -> None:
    poses = capture(1, 20)
    poses[:, :3, 3] = 3 * poses[:, :3, 3] + [5, -2, 1]
    write_scene(tmp_path / "in" / "thing", poses)
    for how in ("auto", "none"):
        pack(str(tmp_path / how), PackOptions(scenes=str(tmp_path / "in"), normalize=how))  # type: ignore[arg-type]
    moved, stay = (Manifest.load(str(tmp_path / how)) for how in ("auto", "none"))
    assert stay.scenes[0].normalization is None and moved.scenes[0].normalization is not None
    *center, _ = moved.scenes[0].normalization
    assert np.abs(np.array(center) - [5, -2, 1]).max() < 0.5 and (moved.scenes[0].views, moved.scenes[0].heldout) == (
        18,
        2,
    )
    expected = move_of(views_of(poses, focal=8 / math.tan(0.35)), (16, 16))
    assert moved.scenes[0].normalization == pytest.approx(expected, rel=1e-9)
    assert moved.cameras is not None and moved.cameras.mean_distance * 2 < stay.cameras.mean_distance  # type: ignore[union-attr]


def test_packing_mends_a_convention_that_it_is_told(tmp_path: Path) -> None:
    poses = capture(2, 20)
    write_scene(tmp_path / "right" / "thing", poses)
    write_scene(tmp_path / "cv" / "thing", poses, axes=np.eye(4))
    with pytest.raises(Refused, match="--convention opencv"):
        pack(str(tmp_path / "x"), PackOptions(scenes=str(tmp_path / "cv")))
    pack(str(tmp_path / "a"), PackOptions(scenes=str(tmp_path / "right")))
    pack(str(tmp_path / "b"), PackOptions(scenes=str(tmp_path / "cv"), convention="opencv"))
    one, other = (Manifest.load(str(tmp_path / name)) for name in "ab")
    assert one.scenes[0].normalization == pytest.approx(other.scenes[0].normalization, rel=1e-9)
    assert one.digest == other.digest


def test_scenes_anywhere_below_the_folder(tmp_path: Path) -> None:
    for path in ("one/a", "one/b", "two/deep/a"):
        write_scene(tmp_path / "in" / path, capture(0, 4))
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "in")))
    assert [(scene.name, scene.category) for scene in manifest.scenes] == [
        ("one_a", "one"),
        ("b", "one"),
        ("two_deep_a", "two"),
    ]
    itself, _ = pack(str(tmp_path / "itself"), PackOptions(scenes=str(tmp_path / "in/one/a")))
    assert [scene.name for scene in itself.scenes] == ["a"]


def test_old_manifests_have_no_normalization(tmp_path: Path) -> None:
    write_scene(tmp_path / "in" / "thing", capture(0, 4))
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "in"), normalize="none"))
    text = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "normalization" not in text["scenes"][0]
    text["scenes"][0]["normalization"] = [0, 0, math.inf, 1]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="damaged"):
        Manifest.load(str(tmp_path / "out"))
    assert manifest.scenes[0].normalization is None
