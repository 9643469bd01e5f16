# SPDX-License-Identifier: Apache-2.0
"""Masks of views: their alpha or, without alpha, where they differ from the background."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scene_files import open_views, picture, write_data

from igae.data import PackOptions, ViewBatch, pack

Pixels = NDArray[np.uint8]
BACKGROUNDS = [(1.0, 1.0, 1.0), (0.0, 0.4, 1.0)]


def colors(background: tuple[float, ...]) -> Pixels:
    return np.array([round(255 * channel) for channel in background], np.uint8)


def partly(background: tuple[float, ...]) -> Pixels:
    """An image with the background's color in a third of it, in some of which one channel differs by 1."""
    pixels = np.asarray(Image.open(io.BytesIO(picture(5)))).copy()
    pixels[:, :5] = colors(background)
    pixels[3, 2, 1] ^= 1
    pixels[8, 4, 2] ^= 1
    return pixels


@pytest.fixture
def views(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, dict[int, ViewBatch]]:
    """Files of a scene's views, and each view as it comes: RGB, RGBA, palette with a transparent color, gray, gray with
    alpha, JPEG, WebP with alpha."""
    background: tuple[float, ...] = request.param
    data = write_data(tmp_path, views=(8,))
    folder = data / "scenes/square16/scene_0/images"
    Image.fromarray(partly(background)).save(folder / "001.png")
    (folder / "002.png").write_bytes(picture(2, mode="RGBA"))
    Image.open(io.BytesIO(picture(3))).quantize(16).save(folder / "003.png", transparency=2)
    (folder / "004.png").write_bytes(picture(4, mode="L"))
    Image.open(io.BytesIO(picture(5, mode="RGBA"))).convert("LA").save(folder / "005.png")
    (folder / "006.png").write_bytes(picture(6, kind="JPEG"))
    Image.open(io.BytesIO(picture(7, mode="RGBA"))).save(folder / "007.png", "WEBP", lossless=True, exact=True)
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(data / "scenes"), subset="square16"))
    found = {}
    for split in ("train", "heldout"):
        options = {"batch_size": 3, "repeat": False, "workers": 0, "shuffle": 0, "background": background}
        loader = open_views(str(tmp_path / "out"), manifest, manifest.scenes, split=split, **options)
        for batch in loader:
            for i, view in enumerate(batch.view.tolist()):
                found[view] = ViewBatch(**{name: value[i] for name, value in vars(batch).items()})
        loader.close()
    assert sorted(found) == list(range(8))
    return folder, found


@pytest.mark.parametrize("views", BACKGROUNDS, indirect=True)
def test_alpha_is_the_mask(views: tuple[Path, dict[int, ViewBatch]]) -> None:
    folder, found = views
    for view in (2, 3, 5, 7):
        alpha = np.asarray(Image.open(folder / f"{view:03d}.png").convert("RGBA"))[..., 3]
        assert found[view].masks.dtype == torch.uint8 and bool(found[view].has_alpha)
        assert np.array_equal(found[view].masks.numpy(), alpha) and len(np.unique(alpha)) > 1, view


@pytest.mark.parametrize(
    ("views", "background"), [(background, background) for background in BACKGROUNDS], indirect=["views"]
)
def test_without_alpha_what_differs_from_the_background_is_the_mask(
    views: tuple[Path, dict[int, ViewBatch]], background: tuple[float, ...]
) -> None:
    folder, found = views
    for view in (0, 1, 4, 6):
        image = np.asarray(Image.open(folder / f"{view:03d}.png").convert("RGB"))
        expected = [[0 if list(pixel) == list(colors(background)) else 255 for pixel in row] for row in image]
        assert not bool(found[view].has_alpha)
        assert found[view].masks.tolist() == expected, view
        assert np.array_equal(found[view].images.permute(1, 2, 0).numpy(), image)  # masks leave images alone
    assert found[1].masks[:, :5].count_nonzero() == 2 and found[1].masks[:, 5:].all()


def test_an_alpha_channel_that_is_opaque_all_over_is_none(tmp_path: Path) -> None:
    """As in ShapeNet-SRN's images, which have four channels and objects on white."""
    data = write_data(tmp_path, views=(8,))
    for path in (data / "scenes/square16/scene_0/images").iterdir():
        pixels = np.full((16, 16, 4), 255, np.uint8)
        pixels[4:12, 4:12, :3] = 90
        Image.fromarray(pixels).save(path)
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(data / "scenes"), subset="square16"))
    loader = open_views(str(tmp_path / "out"), manifest, manifest.scenes, batch_size=4, repeat=False, workers=0)
    batch = next(iter(loader))
    loader.close()
    assert not batch.has_alpha.any()
    assert (batch.masks[:, 4:12, 4:12] == 255).all() and int(batch.masks.sum()) == 255 * 64 * len(batch.masks)
