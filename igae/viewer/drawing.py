# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes, and their layout in a window."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from igae.evaluation import Picture, depth_to_rgb, latent_to_rgb, psnr, to_uint8
from igae.models import IGAE, Views

RGB, LATENTS, CHANNEL, CHANNELS = "decoded RGB", "latents", "latent channel", "all latent channels"
DEPTH, OPACITY, ALL, DATA = "depth", "opacity", "side by side", "compare with the data"
TRUTH, ERROR = "ground truth", "difference"
VIEWS: dict[str, tuple[str, ...]] = {view: (view,) for view in (RGB, LATENTS, CHANNEL, CHANNELS, DEPTH, OPACITY)}
VIEWS |= {ALL: (RGB, LATENTS, DEPTH), DATA: (TRUTH, RGB, ERROR)}
"""What can be looked at -> the panels that show it."""
AMPLIFIED = 4
"""Factor of the differences that are shown."""
LABEL, GAP, FONT = 20, 8, 13  # pixels of the screen: height of labels, between panels, size of letters
LEAST = 4  # rows and columns of latents at least


@dataclass
class ShownScene:
    """Planes [1, 3, R, R, C] of a scene, and mean and standard deviation [c] of its latents as first seen, which keep
    their colors the same while the camera moves."""

    planes: Tensor
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.ones(()))


@dataclass
class Drawn:
    """A view of a scene: latents [c, h, w], depth and opacity [h g, w g], and the image [H, W, 3] if it was decoded."""

    latents: Tensor
    depth: Tensor
    opacity: Tensor
    image: Picture | None


class Panel(NamedTuple):
    """A picture (None: an empty place) with its label, and whether its pixels stay squares when it is enlarged: images
    get smooth, as a browser would show them."""

    label: str
    picture: Picture | None
    square: bool = False


def views_of(model: IGAE, has_data: bool) -> list[str]:
    """Those of VIEWS that a model has: latents of RGB scenes are their colors."""
    views = [RGB, DEPTH, OPACITY] if model.autoencoder.is_identity else [view for view in VIEWS if view != DATA]
    return [*views, DATA] if has_data else views


def is_decoded(view: str) -> bool:
    return RGB in VIEWS[view]


@torch.no_grad()
def draw(
    model: IGAE, scene: ShownScene, cam2world: Tensor, intrinsics: Tensor, scale: float = 1.0, decode: bool = True
) -> Drawn:
    """Render a view, with fixed samples as an evaluation does.

    Args:
        cam2world: [4, 4], OpenCV.
        intrinsics: [3, 3], normalized by the image size.
        scale: of the latents' height and width; below 1 the decoded image is smaller too.
        decode: whether to decode the latents into an image.
    """
    height, width = (max(min(LEAST, side), round(side * scale)) for side in model.latent_shape[1:])
    background = model.background
    if (height, width) != model.latent_shape[1:]:
        background = F.interpolate(background.permute(2, 0, 1)[None], (height, width), mode="area")[0].permute(1, 2, 0)
    index = torch.zeros(1, dtype=torch.int64, device=scene.planes.device)
    views = Views(index, cam2world[None].to(scene.planes), intrinsics[None].to(scene.planes))
    latents, depth, opacity, _ = model.render_planes(scene.planes, views, None, background)
    image = to_uint8(model.autoencoder.decode(model.autoencoder.denormalize(latents))[0]) if decode else None
    return Drawn(latents[0], depth[0], opacity[0], image)


def choose_threads(model: IGAE, scene: ShownScene, cam2world: Tensor, intrinsics: Tensor, most: int) -> int:
    """On a CPU, let this thread compute on one core or on ``most``, whichever draws faster now; returns the number.

    Beside a training that uses all cores, two threads that wait for each other took ten times as long as one.
    """
    if model.background.device.type != "cpu" or most == 1:
        return most
    seconds = {}
    for threads in (1, most):
        torch.set_num_threads(threads)
        draw(model, scene, cam2world, intrinsics, 0.5)
        start = time.perf_counter()
        for _ in range(2):
            draw(model, scene, cam2world, intrinsics, 0.5)
        seconds[threads] = time.perf_counter() - start
    threads = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(threads)
    return threads


def panels(
    view: str, drawn: Drawn, scene: ShownScene, size: tuple[int, int], channel: int = 0, truth: Picture | None = None
) -> list[Panel]:
    """The panels of a view: latents, depth and opacity enlarged to the images' ``size`` (height, width), and the
    decoded image as it is.

    Args:
        channel: of the latents, where one is shown.
        truth: the image of the data that is seen from this camera.
    """
    shown: list[Panel] = []
    for kind in VIEWS[view]:
        if kind == RGB:
            error = "" if truth is None else f", {psnr_of(drawn, truth):.1f} dB"
            shown.append(Panel(RGB + error, drawn.image))
        elif kind == TRUTH:
            shown.append(Panel(TRUTH, truth))
        elif kind == ERROR:
            error = f"{ERROR}, {AMPLIFIED} times"
            shown.append(Panel(error, None if truth is None else difference(_image_like(drawn, truth), truth)))
        elif kind == DEPTH:
            shown.append(Panel(kind, depth_to_rgb(drawn.depth[None], drawn.opacity[None], size)[0], True))
        elif kind == OPACITY:
            signed = 2 * drawn.opacity[None, None] - 1
            gray = latent_to_rgb(signed, size, (torch.zeros(3), torch.full((3,), 0.5)))
            shown.append(Panel(kind, gray[0], True))
        elif kind == LATENTS:
            channels = [i % len(scene.mean) for i in range(3)]
            colors = latent_to_rgb(drawn.latents[None], size, (scene.mean[channels], scene.std[channels]))
            shown.append(Panel(kind, colors[0], True))
        else:
            mean, std = (value[:, None, None, None] for value in (scene.mean, scene.std.clamp_min(1e-12)))
            gray = latent_to_rgb((drawn.latents[:, None] - mean) / std, size, (torch.zeros(3), torch.ones(3)))
            chosen = range(len(gray)) if kind == CHANNELS else [min(max(channel, 0), len(gray) - 1)]
            shown += [Panel(f"{i + 1}", gray[i], True) for i in chosen]
    return shown


