# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos out of tensors. Pictures are uint8 arrays [H, W, 3], several of them [N, H, W, 3]."""

import errno
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from igae.storage import staged

Picture = NDArray[np.uint8]

CELL = 128  # narrower cells of a grid are enlarged, so that their labels can be read
GAP = 4  # pixels around the cells of a grid
NEAR, FAR = 0.85, 0.15  # lightness of depths
VIDEO = 256  # smaller videos are enlarged: players show them blurred otherwise


def to_uint8(image: Tensor) -> Picture:
    """[3, H, W] in [-1, 1] (clamped) -> [H, W, 3]."""
    return _quantize((image.detach().float() + 1) / 2).permute(1, 2, 0).cpu().numpy()


def latent_to_rgb(latents: Tensor, size: tuple[int, int], statistics: tuple[Tensor, Tensor] | None = None) -> Picture:
    """The first three channels of latents [N, c, h, w] as colors [N, *size, 3], enlarged without smoothing.

    A channel's mean - 2 std becomes 0 and its mean + 2 std becomes 255. Mean and standard deviation ([3] each) are of
    all latents of the call unless given: latents which are to be compared belong into one call. Fewer than three
    channels are repeated.

    Args:
        size: (height, width).
    """
    channels = latents.shape[1]
    colors = latents.detach().float()[:, [i % channels for i in range(3)]]
    if statistics is None:
        statistics = colors.mean((0, 2, 3)), colors.std((0, 2, 3), correction=0)
    return _enlarge(_stretch(colors, *(value.to(colors)[:, None, None] for value in statistics)), size)


def channels_to_gray(latents: Tensor, size: tuple[int, int]) -> Picture:
    """Each channel of latents [N, c, h, w] as gray pictures [N, c, *size, 3], enlarged without smoothing.

    A channel's mean - 2 std becomes black and its mean + 2 std white; both are of all latents of the call.

    Args:
        size: (height, width).
    """
    values = latents.detach().float()
    mean, std = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), correction=0, keepdim=True)
    gray = _stretch(values, mean, std).flatten(0, 1)[:, None]
    return _enlarge(gray.expand(-1, 3, -1, -1), size).reshape(*latents.shape[:2], *size, 3)


def depth_to_rgb(depth: Tensor, opacity: Tensor, size: tuple[int, int]) -> Picture:
    """Depth [N, h, w] as colors [N, *size, 3] on white, near light and far dark, enlarged without smoothing.

    The range of colors is that of the depths where the opacity ([N, h, w] in [0, 1]) exceeds 1/2, of all N together.

    Args:
        size: (height, width).
    """
    depth, opacity = depth.detach().float(), opacity.detach().float().clamp(0, 1)
    near, far = depth_range(depth, opacity)
    lightness = NEAR - (NEAR - FAR) * ((depth - near) / max(far - near, 1e-12)).clamp(0, 1)
    return _enlarge(1 + opacity[:, None] * (_cubehelix(lightness) - 1), size)


def depth_range(depth: Tensor, opacity: Tensor) -> tuple[float, float]:
    """The least and the greatest depth where the opacity exceeds 1/2; of all where it does nowhere."""
    solid = depth[opacity > 0.5] if (opacity > 0.5).any() else depth
    return float(solid.min()), float(solid.max())


def depth_scale(count: int = 9) -> str:
    """The colors of depths from the nearest to the farthest, as CSS has them, with commas."""
    colors = _quantize(_cubehelix(torch.linspace(NEAR, FAR, count).reshape(1, 1, count)))[0, :, 0].T
    return ", ".join("#" + bytes(color.tolist()).hex() for color in colors)


