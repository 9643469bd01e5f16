# SPDX-License-Identifier: Apache-2.0
"""Scenes whose images and masks are on another disk, as links to folders: packed as if they were in place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from capture_files import save, shots, write_colmap

from igae.data import PackOptions, pack
from igae.data.sources import FORMATS, find_scenes, read_scene


def link_folders(scene: Path, disk: Path, *names: str) -> None:
    """Move folders of a scene away and leave links."""
    disk.mkdir()
    for name in names:
        shutil.move(scene / name, disk / name)
        (scene / name).symlink_to(disk / name)


def test_masks_of_a_capture_are_found_behind_links(tmp_path: Path) -> None:
    named = {f"{i:03d}.png": shot for i, shot in enumerate(shots(12))}
    scene = tmp_path / "in" / "mug"
    write_colmap(scene, named)
    for name in named:
        save(scene / "masks" / name, np.full((96, 128), 255, np.uint8))
    manifest, _ = pack(str(tmp_path / "plain"), PackOptions(scenes=str(tmp_path / "in")))
    link_folders(scene, tmp_path / "disk", "images", "masks", "sparse")
    linked, _ = pack(str(tmp_path / "linked"), PackOptions(scenes=str(tmp_path / "in")))
    assert linked.digest == manifest.digest
    (ref,) = find_scenes(str(tmp_path / "in"))[1]
    assert [view.mask for view in read_scene(ref)] == [f"masks/{name}" for name in named]


@pytest.mark.parametrize("linked", [False, True])
def test_extensions_and_pairs_are_found_behind_links(tmp_path: Path, linked: bool) -> None:
    blender, srn = tmp_path / "lego", tmp_path / "car"
    save(blender / "train" / "r_0.png", np.zeros((8, 8, 3), np.uint8))
    (blender / "train" / "r_0.png").rename(blender / "train" / "r_0.PNG")
    frame = '{"file_path": "./train/r_0", "transform_matrix": [[1,0,0,0],[0,1,0,0],[0,0,1,1.3],[0,0,0,1]]}'
    (blender / "transforms_train.json").write_text('{"camera_angle_x": 0.7, "frames": [' + frame + "]}")
    save(srn / "rgb" / "000000.png", np.zeros((8, 8, 3), np.uint8))
    (srn / "pose").mkdir()
    (srn / "pose" / "000000.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 -1.3 0 0 0 1")
    (srn / "intrinsics.txt").write_text("8 4 4 0.\n0. 0. 0.\n1.\n8 8\n")
    if linked:
        link_folders(blender, tmp_path / "disk1", "train")
        link_folders(srn, tmp_path / "disk2", "rgb", "pose")
    assert [view.file for view in FORMATS["blender"].read(str(blender))] == ["train/r_0.PNG"]
    assert [view.file for view in FORMATS["srn"].read(str(srn))] == ["rgb/000000.png"]
