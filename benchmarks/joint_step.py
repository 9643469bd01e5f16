#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time, memory and use of the hardware of a joint step: the plain way, and each thing that makes it faster added.

    python benchmarks/joint_step.py --json joint_step.json
    python benchmarks/joint_step.py --only "+ CUDA graph" "as it comes"

12 views and 3 natural images of 128 x 128, an autoencoder of Stable Diffusion's size (83.8 M parameters, random
weights), no LPIPS. "as it comes" is what a run with the defaults does: `auto` chooses. All variants are measured in
turns in one process. A step is what lies between CUDA events of two of them, launched asynchronously as in training.
FLOPs are those of matrix products and convolutions, counted once.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training_step import alone, model_of, prepare, recipe_of, write_data
from igae.training import Engine, Stage

SLOW = {
    "train.precision": "fp32",
    "train.kernels": "torch",
    "train.async_steps": "false",
    "train.cuda_graph": "false",
}
VARIANTS = {
    "plain (TF32)": {},
    "+ bf16": {"train.precision": "bf16"},
    "+ fused kernels": {"train.kernels": "cuda"},
    "+ host runs ahead": {"train.async_steps": "true"},
    "+ CUDA graph": {"train.cuda_graph": "true"},
    "as it comes": {key: "true" if key in ("train.async_steps", "train.cuda_graph") else "auto" for key in SLOW},
}


def matrix_rate() -> float:
    """FLOP/s of a large bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times[3:]) * 1e3


def build(engine: Engine, stage: str, shards: str, settings: dict[str, str]) -> Stage:
    recipe = recipe_of(stage, shards, [f"{key}={value}" for key, value in settings.items()])
    single = alone(engine, recipe.train.async_steps)
    model = model_of(recipe, single)
    return prepare(single, model, stage, recipe)


def times_of(stage: Stage, first: int, steps: int) -> list[float]:
    """Milliseconds of each of some steps."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    outcomes = []
    marks[0].record()
    for i in range(steps):
        outcomes.append(stage.step(first + i))
        marks[i + 1].record()
    assert all(outcome.read()[0] for outcome in outcomes)
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def longest(stage: Stage, first: int, steps: int = 3, shown: int = 25) -> list[tuple[str, float, int]]:
    """Name, milliseconds and launches a step of the kernels that take the most time of the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        times_of(stage, first, steps)
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return [(k.key, k.self_device_time_total / 1e3 / steps, k.count // steps) for k in kernels[:shown]]


def measure(stage_name: str, variants: dict[str, dict[str, str]], args: argparse.Namespace) -> dict:
    """Every variant is the one before with more settings; each is measured `rounds` times, in turns."""
    rounds, steps = args.rounds, args.steps
    engine, found, stages = Engine(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        shards, settings = write_data(Path(folder), args.scenes, 128), dict(SLOW)
        for name, more in variants.items():
            settings |= more
            if args.only and stages and name not in args.only:
                continue
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            stages[name] = build(engine, stage_name, shards, settings)
            times_of(stages[name], 0, 6)
            torch.cuda.synchronize()
            found[name] = {
                "ms": [],
                "GiB": (torch.cuda.max_memory_allocated() - held) / 2**30,
                "start_s": time.perf_counter() - start,
            }
            print(f"{name}: built in {found[name]['start_s']:.0f} s", flush=True)
        with FlopCounterMode(display=False) as counter:
            next(iter(stages.values())).step(6)
        for i in range(rounds):
            for name, stage in stages.items():
                found[name]["ms"] += times_of(stage, 10 + i * steps, steps + 3)[3:]
        kernels = longest(list(stages.values())[-1], 10 + rounds * steps) if args.profile else []
        for stage in stages.values():
            stage.close()
    flops = counter.get_total_flops()
    return {"device": torch.cuda.get_device_name(), "flop": flops, "variants": found, "longest": kernels}


def report(result: dict, peak: float) -> None:
    print(f"{result['device']}, torch {torch.__version__}; {result['flop'] / 1e12:.2f} TFLOP a step; ", end="")
    print(f"bf16 matrix product {peak / 1e12:.0f} TFLOP/s")
    print(f"{'':22s} {'step':>10s} {'lowest':>10s} {'highest':>10s} {'memory':>10s} {'of the rate':>12s} {'speed':>6s}")
    first = None
    for name, row in result["variants"].items():
        median = statistics.median(row["ms"])
        first = first or median
        used = result["flop"] / (median * 1e-3) / peak
        print(
            f"{name:22s} {median:7.2f} ms {min(row['ms']):7.2f} ms {max(row['ms']):7.2f} ms {row['GiB']:6.1f} GiB "
            f"{100 * used:10.1f} % {first / median:5.2f}x"
        )


def main(stage: str = "joint", variants: dict[str, dict[str, str]] = VARIANTS, text: str | None = __doc__) -> None:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="steps of a round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"the first and some of: {', '.join(variants)}")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of the last variant")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none")
    torch.set_float32_matmul_precision("high")
    result = measure(stage, variants, args)
    peak = matrix_rate()
    report(result, peak)
    for name, milliseconds, count in result["longest"]:
        print(f"{milliseconds:8.3f} ms {count:5d} x  {name[:120]}")
    if args.json:
        args.json.write_text(json.dumps({**result, "matrix_flops": peak}, indent=1) + "\n")


if __name__ == "__main__":
    main()