def _cubehelix(lightness: Tensor) -> Tensor:
    """Colors [N, 3, h, w] of lightness [N, h, w] in [0, 1]; their perceived brightness grows evenly with it.

    D. A. Green, "A color scheme for the display of astronomical intensity images", 2011, equation 2 with start 0.3,
    rotations -0.8 and hue 1.6: from sand over green to dark blue, no color twice.
    """
    angle = 2 * math.pi * (0.3 / 3 + 1 - 0.8 * lightness)
    amplitude = 1.6 * lightness * (1 - lightness) / 2
    weights = lightness.new_tensor([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    wave = torch.stack([angle.cos(), angle.sin()], dim=1)
    return lightness[:, None] + amplitude[:, None] * torch.einsum("kj,njhw->nkhw", weights, wave)


def grid(rows: Sequence[Sequence[Picture]], labels: Sequence[str]) -> Picture:
    """Pictures in rows under the labels of their columns, on white.

    All pictures have one size [h, w] and are enlarged k = ceil(128 / w) times, with gaps of 4 pixels between and around
    them; the labels are above the first row.
    """
    pictures = np.stack([np.stack(row) for row in rows])
    n, m, h, w, _ = pictures.shape
    assert pictures.dtype == np.uint8 and len(labels) == m, f"{len(labels)} labels for {m} columns"
    k = math.ceil(CELL / w)
    h, w = k * h, k * w
    font = _font(labels, w)
    top = math.ceil(max(font.getbbox(label)[3] for label in labels)) + GAP
    sheet = Image.new("RGB", (GAP + m * (w + GAP), top + GAP + n * (h + GAP)), "white")
    for i, j in np.ndindex(n, m):
        cell = Image.fromarray(pictures[i, j]).resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(cell, (GAP + j * (w + GAP), top + GAP + i * (h + GAP)))
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(labels):
        draw.text((GAP + j * (w + GAP) + w / 2, GAP), label, fill=(0, 0, 0), font=font, anchor="ma")
    return np.asarray(sheet)


def _font(labels: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font in the largest size, 14 at most, in which every label is at most `width` pixels long."""
    for size in range(14, 6, -1):
        font = ImageFont.load_default(size)
        if all(font.getlength(label) <= width for label in labels):
            break
    return font


def save_png(path: Path, picture: Picture, labels: Mapping[str, str] | None = None) -> None:
    """Write a picture, with labels in the file; the file is there whole or not at all."""
    texts = PngInfo()
    for name, text in (labels or {}).items():
        texts.add_itxt(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        Image.fromarray(picture).save(staging, format="PNG", pnginfo=texts)


def write_video(path: Path, frames: Picture, fps: float = 24) -> None:
    """Write frames [T, H, W, 3] as mp4 (H.264, 4:2:0: every player shows it); the file is there whole or not at all.

    Frames with a side below 256 pixels are enlarged by a whole factor; an odd side has its last pixels repeated.
    """
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and len(frames), frames.shape
    k = math.ceil(VIDEO / min(frames.shape[1:3]))
    frames = frames.repeat(k, axis=1).repeat(k, axis=2)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        # imageio_ffmpeg's own writer does not tell of a full disk.
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", str(fps), "-i", "pipe:0", "-an"]
        command += ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "10"]
        # The index first, so that a browser plays the file while it loads.
        command += ["-movflags", "+faststart", "-f", "mp4", "-y", f"file:{staging}"]
        done = subprocess.run(command, input=np.ascontiguousarray(frames).reshape(-1).data, capture_output=True)
        if done.returncode:
            raise OSError(errno.EIO, " ".join(done.stderr.decode(errors="replace").split())[:300])


def _stretch(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """mean - 2 std -> 0, mean + 2 std -> 1."""
    return 0.5 + (values - mean) / (4 * std.clamp_min(1e-12))


def _quantize(values: Tensor) -> Tensor:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _enlarge(colors: Tensor, size: tuple[int, int]) -> Picture:
    """[N, 3, h, w] in [0, 1] -> [N, *size, 3]."""
    return F.interpolate(_quantize(colors), size=size, mode="nearest").permute(0, 2, 3, 1).cpu().numpy()
