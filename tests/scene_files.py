# SPDX-License-Identifier: Apache-2.0
"""Writes small raw data sets for the tests of packing and streaming."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from igae.data import (
    DataConfig,
    ImageLoader,
    Manifest,
    Scene,
    ViewLoader,
    image_loader,
    opengl_to_opencv,
    orbit,
    view_loader,
)


def picture(seed: int, size: int = 16, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image of noise, different for each seed."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, *channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def cut_out(path: Path, alpha: bool) -> None:
    """Make an image that of a disk in front of nothing: with alpha, half transparent at its edge, or without, in front
    of white."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    side = len(pixels)
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    cover = np.clip(0.36 * side - np.hypot(x, y), 0, 1)[..., None]
    if alpha:
        pixels = np.concatenate([pixels, np.rint(255 * cover).astype(np.uint8)], 2)
    else:
        pixels = np.where(cover > 0.5, pixels, np.uint8(255))
    Image.fromarray(pixels).save(path)


def over_white(path: Path) -> NDArray[np.float64]:
    """An image file in front of white, whole numbers [H, W, 3]."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).astype(np.float64)
    return np.rint(255 + (pixels[..., :3] - 255) * pixels[..., 3:] / 255)


def write_scene(folder: Path, views: int = 12, seed: int = 0, size: int = 16, opengl: bool = False) -> dict[str, Any]:
    """Writes a scene of `views` noise images on an orbit; returns its transforms."""
    poses = orbit(views, 1.3, 0.3).double()
    (folder / "images").mkdir(parents=True)
    frames = []
    for index in range(views):
        name = f"images/{index:03d}"
        (folder / f"{name}.png").write_bytes(picture(1000 * seed + index, size))
        pose = opengl_to_opencv(poses[index]) if opengl else poses[index]
        frames.append({"file_path": name if opengl else f"{name}.png", "transform_matrix": pose.tolist()})
    shared = {"fl_x": 70.0 * size / 64, "fl_y": 70.0 * size / 64, "cx": size / 2, "cy": size / 2, "w": size, "h": size}
    if opengl:
        shared = {"camera_angle_x": 2 * float(np.arctan(size / 2 / shared["fl_x"]))}
    transforms = {**shared, "frames": frames}
    (folder / ("transforms.json" if opengl else "transforms_opencv.json")).write_text(json.dumps(transforms))
    return transforms


def write_data(root: Path, views: tuple[int, ...] = (12, 5, 1, 20), images: int = 0) -> Path:
    """Scenes `scene_0`, ... in `root/scenes/square16` with a dataset map, and images in `root/natural_images`."""
    names = [f"scene_{i}" for i in range(len(views))]
    for index, number in enumerate(views):
        write_scene(root / "scenes" / "square16" / names[index], number, seed=index)
    (root / "scenes" / "dataset_map.json").write_text(json.dumps({"toys": names, "cars": names[1:3]}))
    for index in range(images):
        folder = root / "natural_images" / f"class_{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(picture(50000 + index, kind="JPEG"))
    return root


def open_views(root: str, manifest: Manifest, scenes: Sequence[Scene], **options: Any) -> ViewLoader:
    """`view_loader`, with the settings of the data among the options."""
    return view_loader(_take_config(root, options), manifest, scenes, **options)


def open_images(root: str, manifest: Manifest, **options: Any) -> ImageLoader:
    """`image_loader`, with the settings of the data among the options."""
    return image_loader(_take_config(root, options), manifest, **options)


def _take_config(root: str, options: dict[str, Any]) -> DataConfig:
    return DataConfig(root=root, **{key: options.pop(key) for key in set(options) & set(DataConfig.model_fields)})


@contextlib.contextmanager
def interrupted_at(name: str) -> Iterator[None]:
    """Ctrl-C while a file is opened for writing, on any file system."""
    opened = fsspec.AbstractFileSystem.open

    def stop(self: fsspec.AbstractFileSystem, path: str, mode: str = "rb", *rest: Any, **options: Any) -> Any:
        if "w" in mode and name in path:
            raise KeyboardInterrupt
        return opened(self, path, mode, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsspec.AbstractFileSystem, "open", stop)
        yield
