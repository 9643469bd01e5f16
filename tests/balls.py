# SPDX-License-Identifier: Apache-2.0
"""Two small balls, ray-cast through any lens, for tests that a packed camera is that of its packed pixels."""

import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igae.data import Manifest, PackOptions, pack

Array = NDArray[np.float64]
RED, BLUE = np.array([0.2, 0.1, -0.15]), np.array([-0.12, 0.05, 0.2])
RADIUS = 0.06
SAMPLES = 4
"""Along a side of a pixel."""
OPENGL = np.array([1.0, -1.0, -1.0, 1.0])
WHITE = (255.0, 255.0, 255.0, 0.0)


class Lens(NamedTuple):
    """In pixels, of an image of (height, width)."""

    fx: float
    fy: float
    cx: float
    cy: float
    size: tuple[int, int] = (64, 64)


def lens(fx: float = 88.0, size: tuple[int, int] = (64, 64)) -> Lens:
    """A lens with square pixels, centered."""
    return Lens(fx, fx, size[1] / 2, size[0] / 2, size)


def poses(count: int, distance: float = 1.645, seed: int = 0) -> list[Array]:
    """cam2world (OpenCV), all around, each with a roll of its own, looking past the origin a little."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        forward = rng.normal(size=3)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, rng.normal(size=3))
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
        pose[:3, 3] = -distance * forward + rng.uniform(-0.02, 0.02, 3)
        found.append(pose)
    return found


def distort(xy: Array, k: Mapping[str, float]) -> Array:
    """OpenCV's model, on points [..., 2] of the plane at distance 1."""
    x, y = xy[..., 0], xy[..., 1]
    r2 = x * x + y * y
    k1, k2, k3, k4, k5, k6, p1, p2 = (k.get(key, 0.0) for key in ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2"))
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        -1,
    )


def render(
    pose: Array,
    of: Lens,
    distortion: Mapping[str, float] | None = None,
    background: tuple[float, float, float, float] = WHITE,
    scale: float = 1.0,
) -> Image.Image:
    """RGBA; the scene is `scale` times as large."""
    height, width = of.size
    v, u = (np.mgrid[: height * SAMPLES, : width * SAMPLES] + 0.5) / SAMPLES
    seen = np.stack([(u - of.cx) / of.fx, (v - of.cy) / of.fy], -1)
    xy = seen.copy()
    for _ in range(15 if distortion else 0):
        xy += seen - distort(xy, distortion or {})
    ray = np.concatenate([xy, np.ones_like(xy[..., :1])], -1) @ pose[:3, :3].T
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    image = np.broadcast_to(np.array(background), (*u.shape, 4)).copy()
    nearest = np.full(u.shape, np.inf)
    for center, color in ((RED, (255, 0, 0, 255)), (BLUE, (0, 0, 255, 255))):
        to = center * scale - pose[:3, 3]
        along = ray @ to
        hit = (to @ to - along**2 < (RADIUS * scale) ** 2) & (along > 0) & (along < nearest)
        image[hit], nearest[hit] = color, along[hit]
    cover = image[..., 3:] / 255
    pixels = np.concatenate([image[..., :3] * cover, image[..., 3:]], -1)
    pixels = pixels.reshape(height, SAMPLES, width, SAMPLES, 4).mean((1, 3))
    pixels[..., :3] *= 255 / np.maximum(pixels[..., 3:], 1e-9)
    pixels[..., :3][pixels[..., 3] == 0] = background[:3]
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def flat(image: Image.Image) -> Image.Image:
    """In front of white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_transforms(folder: Path, frames: Sequence[Any], name: str = "transforms.json", **shared: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({**shared, "frames": frames}))


def matrix(pose: Array) -> list[list[float]]:
    """With OpenGL's axes."""
    rows: list[list[float]] = (pose * OPENGL).tolist()
    return rows


@dataclass(frozen=True)
class Packed:
    """A view as it was packed."""

    kind: str
    file: bytes
    cam2world: Array
    intrinsics: Array

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.file))

    @property
    def alpha(self) -> NDArray[np.uint8]:
        return np.asarray(self.image)[..., 3]

    def error(self, point: Array, red: bool) -> float:
        """Pixels between where a ball's center is projected to and where its pixels are; 0 where they can't be told."""
        x, y, z = np.linalg.inv(self.cam2world)[:3] @ [*point, 1]
        size = np.array(self.image.size)
        wanted = (self.intrinsics @ [x / z, y / z, 1])[:2] * size
        weight = 255.0 - np.asarray(flat(self.image))[..., 2 if red else 0]
        weight[weight < 40] = 0  # JPEG's noise
        if weight.sum() < 255 * 4 or (wanted < 6).any() or (wanted > size - 6).any():
            return 0.0
        v, u = np.mgrid[: size[1], : size[0]] + 0.5
        return math.hypot(*(np.array([(weight * u).sum(), (weight * v).sum()]) / weight.sum() - wanted))


def packed(out: Path) -> dict[str, Packed]:
    """All views by name."""
    found = {}
    for shard in sorted(out.glob("*-*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in members:
            key, _, suffix = name.rpartition(".")
            if suffix != "json" and not name.startswith("images/"):
                camera = json.loads(members[f"{key}.json"])
                of = np.array(camera["cam2world"]), np.array(camera["intrinsics"])
                found[key] = Packed(shard.name.split("-")[0], members[name], *of)
    return found


def pack_and_look(source: Path, tolerance: float = 0.1, scale: float = 1.0, **options: Any) -> dict[str, Packed]:
    """Pack a folder, and find both balls in every view where the packed camera says that they are."""
    out = source.parent / f"{source.name}-packed"
    manifest, left_out = pack(str(out), PackOptions(scenes=str(source), **options))
    assert left_out == []
    found = packed(out)
    errors = list[float]()
    for scene in manifest.scenes:
        *center, factor = scene.normalization or (0.0, 0.0, 0.0, 1.0)
        for name, view in found.items():
            if name.startswith(f"{scene.name}/"):
                red, blue = (factor * (ball * scale - np.array(center)) for ball in (RED, BLUE))
                position = view.cam2world[:3, 3]
                a, b = (ball - position for ball in (red, blue))
                together = np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))
                if together > 3 * factor * RADIUS * scale / min(np.linalg.norm(a), np.linalg.norm(b)):
                    errors += [view.error(red, True), view.error(blue, False)]
    assert sum(error > 0 for error in errors) >= len(found) / 2, "the balls are seen in too few views"
    assert max(errors) < tolerance, f"the balls are {max(errors):.2f} pixels from where the cameras see them"
    return found


def kinds(out: Path, scene: str) -> tuple[list[int], list[int]]:
    """Indices of a scene's training and held-out views."""
    found = packed(out)
    of = {int(name.rsplit("/", 1)[1]): view.kind for name, view in found.items() if name.startswith(f"{scene}/")}
    train, heldout = ([i for i, kind in sorted(of.items()) if kind == k] for k in ("scenes", "heldout"))
    return train, heldout


def manifest_of(source: Path) -> Manifest:
    return Manifest.load(str(source.parent / f"{source.name}-packed"))
