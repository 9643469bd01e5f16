# SPDX-License-Identifier: Apache-2.0
"""Scenes of balls in the formats of rendered objects, each written from the format's definition."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igae.data import Manifest

Array = NDArray[np.float64]
VIEWS, SIZE = 11, 64
BALLS: dict[tuple[int, int, int], tuple[float, float, float]] = {
    (255, 0, 0): (0.4, 0.05, 0.1),
    (0, 200, 0): (-0.1, 0.35, -0.2),
    (0, 0, 255): (0.05, -0.25, 0.35),
}
RADIUS = 0.06


class Camera:
    """A place, and the directions right, down and forward of its image, in the world."""

    def __init__(self, index: int, distance: float) -> None:
        height = 0.9 - 1.7 * index / VIEWS
        across = math.sqrt(1 - height * height)
        out = np.array([across * math.cos(2.4 * index), across * math.sin(2.4 * index), height])
        self.place, self.forward = distance * out, -out
        right = np.cross(self.forward, [0, 0, 1])
        self.right = right / np.linalg.norm(right)
        self.down = np.cross(self.forward, self.right)

    def opencv(self) -> Array:
        """cam2world [4, 4]."""
        columns = np.stack([self.right, self.down, self.forward, self.place], 1)
        return np.concatenate([columns, [[0, 0, 0, 1]]])

    def picture(self, focal: float, cx: float = 0.5, cy: float = 0.5) -> Image.Image:
        """The balls on white; the lens is in image sizes."""
        v, u = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
        x, y = (u - cx) / focal, (v - cy) / focal
        ray = self.forward + x[..., None] * self.right + y[..., None] * self.down
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        pixels, nearest = np.full((SIZE, SIZE, 3), 255, np.uint8), np.full((SIZE, SIZE), np.inf)
        for color, center in BALLS.items():
            to = np.array(center) - self.place
            along = ray @ to
            hit = (to @ to - along**2 < RADIUS**2) & (along > 0) & (along < nearest)
            pixels[hit], nearest[hit] = color, along[hit]
        return Image.fromarray(pixels)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_zero123(root: Path, scene: str, views: int = VIEWS) -> None:
    for i in range(views):
        camera = Camera(i, 1.5 + 0.05 * i)
        save(camera.picture(35 / 32), root / scene / f"{i:03d}.png")
        # Blender's camera looks along its -z, with y up: rows are the camera's axes in the world.
        rotation = np.stack([camera.right, -camera.down, -camera.forward])
        matrix = np.concatenate([rotation, (-rotation @ camera.place)[:, None]], 1)
        np.save(root / scene / f"{i:03d}.npy", matrix)


def write_gobjaverse(root: Path, scene: str, views: int = VIEWS) -> None:
    for i in range(views):
        camera, name = Camera(i, 1.6), f"{i:05d}"
        folder = root / scene / "campos_512_v4" / name
        save(camera.picture(1.2 + 0.01 * i), folder / f"{name}.png")
        save(Image.new("RGB", (SIZE, SIZE)), folder / f"{name}_albedo.png")
        (folder / f"{name}_nd.exr").write_bytes(b"depth")
        axes = {"x": camera.right, "y": camera.down, "z": camera.forward, "origin": camera.place}
        angle = 2 * math.atan(0.5 / (1.2 + 0.01 * i))
        content = {**{key: axis.tolist() for key, axis in axes.items()}, "x_fov": angle, "y_fov": angle}
        content |= {"max_depth": 5.0, "bbox": [[-0.5] * 3, [0.5] * 3]}
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_srn(root: Path, scene: str, views: int = VIEWS) -> None:
    for i in range(views):
        camera = Camera(i, 1.3)
        save(camera.picture(1.025, 0.53, 0.48), root / scene / "rgb" / f"{i:06d}.png")
        pose = root / scene / "pose" / f"{i:06d}.txt"
        pose.parent.mkdir(parents=True, exist_ok=True)
        pose.write_text(" ".join(f"{number:.9f}" for number in camera.opencv().flatten()))
    # For images of 512 pixels, not of 64.
    lines = f"{1.025 * 512} {0.53 * 512} {0.48 * 512} 0.\n0. 0. 0.\n1.\n512 512\n"
    (root / scene / "intrinsics.txt").write_text(lines)


def write_eg3d(root: Path, scene: str, views: int = VIEWS) -> None:
    file = root / scene.rpartition("/")[0] / "dataset.json"
    labels = json.loads(file.read_text())["labels"] if file.exists() else []
    for i in range(views):
        camera, name = Camera(i, 1.3), f"img{i:08d}.png"
        save(camera.picture(1.025, 0.5, 0.52), root / scene / name)
        intrinsics = [1.025, 0, 0.5, 0, 1.025, 0.52, 0, 0, 1]
        labels.append([f"{Path(scene).name}/{name}", [*camera.opencv().flatten().tolist(), *intrinsics]])
    file.write_text(json.dumps({"labels": labels}))


WRITERS: dict[str, Callable[..., None]] = {
    "zero123": write_zero123,
    "gobjaverse": write_gobjaverse,
    "srn": write_srn,
    "eg3d": write_eg3d,
}


def members(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    content = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            content |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return content


def offsets(folder: Path, manifest: Manifest) -> list[float]:
    """Pixels between where packed cameras show each ball's center, and the middle of its color in the packed image."""
    moves = {scene.name: scene.normalization for scene in manifest.scenes}
    content, found = members(folder), []
    for name in (name for name in content if name.endswith(".json")):
        camera = json.loads(content[name])
        world2cam, intrinsics = np.linalg.inv(camera["cam2world"]), np.array(camera["intrinsics"])
        pixels = np.asarray(Image.open(io.BytesIO(content[name[:-4] + "png"])).convert("RGB"))
        x, y, z, scale = moves[name.split("/")[0]] or (0, 0, 0, 1)
        centers = scale * (np.array(list(BALLS.values())) - [x, y, z])
        seen = (centers @ world2cam[:3, :3].T + world2cam[:3, 3]) @ intrinsics.T
        places = SIZE * seen[:, :2] / seen[:, 2:]
        for index, color in enumerate(BALLS):
            others = np.delete(places, index, 0)
            if np.linalg.norm(others - places[index], axis=1).min() > 10:  # no ball in front of it
                rows, columns = (pixels == color).all(-1).nonzero()
                middle = np.array([columns.mean(), rows.mean()]) + 0.5
                found.append(float(np.linalg.norm(middle - places[index])))
    return found
