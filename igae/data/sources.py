# SPDX-License-Identifier: Apache-2.0
"""Raw data as users have it: folders of scenes with a transforms file each, and folders of natural images.

Nothing here trusts its input: whatever is wrong becomes a `BadInput` that names the scene and the file.
"""

import functools
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from torch import Tensor

from igae.data.cameras import RIGID_TOLERANCE, is_rigid, normalized_intrinsics, opengl_to_opencv
from igae.data.manifest import name_problem, unknown_category
from igae.errors import redact
from igae.storage import file_system, join

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
LENS = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
PINHOLE = {"OPENCV", "PINHOLE", "SIMPLE_PINHOLE"}
READ_TOGETHER = 64
"""Files asked for in one go: an object store answers them at the same time."""


class BadInput(ValueError):
    """One sentence about a scene or natural image that cannot be packed."""


@dataclass(frozen=True)
class SceneRef:
    """Where a scene is: `folder` is a path or URL."""

    name: str
    category: str
    folder: str


@dataclass(frozen=True)
class View:
    """A view in a transforms file: its index there, its image and its camera (cam2world as rows, OpenCV)."""

    index: int
    file: str
    cam2world: list[list[float]]
    lens: tuple[tuple[str, float | str], ...]

    def intrinsics(self, size: tuple[int, int]) -> list[list[float]]:
        """Rows of [3, 3], normalized; `size` is the (height, width) of the image file."""
        try:
            return _intrinsics(self.lens, size)
        except ValueError as error:
            raise BadInput(f"{self.file}: {error}") from error


@functools.lru_cache(maxsize=256)
def _intrinsics(lens: tuple[tuple[str, float | str], ...], size: tuple[int, int]) -> list[list[float]]:
    rows: list[list[float]] = normalized_intrinsics(dict(lens), size).tolist()
    return rows


@dataclass(frozen=True)
class SourceScene:
    """A scene with all its views; the first `heldout` of them are held out."""

    ref: SceneRef
    views: Sequence[View]

    @property
    def heldout(self) -> int:
        """A tenth of the views, at least one where there is more than one."""
        return max(len(self.views) // 10, 1) if len(self.views) > 1 else 0


def find_scenes(
    root: str, subset: str | None = None, categories: Mapping[str, tuple[int, int]] | None = None
) -> tuple[str, list[SceneRef], list[str]]:
    """Lists the scenes of a data set.

    With a `dataset_map.json` (category -> scene names) in `root`, they are those it lists: the given ranges of the
    given categories, or all. Without one, every folder (of `subset`) with a transforms file is a scene.

    Returns:
        (name of the data set, scenes in the order of the lists, sentences about names that cannot be scenes).

    Raises:
        ValueError: `root` has no scenes, the map is no such map, or a category is unknown.
    """
    fs, path = file_system(root)
    folder = join(root, subset) if subset else root
    dataset = path.rstrip("/").rsplit("/", 1)[-1]
    map_file = join(path, "dataset_map.json")
    if fs.exists(map_file):
        lists = _read_map(fs.cat_file(map_file), redact(join(root, "dataset_map.json")))
        longest = max(lists, key=lambda key: len(lists[key]))
        if set(longest_names := lists[longest]) >= {name for names in lists.values() for name in names}:
            dataset, lists = longest, {longest: longest_names, **lists}
    else:
        if not fs.isdir(fs._strip_protocol(folder)):
            raise ValueError(f"there is no folder {redact(folder)}")
        entries = fs.ls(fs._strip_protocol(folder), detail=False)
        names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        lists = {dataset: [name for name in names if _transforms_file(fs, fs._strip_protocol(join(folder, name)))]}
        if not lists[dataset]:
            hidden = redact(folder)
            raise ValueError(f"no scenes in {hidden}: no folder in it has a transforms_opencv.json or transforms.json")
    # The most specific category of a scene is the shortest list that has it.
    category = {name: key for key in sorted(lists, key=lambda key: -len(lists[key])) for name in lists[key]}
    refs: dict[str, SceneRef] = {}
    bad: dict[str, None] = {}
    ranges = {key: (0, len(lists[key])) for key in lists} if categories is None else categories
    for key, (start, stop) in ranges.items():
        if key not in lists:
            raise unknown_category(key, lists)
        chosen = lists[key][start:stop]
        seen: set[str] = set()
        for name in chosen:
            if problem := name_problem(name):
                bad[f"scene {name!r}: {problem}"] = None
            elif name in seen:
                bad[f"scene {name!r}: it is listed twice under {key!r} in dataset_map.json"] = None
            else:
                refs.setdefault(name, SceneRef(name, category[name], join(folder, name)))
            seen.add(name)
    return dataset, list(refs.values()), list(bad)


def _read_map(text: bytes, file: str) -> dict[str, list[str]]:
    try:
        lists = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f"{file} has to map category names to lists of scene names")
    for key, names in lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file}: {key!r} has to be a list of scene names")
    return lists


