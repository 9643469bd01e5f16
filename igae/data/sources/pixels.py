# SPDX-License-Identifier: Apache-2.0
"""What packing changes about the pixels of a view, and what that does to its intrinsics.

In this order: a mask becomes the alpha channel, the lens' distortion is undone, the image is brought to a square, and
resized. A view that needs none of it keeps the bytes of its file.
"""

from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igae.data.config import Fit
from igae.data.sources.images import FORMATS, colors_of, decode, open_image, orientation_of, png
from igae.data.sources.scene import BadInput, View

Rows = list[list[float]]


def check_extras(view: View) -> None:
    """Raise BadInput if a view needs a package that is not installed."""
    if view.distortion:
        _opencv(view.file)


def is_inverted(view: View, data: bytes | Exception, mask: bytes | Exception | None) -> bool | None:
    """Whether a view's mask or alpha seems to be white beside the object: it is full along the border and mostly empty
    in the middle. None: there is none that can be read; packing says why."""
    try:
        image = open_image(data, view.file)
        if mask is not None and view.mask is not None:
            alpha = _read_mask(mask, view.mask, view.file, (image.height, image.width))
        elif image.mode == "RGBA":
            alpha = np.asarray(decode(data, view.file).getchannel("A"))
        else:
            return None
    except BadInput:
        return None
    y, x = (side // 4 for side in alpha.shape)
    border = np.concatenate([alpha[[0, -1]].ravel(), alpha[:, [0, -1]].ravel()])
    middle = alpha[y : len(alpha) - y, x : alpha.shape[1] - x]
    return bool((border == 255).mean() > 0.95 and (middle == 0).mean() > 0.5)


def pack_view(
    view: View,
    data: bytes | Exception,
    mask: bytes | Exception | None,
    size: tuple[int, int],
    resize: bool = False,
    fit: Fit = "refuse",
) -> tuple[str, bytes, Rows]:
    """Decodes a view's image, to know that it can be, and makes of it what is stored.

    Args:
        view: its camera and the names of its files.
        data: content of its image's file.
        mask: content of its mask's file; None: it has none.
        size: (height, width) that is wanted.
        resize: bring other sizes to `size`, a square; otherwise they are refused.
        fit: of an image that is not square, with `resize`: `crop` takes the largest centered square, `pad` gives it a
            transparent border.

    Returns:
        (extension, bytes to store, normalized intrinsics of what is stored).

    Raises:
        BadInput: unreadable, damaged, or of the wrong size; a mask of another size; a lens that is not complete.
    """
    found = _check_size(view.file, data, size, resize, fit)
    image = source = decode(data, view.file)
    assert isinstance(data, bytes) and source.format is not None
    if (turn := orientation_of(source)) != 1:
        raise BadInput(
            f"{view.file} has the EXIF orientation {turn}, with which its camera would not be turned: remove the tag "
            "if the camera is that of the pixels as they are stored (exiftool -Orientation= FILE), else turn the "
            "pixels (mogrify -auto-orient FILE)"
        )
    rows = view.intrinsics(found)
    if mask is not None and view.mask is not None:
        image = _with_alpha(colors_of(image), _read_mask(mask, view.mask, view.file, found))
    if view.distortion:
        image = _undistorted(colors_of(image), rows, dict(view.distortion), view.file)
    if found != size:
        if found[0] * size[1] != found[1] * size[0]:
            image, rows = _squared(colors_of(image), rows, pad=fit == "pad")
        image = colors_of(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return (FORMATS[source.format], data, rows) if image is source else ("png", png(image), rows)


def _check_size(file: str, data: bytes | Exception, size: tuple[int, int], resize: bool, fit: Fit) -> tuple[int, int]:
    image = open_image(data, file)
    height, width = image.height, image.width
    if (height, width) != size and not resize:
        raise BadInput(f"{file} is {width}x{height} pixels, not {size[1]}x{size[0]} as the others")
    if fit == "refuse" and width * size[0] != height * size[1]:
        raise BadInput(
            f"{file} is {width}x{height} pixels, which cannot be resized to {size[1]}x{size[0]} evenly: "
            "pack with --fit crop or --fit pad"
        )
    return height, width


def _read_mask(data: bytes | Exception, file: str, image: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Alpha [H, W]. A mask of two values, such as 0 and 1, is one of nothing and everything."""
    mask = decode(data, file)
    if (mask.height, mask.width) != size:
        raise BadInput(f"the mask {file} is {mask.width}x{mask.height} pixels, but {image} is {size[1]}x{size[0]}")
    pixels = np.asarray(colors_of(mask))
    alpha: NDArray[np.uint8] = pixels[..., :3].max(-1)
    if pixels.shape[-1] == 4:
        alpha = np.minimum(alpha, pixels[..., 3])
    if len(np.unique(alpha)) <= 2:
        alpha = np.where(alpha > 0, np.uint8(255), np.uint8(0))
    return alpha


def _with_alpha(image: Image.Image, alpha: NDArray[np.uint8]) -> Image.Image:
    pixels = np.array(image.convert("RGBA"))
    pixels[..., 3] = np.minimum(pixels[..., 3], alpha)
    return Image.fromarray(pixels)


def _undistorted(image: Image.Image, rows: Rows, distortion: dict[str, float], file: str) -> Image.Image:
    """The image of the lens without its distortion. Where it shows what the distorted one has not seen, it is black,
    and transparent if the image has an alpha channel; one without gets none."""
    cv2 = _opencv(file)
    width, height = image.size
    lens = np.array(rows) * [[width], [height], [1.0]]
    lens[:2, 2] -= 0.5  # in OpenCV the center of the first pixel is at 0
    names = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")
    values = np.array([distortion.get(name, 0.0) for name in names])
    maps = cv2.initUndistortRectifyMap(lens, values, None, lens, (width, height), cv2.CV_32FC1)
    x, y = np.meshgrid((np.arange(width) - lens[0, 2]) / lens[0, 0], (np.arange(height) - lens[1, 2]) / lens[1, 1])
    maps[0][np.hypot(x, y) >= _fold(distortion)] = -width - 2.0  # outside of the image
    pixels = np.asarray(image).astype(np.float32)
    if image.mode == "RGBA":
        pixels[..., :3] *= pixels[..., 3:] / 255  # what is transparent has no color to give to its neighbors
    pixels = cv2.remap(pixels, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    if image.mode == "RGBA":
        pixels[..., :3] *= 255 / np.maximum(pixels[..., 3:], 1e-3)
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def _fold(distortion: dict[str, float]) -> float:
    """Tangent of the angle from the axis where the polynomial turns back: farther out it says nothing."""
    r = np.linspace(0, 10, 5001)
    k1, k2, k3, k4, k5, k6 = (distortion.get(f"k{i}", 0.0) for i in range(1, 7))
    below = 1 + r**2 * (k4 + r**2 * (k5 + r**2 * k6))
    seen = r * (1 + r**2 * (k1 + r**2 * (k2 + r**2 * k3))) / np.where(below > 0, below, np.nan)
    turns = ~(np.diff(seen) > 0)
    return float(r[turns.argmax()]) if turns.any() else float(np.inf)


def _squared(image: Image.Image, rows: Rows, pad: bool) -> tuple[Image.Image, Rows]:
    """The largest centered square of an image, or the smallest square around it; centered to half a pixel."""
    width, height = image.size
    side = max(width, height) if pad else min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if pad:
        square = Image.new("RGBA", (side, side))
        square.paste(image, (-left, -top))
    else:
        square = image.crop((left, top, left + side, top + side))
    (fx, skew, cx), (_, fy, cy), last = rows
    across = [fx * width / side, skew * width / side, (cx * width - left) / side]
    return square, [across, [0.0, fy * height / side, (cy * height - top) / side], last]


def _opencv(file: str) -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise BadInput(
            f"{file} has lens distortion, and undoing it needs OpenCV: pip install -e '.[photos]'"
        ) from error
    module: ModuleType = cv2
    return module
