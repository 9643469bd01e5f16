#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and memory that the start of a run takes on one of its ranks, by the number of scenes.

    python benchmarks/million.py --scenes 1000000 --shard-scenes 100 1 --json million.json

The manifest is of shards that are not there: only what a rank does before it reads its first view is measured, each
step in CPU seconds of a process of its own, without communication. Memory is the most that the process had, above what
the imports take.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from igae import config
from igae.checkpoint.load import Checkpoint
from igae.data import CameraSummary, Manifest, Scenes, Shards
from igae.data.columns import SceneColumns, ShardColumns
from igae.evaluation import spread
from igae.scenes import PlanesConfig, SceneStore
from igae.training import RankData, Recipe

ROOT = Path(__file__).resolve().parent.parent


def manifest_of(scenes: int, shard_scenes: int, heldout: bool, moved: bool, seed: int = 0) -> Manifest:
    """A manifest with 20 to 200 training views for each scene and names as long as Objaverse's."""
    rng = np.random.default_rng(seed)
    names = b"".join(f"{rng.bytes(16).hex()}\n".encode() for _ in range(scenes))
    views = rng.integers(20, 201, scenes).astype(np.int32)
    out = views // 10 if heldout else np.zeros_like(views)
    moves = np.column_stack([rng.normal(size=(scenes, 3)), np.ones(scenes)]) if moved else np.zeros((0, 4))
    listed = SceneColumns(np.frombuffer(names, np.uint8), np.zeros_like(views), views, out, moves, ["objects"])
    ends = np.append(np.arange(shard_scenes, scenes, shard_scenes), scenes)
    kinds = 2 if heldout else 1
    samples = np.concatenate([np.add.reduceat(part, ends - np.diff(ends, prepend=0)) for part in (views, out)[:kinds]])
    count = len(ends) * kinds
    numbers = np.tile(np.arange(len(ends)), kinds)
    shards = ShardColumns(
        np.repeat(np.arange(kinds, dtype=np.uint8), len(ends)),
        numbers,
        np.maximum(5, np.char.str_len(numbers.astype(str))).astype(np.uint8),
        samples * np.int64(16_000),
        rng.integers(0, 256, (count, 32), np.uint8),
        samples.astype(np.int32),
        np.concatenate([ends + scenes * kind for kind in range(kinds)]),
        np.tile(np.arange(scenes, dtype=np.int32), kinds),
        np.concatenate([views, out][:kinds]),
    )
    every = Scenes(listed, np.arange(scenes))
    cameras = CameraSummary(1.3, 1.3, 1.3, 1.1)
    return Manifest((128, 128), 0, "objects", Shards(shards, listed), every, 0, cameras)


def peak(reset: bool = False) -> float:
    """Most memory that this process had, in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


class Meter:
    """CPU seconds of steps, and the most memory up to the end of each, above what there was before the first."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}
        self._before = peak(reset=True)

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = step()
        self.steps[name] = round(time.process_time() - begun, 3), round(peak() - self._before, 1)
        return result


def measure(root: str) -> dict[str, tuple[float, float]]:
    """What this rank does with the data at ``root``."""
    logging.getLogger("igae").addHandler(logging.NullHandler())
    settings = [f"data.root={root}", "autoencoder={create: {_class_name: AutoencoderTiny}, scale: 1}"]
    recipe = config.load(Recipe, str(ROOT / "configs" / "igae.yaml"), [*settings, "data.workers=0"])
    meter = Meter()
    manifest = meter("manifest", lambda: Manifest.load(root))
    data = meter("ownership", lambda: RankData.split(recipe, manifest))
    meter("fingerprint for the other ranks", lambda: manifest.fingerprint)
    meter("table of the ranks", lambda: data.log_parts("ddp", 1))
    meter("steps of an epoch", lambda: [data.steps_per_epoch(stage) for stage in recipe.train.stages.values()])
    meter("choice of evaluation", lambda: list(spread(data.scenes, recipe.evaluation.scenes)))
    meter("stream of views", lambda: data.open_views(64).close())
    ids = data.owned.ids.tolist()
    store = meter("seeds of the rows", lambda: SceneStore(PlanesConfig(resolution=2), ids, 0, torch.device("cpu")))
    files = [part.ids for part in data.parts]

    def restore() -> None:
        checkpoint = Checkpoint(None, "", {}, {}, "", [], files)  # type: ignore[arg-type]
        assert np.array_equal(checkpoint.ids, data.scenes.ids) and len(store)

    meter("ids of a checkpoint", restore)
    return meter.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1_000_000)
    parser.add_argument("--shard-scenes", type=int, nargs="+", default=[100, 1], help="scenes in a shard")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rank", type=int, default=0, help="the one that is measured")
    parser.add_argument("--heldout", action="store_true", help="with held-out views, which have shards of their own")
    parser.add_argument("--moved", action="store_true", help="with a normalization of each scene")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--measure", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    results = {}
    for shard_scenes in args.shard_scenes:
        with tempfile.TemporaryDirectory() as folder:
            manifest_of(args.scenes, shard_scenes, args.heldout, args.moved).save(folder)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            environment = {**os.environ, "RANK": str(args.rank), "WORLD_SIZE": str(args.ranks)}
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        steps = json.loads(done.stdout.splitlines()[-1])
        results[str(shard_scenes)] = {"megabytes": round(size, 1), "steps": steps}
        print(
            f"{args.scenes} scenes, {shard_scenes} a shard, rank {args.rank} of {args.ranks}; {size:.0f} MB of manifest"
        )
        for name, (seconds, memory) in steps.items():
            print(f"  {name:32} {seconds:7.3f} s {memory:8.1f} MB")
        print(f"  {'all':32} {sum(seconds for seconds, _ in steps.values()):7.3f} s")
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