def _transforms_file(fs: fsspec.AbstractFileSystem, folder: str) -> str | None:
    for name in ("transforms_opencv.json", "transforms.json"):
        if fs.exists(f"{folder}/{name}"):
            return name
    return None


def read_scene(ref: SceneRef) -> SourceScene:
    """Reads a scene's transforms file and checks all that can be checked without its images.

    Raises:
        BadInput: no transforms file, unreadable, no frames, or a frame without image name or with a bad camera.
    """
    fs, folder = file_system(ref.folder)
    try:
        name = _transforms_file(fs, folder)
        if name is None:
            raise BadInput(f"there is no transforms_opencv.json or transforms.json in {redact(ref.folder)}")
        try:
            content = json.loads(fs.cat_file(f"{folder}/{name}"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name} is not readable JSON: {error}") from error
        except OSError as error:
            raise BadInput(f"{name} cannot be read: {redact(str(error))}") from None
        return SourceScene(ref, _read_frames(content, name))
    except BadInput as error:
        raise BadInput(f"scene {ref.name!r}: {error}") from error


def _read_frames(content: Any, name: str) -> list[View]:
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise BadInput(f"{name} has no frames: the scene is empty")
    files: dict[str, int] = {}
    poses: list[Any] = []
    lenses: list[tuple[tuple[str, float | str], ...]] = []
    shared = {key: value for key, value in content.items() if key != "frames"}
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise BadInput(f"{name}: frame {index} is not an object")
        file = _image_file(frame.get("file_path"), f"{name}: frame {index}")
        if file in files:
            raise BadInput(f"{name}: frames {files[file]} and {index} are both {file}")
        files[file] = index
        poses.append(frame.get("transform_matrix"))
        lens = {**shared, **frame}
        if lens.get("camera_model", "OPENCV") not in PINHOLE or any(lens.get(key) for key in DISTORTION):
            raise BadInput(f"{name}: frame {index} ({file}) has lens distortion: undistort the images first")
        values = {key: lens[key] for key in LENS if key in lens}
        lenses.append(tuple((k, v if isinstance(v, int | float) else repr(v)) for k, v in values.items()))
    cam2world = _matrices(poses)
    if cam2world is None:
        index = next(i for i, pose in enumerate(poses) if _matrices([pose]) is None)
        raise BadInput(f"{name}: frame {index} ({list(files)[index]}) has no transform_matrix of 4 x 4 numbers")
    for index in (~is_rigid(cam2world)).nonzero().flatten().tolist():
        finite = bool(cam2world[index].isfinite().all())
        what = f"is no rigid motion (within {RIGID_TOLERANCE:g})" if finite else "has NaN or infinite numbers"
        raise BadInput(f"{name}: the pose of frame {index} ({list(files)[index]}) {what}")
    if name == "transforms.json":
        cam2world = opengl_to_opencv(cam2world)
    rows = (cam2world + 0.0).tolist()  # no negative zeros, so that both conventions give the same text
    return [View(i, file, rows[i], lenses[i]) for i, file in enumerate(files)]


def _matrices(poses: Sequence[Any]) -> Tensor | None:
    try:
        matrices = torch.tensor(poses, dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None
    return matrices if matrices.shape == (len(poses), 4, 4) else None


def _image_file(path: Any, where: str) -> str:
    if not isinstance(path, str) or not path.isprintable():
        raise BadInput(f"{where} has no file_path")
    parts = [part for part in path.split("/") if part != "."]
    if not path or path.startswith("/") or "\\" in path or ".." in parts or "" in parts:
        raise BadInput(f"{where}: file_path {path!r} does not stay in the scene's folder")
    # Blender's exporters leave the extension out.
    return "/".join(parts) + ("" if path.lower().endswith(SUFFIXES) else ".png")


def find_images(root: str) -> dict[str, int]:
    """All natural images below `root` (PNG, JPEG, WebP), sorted by path: path relative to `root` -> size in bytes."""
    fs, path = file_system(root)
    found = fs.find(path, detail=True)
    prefix = path.rstrip("/") + "/"
    sizes = {
        name.removeprefix(prefix): int(info["size"] or 0)
        for name, info in sorted(found.items())
        if name.lower().endswith(SUFFIXES)
    }
    if not sizes:
        raise ValueError(f"no PNG, JPEG or WebP images in {redact(root)}")
    return sizes


def read_files(files: Iterable[tuple[str, str]]) -> Iterator[bytes | Exception]:
    """Reads (folder, file in it) one after the other; what cannot be read comes as the exception."""
    pending = iter(files)
    while chunk := [entry for _, entry in zip(range(READ_TOGETHER), pending, strict=False)]:
        fs = file_system(chunk[0][0])[0]
        folders = {folder: fs._strip_protocol(folder) for folder, _ in chunk}
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
