# SPDX-License-Identifier: Apache-2.0
"""Demo data in the `igae-data` layout: procedural objects, ray-traced on the CPU, and crops of natural images.

    python data_tools/make_demo.py --output demo_data

    OUT/train/objaverse/dataset_map.json
    OUT/train/objaverse/square<N>/<scene>/transforms_opencv.json   and images/000.png ...
    OUT/train/imagenet/square<N>/<natural image>/<natural image>_00000.jpg ...
    OUT/demo.json                                                  the arguments it was made with

The natural images are those that scikit-image ships. The same arguments give the same bytes, for any number of workers.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the script's neighbors, however it was loaded
if importlib.util.find_spec("igae") is None:  # in a source tree that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_objects import BALL, COMPOSED, Array, Solid, column, length, make_solid, solid_name  # noqa: E402

from igae.data import ItemFailed, ProcessPool, ProgressCallback  # noqa: E402
from igae.errors import Parser, command, end, local_path, say  # noqa: E402
from igae.storage import writes_to  # noqa: E402

FORMAT = 1
RADIUS = 1.3
FOCAL = 1.09375  # in image sizes
HIT = 4e-4  # nearer than this to a surface, a ray has reached it
RAYS_AT_ONCE = 2**17  # enough that the cost of a numpy call does not count, few enough for the processor's cache

# Only files that lie in the scikit-image wheel itself: the package would download the others.
NATURAL_IMAGES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg", "brick.png", "camera.png", "grass.png", "gravel.png",
)  # fmt: skip

# Directions towards the two lights, and their strengths. They are fixed in the world: all views of a point agree.
KEY, FILL = np.array([0.48, -0.55, 0.68]), np.array([-0.75, 0.60, 0.10])
KEY_STRENGTH, FILL_STRENGTH = 0.55, 0.22

Job = tuple[Callable[..., str], tuple[Any, ...]]


def sphere_cameras(views: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Poses cam2world [views, 4, 4] (OpenCV axes), on a sphere around the origin, which they look at; z is up.

    A jittered, randomly turned Fibonacci sphere. Each view is the one farthest from all before it, so that the first
    views (those that get held out) cover the sphere too.
    """
    index = np.arange(views)
    height = 1 - (2 * index + 1) / views
    angle = index * np.pi * (3 - np.sqrt(5)) + rng.uniform(0, 2 * np.pi)
    ring = np.sqrt(1 - height**2)
    directions = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    directions += rng.normal(size=(views, 3)) * 0.5 / np.sqrt(views)
    directions[:, 2] *= rng.choice([-1, 1])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    order = [int(rng.integers(views))]
    nearest = directions @ directions[order[0]]
    while len(order) < views:
        nearest[order[-1]] = np.inf
        order.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, directions @ directions[order[-1]])

    poses = np.tile(np.eye(4), (views, 1, 1))
    forward = -directions[order]
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    poses[:, :3, 0], poses[:, :3, 1], poses[:, :3, 2] = right, np.cross(forward, right), forward
    poses[:, :3, 3] = -RADIUS * forward
    return poses.round(9) + 0.0  # as written to the file; no negative zeros


