#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures packing (with full decoding of every image as a check) and reading decoded views, per core.

    python benchmarks/packing.py
    python benchmarks/packing.py --scenes 10000 --views 24 --repeats 1 --captures

Makes its own scenes: 128x128 PNG views of 10 to 20 KB, links to some 200 files. With --captures they are nerfstudio's,
with cameras at other distances around other places, so that each is moved into the box, and are not read. Per core
means per second of processor time of this process and its workers together, so that other programs change the results
little.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from igae.data import DataConfig, Manifest, PackOptions, Refused, orbit, pack, view_loader

DISTINCT = 211


def make_scenes(root: Path, scenes: int, views: int, captures: bool, size: int = 128) -> float:
    """Writes textured views; returns the mean size of a file in bytes."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size)
    pictures = []
    root.mkdir()
    for number in range(DISTINCT):
        shade = ramp[:, None, None] * rng.random(3) + ramp[None, :, None] * 0.2
        out = io.BytesIO()
        Image.fromarray((shade + rng.integers(0, 2, (size, size, 3))).astype(np.uint8)).save(out, "PNG")
        pictures.append(root / f"{number}.png")
        pictures[-1].write_bytes(out.getvalue())
    poses = orbit(views, 1.3, 0.4).numpy().astype(np.float64)
    if captures:
        poses[:, :3, 1:3] *= -1  # OpenGL's axes
    name = "transforms.json" if captures else "transforms_opencv.json"
    lens = {"fl_x": 140.0, "fl_y": 140.0, "cx": size / 2, "cy": size / 2, "w": size, "h": size}
    for scene in range(scenes):
        folder = root / f"scene_{scene:05d}"
        (folder / "images").mkdir(parents=True)
        placed = poses.copy()
        if captures:
            placed[:, :3, 3] = placed[:, :3, 3] * rng.uniform(0.1, 10) + rng.normal(size=3)
        frames = [{"file_path": f"images/{i:03d}.png", "transform_matrix": placed[i].tolist()} for i in range(views)]
        for i in range(views):
            (folder / "images" / f"{i:03d}.png").hardlink_to(pictures[(scene * views + i) % DISTINCT])
        (folder / name).write_text(json.dumps({**lens, "frames": frames}))
    return sum(path.stat().st_size for path in pictures) / DISTINCT


def measure(views: int, work: Callable[[], None]) -> dict[str, float]:
    """Views per second of wall-clock time and of processor time (children that have ended included)."""

    def spent() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    wall, cpu = time.perf_counter(), spent()
    work()
    wall, cpu = time.perf_counter() - wall, spent() - cpu
    return {"views_per_second": round(views / wall, 1), "views_per_core_second": round(views / cpu, 1)}


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--views", type=int, default=50, help="views of a scene")
    parser.add_argument("--captures", action="store_true", help="scenes that are moved into the box")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="the best run of each is reported")
    parser.add_argument("--json", metavar="FILE", help="write the results to a file ('-': print only them)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        raw, packed = Path(folder) / "raw", str(Path(folder) / "packed")
        results["bytes_per_view"] = round(make_scenes(raw, arguments.scenes, arguments.views, arguments.captures))
        total = arguments.scenes * arguments.views

        def best(number: int, work: Callable[[], None]) -> dict[str, float]:
            runs = [measure(number, work) for _ in range(arguments.repeats)]
            return max(runs, key=lambda run: run["views_per_core_second"])

        options = PackOptions(scenes=str(raw), overwrite=True)
        results["packing"] = best(total, lambda: void(pack(packed, options)))
        results["its_scan"] = best(total, lambda: scan(options, Path(folder)))
        packing, scanning = (results[name]["views_per_core_second"] for name in ("packing", "its_scan"))
        results["its_scan_adds_percent"] = round(100 / (scanning / packing - 1), 1)
        manifest = Manifest.load(packed)
        for workers in () if arguments.captures else (0, 1):

            def read(workers: int = workers) -> None:
                config = DataConfig(root=packed, workers=workers)
                loader = view_loader(config, manifest, manifest.scenes, batch_size=arguments.batch_size, repeat=False)
                count = sum(len(batch.view) for batch in loader)
                loader.close()
                assert count == sum(scene.views for scene in manifest.scenes)

            views = sum(scene.views for scene in manifest.scenes)
            results[f"reading_{workers}_workers"] = best(views, read)
    results["load_average"] = os.getloadavg()[0]
    text = json.dumps(results, indent=1)
    if arguments.json and arguments.json != "-":
        Path(arguments.json).write_text(text + "\n")
    if arguments.json == "-":
        print(text)
    else:
        for name, value in results.items():
            print(f"{name:20} {value}")


def scan(options: PackOptions, folder: Path) -> None:
    """Finds, reads, checks and moves scenes as packing does, which a link to nothing among natural images ends then."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    (images / "0.png").write_bytes(b"")
    with contextlib.suppress(FileExistsError):
        (images / "1.png").symlink_to("nothing")
    try:
        pack(str(folder / "nothing"), replace(options, images=str(images)))
    except Refused as error:
        assert len(error.problems) == 1, error


def void(_: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    main()
