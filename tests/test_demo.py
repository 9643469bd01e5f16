# SPDX-License-Identifier: Apache-2.0
"""Demo data: geometry against closed forms, the files against the published layout, and what the pictures show."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="the natural images come from scikit-image")

TOOLS = Path(__file__).parent.parent / "data_tools"
sys.path.insert(0, str(TOOLS))

import demo_objects  # noqa: E402
import demo_shapes  # noqa: E402
import make_demo  # noqa: E402

FOCAL, RADIUS = 1.09375, 1.3
ARGUMENTS = (
    "--scenes",
    "2",
    "--views",
    "5",
    "--size",
    "24",
    "--natural-images",
    "15",
    "--supersample",
    "1",
    "--seed",
    "3",
)


def look_from(direction: tuple[float, float, float]) -> np.ndarray:
    """OpenCV cam2world looking at the origin from `direction` with z up, written independently of the tool."""
    back = np.array(direction) / np.linalg.norm(direction)
    down = np.array([0, 0, -1.0]) + back * back[2]
    down /= np.linalg.norm(down)
    pose = np.eye(4)
    pose[:3, :] = np.stack([np.cross(down, -back), down, -back, RADIUS * back], axis=1)
    return pose


def ball(radius: float, at: tuple[float, float, float]) -> demo_objects.Solid:
    shape = demo_shapes.place(demo_shapes.sphere(radius), at)
    return demo_objects.Solid("ball", (demo_objects.Part(shape, demo_shapes.plain("802010")),))


def ball_mask(radius: float, at: tuple[float, float, float], pose: np.ndarray, size: int) -> np.ndarray:
    """Closed form: the rays through the pixel centers whose distance from the ball's center is below its radius."""
    center = np.linalg.inv(pose) @ np.array([*at, 1.0])
    mask = np.zeros((size, size), dtype=bool)
    for i in range(size):
        for j in range(size):
            ray = np.array([((j + 0.5) / size - 0.5) / FOCAL, ((i + 0.5) / size - 0.5) / FOCAL, 1.0])
            mask[i, j] = np.linalg.norm(np.cross(ray / np.linalg.norm(ray), center[:3])) < radius
    return mask


def covered(picture: np.ndarray) -> np.ndarray:
    return (picture < 250).any(axis=-1)


@pytest.mark.parametrize("direction", [(0, -1, 0), (1, 0, 0), (-0.4, 0.7, 0.5), (0.3, 0.2, -0.9)])
@pytest.mark.parametrize("at", [(0.0, 0.0, 0.0), (0.2, -0.15, 0.25)])
def test_silhouette_of_a_ball_is_its_closed_form_projection(direction, at):
    pose = look_from(direction)
    rendered = covered(make_demo.render(ball(0.15, at), pose[None], 96, 1)[0])
    # A ray that passes nearer than the hit distance, 0.0004, counts; a pixel is 0.012 wide there. Rounding: 1e-6.
    inner, outer = ball_mask(0.15 - 1e-5, at, pose, 96), ball_mask(0.15 + 4.1e-4, at, pose, 96)
    assert inner.sum() > 300
    assert not (inner & ~rendered).any() and not (rendered & ~outer).any()


def test_supersampling_blends_the_rim_of_a_centered_ball():
    picture = make_demo.render(ball(0.3, (0, 0, 0)), look_from((0, -1, 0))[None], 64, 4)[0]
    edge = FOCAL * 64 * 0.3 / np.sqrt(RADIUS**2 - 0.3**2)
    distance = np.hypot(*(np.indices((64, 64)) - 31.5))
    # A pixel is touched when its center is within half a diagonal of the disc, and full when that far inside.
    assert covered(picture)[distance < edge - 0.71].all() and not covered(picture)[distance > edge + 0.71].any()
    rim = picture[np.abs(distance - edge) < 0.71][:, 2]
    full = picture[distance < edge - 0.71][:, 2]
    assert full.max() < 60 < np.mean(rim) < 230 and len(np.unique(rim)) > 8  # blended with the white