def pixel_rays(poses: NDArray[np.float64], size: int) -> tuple[Array, Array]:
    """Origins and unit directions [3, views * size * size] (row by row) through the centers of the pixels."""
    centers = ((np.arange(size) + 0.5) / size - 0.5) / FOCAL
    v, u = np.meshgrid(centers, centers, indexing="ij")
    right, down, forward, position = (poses[:, :3, axis].T[:, :, None] for axis in range(4))
    rays = (right * u.ravel() + down * v.ravel() + forward).reshape(3, -1)
    origins = np.broadcast_to(position, (3, len(poses), size * size)).reshape(3, -1)
    return origins.astype(np.float32), (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


def march(solid: Solid, origins: Array, directions: Array, reach: Array, steps: int = 64) -> Array:
    """Distances [n] at which rays (origins, unit directions [3, n]) enter the solid; inf where not within reach [n]."""
    found = np.full(directions.shape[1], np.inf, dtype=np.float32)
    index = np.arange(found.size)
    travelled = np.zeros_like(found)
    for _ in range(steps):
        distance = solid.distance(origins + directions * travelled)
        hit = distance < HIT
        found[index[hit]] = travelled[hit]
        # Below a full step: the distance of an ellipsoid is an estimate.
        travelled = travelled + np.float32(0.9) * distance
        keep = ~hit & (travelled < reach)
        if not keep.any():
            break
        index, travelled, reach = index[keep], travelled[keep], reach[keep]
        origins, directions = origins[:, keep], directions[:, keep]
    return found


def shade(solid: Solid, points: Array) -> Array:
    """Colors [3, n] of surface points [3, n], lit from fixed directions: nothing depends on the viewer."""
    offsets = [column(axis) for axis in 2e-3 * np.eye(3)]
    normals = np.stack([solid.distance(points + offset) - solid.distance(points - offset) for offset in offsets])
    normals /= np.maximum(length(normals), 1e-9)

    # A point in a crevice sees less of the sky: the solid comes nearer than the way gone along the normal.
    open_sky = np.ones(points.shape[1], dtype=np.float32)
    for step, weight in ((0.03, 5.0), (0.09, 2.0)):
        open_sky -= np.float32(weight) * np.maximum(step - solid.distance(points + normals * np.float32(step)), 0)
    open_sky = np.clip(open_sky, 0.35, 1)

    key, fill = (column(light / np.linalg.norm(light)) for light in (KEY, FILL))
    towards_key = np.maximum((normals * key).sum(axis=0), 0)
    lit = np.flatnonzero(towards_key > 0)
    start = points[:, lit] + normals[:, lit] * np.float32(8e-3)
    reach = np.full(lit.size, 2 * BALL, dtype=np.float32)
    shadow = np.isfinite(march(solid, start, np.broadcast_to(key, start.shape), reach, steps=48))
    towards_key[lit[shadow]] *= np.float32(0.25)

    light = open_sky * (0.54 + 0.12 * normals[2] + FILL_STRENGTH * np.maximum((normals * fill).sum(axis=0), 0))
    return np.clip(solid.color(points) * (light + KEY_STRENGTH * towards_key).astype(np.float32), 0, 1)


def render(solid: Solid, poses: NDArray[np.float64], size: int, supersample: int) -> NDArray[np.uint8]:
    """Pictures [views, size, size, 3] of a solid on white from cameras [views, 4, 4] outside the ball that holds it."""
    fine = size * supersample
    views = max(1, RAYS_AT_ONCE // fine**2)
    if len(poses) > views:
        parts = [render(solid, poses[i : i + views], size, supersample) for i in range(0, len(poses), views)]
        return np.concatenate(parts)

    origins, directions = pixel_rays(poses, fine)
    middle = -(directions * origins).sum(axis=0)  # the way along each ray to where it is nearest to the center
    half_chord = np.sqrt(np.maximum(BALL**2 - (origins**2).sum(axis=0) + middle**2, 0))
    index = np.flatnonzero(half_chord)
    directions = directions[:, index]
    starts = origins[:, index] + directions * (middle - half_chord)[index]
    travelled = march(solid, starts, directions, 2 * half_chord[index])
    hit = np.isfinite(travelled)

    picture = np.ones((3, origins.shape[1]), dtype=np.float32)
    if hit.any():
        picture[:, index[hit]] = shade(solid, starts[:, hit] + directions[:, hit] * travelled[hit])
    mean = picture.reshape(3, len(poses), size, supersample, size, supersample).mean(axis=(3, 5))
    return (mean * 255).round().astype(np.uint8).transpose(1, 2, 3, 0)


def write_scene(root: Path, index: int, views: int, size: int, supersample: int, seed: int) -> str:
    """Write one scene's folder below `root`; returns the scene's name."""
    solid = make_solid(index, seed)
    poses = sphere_cameras(views, np.random.default_rng((seed, 0, index)))
    folder = root / solid.name
    (folder / "images").mkdir(parents=True)
    camera = {"fl_x": FOCAL * size, "fl_y": FOCAL * size, "cx": size / 2, "cy": size / 2, "w": size, "h": size}
    frames = []
    for view, (pose, picture) in enumerate(zip(poses, render(solid, poses, size, supersample), strict=True)):
        path = f"images/{view:03d}.png"
        Image.fromarray(picture).save(folder / path)
        frames.append({"file_path": path, "transform_matrix": pose.tolist(), **camera})
    text = json.dumps({"camera_model": "OPENCV", "source": "data_tools/make_demo.py", "frames": frames})
    (folder / "transforms_opencv.json").write_text(text + "\n", encoding="utf-8")
    return solid.name


def natural_images() -> list[Path]:
    """The natural images in the installed scikit-image package; ValueError when there are none."""
    package = importlib.util.find_spec("skimage")
    folders = [Path(p) / "data" for p in (package.submodule_search_locations or ())] if package else []
    paths = [folder / name for name in NATURAL_IMAGES for folder in folders if (folder / name).is_file()]
    if not paths:
        raise ValueError(
            "the natural images come from scikit-image: run pip install -e '.[demo]' or use --natural-images 0"
        )
    return paths


def write_crops(root: Path, natural_image: Path, numbers: Sequence[int], size: int, seed: int) -> str:
    """Write seeded random crops of one natural image, scaled to size x size, below `root`; returns its name."""
    with Image.open(natural_image) as opened:
        image = opened.convert("RGB")
    folder = root / natural_image.stem
    folder.mkdir(parents=True)
    shortest = min(image.size)
    smallest = min(shortest, max(size, shortest // 5))
    for number in numbers:
        rng = np.random.default_rng((seed, 2, number))
        while True:
            side = float(np.exp(rng.uniform(np.log(smallest), np.log(shortest))))
            left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
            crop = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
            if np.asarray(crop, dtype=np.float32).std(axis=(0, 1)).max() > 8:  # not a piece of plain sky
                break
        if rng.uniform() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop.save(folder / f"{natural_image.stem}_{number:05d}.jpg", quality=95)
    return natural_image.stem


def start() -> Callable[[Job, ProgressCallback], str]:
    """What a process does with a job."""

    def work(job: Job, _: ProgressCallback) -> str:
        with writes_to(job[1][0]):
            return job[0](*job[1])

    return work


def finished(jobs: Sequence[Job], workers: int) -> Iterator[str]:
    """Run the jobs and yield what they return, in no particular order."""
    with ProcessPool(workers if workers > 1 else 0, start) as pool:
        for _, result in pool.run(jobs):
            if isinstance(result, ItemFailed):
                raise result.error or result
            yield result


def make(output: Path, arguments: dict[str, int], workers: int) -> None:
    """Make the set in a folder beside `output`, which gets its final name when all is written."""
    staging = output.with_name(f".{output.name}.partial")
    if staging.exists():  # left by an interrupted run
        shutil.rmtree(staging)
    try:
        with writes_to(output):
            write(staging, arguments, workers)
            os.replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write(staging: Path, arguments: dict[str, int], workers: int) -> None:
    """Write all files of the set into a folder."""
    scenes, views, size, seed = (arguments[key] for key in ("scenes", "views", "size", "seed"))
    sources = natural_images() if arguments["natural_images"] else []
    objects, natural = staging / "train" / "objaverse", staging / "train" / "imagenet" / f"square{size}"
    objects.mkdir(parents=True)
    natural.mkdir(parents=True)

    root = objects / f"square{size}"
    jobs: list[Job] = [
        (write_scene, (root, index, views, size, arguments["supersample"], seed)) for index in range(scenes)
    ]
    for index, source in enumerate(sources[: arguments["natural_images"]]):
        jobs.append(
            (write_crops, (natural, source, range(index, arguments["natural_images"], len(sources)), size, seed))
        )
    for count, name in enumerate(finished(jobs, workers), start=1):
        print(f"[{count}/{len(jobs)}] {name}", flush=True)

    names = [solid_name(index) for index in range(scenes)]
    (objects / "dataset_map.json").write_text(json.dumps({"objaverse": names}, indent=0) + "\n", encoding="utf-8")
    (staging / "demo.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


def at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {minimum}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description="Make demo data: rendered objects and crops of natural images.")
    parser.add_argument("--output", type=local_path, required=True, help="folder to make")
    composed = f"objects: {len(COMPOSED)} composed by hand, then random ones"
    parser.add_argument("--scenes", type=at_least(1), default=6, help=composed)
    parser.add_argument("--views", type=at_least(1), default=48, help="pictures of each object")
    parser.add_argument("--size", type=at_least(8), default=64, help="width and height of all pictures in pixels")
    parser.add_argument("--natural-images", type=at_least(0), default=200, help="crops of natural images")
    parser.add_argument("--photos", dest="natural_images", type=at_least(0), help=argparse.SUPPRESS)  # of version 0.1
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--supersample", type=at_least(1), default=2, help="rays along each side of a pixel")
    parser.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1, help="processes")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 nothing was done, 130 interrupted."""
    options = make_parser().parse_args(argv)
    output: Path = options.output.resolve()
    arguments = {"format": FORMAT} | {k: v for k, v in vars(options).items() if k not in ("output", "workers")}
    begin = time.perf_counter()
    if (output / "demo.json").is_file():
        if json.loads((output / "demo.json").read_text(encoding="utf-8")) != arguments:
            raise ValueError(f"{output} holds demo data of other arguments: remove it or choose another --output")
        print(f"{output} is complete already: nothing to do")
        return 0
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not demo data: choose another --output")
    try:
        make(output, arguments, options.workers)
    except KeyboardInterrupt:
        say(f"interrupted; {output} was not made")
        return 130
    made = f"{options.scenes} scenes x {options.views} views, {options.natural_images} natural images"
    print(f"{output}: {made}, {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    end(main())
