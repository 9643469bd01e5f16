# SPDX-License-Identifier: Apache-2.0
"""Time of the planes' optimizer by the number of scenes, in the middle of a long training.

    python benchmarks/row_adam.py --scenes 100 1000 10000 --json row_adam.json

Each step visits as many scenes, drawn uniformly: the more scenes there are, the more deferred updates a visited one
has. Printed are medians of one visit (which copies the rows) and step together, on a GPU between CUDA events, on a CPU
by the wall clock; on a GPU the time in which the host has launched them, and with the kernels that of a captured
graph's replay; the bytes that a step reads and writes in rows; and the time of torch's Adam over all scenes where
memory holds it. Ratios are to the smallest number of scenes.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igae.scenes import CudaRowAdam, RowAdam, make_row_adam
from igae.scenes.row_adam import CHUNK

STEP = 20_000  # where in training the optimizer is


class Traffic(TorchDispatchMode):
    """Bytes of rows that operations read and write; of all scenes together they touch the rows of a step only.

    The few numbers of each row, such as its learning rate, are not counted.
    """

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.row, self.step, self.bytes = gradient[0].numel(), gradient.numel(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = {id(value): value for value in tree_leaves((args, kwargs))}
            # Where rows are put back, what they replace is among the arguments but not read.
            written = [] if func is torch.ops.aten.index_put_.default else tree_leaves(result)
            for value in (*read.values(), *written):
                if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() >= self.row:
                    self.bytes += min(value.numel(), self.step) * value.element_size()
        return result


def free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def medians(
    call: Callable[[], Any], device: str, warmup: int, repeats: int, prepare: Callable[[], Any] = lambda: None
) -> tuple[float, float | None]:
    """Milliseconds of a call on the device, and on a GPU those until it has returned; `prepare` goes before each."""
    times, hosts = [], []
    work = torch.ones(4096, 4096, device=device) if device == "cuda" else None
    for _ in range(warmup + repeats):
        prepare()
        if work is None:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        # As in training the device is busy while the host launches: it must not have to wait for the launches.
        for _ in range(8):
            torch.mm(work, work)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        call()
        hosts.append((time.perf_counter() - start) * 1e3)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[warmup:]), statistics.median(hosts[warmup:]) if hosts else None


def trained(parameters: Tensor, rows: int, generator: torch.Generator, backend: Any) -> RowAdam:
    """The optimizer at STEP, of scenes that were visited uniformly until then."""
    adam = make_row_adam(parameters, backend=backend)
    # Steps since a scene's last visit, where each step visits it with probability rows / scenes.
    missed = torch.empty(len(parameters)).geometric_(min(0.999, rows / len(parameters)), generator=generator) - 1
    visited = STEP - missed.long().clamp(max=STEP - 1)
    adam.load_state(
        {
            "exp_avg": adam.exp_avg.fill_(1e-4),
            "exp_avg_sq": adam.exp_avg_sq.fill_(1e-7),
            "updated": visited,
            "visited": visited,
            "learning_rates": torch.full((STEP,), 1e-4, dtype=torch.float64),
        }
    )
    return adam


def row_adam(args: argparse.Namespace, scenes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = min(args.rows, scenes)
    gradient = 1e-4 * torch.randn(rows, *shape, device=args.device)
    # Not zeros: on a CPU their memory would be handed out only when a row is first written.
    adam = trained(torch.full((scenes, *shape), 0.1, device=args.device), rows, generator, args.backend)
    calls = 2 * (1 + args.warmup + args.repeats)
    drawn = iter([torch.randperm(scenes, generator=generator)[:rows] for _ in range(calls)])

    def both() -> None:
        some = next(drawn)
        adam.visit(some)
        adam.step(some, gradient, 1e-4)

    if isinstance(adam, CudaRowAdam):
        some = next(drawn)
        last = adam.updated[some.to(args.device)].cpu()
        owing = int(((adam.step_count > last) & (adam.horizon > last - adam.visited.cpu()[some])).sum())
        # A visit reads parameters and writes copies, and where moves are owed reads the moments; a step reads and
        # writes all, and reads the gradient.
        moved = gradient[0].numel() * 4 * (2 * rows + 2 * owing + 7 * rows)
        drawn = iter([some, *drawn])
        both()
    else:
        with Traffic(gradient) as traffic:
            both()
        moved = traffic.bytes
    took, host = medians(both, args.device, args.warmup, args.repeats)
    found = {"ms": round(took, 3), "host_ms": host and round(host, 3), "MB": round(moved / 1e6, 1)}
    found["GB/s"] = round(moved / took / 1e6)
    found["graph_ms"] = replayed(args, adam, gradient, drawn) if isinstance(adam, CudaRowAdam) else None
    return found


def replayed(args: argparse.Namespace, adam: CudaRowAdam, gradient: Tensor, drawn: Iterator[Tensor]) -> float:
    """Milliseconds of a visit and a step that were captured in a graph."""
    rows, graph = next(drawn).to(args.device), torch.cuda.CUDAGraph()
    adam.reserve(2 * STEP)
    with torch.cuda.graph(graph):
        adam.visit(rows)
        adam.step(rows, gradient, 1e-4)

    def prepared() -> Iterator[None]:
        for some in drawn:
            rows.copy_(some)
            yield

    waiting = prepared()
    return round(medians(graph.replay, args.device, args.warmup, args.repeats - 1, lambda: next(waiting))[0], 3)


def copy_rate() -> float:
    """GB read and written a second, by torch's copy of 1 GB."""
    source = torch.ones(2**28, device="cuda")
    place = torch.empty_like(source)
    return 2 * 4 * 2**28 / medians(lambda: place.copy_(source), "cuda", 3, 11)[0] / 1e6