def test_x_is_right_and_y_is_down():
    front = look_from((0, -1, 0))  # from -y: world x to the right, world z up

    def center_of(at: tuple[float, float, float], pose: np.ndarray) -> tuple[float, float]:
        rows, columns = np.nonzero(covered(make_demo.render(ball(0.08, at), pose[None], 64, 1)[0]))
        return columns.mean() - 31.5, rows.mean() - 31.5

    right, above = center_of((0.3, 0, 0), front), center_of((0, 0, 0.3), front)
    # Projected center: 64 * FOCAL * 0.3 / RADIUS = 16.15; the outline of a ball lies a little farther out.
    assert right == pytest.approx((16.2, 0), abs=0.6) and above == pytest.approx((0, -16.2), abs=0.6)
    assert center_of((0.3, 0, 0), look_from((0, 1, 0)))[0] == pytest.approx(-16.2, abs=0.6)  # from behind: left


def test_shading_does_not_depend_on_the_viewer():
    solid = demo_objects.make_solid(0, 0)
    point = np.array([[0.0], [-0.28], [0.0]], dtype=np.float32)
    depth = make_demo.march(solid, point - [[0], [0.7], [0]], np.float32([[0], [1], [0]]), np.float32([2]))
    surface = (point - [[0], [0.7], [0]] + np.float32([[0], [1], [0]]) * depth).astype(np.float32)
    color = make_demo.shade(solid, surface)[:, 0]
    seen = []
    for direction in ((0, -1, 0.0), (0.25, -1, 0.1), (-0.3, -1, 0.2)):
        pose = look_from(direction)
        x, y, z, _ = np.linalg.inv(pose) @ [*surface[:, 0], 1]
        column, row = (int((FOCAL * value / z + 0.5) * 128) for value in (x, y))
        seen.append(make_demo.render(solid, pose[None], 128, 1)[0, row, column] / 255)
    assert np.abs(np.array(seen) - color).max() < 0.06  # half a pixel of texture away


@pytest.mark.parametrize("views", [1, 2, 5, 48])
def test_poses_are_rigid_and_look_at_the_origin(views):
    poses = make_demo.sphere_cameras(views, np.random.default_rng(7))
    turn, position = poses[:, :3, :3], poses[:, :3, 3]
    assert np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max() < 1e-8
    assert np.linalg.det(turn) == pytest.approx(1)
    assert np.linalg.norm(position, axis=1) == pytest.approx(RADIUS, abs=1e-8)
    assert np.abs(position + RADIUS * turn[:, :, 2]).max() < 1e-8  # forward points at the origin
    assert np.abs(turn[:, 2, 0]).max() < 1e-8 and (turn[:, 2, 1] < 0).all()  # level, and down is down


@pytest.mark.parametrize("seed", range(5))
def test_all_views_and_the_first_tenth_are_spread_over_the_sphere(seed):
    directions = make_demo.sphere_cameras(48, np.random.default_rng(seed))[:, :3, 3] / RADIUS
    cosines = np.clip(directions @ directions.T - 2 * np.eye(48), -1, 1)
    assert np.degrees(np.arccos(cosines[:4, :4].max())) > 60  # a regular tetrahedron has 109; measured: at least 82
    assert np.linalg.norm(directions.mean(axis=0)) < 0.1  # measured: 0.02
    assert np.degrees(np.arccos(cosines.max(axis=1))).max() < 40  # no lonely camera; measured: 31


@pytest.mark.parametrize("index", range(10))
def test_solids_show_whole_colorful_and_different_from_all_sides(index):
    solid = demo_objects.make_solid(index, seed=0)
    poses = make_demo.sphere_cameras(12, np.random.default_rng(index))
    pictures = make_demo.render(solid, poses, 40, 1)
    masks = covered(pictures)
    share = masks.mean(axis=(1, 2))
    assert 0.05 < share.min() and share.max() < 0.6, share
    assert not (masks[:, [0, -1]].any() or masks[:, :, [0, -1]].any())

    pixels = pictures[masks].astype(float) / 255
    saturation = 1 - pixels.min(axis=1) / np.maximum(pixels.max(axis=1), 1e-6)
    assert saturation.mean() > 0.4 and len(np.unique((pixels * 8).astype(int), axis=0)) > 20
    for first, second in zip(pictures[:-1], pictures[1:], strict=True):
        assert np.abs(first.astype(float) - second).mean() > 4

    axis = np.linspace(-0.6, 0.6, 41)
    grid = np.stack(np.meshgrid(axis, axis, axis)).reshape(3, -1).astype(np.float32)
    outside = (np.abs(grid).max(axis=0) > 0.4501) | (np.linalg.norm(grid, axis=0) > 0.5201)
    assert (solid.distance(grid)[outside] > 0).all()