def psnr_of(drawn: Drawn, truth: Picture) -> float:
    """PSNR in dB of a decoded image against the data's."""
    images = torch.from_numpy(np.stack([_image_like(drawn, truth), truth])).float()
    return float(psnr(images[:1], images[1:], 255.0))


def difference(image: Picture, truth: Picture) -> Picture:
    """Absolute differences, AMPLIFIED: black where there is none."""
    found: Picture = np.abs(image.astype(np.int16) - truth) * AMPLIFIED
    return found.clip(0, 255).astype(np.uint8)


def _image_like(drawn: Drawn, truth: Picture) -> Picture:
    assert drawn.image is not None
    return _resize(drawn.image, truth.shape[:2], False)


def side_by_side(shown: Sequence[Panel]) -> Picture:
    """Panels of a view as one picture without labels, to be saved: up to three in a row, more in a square."""
    height, width = (max(panel.picture.shape[i] for panel in shown if panel.picture is not None) for i in (0, 1))
    blank = np.full((height, width, 3), 255, np.uint8)
    cells = [blank if panel.picture is None else _resize(panel.picture, blank.shape[:2], True) for panel in shown]
    columns = len(cells) if len(cells) <= 3 else math.ceil(math.sqrt(len(cells)))
    cells += [blank] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


@dataclass
class Sheet:
    """Pictures in a window: ``cells`` are left, top, right and bottom of each in [0, 1]."""

    picture: Picture
    cells: list[tuple[float, float, float, float]]

    def at(self, x: float, y: float) -> int | None:
        """Which picture is at a point, if any."""
        inside = (
            i for i, (left, top, right, bottom) in enumerate(self.cells) if left <= x <= right and top <= y <= bottom
        )
        return next(inside, None)


def arrange(shown: Sequence[Panel], window: tuple[int, int], most: int) -> Sheet:
    """Lay out panels of one shape on white, as large as they fit into a window, with labels if there are several.

    Args:
        shown: labels are cut off where they are too long.
        window: (height, width) in pixels of the screen; the sheet has its aspect ratio.
        most: pixels of the sheet's longer side; the page enlarges what it gets.
    """
    reduced = min(1.0, most / max(window))
    height, width = (max(1, round(side * reduced)) for side in window)
    shape = next((panel.picture.shape[:2] for panel in shown if panel.picture is not None), (1, 1))
    count, several = len(shown), len(shown) > 1
    label, gap = (round(size * reduced) if several else 0 for size in (LABEL, GAP))

    def side(columns: int) -> float:
        rows = math.ceil(count / columns)
        return float(min((width / columns - gap) / shape[1], (height / rows - gap - label) / shape[0]))

    columns = max(range(1, count + 1), key=side)
    rows = math.ceil(count / columns)
    factor = max(side(columns), 1 / min(shape))
    h, w = max(1, int(shape[0] * factor)), max(1, int(shape[1] * factor))
    left, top = (width - columns * (w + gap) + gap) // 2, (height - rows * (h + gap + label) + gap) // 2
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(1, FONT * reduced))
    cells = []
    for i, (text, picture, square) in enumerate(shown):
        spare = columns * rows - count if i // columns == rows - 1 else 0  # the last row is in the middle
        x = left + i % columns * (w + gap) + spare * (w + gap) // 2
        y = top + i // columns * (h + gap + label) + label
        if picture is None:
            pen.rectangle((x, y, x + w - 1, y + h - 1), fill="#eeeeee")
        else:
            canvas.paste(Image.fromarray(_resize(picture, (h, w), square)), (x, y))
        if label:
            pen.text((x + w / 2, y - label / 4), _fit(text, font, w), fill="#333333", font=font, anchor="ms")
        cells.append((x / width, (y - label) / height, (x + w) / width, (y + h) / height))
    return Sheet(np.asarray(canvas), cells)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    for length in range(len(text), 0, -1):
        shown = text if length == len(text) else text[:length] + "…"
        if font.getlength(shown) <= width:
            return shown
    return ""


def _resize(picture: Picture, size: tuple[int, int], square: bool) -> Picture:
    if picture.shape[:2] == size:
        return picture
    how = Image.Resampling.NEAREST if square else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize(size[::-1], how))
