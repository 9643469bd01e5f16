# SPDX-License-Identifier: Apache-2.0
"""The views of the data that the viewer compares with: against the source's files, and by the export's renders."""

import json
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scene_files import over_white
from view_models import CPU, NAMES, Made, connected, wait

from igae.data import PackOptions, pack
from igae.export import Export
from igae.viewer import DATA, Camera, Followed, Viewer, draw, lens_of, nearest, open_subject, panels

LENS = lens_of(50, (16, 16))


def decibels(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """PSNR by its definition."""
    return 10 * math.log10(255**2 / np.square(image.astype(float) - truth).mean())


def test_the_data_beside_the_model(viewed: Made) -> None:
    """Views of the data as they were packed, and what the evaluation says of them."""
    for subject in (
        open_subject(str(viewed.newer), viewed.overrides, CPU),
        open_subject(str(viewed.export), viewed.overrides, CPU),
    ):
        truth, waiting = subject.truth, threading.Event()
        assert truth is not None
        counts = {}
        for name in NAMES:
            for split in ("heldout", "train"):
                while (views := truth.views(name, split, waiting.set)) is None:
                    assert waiting.wait(30)
                    waiting.clear()
                counts[name, split] = len(views)
                assert [view.place for view in views] == list(range(len(views)))
        assert [counts[name, "train"] for name in NAMES] == [11, 4, 1, 18]
        assert [counts[name, "heldout"] for name in NAMES] == [1, 1, 0, 2]
        views = truth.views("scene_0", "train", waiting.set) or truth._read("scene_0", "train")
        # The source's images, over white, in its order; its first tenth is held out.
        transforms = json.loads((viewed.source / "scene_0/transforms_opencv.json").read_text())
        for view, frame in zip(views, transforms["frames"][1:], strict=True):
            assert np.abs(view.image - over_white(viewed.source / "scene_0" / frame["file_path"])).max() <= 1
            torch.testing.assert_close(
                view.camera.cam2world, torch.tensor(frame["transform_matrix"]).double(), atol=1e-6, rtol=0
            )
        for view in views:
            other = Camera(view.camera.cam2world.clone(), LENS)
            other.cam2world[:3, 3] *= 3  # from further away in the same direction
            assert nearest(views, other) is view
        assert truth.views("nobody", "train", waiting.set) in ([], None)
        for name in NAMES:
            while not subject.measure(name, waiting.set):
                assert waiting.wait(30)
        assert math.isnan(subject.psnr["scene_2"]) and subject.label("scene_2") == "scene_2"
        assert subject.label("scene_0") == f"scene_0 · {subject.psnr['scene_0']:.1f} dB"
        (view,) = truth.views("scene_0", "heldout", waiting.set) or truth._read("scene_0", "heldout")
        rendered = Export(str(viewed.export)).scene("scene_0").image(view.camera.cam2world, view.camera.intrinsics)
        expected = decibels(rendered[0].numpy(), view.image)
        assert subject.psnr["scene_0"] == pytest.approx(expected, abs=1e-3)
        drawn = draw(subject.model, subject.scene("scene_0"), views[0].camera.cam2world, views[0].camera.intrinsics)
        first, second, third = panels(DATA, drawn, subject.scene("scene_0"), (16, 16), truth=views[0].image)
        assert first.picture is views[0].image and drawn.image is not None
        error = np.abs(drawn.image.astype(int) - views[0].image)
        assert np.array_equal(third.picture, np.minimum(4 * error, 255))
        assert second.label == f"decoded RGB, {decibels(drawn.image, views[0].image):.1f} dB"
        truth.close()
    assert open_subject(str(viewed.export), [], CPU).truth is None


def test_a_scene_is_first_seen_upright_from_a_side_that_was_captured(viewed: Made, tmp_path: Path) -> None:
    """In worlds turned as photos with poses from COLMAP leave them; one of the captures is of one side."""
    turns = {"scene_0": (0.0, -0.8, 0.6), "scene_3": (0.6, 0.0, -0.8)}
    for name, up in turns.items():
        path = shutil.copytree(viewed.source / name, tmp_path / "all/square16" / name) / "transforms_opencv.json"
        transforms = json.loads(path.read_text())
        frames = transforms["frames"]
        if name == "scene_3":
            del frames[len(frames) // 3 :]
        z, other = np.array(up), np.array([0.0, 1.0, 0.0]) if name == "scene_3" else np.array([1.0, 0.0, 0.0])
        turn = np.eye(4)
        turn[:3, :3] = np.stack([other, np.cross(z, other), z], 1)  # the world's z axis becomes `up`
        for frame in frames:
            frame["transform_matrix"] = (turn @ np.array(frame["transform_matrix"])).tolist()
        path.write_text(json.dumps(transforms))
    pack(str(tmp_path / "shards"), PackOptions(scenes=str(tmp_path / "all"), subset="square16"))
    viewer = Viewer(Followed(str(viewed.export), [f"data.root={tmp_path / 'shards'}"], CPU), port=0)
    subject = viewer.subject
    assert subject.truth is not None
    for name, expected in turns.items():
        front, up = subject.front(name)
        assert front.dtype == up.dtype == torch.float64
        torch.testing.assert_close(up, torch.tensor(expected).double(), atol=1e-4, rtol=0)
        cameras = subject.truth.cameras(name)
        heights, radius = cameras[:, :3, 3] @ up, cameras[:, :3, 3].norm(dim=1)
        assert abs(front[:3, 0] @ up) < 1e-4 and -front[:3, 1] @ up > 0  # no roll, and not upside down
        assert float(front[:3, 3] @ up) == pytest.approx(float(heights.mean()), abs=0.05 * float(radius.mean()))
        nearby = torch.nn.functional.cosine_similarity(cameras[:, :3, 3], front[:3, 3], dim=1)
        assert nearby.max() > 0.9
    # Of a scene that the data don't have, as of an export alone, around the z axis.
    alone = open_subject(str(viewed.export), [], CPU)
    assert torch.equal(subject.front("scene_1")[1], alone.front("scene_0")[1])
    assert alone.front("scene_0")[1].tolist() == [0, 0, 1]
    # A page begins there, wherever its camera was, and turns with the world of the scene.
    with connected(viewer) as (_, session):
        for name in ("scene_0", "scene_3"):
            session._select(name)
            wait(lambda name=name: torch.allclose(session.camera().cam2world, subject.front(name)[0], atol=1e-4))
        session.up.value = "x"
        session._reset()
        session._select("scene_0")  # what was chosen stays
        wait(lambda: not session._dirty)
        np.testing.assert_allclose(session.client.camera.up_direction, [1, 0, 0])
    viewer.close()
