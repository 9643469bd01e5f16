# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one forward and backward pass of the renderer, of each backend that is there.

    python benchmarks/renderer.py --views 32 128 --json renderer.json

On a GPU: median milliseconds between CUDA events, as Python calls it and (graph_) as a CUDA graph replays it, where the
host does not count; the peak of the memory that a pass allocates beyond its inputs and the planes' gradient. What the
time means: tap_TBps are the bytes of texels that the samples of a pass have to read (backward reads them again and adds
as many) per second, mlp_TFLOPs the MLP's arithmetic (backward: three times the forward's). The last line has what this
device reaches in a copy and in a matrix product with TF32, measured in the same run.
On a CPU: median wall-clock milliseconds, and the forward pass's share of them.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igae.kernels import INSTALLED
from igae.rendering import Cameras, DecodingMLP, RenderOptions, render


def orbit(views: int, distance: float, device: str) -> tuple[Tensor, Tensor]:
    """Seeded cameras on a sphere that look at the origin: poses [views, 4, 4] and intrinsics [views, 3, 3]."""
    generator = torch.Generator().manual_seed(0)
    position = F.normalize(torch.randn(views, 3, generator=generator), dim=-1) * distance
    z = F.normalize(-position, dim=-1)
    x = F.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0]).expand_as(z)), dim=-1)
    pose = torch.eye(4).repeat(views, 1, 1)
    pose[:, :3] = torch.stack((x, torch.linalg.cross(z, x), z, position), -1)
    intrinsics = torch.tensor([[1.09375, 0, 0.5], [0, 1.09375, 0.5], [0, 0, 1]]).repeat(views, 1, 1)
    return pose.to(device), intrinsics.to(device)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; it has to have run before."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings() -> dict[str, float]:
    """TB/s of a device copy (bytes read and written) and TFLOP/s of a TF32 matrix product."""
    source = torch.randn(2**28, device="cuda")
    target, a, b = (
        torch.empty_like(source),
        source[: 2**26].view(8192, 8192),
        source[2**27 : 2**27 + 2**26].view(8192, 8192),
    )
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for _ in range(2):
        copy = statistics.median(milliseconds(lambda: target.copy_(source), "cuda") for _ in range(9))
        product = statistics.median(milliseconds(lambda: a @ b, "cuda") for _ in range(9))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return {"copy_TBps": round(8 * 2**28 / copy / 1e9, 2), "tf32_TFLOPs": round(2 * 8192**3 / product / 1e9, 1)}


def measure(
    args: argparse.Namespace, backend: Any, precision: Any, views: int, size: int, coarse: int, fine: int
) -> dict[str, Any]:
    device = args.device
    generator = torch.Generator().manual_seed(0)
    scenes = min(views, args.scenes or views)
    planes = torch.randn(scenes, 3, args.resolution, args.resolution, args.features, generator=generator)
    planes = planes.to(device).requires_grad_()
    mlp = DecodingMLP(args.features, args.colors, generator=generator).to(device)
    cameras = Cameras(*orbit(views, 1.3, device), (size, size))
    background = torch.full((args.colors,), 0.5, device=device)
    scene = torch.arange(views, device=device) % scenes
    options = RenderOptions(
        coarse_samples=coarse,
        fine_samples=fine,
        axes=args.axes,
        precision=precision,
        rays_per_pixel=args.rays_per_pixel,
    )
    seed = torch.zeros((), dtype=torch.int64, device=device)
    cotangent = torch.randn(views, size, size, args.colors, generator=generator).to(device)

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            out = render(planes, mlp, cameras, options, background=background, scene=scene, seed=seed, backend=backend)
        return out.features

    def both() -> None:
        planes.grad = None
        mlp.zero_grad()
        forward().backward(cotangent)

    for _ in range(args.warmup):
        both()
    row: dict[str, Any] = {"backend": backend, "precision": precision if backend == "cuda" else "-"}
    row |= {"views": views, "size": size, "coarse": coarse, "fine": fine, "scenes": scenes}
    if device == "cuda":
        planes.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        both()
        row["extra_MB"] = round((torch.cuda.max_memory_allocated() - held - 4 * planes.numel()) / 1e6, 1)

    def median(call: Callable[[], Any]) -> float:
        return round(statistics.median(milliseconds(call, device) for _ in range(args.repeats)), 3)

    with torch.no_grad():
        row["forward_ms"] = median(forward)
    row["both_ms"] = median(both)
    rays = views * size * size * args.rays_per_pixel**2
    row["forward_share"] = round(row["forward_ms"] / row["both_ms"], 3)
    row["rays_per_s"] = round(rays / row["both_ms"] * 1e3)
    if device == "cuda" and backend == "cuda":
        with torch.no_grad():
            row["graph_forward_ms"] = median(replayed(forward))
        row["graph_both_ms"] = median(replayed(both))
        samples = rays * (coarse + fine)
        taps, flops = samples * 12 * args.features * 4, samples * 2 * mlp.hidden * (args.features + 1 + args.colors)
        row["tap_TBps"] = round(3 * taps / row["graph_both_ms"] / 1e9, 2)
        row["mlp_TFLOPs"] = round(4 * flops / row["graph_both_ms"] / 1e9, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", type=int, nargs="+", default=[16], help="height and width in pixels")
    parser.add_argument("--samples", type=int, nargs=2, default=[48, 48], metavar=("COARSE", "FINE"))
    parser.add_argument("--features", type=int, default=32, help="features of a point in the planes")
    parser.add_argument("--colors", type=int, default=16, help="channels of the image")
    parser.add_argument("--resolution", type=int, default=64, help="side of a plane")
    parser.add_argument("--rays-per-pixel", type=int, default=1, help="along each side of a pixel")
    parser.add_argument("--scenes", type=int, help="distinct scenes among the views; default: one a view")
    parser.add_argument("--axes", choices=["orthogonal", "eg3d"], default="orthogonal")
    parser.add_argument("--backend", nargs="+", help="default: all that are there")
    parser.add_argument("--precision", nargs="+", default=["fp16", "fp32"], help="of the cuda backend")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, median of {args.repeats}")
    rows: list[dict[str, Any]] = []
    backends = args.backend or (["torch", "cuda"] if args.device == "cuda" and INSTALLED else ["torch"])
    runs = [(backend, p) for backend in backends for p in (args.precision if backend == "cuda" else ["fp32"])]
    for views, size, (backend, precision) in itertools.product(args.views, args.size, runs):
        row = measure(args, backend, precision, views, size, *args.samples)
        if len(row) > len(rows[-1] if rows else ()):
            print("  ".join(f"{key:>13}" for key in row))
        print("  ".join(f"{value:>13}" for value in row.values()), flush=True)
        rows.append(row)
    ceiling = ceilings() if args.device == "cuda" else {}
    if ceiling:
        print("this device:", ceiling)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(
            json.dumps({"device": name, "ceilings": ceiling, "settings": settings, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
