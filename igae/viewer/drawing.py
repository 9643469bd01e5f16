# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes, and their layout in a window."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from igae.evaluation import Picture, depth_to_rgb, latent_to_rgb, to_uint8
from igae.models import IGAE, Views

RGB, LATENTS, CHANNELS, DEPTH, ALL = "decoded RGB", "latents", "latent channels", "depth", "side by side"
VIEWS = {**{view: (view,) for view in (RGB, LATENTS, CHANNELS, DEPTH)}, ALL: (RGB, LATENTS, DEPTH)}
"""What can be looked at -> the panels that show it."""
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


def views_of(model: IGAE) -> list[str]:
    """Those of VIEWS that a model has: latents of RGB scenes are their colors."""
    return [RGB, DEPTH] if model.autoencoder.is_identity else list(VIEWS)


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


def panels(view: str, drawn: Drawn, scene: ShownScene, size: tuple[int, int]) -> list[Picture]:
    """The panels of a view: latents, channels (a grid of them) and depth enlarged to the images' ``size`` (height,
    width), and the decoded image as it is."""
    shown: list[Picture] = []
    for kind in VIEWS[view]:
        if kind == RGB:
            assert drawn.image is not None
            shown.append(drawn.image)
        elif kind == DEPTH:
            shown.append(depth_to_rgb(drawn.depth[None], drawn.opacity[None], size)[0])
        elif kind == LATENTS:
            channels = [i % len(scene.mean) for i in range(3)]
            shown.append(latent_to_rgb(drawn.latents[None], size, (scene.mean[channels], scene.std[channels]))[0])
        else:
            mean, std = (value[:, None, None, None] for value in (scene.mean, scene.std.clamp_min(1e-12)))
            cells = latent_to_rgb((drawn.latents[:, None] - mean) / std, size, (torch.zeros(3), torch.ones(3)))
            columns = math.ceil(math.sqrt(len(cells)))
            cells = np.concatenate([cells, np.full((-len(cells) % columns, *size, 3), 255, np.uint8)])
            grid = cells.reshape(-1, columns, *size, 3).transpose(0, 2, 1, 3, 4)
            shown.append(grid.reshape(-1, columns * size[1], 3))
    return shown


def side_by_side(pictures: Sequence[Picture]) -> Picture:
    """Panels of a view as one picture without labels, to be saved."""
    height = max(picture.shape[0] for picture in pictures)
    return np.concatenate([_resize(p, (height, round(p.shape[1] * height / p.shape[0])), True) for p in pictures], 1)


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


def arrange(pictures: Sequence[Picture | None], labels: Sequence[str], window: tuple[int, int], most: int) -> Sheet:
    """Lay out pictures of one shape on white, as large as they fit into a window, with labels if there are several.

    Args:
        pictures: None is an empty cell.
        labels: cut off where they are too long.
        window: (height, width) in pixels of the screen; the sheet has its aspect ratio.
        most: pixels of the sheet's longer side; the page enlarges what it gets.
    """
    reduced = min(1.0, most / max(window))
    height, width = (max(1, round(side * reduced)) for side in window)
    shape = next((picture.shape[:2] for picture in pictures if picture is not None), (1, 1))
    count, several = len(pictures), len(pictures) > 1
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
    for i, picture in enumerate(pictures):
        spare = columns * rows - count if i // columns == rows - 1 else 0  # the last row is in the middle
        x = left + i % columns * (w + gap) + spare * (w + gap) // 2
        y = top + i // columns * (h + gap + label) + label
        if picture is None:
            pen.rectangle((x, y, x + w - 1, y + h - 1), fill="#eeeeee")
        else:
            # Latents stay squares; images get smooth, as a browser would show them.
            canvas.paste(Image.fromarray(_resize(picture, (h, w), labels[i] in (LATENTS, CHANNELS, DEPTH))), (x, y))
        if label:
            text = _fit(labels[i], font, w)
            pen.text((x + w / 2, y - label / 4), text, fill="#333333", font=font, anchor="ms")
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