def dense_adam(args: argparse.Namespace, scenes: int, shape: tuple[int, ...]) -> float | None:
    """Milliseconds of a step of all scenes, without what their gradient costs; None if memory can't hold it."""
    # Fused: parameters, their gradients and both moments; otherwise torch makes copies on the way.
    if free_bytes(args.device) < (4.1 if args.device == "cuda" else 7) * 4 * scenes * math.prod(shape):
        return None
    parameters = torch.zeros(scenes, *shape, device=args.device, requires_grad=True)
    parameters.grad = torch.full_like(parameters, 1e-4)
    adam = torch.optim.Adam([parameters], lr=1e-4, fused=args.device == "cuda" or None)
    return round(medians(adam.step, args.device, 2, max(3, args.repeats // 10))[0], 3)


def check_memory(args: argparse.Namespace) -> None:
    row, free = 4 * 3 * args.resolution**2 * args.features, free_bytes(args.device)
    for scenes in args.scenes:
        # Parameters and moments, and what a step holds of its rows.
        needed = 3 * scenes * row + 8 * min(CHUNK, args.rows) * row
        if needed > free:
            raise SystemExit(
                f"{scenes} scenes need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
                f"choose fewer with --scenes, or smaller planes with --resolution and --features"
            )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rows", type=int, default=32, help="scenes of a step")
    parser.add_argument("--resolution", type=int, help="side of a plane; default: 64, on a CPU 16")
    parser.add_argument("--features", type=int, help="features of a point in the planes; default: 32, on a CPU 8")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--backend", choices=["auto", "cuda", "torch"], default="auto")
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    args.resolution = args.resolution or (64 if args.device == "cuda" else 16)
    args.features = args.features or (32 if args.device == "cuda" else 8)
    check_memory(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kind = "torch"
    if args.device == "cuda":
        kind = type(make_row_adam(torch.zeros(1, 4, device="cuda"), backend=args.backend)).__name__
        print(f"copy: {copy_rate():.0f} GB/s, read and written")
    print(f"{name}, torch {torch.__version__}, {kind}, median of {args.repeats}, {args.rows} scenes a step")
    shape = (3, args.resolution, args.resolution, args.features)
    found: list[dict[str, Any]] = []
    for scenes in sorted(args.scenes):
        row = {"scenes": scenes, **row_adam(args, scenes, shape), "dense_ms": dense_adam(args, scenes, shape)}
        first = found[0] if found else row
        row["ratio"] = round(row["ms"] / first["ms"], 2)
        comparable = row["dense_ms"] and first["dense_ms"]
        row["dense_ratio"] = round(row["dense_ms"] / first["dense_ms"], 2) if comparable else None
        if not found:
            print("  ".join(f"{key:>11}" for key in row))
        print("  ".join(f"{'-' if value is None else value:>11}" for value in row.values()), flush=True)
        found.append(row)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"device": name, "settings": settings, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
