# SPDX-License-Identifier: Apache-2.0
"""Image files of natural images and views: finding, reading, decoding them as a check, resizing.

Nothing here trusts its input: whatever is wrong becomes a `BadInput` that names the file.
"""

import io
import warnings
from collections.abc import Iterable, Iterator

from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from igae.data.sources.scene import SUFFIXES, BadInput
from igae.errors import redact
from igae.storage import FileInfo, file_system, find_files, join

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
READ_TOGETHER = 64
"""Files asked for in one go: an object store answers them at the same time."""


def find_images(root: str) -> tuple[dict[str, FileInfo], list[str]]:
    """All natural images below `root` (PNG, JPEG, WebP): sorted paths relative to `root` -> files; and a sentence for
    each link and folder below it that can't be followed."""
    found, problems = find_files(root, lambda path: path.lower().endswith(SUFFIXES))
    if not found:
        raise ValueError(": ".join([f"no PNG, JPEG or WebP images in {redact(root)}", *problems[:1]]))
    return found, problems


def read_files(files: Iterable[tuple[str, str]]) -> Iterator[bytes | Exception]:
    """Reads (folder, file in it) one after the other; what cannot be read comes as the exception."""
    pending = iter(files)
    while chunk := [entry for _, entry in zip(range(READ_TOGETHER), pending, strict=False)]:
        fs = file_system(chunk[0][0])[0]
        folders = {folder: fs._strip_protocol(folder.partition("::")[0]) for folder, _ in chunk}
        paths = [join(folders[folder], name) for folder, name in chunk]
        if isinstance(fs, LocalFileSystem):
            yield from map(_read_local, paths)
        else:
            yield from fs.cat_ranges(paths, None, None, on_error="return")


def _read_local(path: str) -> bytes | Exception:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        return error


def open_image(data: bytes | Exception, file: str) -> Image.Image:
    """Opens an image without decoding it: its `size`, `mode` and `format` are known.

    Raises:
        BadInput: unreadable, not PNG, JPEG or WebP, of a mode that has no plain colors, or too large to be honest.
    """
    if isinstance(data, FileNotFoundError):
        raise BadInput(f"{file} is missing")
    if isinstance(data, Exception):
        raise BadInput(f"{file} cannot be read: {redact(str(data))}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{file} is a decompression bomb: {error}") from error
    except Exception as error:  # decoders raise whatever a damaged header makes them raise
        raise BadInput(f"{file} is no PNG, JPEG or WebP image") from error
    if image.mode not in MODES:
        raise BadInput(f"{file} has pixels of mode {image.mode}, which are no 8-bit colors")
    return image


def check_image(
    data: bytes | Exception, file: str, size: tuple[int, int], resize: bool, crop: bool = False
) -> tuple[str, bytes, tuple[int, int]]:
    """Decodes an image fully, to know that it can be, and resizes it where that was asked for.

    Args:
        data: content of the file.
        file: name for messages.
        size: (height, width) that is wanted.
        resize: bring other sizes to `size`; otherwise they are refused. Images that have the size stay as they are.
        crop: cut the largest centered part of the right shape out before resizing; otherwise another shape is refused.

    Returns:
        (extension, bytes to store, (height, width) of the image in the file).

    Raises:
        BadInput: unreadable, damaged, or of the wrong size.
    """
    image = open_image(data, file)
    assert isinstance(data, bytes) and image.format is not None
    height, width = found = image.height, image.width
    if found != size and not resize:
        raise BadInput(f"{file} is {width}x{height} pixels, not {size[1]}x{size[0]} as the others")
    try:
        image.load()
    except Exception as error:
        raise BadInput(f"{file} is damaged: {error}") from error
    if found == size:
        return FORMATS[image.format], data, found
    left, top = 0.0, 0.0
    if width * size[0] != height * size[1]:
        if not crop:
            raise BadInput(f"{file} is {width}x{height} pixels, which cannot be resized to {size[1]}x{size[0]} evenly")
        scale = min(width / size[1], height / size[0])
        left, top = (width - size[1] * scale) / 2, (height - size[0] * scale) / 2
    colors = "RGBA" if image.has_transparency_data else "RGB"
    box = (left, top, width - left, height - top)
    small = image.convert(colors).resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
    out = io.BytesIO()
    small.save(out, "PNG")
    return "png", out.getvalue(), found
