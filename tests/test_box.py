# SPDX-License-Identifier: Apache-2.0
"""Scenes that are not in the box that is rendered: told before anything is trained."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image
from test_placement import FLIP, capture

import train
from igae.data import DataConfig, Manifest, PackOptions, pack
from igae.training.box import check_box
from igae.training.rank_data import RankData

SIDE = 32
FIELD = 0.6911112  # radians: that of the synthetic scenes of NeRF


def write_ball(folder: Path, radius: float, distance: float, alpha: bool = True, place: float = 0.0) -> str:
    """Packs nothing: a folder of a scene whose views show a ball at (place, place, place)."""
    poses = capture(0, 20, jitter=0.0)
    poses[:, :3, 3] *= distance / np.linalg.norm(poses[:, :3, 3], axis=1, keepdims=True)
    focal = 0.5 * SIDE / math.tan(FIELD / 2)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2) / focal
    seen = np.hypot(x, y) < math.tan(math.asin(radius / distance))
    image = np.zeros((SIDE, SIDE, 4), np.uint8)
    image[..., 0], image[..., 3] = 200, 255 * seen
    if not alpha:
        image = np.random.default_rng(0).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)  # a room
    (folder / "thing" / "images").mkdir(parents=True)
    frames = []
    for i, pose in enumerate(poses):
        Image.fromarray(image).save(folder / "thing" / "images" / f"{i}.png")
        pose[:3, 3] += place
        frames.append({"file_path": f"images/{i}", "transform_matrix": (pose @ FLIP).tolist()})
    (folder / "thing" / "transforms.json").write_text(json.dumps({"camera_angle_x": FIELD, "frames": frames}))
    return str(folder)


def data_of(root: Path, source: str, normalize: str) -> RankData:
    pack(str(root), PackOptions(scenes=source, normalize=normalize))  # type: ignore[arg-type]
    manifest = Manifest.load(str(root))
    return RankData.alone(DataConfig(root=str(root)), manifest, manifest.scenes)


@pytest.mark.parametrize("place", [0.0, 30.0])
@pytest.mark.parametrize("distance", [0.4, 4.0, 400.0])
def test_scenes_of_any_scale_and_place_are_moved_into_the_box(tmp_path: Path, distance: float, place: float) -> None:
    source = write_ball(tmp_path / "in", 0.3 * distance, distance, place=place * distance)
    check_box(1.0, data_of(tmp_path / "auto", source, "auto"))
    if distance < 1 and not place:
        check_box(1.0, data_of(tmp_path / "none", source, "none"))  # all of it is in the box, and small
    else:
        with pytest.raises(ValueError, match=r"^only \d+ % of the rays .* --normalize cameras"):
            check_box(1.0, data_of(tmp_path / "none", source, "none"))


def test_the_box_that_is_needed_is_named(tmp_path: Path) -> None:
    data = data_of(tmp_path / "out", write_ball(tmp_path / "in", 1.2, 4.0), "none")
    with pytest.raises(ValueError, match=r"or set render\.box=") as refused:
        check_box(1.0, data)
    needed = float(str(refused.value).rpartition("=")[2])
    # A cube around the ball has side 2.4; one that 98 % of its rays meet is smaller, the next of steps of 10 %.
    assert 1.9 < needed <= 2.4 * 1.1
    check_box(needed, data)


def test_objects_that_are_cut_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(tmp_path / "out", write_ball(tmp_path / "in", 0.7, 4.0), "none")
    with caplog.at_level(logging.WARNING, "igae"):
        check_box(1.0, data)
    assert "if objects are cut off, pack the scenes with --normalize cameras, or set render.box=1." in caplog.text


def test_of_photographs_the_middle_counts(tmp_path: Path) -> None:
    source = write_ball(tmp_path / "in", 1.0, 4.0, alpha=False)
    check_box(1.0, data_of(tmp_path / "auto", source, "auto"))
    with pytest.raises(ValueError, match="only"):
        check_box(0.3, data_of(tmp_path / "none", source, "none"))


def test_a_run_is_refused_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_run_a_process: None
) -> None:
    pack(str(tmp_path / "out"), PackOptions(scenes=write_ball(tmp_path / "in", 1.2, 4.0), normalize="none"))
    recipe = runs.recipe_file(tmp_path, str(tmp_path / "out"))
    settings = ["train.joint.natural_images=0", *(f"train.joint.weights.natural_{k}=0" for k in ("ae", "tv", "kl"))]
    assert train.main(["--config", str(recipe), *settings]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: only") and "render.box=" in said
    assert not list((tmp_path / "outputs").rglob("step-*"))
