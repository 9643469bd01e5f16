# SPDX-License-Identifier: Apache-2.0
"""Image files of natural images and views: finding, reading, decoding them as a check, resizing.

Nothing here trusts its input: whatever is wrong becomes a `BadInput` that names the file.
"""

import io
import warnings
from collections.abc import Iterable, Iterator

from fsspec.implementations.local import LocalFileSystem
from PIL import ExifTags, Image, ImageOps

from igae.data.sources.scene import SUFFIXES, BadInput
from igae.errors import redact
from igae.storage import FileInfo, file_system, find_files, join, read_input

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
            yield from (_read_local(fs, path) for path in paths)
        else:
            yield from fs.cat_ranges(paths, None, None, on_error="return")


def _read_local(fs: LocalFileSystem, path: str) -> bytes | Exception:
    try:
        return read_input(fs, path)
    except OSError as error:
        return error


def content_of(data: bytes | Exception, file: str) -> bytes:
    """What :func:`read_files` gave for a file. Raises BadInput where it is missing or cannot be read."""
    if isinstance(data, FileNotFoundError):
        raise BadInput(f"{file} is missing")
    if isinstance(data, Exception):
        raise BadInput(f"{file} cannot be read: {redact(str(data))}")
    return data


def open_image(data: bytes | Exception, file: str) -> Image.Image:
    """Opens an image without decoding it: its `size`, `mode` and `format` are known.

    Raises:
        BadInput: unreadable, not PNG, JPEG or WebP, of a mode that has no plain colors, or too large to be honest.
    """
    data = content_of(data, file)
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


def orientation_of(image: Image.Image) -> int:
    """How the pixels are turned, by EXIF: 1 to 8, 1 where it does not say."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata, or a damaged image, which is told when it is decoded
        return 1
    return value if value in range(2, 9) else 1


def size_of(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a natural image as it is packed: upright."""
    turned = orientation_of(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def decode(data: bytes | Exception, file: str) -> Image.Image:
    """Decodes an image fully, to know that it can be.

    Raises:
        BadInput: unreadable or damaged.
    """
    image = open_image(data, file)
    try:
        image.load()
    except Exception as error:
        raise BadInput(f"{file} is damaged: {error}") from error
    return image


def colors_of(image: Image.Image) -> Image.Image:
    """The image as RGBA if anything is transparent in it, else as RGB."""
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def png(image: Image.Image) -> bytes:
    """An image as a file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def check_image(data: bytes | Exception, file: str, size: tuple[int, int], resize: bool) -> tuple[str, bytes]:
    """Checks a natural image; turns it upright if its EXIF says how, and resizes it where that was asked for.

    Args:
        data: content of the file.
        file: name for messages.
        size: (height, width) that is wanted.
        resize: cut the largest centered part of the right shape out of images of other sizes, and bring it to `size`;
            otherwise they are refused. Upright images that have the size stay as they are.

    Returns:
        (extension, bytes to store).

    Raises:
        BadInput: unreadable, damaged, or of the wrong size.
    """
    image = open_image(data, file)
    height, width = found = size_of(image)
    if found != size and not resize:
        raise BadInput(f"{file} is {width}x{height} pixels, not {size[1]}x{size[0]} as the others")
    image = decode(data, file)
    assert isinstance(data, bytes) and image.format is not None
    upright = image if orientation_of(image) == 1 else colors_of(ImageOps.exif_transpose(image))
    if found != size:
        scale = min(width / size[1], height / size[0])
        left, top = (width - size[1] * scale) / 2, (height - size[0] * scale) / 2
        box = (left, top, width - left, height - top)
        upright = colors_of(upright).resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
    return (FORMATS[image.format], data) if upright is image else ("png", png(upright))
