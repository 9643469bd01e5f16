#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures packing (with full decoding of every image as a check) and reading decoded views, per core.

Makes its own scenes: 128x128 PNG views of 10 to 20 KB. Per core means per second of processor time of this process and
its workers together, so that other programs on the machine change the results little.
"""

import argparse
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from igae.data import DataConfig, Manifest, PackOptions, orbit, pack, view_loader


def make_scenes(root: Path, scenes: int, views: int, size: int = 128) -> float:
    """Writes textured views; returns the mean size of a file in bytes."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, size)
    poses = orbit(views, 1.3, 0.4).tolist()
    total = 0
    for scene in range(scenes):
        folder = root / f"scene_{scene:04d}"
        (folder / "images").mkdir(parents=True)
        frames = []
        for view in range(views):
            shade = ramp[:, None, None] * rng.random(3) + ramp[None, :, None] * 0.2
            pixels = (shade + rng.integers(0, 2, (size, size, 3))).astype(np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            name = f"images/{view:03d}.png"
            (folder / name).write_bytes(out.getvalue())
            total += len(out.getvalue())
            frames.append({"file_path": name, "transform_matrix": poses[view]})
        lens = {"fl_x": 140.0, "fl_y": 140.0, "cx": size / 2, "cy": size / 2, "w": size, "h": size}
        (folder / "transforms_opencv.json").write_text(json.dumps({**lens, "frames": frames}))
    return total / (scenes * views)


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--views", type=int, default=50, help="views of a scene")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="the best run of each is reported")
    parser.add_argument("--json", metavar="FILE", help="write the results to a file ('-': print only them)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        raw, packed = Path(folder) / "raw", str(Path(folder) / "packed")
        results["bytes_per_view"] = round(make_scenes(raw, arguments.scenes, arguments.views))
        total = arguments.scenes * arguments.views

        def best(number: int, work: Callable[[], None]) -> dict[str, float]:
            runs = [measure(number, work) for _ in range(arguments.repeats)]
            return max(runs, key=lambda run: run["views_per_core_second"])

        results["packing"] = best(total, lambda: void(pack(packed, PackOptions(scenes=str(raw), overwrite=True))))
        manifest = Manifest.load(packed)
        for workers in (0, 1):

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


def void(_: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    main()
