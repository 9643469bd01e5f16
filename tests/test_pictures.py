# SPDX-License-Identifier: Apache-2.0
"""Pictures: values, geometry, and files read back."""

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import igae.evaluation as pictures

Frames = NDArray[np.uint8]


def read_video(path: Path) -> tuple[dict[str, object], Frames]:
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def test_to_uint8() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5]).expand(3, 2, 6).clone()
    image[1] *= -1
    found = pictures.to_uint8(image.requires_grad_())
    assert found.shape == (2, 6, 3) and found.dtype == np.uint8
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255, 191]  # 127.5 rounds to even
    assert found[0, :, 1].tolist() == [255, 255, 128, 0, 0, 64]
    assert pictures.to_uint8(image.bfloat16()).shape == (2, 6, 3)


def test_latent_to_rgb_uses_joint_statistics() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 5, 4, 6, dtype=torch.float64) * torch.tensor([1.0, 9, 0.1, 1, 1])[:, None, None] + 3
    found = pictures.latent_to_rgb(latents, (8, 18))
    assert found.shape == (2, 8, 18, 3) and found.dtype == np.uint8
    mean, std = latents[:, :3].mean((0, 2, 3)), latents[:, :3].std((0, 2, 3), correction=0)
    for i, row, column, channel in [(0, 0, 0, 0), (1, 7, 17, 1), (1, 3, 8, 2), (0, 5, 11, 1)]:
        value = latents[i, channel, row // 2, column // 3]
        expected = 255 * min(max(float((value - mean[channel]) / (4 * std[channel]) + 0.5), 0), 1)
        assert abs(int(found[i, row, column, channel]) - expected) <= 0.51  # rounding, measured 0.49
    # one picture alone has other statistics, unless they are given
    assert not np.array_equal(pictures.latent_to_rgb(latents[:1], (8, 18)), found[:1])
    assert np.array_equal(pictures.latent_to_rgb(latents[:1], (8, 18), (mean, std)), found[:1])


def test_latent_to_rgb_of_odd_latents() -> None:
    assert (pictures.latent_to_rgb(torch.full((1, 4, 2, 2), 7.0), (2, 2)) == 128).all()  # constant: no division by zero
    one = pictures.latent_to_rgb(torch.randn(2, 1, 2, 2), (4, 4))
    assert np.array_equal(one[..., 0], one[..., 1]) and np.array_equal(one[..., 0], one[..., 2])


def test_channels_are_gray_and_comparable() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 5, 4, 6, dtype=torch.float64) * torch.tensor([1.0, 9, 0.1, 1, 1])[:, None, None] + 3
    latents[:, 4] = 7.0
    found = pictures.channels_to_gray(latents, (8, 18))
    assert found.shape == (2, 5, 8, 18, 3) and found.dtype == np.uint8
    assert (found == found[..., :1]).all() and (found[:, 4] == 128).all()  # constant: no division by zero
    for i, channel, row, column in [(0, 0, 0, 0), (1, 1, 7, 17), (1, 2, 3, 8), (0, 3, 5, 11)]:
        values = latents[:, channel]
        value = (latents[i, channel, row // 2, column // 3] - values.mean()) / (4 * values.std(correction=0)) + 0.5
        assert abs(int(found[i, channel, row, column, 0]) - 255 * min(max(float(value), 0), 1)) <= 0.51


def luma(picture: Frames) -> NDArray[np.float64]:
    """Brightness of Rec. 601, which the color map is made for."""
    return picture @ np.array([0.299, 0.587, 0.114])


def test_depth_is_ordered_by_brightness() -> None:
    depth = torch.linspace(2.0, 5.0, 32).expand(1, 1, 32)
    found = pictures.depth_to_rgb(depth, torch.ones(1, 1, 32), (2, 64))
    assert found.shape == (1, 2, 64, 3) and np.array_equal(found[0, 0], found[0, 1])
    brightness = luma(found[0, 0, ::2])
    assert (np.diff(brightness) < 0).all()
    # evenly: brightness is 0.85 - 0.7 x for the relative depth x; 3 of 255 where a channel is clipped (measured 1.7)
    assert np.abs(brightness / 255 - np.linspace(0.85, 0.15, 32)).max() < 3 / 255


def test_depth_background_is_white_and_outside_of_the_range() -> None:
    depth = torch.tensor([[[1.0, 2.0, 100.0, -7.0]]])
    opacity = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    found = pictures.depth_to_rgb(depth, opacity, (1, 4))[0, 0]
    assert (found[2:] == 255).all()
    alone = pictures.depth_to_rgb(depth[..., :2], opacity[..., :2], (1, 2))[0, 0]
    assert np.array_equal(found[:2], alone)
    half = pictures.depth_to_rgb(depth[..., :2], torch.tensor([[[0.6, 1.0]]]), (1, 2))[0, 0, 0].astype(float)
    assert np.abs(half - (0.6 * alone[0] + 0.4 * 255)).max() <= 1
    assert (pictures.depth_to_rgb(depth, torch.zeros(1, 1, 4), (1, 4)) == 255).all()  # nothing there


@pytest.mark.parametrize(("size", "factor"), [((64, 64), 2), ((100, 128), 1), ((30, 50), 3), ((20, 200), 1)])
def test_grid_geometry(size: tuple[int, int], factor: int) -> None:
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 200, (*size, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)]
    sheet = pictures.grid(rows, ["truth", "a decoded render", "y"])
    h, w = size[0] * factor, size[1] * factor
    assert sheet.dtype == np.uint8 and sheet.shape[1:] == (4 + 3 * (w + 4), 3)
    top = sheet.shape[0] - 2 * (h + 4)  # the last row ends one gap above the edge
    assert 4 + 6 <= top <= 40  # room for the labels
    rest = sheet.copy()
    for i in range(2):
        for j in range(3):
            y, x = top + i * (h + 4), 4 + j * (w + 4)
            assert np.array_equal(sheet[y : y + h : factor, x : x + w : factor], rows[i][j])
            assert np.array_equal(sheet[y + factor - 1 : y + h : factor, x + factor - 1 : x + w : factor], rows[i][j])
            rest[y : y + h, x : x + w] = 255
    assert (rest[top:] == 255).all()  # gaps are white
    labels = rest[:top]
    for j in range(3):  # every column has its label, in its own width
        assert (labels[:, 4 + j * (w + 4) : 4 + j * (w + 4) + w] < 128).any()
        assert (labels[:, j * (w + 4) : j * (w + 4) + 4] > 128).all()
    assert (labels[:4] == 255).all() and (labels[-4:] == 255).all()


def test_grid_refuses_wrong_labels() -> None:
    with pytest.raises(AssertionError):
        pictures.grid([[np.zeros((4, 4, 3), np.uint8)]], ["a", "b"])


def test_save_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pictures.save_png(tmp_path / "new" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), picture)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]  # nothing else is left


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (256, 256)),
        ((256, 300), (256, 300)),
        ((257, 301), (258, 302)),
        ((64, 192), (256, 768)),
        ((85, 31), (766, 280)),
    ],
)
def test_video_is_read_back(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    frames = np.zeros((9, *size, 3), dtype=np.uint8)
    frames[:, :, : size[1] // 2] = [220, 30, 60]
    frames[:, :, size[1] // 2 :, 1] = np.linspace(0, 255, 9, dtype=np.uint8)[:, None, None]
    path = tmp_path / "new" / "orbit.mp4"
    pictures.write_video(path, frames, fps=12)
    assert [p.name for p in path.parent.iterdir()] == ["orbit.mp4"]
    meta, found = read_video(path)
    assert meta["codec"] == "h264" and str(meta["pix_fmt"]).startswith("yuv420p") and meta["fps"] == 12
    assert found.shape == (9, *expected, 3)
    h, w = expected
    left, right = found[:, h // 8 : -h // 8, w // 8 : w * 3 // 8], found[:, h // 8 : -h // 8, w * 5 // 8 : w * 7 // 8]
    # the encoder's loss and 4:2:0; measured 3
    assert np.abs(left.mean((1, 2)) - [220, 30, 60]).max() < 8
    assert np.abs(right.mean((1, 2))[:, 1] - np.linspace(0, 255, 9)).max() < 8


def test_failed_video_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "orbit.mp4"
    path.write_bytes(b"old")
    with pytest.raises(AssertionError):
        pictures.write_video(path, np.zeros((0, 8, 8, 3), np.uint8))

    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho no codec >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(broken))
    with pytest.raises(OSError, match="orbit.mp4 can't be written: no codec"):
        pictures.write_video(path, np.zeros((2, 8, 8, 3), np.uint8))
    assert path.read_bytes() == b"old" and {each.name for each in tmp_path.iterdir()} == {"orbit.mp4", "ffmpeg"}