def test_random_solids_differ_by_index_and_seed():
    pose = look_from((0.5, -1, 0.4))[None]
    solids = [demo_objects.make_solid(index, seed) for index, seed in ((6, 0), (7, 0), (6, 1))]
    first, second, third = (make_demo.render(solid, pose, 24, 1).astype(float) for solid in solids)
    assert min(np.abs(a - b).mean() for a, b in ((first, second), (second, third), (third, first))) > 5


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "new" / "set"
    assert make_demo.main(["--output", str(root), "--workers", "1", *ARGUMENTS]) == 0
    return root


def test_layout_and_counts(made):
    objects = made / "train" / "objaverse"
    assert json.loads((objects / "dataset_map.json").read_text()) == {"objaverse": ["mug", "teddy"]}
    assert sorted(path.name for path in (objects / "square24").iterdir()) == ["mug", "teddy"]
    for scene in (objects / "square24").iterdir():
        frames = json.loads((scene / "transforms_opencv.json").read_text())["frames"]
        assert [frame["file_path"] for frame in frames] == [f"images/{i:03d}.png" for i in range(5)]
        assert len(list((scene / "images").iterdir())) == 5
        solid = demo_objects.make_solid(["mug", "teddy"].index(scene.name), 3)
        for frame in frames:
            assert (frame["fl_x"], frame["fl_y"], frame["cx"], frame["cy"]) == (26.25, 26.25, 12, 12)
            assert (frame["w"], frame["h"]) == (24, 24)
            with Image.open(scene / frame["file_path"]) as image:
                assert (image.mode, image.size) == ("RGB", (24, 24))
                pose = np.array(frame["transform_matrix"])
                assert (np.asarray(image) == make_demo.render(solid, pose[None], 24, 1)[0]).mean() > 0.999


def test_natural_images(made):
    paths = sorted((made / "train" / "imagenet" / "square24").glob("*/*.jpg"))
    assert len(paths) == 15 and len({path.parent for path in paths}) == len(make_demo.NATURAL_IMAGES)
    crops = []
    for path in paths:
        with Image.open(path) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (24, 24), "JPEG")
            crops.append(np.asarray(image, dtype=float))
        assert crops[-1].std(axis=(0, 1)).max() > 5
    assert len({crop.tobytes() for crop in crops}) == 15


def test_all_natural_images_are_in_the_wheel():
    assert [path.name for path in make_demo.natural_images()] == list(make_demo.NATURAL_IMAGES)


def test_bytes_do_not_depend_on_the_workers(made, tmp_path):
    assert make_demo.main(["--output", str(tmp_path / "b"), "--workers", "2", *ARGUMENTS]) == 0
    assert contents(tmp_path / "b") == contents(made)


def test_a_finished_set_is_kept_and_another_refused(made, capsys):
    before = (made / "demo.json").stat().st_mtime_ns
    assert make_demo.main(["--output", str(made), *ARGUMENTS]) == 0
    assert "complete already" in capsys.readouterr().out
    assert make_demo.main(["--output", str(made), *ARGUMENTS, "--seed", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other arguments" in error
    assert (made / "demo.json").stat().st_mtime_ns == before


def test_foreign_folders_are_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert make_demo.main(["--output", str(tmp_path), *ARGUMENTS]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_run_leaves_no_set_and_the_next_one_is_whole(made, tmp_path, monkeypatch):
    target = tmp_path / "set"
    write = make_demo.write_scene

    def stop_at_the_second(root: Path, index: int, *rest: int) -> str:
        if index == 1:
            raise KeyboardInterrupt
        return write(root, index, *rest)

    monkeypatch.setattr(make_demo, "write_scene", stop_at_the_second)
    assert make_demo.main(["--output", str(target), "--workers", "1", *ARGUMENTS]) == 130
    assert not target.exists()
    monkeypatch.undo()
    assert make_demo.main(["--output", str(target), "--workers", "1", *ARGUMENTS]) == 0
    assert contents(target) == contents(made) and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_missing_scikit_image_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_demo.main(["--output", str(tmp_path / "set"), *ARGUMENTS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "scikit-image" in error and "demo" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [("--scenes", "0"), ("--size", "4"), ("--natural-images", "-1"), ("--views", "many")]
)
def test_impossible_arguments_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_demo.main(["--output", str(tmp_path / "set"), *option])
    assert stopped.value.code == 2
    assert f"argument {option[0]}: " in capsys.readouterr().err.splitlines()[-1]
