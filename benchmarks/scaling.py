#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures what ranks and scenes cost: time of a warm-up and a joint step, and peak memory of a rank.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --weak 2 4 8 6 --strategies ddp zero2 fsdp2
    python benchmarks/scaling.py --cases joint:1:500 joint:1:8000 joint:1:3000 joint:2:6000

A case is STAGE:RANKS:SCENES, with the scenes of all ranks together; STAGE:RANKS:SCENES:apart is the same without any
exchange, which tells what is lost by it from what ranks lose by sharing a machine. `--weak` makes the cases of both
stages for these numbers of ranks, with `--scenes` a rank. Each number of ranks, under each strategy, is a launch that
measures its cases and those of one rank in turns. Steps are real ones: data from shards (random latents in the
warm-up), an autoencoder of Stable Diffusion's size with random weights, planes and their optimizer as in the middle of
a long training. Time is that of a round of steps, by their number, as the slowest rank sees it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.ranks import free_port
from benchmarks.training_step import ROOT, alone, model_of, prepare, recipe_of, write_data
from igae.models import IGAE
from igae.ranks import Channel, rank, world_size
from igae.training import ASYNC_STEPS, Engine, Outcome

Figures = dict[str, float]

WARM = 10  # steps that are not counted


def measure(engine: Engine, model: IGAE, stage_name: str, shards: str, steps: int, overrides: list[str]) -> Figures:
    """Time and memory of steps of this rank, of this process's part of the scenes."""
    device = engine.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = prepare(engine, model, stage_name, recipe_of(stage_name, shards, overrides))
    outcomes: deque[Outcome] = deque()

    def settle(left: int) -> None:
        while len(outcomes) > left:
            assert outcomes.popleft().read()[0]

    for step in range(steps + WARM):
        if step == WARM:
            settle(0)
            start = time.perf_counter()
        outcomes.append(stage.step(step))
        settle(ASYNC_STEPS if engine.asynchronous else 0)
    settle(0)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    stage.close()
    engine.finish()
    return {"ms": 1e3 * seconds / steps, "gib": peak}


