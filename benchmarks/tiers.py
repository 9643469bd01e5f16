#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time of a step whose scenes' planes are on the GPU, in host memory or on a disk, of which a 20th is on the GPU.

    python benchmarks/tiers.py --json tiers.json

Warm-up steps take 32 views, shuffled or in groups of scenes that stay on the GPU while their views are used; joint
steps take 12 views and 3 natural images of 128 x 128, with an autoencoder of Stable Diffusion's size (83.8 M
parameters, random weights, no LPIPS). Planes are 64 x 64 x 32. Steps are CUDA graphs, launched as in training; time is
that of a round of steps by their number. Less than two minutes on one H200.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.training_step import STEP, VIEWS, PreparedStage, alone, model_of, random_latents, recipe_of, write_data
from igae.data import LatentCache
from igae.scenes import SceneStore, Storage
from igae.training import ASYNC_STEPS, Engine, Outcome, RankData, Recipe, StageState

FAST = [
    "train.precision=bf16",
    "train.kernels=cuda",
    "planes.resolution=64",
    "planes.features=32",
]
MOST_STEPS, MOST_SECONDS = 1_000_000, 3.0
TURNS = 16  # of the views of a scene, so that it has 32


class ManyViews(PreparedStage):
    """A warm-up with more views of each scene than are in the shards."""

    def encode_views(self) -> LatentCache:
        cache = random_latents(self.model, self.data, self.engine.device)
        cache.tensors = {name: values.repeat(TURNS, *[1] * (values.ndim - 1)) for name, values in cache.tensors.items()}
        cache.scene = cache.scene.repeat(TURNS)
        return cache


def filled(recipe: Recipe, data: RankData, device: torch.device, storage: Storage) -> SceneStore:
    """Planes as in the middle of a long training; all of a group of 64 are alike but for when they were visited."""
    store = SceneStore(recipe.planes, [scene.id for scene in data.owned], None, device, storage)
    store.start_optimizer(recipe.train.kernels)
    store.load_state_dict({"learning_rates": torch.full((STEP,), 1e-4, dtype=torch.float64)})
    store.reserve(MOST_STEPS)
    rows = torch.randn(64, *recipe.planes.row_shape)
    state = {"planes": 0.1 * rows, "exp_avg": 1e-6 * rows, "exp_avg_sq": torch.full_like(rows, 1e-10)}
    for start in range(0, len(store), 64):
        count = min(64, len(store) - start)
        last = STEP - torch.randint(0, len(store) // 32, (count,))
        some = {name: values[:count] for name, values in state.items()}
        store.load_state_dict({**some, "updated": last, "visited": last}, start)
    return store


def time_of(stage: Any, first: int, steps: int) -> float:
    """Milliseconds of a step; of fewer steps where they take long."""
    outcomes: deque[Outcome] = deque()
    torch.cuda.synchronize()
    start, made = time.perf_counter(), 0
    while made < steps and time.perf_counter() - start < MOST_SECONDS:
        outcomes.append(stage.step(first + made))
        made += 1
        while len(outcomes) > ASYNC_STEPS:
            assert outcomes.popleft().read()[0]
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / made * 1e3


def measure(name: str, recipe: Recipe, store: SceneStore, engine: Engine, args: argparse.Namespace) -> list[float]:
    """Milliseconds of a step in each round."""
    model = model_of(recipe, engine)
    steps = args.steps if name == "joint" else 10 * args.steps
    single, data, state = alone(engine, recipe.train.async_steps), RankData.split(recipe), StageState(rows_resumed=True)
    arguments: Any = (name, recipe, single, model, store, data, state)
    stage = ManyViews(*arguments)
    try:
        time_of(stage, 0, max(8, steps // 4))
        return [time_of(stage, (1 + i) * steps, steps) for i in range(args.rounds)]
    finally:
        stage.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--resident", type=int, default=100, help="scenes on the GPU at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=20, help="joint steps of a round; warm-up steps are ten times that"
    )
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder on the disk that is measured")
    parser.add_argument("--only", nargs="+", default=["device", "host", "disk"], metavar="TIER")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of configs/igae.yaml")
    args = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    engine, found = Engine(async_steps=True), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.scenes} scenes of {VIEWS * TURNS} views")
    with tempfile.TemporaryDirectory() as folder:
        shards = write_data(Path(folder), args.scenes, 128)
        for tier in args.only:
            start = time.perf_counter()
            recipe = recipe_of("warmup", shards, [*FAST, *args.overrides])
            before = torch.cuda.memory_allocated()
            store = filled(recipe, RankData.split(recipe), engine.device, Storage(tier, args.resident, args.scratch))
            gib, seconds = (torch.cuda.memory_allocated() - before) / 2**30, time.perf_counter() - start
            print(f"{tier}: {gib:.2f} GiB of the GPU for planes, filled in {seconds:.0f} s", flush=True)
            for stage, group in (("warmup", 0), ("warmup", None), ("joint", None)):
                if tier == "device" and stage == "warmup" and group is None:
                    continue
                more = [] if group is None else [f"train.{stage}.group={group}"]
                times = measure(stage, recipe_of(stage, shards, [*FAST, *args.overrides, *more]), store, engine, args)
                name = f"{stage}, grouped" if stage == "warmup" and group is None else stage
                found.append({"stage": name, "tier": tier, "ms": times, "GiB": gib})
                middle, low, high = statistics.median(times), min(times), max(times)
                print(f"{name:16s} {tier:8s} {middle:8.2f} ms {low:8.2f} ms {high:8.2f} ms", flush=True)
            del store
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
