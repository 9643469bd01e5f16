#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures how training settings change the quality of latent scenes: runs of train.py side by side, one table.

    python benchmarks/quality.py --data SHARDS --autoencoder AE --output FOLDER
    python benchmarks/quality.py --data SHARDS --autoencoder AE --output FOLDER --variants improved no-masks --seeds 0 1
    python benchmarks/quality.py --data SHARDS --autoencoder AE --output FOLDER --variants --own \\
        "fine=igae_improved.yaml planes.resolution=64"

A variant is a recipe and some settings of it: those of VARIANTS, by name, and those that --own adds. `key=value` at
the end goes to all runs. Runs that are finished are not made again, so several calls make one table. With --apart N
the last N scenes are trained like the others and reported apart: no setting should be chosen by them.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["evaluation.scenes=null", "evaluation.every=0", "evaluation.orbits=0", "checkpoint.every=1000000"]
IMPROVED = "igae_improved.yaml"
VARIANTS: dict[str, list[str]] = {
    "published": ["igae.yaml"],
    "improved": [IMPROVED],
    "no-patches": [IMPROVED, "render.patch=1", "planes.resolution=16"],
    "patches-of-2": [IMPROVED, "render.patch=2", "planes.resolution=32"],
    "no-masks": [IMPROVED, "train.warmup.weights.opacity=0", "train.joint.weights.opacity=0"],
    "no-shifts": [IMPROVED, "train.warmup.augment.shift=0", "train.joint.augment.shift=0"],
}
COLUMNS = {
    "held-out RGB": "heldout/rgb_psnr",
    "SSIM": "heldout/rgb_ssim",
    "training RGB": "train/rgb_psnr",
    "scene AE": "heldout/ae_psnr",
    "natural AE": "natural/ae_psnr",
    "opacity beside objects": "heldout/opacity_background",
    "on objects": "heldout/opacity_object",
}
APART = {"held-out RGB, scenes apart": "heldout/rgb_psnr", "scene AE, scenes apart": "heldout/ae_psnr"}


def run(name: str, recipe: str, settings: list[str], gpu: str | None, output: Path) -> dict[str, Any]:
    """Train a variant and evaluate all of its scenes, unless it is done; returns `means` of the metrics, those of each
    scene by its name, in their order (`scenes`), and the `seconds` of the training."""
    folder = output / name
    result = folder / "quality.json"
    if result.exists():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    folder.mkdir(parents=True, exist_ok=True)
    train = ["train.py", "--config", recipe, f"experiment={name}", f"outputs={output}", *settings]
    seconds = []
    for command in (train, ["-m", "igae.evaluate", "--checkpoint", str(folder), "evaluation.scenes=null"]):
        print(shlex.join(["python", *command]), flush=True)
        start = time.perf_counter()
        with (folder / "log.txt").open("a") as log:
            made = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        if made.returncode:
            last = (folder / "log.txt").read_text()[-2000:]
            raise RuntimeError(f"{name} ended with exit code {made.returncode}:\n{last}")
        seconds.append(time.perf_counter() - start)
    found = {**json.loads((folder / "evaluation.json").read_text()), "seconds": seconds[0]}
    result.write_text(json.dumps(found) + "\n")
    return found


def table(results: dict[str, list[dict[str, Any]]], apart: int) -> str:
    """A row for each variant: means over its seeds, of all scenes but the last ``apart``, and of these."""
    names = [*COLUMNS, *(APART if apart else ())]
    lines = ["| variant | seeds | " + " | ".join(names) + " | seconds |", "|---" * (len(names) + 3) + "|"]
    for variant, runs in results.items():
        cells = []
        for name, metric in [*COLUMNS.items(), *(APART.items() if apart else ())]:
            values = []
            for found in runs:
                scenes = list(found["scenes"].values())
                chosen = scenes[len(scenes) - apart :] if name in APART else scenes[: len(scenes) - apart]
                seen = [scene[metric] for scene in chosen if metric in scene] or [found["means"].get(metric)]
                values += [statistics.mean(seen)] if seen[0] is not None else []
            digits = 2 if metric.endswith("psnr") else 3
            cells.append(f"{statistics.mean(values):.{digits}f}" if values else "")
        seconds = statistics.mean(found["seconds"] for found in runs)
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="packed shards")
    parser.add_argument("--autoencoder", required=True, help="folder or hub id of a pretrained autoencoder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--own", nargs="*", default=[], metavar="NAME=RECIPE [key=value ...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", nargs=2, default=["15", "10"], metavar=("WARMUP", "JOINT"))
    parser.add_argument("--apart", type=int, default=0, metavar="N", help="scenes that are reported apart")
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs have runs")
    parser.add_argument("--each", type=int, default=1, help="runs at a time on a GPU")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")
    arguments = parser.parse_intermixed_args()
    variants = {name: VARIANTS[name] for name in arguments.variants}
    for own in arguments.own:
        name, _, rest = own.partition("=")
        variants[name] = shlex.split(rest)
    common = [
        f"data.root={arguments.data}",
        f"autoencoder.path={arguments.autoencoder}",
        f"train.warmup.epochs={arguments.epochs[0]}",
        f"train.joint.epochs={arguments.epochs[1]}",
        *QUIET,
        *arguments.settings,
    ]
    places: SimpleQueue[str | None] = SimpleQueue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for _ in range(arguments.each):
        for gpu in range(arguments.gpus):
            places.put(visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu))

    def one(name: str, seed: int) -> dict[str, Any]:
        gpu = places.get()
        try:
            recipe, *own = variants[name]
            settings = [*common, *own, f"seed={seed}"]
            return run(f"{name}-{seed}", recipe, settings, gpu, arguments.output.resolve())
        finally:
            places.put(gpu)

    results: dict[str, list[dict[str, Any]]] = {}
    failed = 0
    with ThreadPoolExecutor(arguments.gpus * arguments.each) as pool:
        futures = {(name, seed): pool.submit(one, name, seed) for seed in arguments.seeds for name in variants}
        for (name, _), future in futures.items():
            try:
                results.setdefault(name, []).append(future.result())
            except RuntimeError as error:
                failed += 1
                print(error, file=sys.stderr)
    print(table({name: runs for name, runs in results.items() if runs}, arguments.apart))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