def worker(cases: list[str], folder: str, rounds: int, steps: int, overrides: list[str]) -> None:
    """Measure all cases in turns, each `rounds` times; the first rank prints the numbers. In a case of one rank the
    first works and the others wait."""
    first = recipe_of("joint", f"{folder}/shards-{cases[0].split(':')[2]}", overrides)
    engine = Engine(async_steps=first.train.async_steps)
    channel, world = Channel(), world_size()
    single = alone(engine, engine.asynchronous)
    model = model_of(first, engine)
    found: dict[str, list[Figures]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            stage, ranks, scenes, *apart = case.split(":")
            figures = None
            if int(ranks) == world or rank() == 0:
                os.environ["WORLD_SIZE"] = ranks
                chosen = engine if int(ranks) == world and not apart else single
                figures = measure(chosen, model, stage, f"{folder}/shards-{scenes}", steps, overrides)
                os.environ["WORLD_SIZE"] = str(world)
            every = [one for one in channel.gather(figures) if one is not None]
            found[case].append({key: max(one[key] for one in every) for key in ("ms", "gib")})
            if rank() == 0:
                print(f"{case:24s} {found[case][-1]['ms']:9.3f} ms  {found[case][-1]['gib']:6.1f} GiB", flush=True)
    if rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    engine.close()


def launch(
    strategy: str, ranks: int, cases: list[str], folder: str, arguments: argparse.Namespace
) -> dict[str, list[Figures]]:
    """Measure these cases under `accelerate launch`, or as many of them as ranks where they share a GPU."""
    file = ROOT / "launch" / "accelerate" / (f"{strategy}.yaml" if ranks > 1 else "one_process.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(ranks), "--num_cpu_threads_per_process", "4"]
    worker = [__file__, "--worker", folder, "--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
    worker += ["--cases", *cases, *(["--", *arguments.overrides] if arguments.overrides else [])]
    machines = [([], {})] if not arguments.one_gpu or ranks == 1 else machines_of_one_gpu(ranks)
    found, processes = None, []
    for place, variables in machines:
        output = {"stdout": subprocess.DEVNULL if processes else subprocess.PIPE, "text": True}
        environment = {**os.environ, **variables}
        processes.append(subprocess.Popen([*command, *place, *worker], env=environment, **output))  # type: ignore[call-overload]
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("RESULT "):
            found = json.loads(line.removeprefix("RESULT "))
        else:
            print(line, end="", flush=True)
    codes = [process.wait() for process in processes]
    if any(codes) or found is None:
        raise SystemExit(f"the measurement failed with exit codes {codes}")
    return dict(found)


def machines_of_one_gpu(ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and variables of launches whose ranks NCCL takes for machines of their own: they share the GPU."""
    of_all = ["--num_machines", str(ranks), "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [([*of_all, "--machine_rank", str(i)], {"NCCL_HOSTID": f"rank-{i}"}) for i in range(ranks)]


def report(found: dict[str, list[Figures]]) -> None:
    """The medians of the rounds of a launch, and what follows from them."""
    time_of = {case: statistics.median(one["ms"] for one in rounds) for case, rounds in found.items()}
    print(f"\n{'stage:ranks:scenes':24s} {'step':>10s} {'lowest':>10s} {'highest':>10s} {'peak memory':>14s}")
    for case, rounds in found.items():
        times = [one["ms"] for one in rounds]
        memory = max(one["gib"] for one in rounds)
        print(f"{case:24s} {time_of[case]:7.3f} ms {min(times):7.3f} ms {max(times):7.3f} ms {memory:10.1f} GiB")
    for stage in ("warmup", "joint"):
        single = {int(c.split(":")[2]): t for c, t in time_of.items() if c.startswith(f"{stage}:1:")}
        for case, together in time_of.items():
            name, ranks, scenes, *apart = case.split(":")
            if name == stage and ranks != "1" and int(scenes) // int(ranks) in single:
                share = single[int(scenes) // int(ranks)] / together
                who = f"{ranks} ranks{' apart' if apart else ''}"
                print(f"{stage}: {who} keep {100 * share:.1f} % of one rank's speed with as many scenes a rank")
        if len(single) > 1:
            few, many = min(single), max(single)
            print(f"{stage}: {many} scenes a rank instead of {few}: {100 * (single[many] / single[few] - 1):+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="STAGE:RANKS:SCENES")
    parser.add_argument("--weak", nargs="+", type=int, metavar="RANKS", help="both stages on so many ranks and on one")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes a rank of --weak (default: 3000)")
    parser.add_argument("--strategies", nargs="+", default=["ddp"], help="files of launch/accelerate (default: ddp)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is measured, in turns (default: 3)")
    parser.add_argument("--steps", type=int, default=60, help="steps that are counted in a round (default: 60)")
    parser.add_argument("--size", type=int, default=128, help="pixels along a side of an image (default: 128)")
    parser.add_argument(
        "--one-gpu", action="store_true", help="all ranks on the first GPU: that they work, not how fast"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of configs/igae.yaml")
    arguments = parser.parse_intermixed_args()
    gpus = max(2, torch.cuda.device_count())
    ends = ["1:500", "1:8000", "1:6000", f"1:{6000 // gpus}", f"{gpus}:6000", f"{gpus}:6000:apart"]
    if arguments.weak:
        ends = [f"{ranks}:{ranks * arguments.scenes}" for ranks in sorted({1, *arguments.weak})]
    cases = arguments.cases or [f"{stage}:{end}" for stage in ("warmup", "joint") for end in ends]
    if arguments.worker:
        worker(cases, arguments.worker, arguments.rounds, arguments.steps, arguments.overrides)
        return
    several = sorted({int(case.split(":")[1]) for case in cases} - {1}) or [1]
    found: dict[str, dict[str, list[Figures]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for scenes in {int(case.split(":")[2]) for case in cases}:
            write_data(Path(folder), scenes, arguments.size)
        for strategy, ranks in [(strategy, ranks) for ranks in several for strategy in arguments.strategies]:
            name = f"{strategy}, {ranks} ranks" if ranks > 1 else "one rank"
            print(f"\n{name}", flush=True)
            chosen = [case for case in cases if int(case.split(":")[1]) in (1, ranks)]
            found[name] = launch(strategy, ranks, chosen, folder, arguments)
            report(found[name])
            if arguments.json:  # after each launch: what was measured stays if a later one fails
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
