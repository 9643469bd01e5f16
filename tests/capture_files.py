# SPDX-License-Identifier: Apache-2.0
"""Draws a scene of balls through known cameras, and writes it as COLMAP and CO3D define their files.

Poses start as three axes in the world; what a format stores is computed from these by the format's definition.
"""

import gzip
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

MIDDLE = np.array([4.0, -2.0, 1.0])
BALLS = [
    (MIDDLE + (0.5, 0.1, 0.3), 0.15, (220, 40, 30)),
    (MIDDLE + (-0.4, 0.3, -0.2), 0.15, (30, 160, 60)),
    (MIDDLE + (0.0, -0.5, 0.1), 0.15, (40, 60, 220)),
]


@dataclass(frozen=True)
class Shot:
    """A camera: its axes in the world (unit vectors), position, focal lengths and principal point in pixels, w x h."""

    right: NDArray[np.float64]
    down: NDArray[np.float64]
    forward: NDArray[np.float64]
    position: NDArray[np.float64]
    fx: float = 110.0
    fy: float = 118.0
    cx: float = 70.0
    cy: float = 41.0
    w: int = 128
    h: int = 96


def shots(count: int = 12, **lens: Any) -> list[Shot]:
    """Cameras around the balls, with roll, that look at the middle."""
    found = []
    for i in range(count):
        a, z = 2 * math.pi * i / count, 0.6 * math.sin(1.7 * i)
        away = np.array([math.cos(a), math.sin(a), z])
        forward = -away / np.linalg.norm(away)
        right = np.cross(forward, (0.2, 0.1 * i - 0.5, 1.0))
        right /= np.linalg.norm(right)
        found.append(Shot(right, np.cross(forward, right), forward, MIDDLE - 4 * forward, **lens))
    return found


def draw(shot: Shot, balls: Sequence[Any] = BALLS) -> NDArray[np.uint8]:
    """The balls, of one color each, in front of white: [h, w, 3]. A ray goes through each pixel's center."""
    v, u = np.mgrid[: shot.h, : shot.w] + 0.5
    x, y = (u - shot.cx) / shot.fx, (v - shot.cy) / shot.fy
    ray = x[..., None] * shot.right + y[..., None] * shot.down + shot.forward
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    nearest, image = np.full(u.shape, np.inf), np.full((*u.shape, 3), 255, np.uint8)
    for center, radius, color in balls:
        along = ray @ (center - shot.position)
        apart = np.linalg.norm(center - shot.position - along[..., None] * ray, axis=-1)
        hit = (apart < radius) & (along < nearest)
        image[hit], nearest[hit] = color, along[hit]
    return image


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _world_to_camera(shot: Shot) -> tuple[list[float], list[float]]:
    """Quaternion (w, x, y, z) and translation."""
    rotation = np.array([shot.right, shot.down, shot.forward])
    x, y, z, w = Rotation.from_matrix(rotation).as_quat().tolist()
    return [w, x, y, z], (-rotation @ shot.position).tolist()


def write_colmap(folder: Path, named: Mapping[str, Shot], binary: bool = False, model: str = "sparse/0") -> None:
    """Images and a reconstruction, listed in the order of `named`, each image with its own camera."""
    for name, shot in named.items():
        save(folder / "images" / name, draw(shot))
    (folder / model).mkdir(parents=True)
    (_write_binary if binary else _write_text)(folder / model, named)


def _write_text(folder: Path, named: Mapping[str, Shot]) -> None:
    cameras, images = ["# Camera list"], ["# Image list"]
    for i, (name, shot) in enumerate(named.items(), 1):
        cameras.append(f"{i} PINHOLE {shot.w} {shot.h} {shot.fx} {shot.fy} {shot.cx} {shot.cy}")
        quaternion, translation = _world_to_camera(shot)
        images.append(f"{100 + i} {' '.join(map(repr, quaternion + translation))} {i} {name}")
        images.append("" if i % 2 else "12.5 40.25 -1 30.0 20.0 7")
    (folder / "cameras.txt").write_text("\n".join(cameras) + "\n")
    (folder / "images.txt").write_text("\n".join(images) + "\n")


def _write_binary(folder: Path, named: Mapping[str, Shot]) -> None:
    cameras, images = struct.pack("<Q", len(named)), struct.pack("<Q", len(named))
    for i, (name, shot) in enumerate(named.items(), 1):
        cameras += struct.pack("<IiQQ4d", i, 1, shot.w, shot.h, shot.fx, shot.fy, shot.cx, shot.cy)
        quaternion, translation = _world_to_camera(shot)
        images += struct.pack("<I7dI", 100 + i, *quaternion, *translation, i) + name.encode() + b"\0"
        images += struct.pack("<Q", i % 3) + struct.pack("<ddq", 12.5, 40.25, -1) * (i % 3)
    (folder / "cameras.bin").write_bytes(cameras)
    (folder / "images.bin").write_bytes(images)


def co3d_frame(shot: Shot, sequence: str, number: int, format: str | None, category: str = "apple") -> dict[str, Any]:
    """The annotation of a frame."""
    # x_camera = x_world R + T: the columns of R are the axes left, up, forward.
    rotation = np.stack([-shot.right, -shot.down, shot.forward], 1)
    # Half of what 2 units of NDC measure in pixels, along x and y.
    x, y = (shot.w / 2, shot.h / 2) if format != "ndc_isotropic" else (min(shot.w, shot.h) / 2,) * 2
    viewpoint = {
        "R": rotation.tolist(),
        "T": (-shot.position @ rotation).tolist(),
        "focal_length": [shot.fx / x, shot.fy / y],
        "principal_point": [(shot.w / 2 - shot.cx) / x, (shot.h / 2 - shot.cy) / y],
        **({"intrinsics_format": format} if format else {}),
    }
    folder = f"{category}/{sequence}"
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "frame_timestamp": 0.1 * number,
        "image": {"path": f"{folder}/images/frame{number:06d}.png", "size": [shot.h, shot.w]},
        "mask": {"path": f"{folder}/masks/frame{number:06d}.png", "mass": 1.0},
        "viewpoint": viewpoint,
        "meta": None,
    }


def write_co3d(
    root: Path, sequences: Sequence[str] = ("110_1_2",), format: str | None = "ndc_isotropic", **lens: Any
) -> list[dict[str, Any]]:
    """A category `apple`; returns the annotations, whose frames are not in their order."""
    frames = []
    for sequence in sequences:
        for i, shot in enumerate(shots(**lens)):
            frame = co3d_frame(shot, sequence, 3 * i + 1, format)
            frames.append(frame)
            pixels = draw(shot)
            save(root / frame["image"]["path"], pixels)
            save(root / frame["mask"]["path"], np.where((pixels == 255).all(-1), 0, 255).astype(np.uint8))
    frames = frames[::-1]
    annotate(root, frames)
    return frames


def annotate(root: Path, frames: Any) -> None:
    (root / "apple").mkdir(parents=True, exist_ok=True)
    (root / "apple/frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(frames).encode()))
