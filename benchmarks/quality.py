#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures how training settings change the quality of latent scenes: runs of train.py side by side, one table.

    python benchmarks/quality.py --data SHARDS --autoencoder AE --output FOLDER
    python benchmarks/quality.py --data SHARDS --autoencoder AE --output FOLDER --variants improved shift --seeds 0 1
    python benchmarks/quality.py ... --variants --own "planes24=igae_improved.yaml planes.resolution=24"

A variant is a recipe and some settings of it: those of VARIANTS, by name, and those that --own adds. `key=value` at
the end goes to all runs. Runs that are finished are not made again, so several calls make one table. With --apart N
the last N scenes are trained with the others and reported apart: settings should not be chosen by them.
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
VARIANTS: dict[str, list[str]] = {
    "published": ["igae.yaml"],
    "improved": ["igae_improved.yaml"],
}
COLUMNS = {
    "held-out RGB": "heldout/rgb_psnr",
    "training RGB": "train/rgb_psnr",
    "held-out latent": "heldout/latent_psnr",
    "scene AE": "heldout/ae_psnr",
    "natural AE": "natural/ae_psnr",
}


def step_seconds(folder: Path, stage: str) -> float:
    """Median time of a step of a stage, from the views per second that the run has recorded."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = [line[f"{stage}/views_per_second"] for line in lines if f"{stage}/views_per_second" in line]
    return statistics.median(seen) if seen else 0.0


def run(name: str, recipe: str, settings: list[str], gpu: str | None, output: Path) -> dict[str, Any]:
    """Train a variant, unless it is there; returns its metrics by stage, with the seconds that it took."""
    folder = output / name
    result = folder / "quality.json"
    if result.exists():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    command = [sys.executable, "train.py", "--config", recipe, f"experiment={name}", f"outputs={output}", *settings]
    print(shlex.join(["python", *command[1:]]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name} ended with exit code {code}:\n{(folder / 'log.txt').read_text()[-2000:]}")
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    found = {"seconds": time.perf_counter() - start, "stages": metrics}
    result.write_text(json.dumps(found) + "\n")
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each variant: means over its seeds, and the seconds of a run."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS) + " | seconds |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, runs in results.items():
        last = [list(found["stages"].values())[-1] for found in runs]
        cells = []
        for metric in COLUMNS.values():
            values = [metrics[metric] for metrics in last if metric in metrics]
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
        seconds = statistics.mean(found["seconds"] for found in runs)
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
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
    with ThreadPoolExecutor(arguments.gpus * arguments.each) as pool:
        futures = {(name, seed): pool.submit(one, name, seed) for seed in arguments.seeds for name in variants}
        for (name, _), future in futures.items():
            try:
                results.setdefault(name, []).append(future.result())
            except SystemExit as error:
                print(error, file=sys.stderr)
    print(table({name: runs for name, runs in results.items() if runs}))


if __name__ == "__main__":
    main()
