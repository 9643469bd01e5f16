#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks behind the tables of README.md and docs/, one after another, and writes what they found.

    python benchmarks/all.py --output outputs/benchmarks
    python benchmarks/all.py --output outputs/benchmarks --only joint_step warmup_step

Each is a process of its own with a time limit. `all.json` has the machine, versions and all numbers, `all.md` the same
as it was printed. What needs a GPU, several, or data that are not there is skipped, which is said. The quality tables
are left out: they are trainings of hours (quality.py, objects.py).

Exit codes: 0 all that could run did, 1 a benchmark failed or took too long.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from igae.ranks import available_cores

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "accelerate", "diffusers", "numpy", "cuda-core")


@dataclass(frozen=True)
class Benchmark:
    command: str
    """File of this folder and arguments."""
    gpus: int = 0
    """How many it needs."""
    data: str | None = None
    """A file that it needs."""


BENCHMARKS = {
    "renderer": Benchmark("renderer.py --views 32 128 --repeats 31", gpus=1),
    "warmup_step": Benchmark("warmup_step.py", gpus=1),
    "joint_step": Benchmark("joint_step.py --rounds 2 --steps 20", gpus=1),
    "rays_warmup": Benchmark("rays_step.py warmup --rounds 2", gpus=1),
    "rays_joint": Benchmark("rays_step.py joint --rounds 2", gpus=1),
    "scenes": Benchmark("scaling.py --cases warmup:1:500 warmup:1:8000 joint:1:500 joint:1:8000", gpus=1),
    "scaling_warmup": Benchmark(
        "scaling.py --cases warmup:1:3000 warmup:2:6000 warmup:2:6000:apart --rounds 5 --steps 300", gpus=2
    ),
    "scaling_joint": Benchmark(
        "scaling.py --cases joint:1:3000 joint:2:6000 joint:2:6000:apart --rounds 3 --steps 80", gpus=2
    ),
    "row_adam": Benchmark("row_adam.py"),
    "viewer": Benchmark("viewer.py"),
    "packing": Benchmark("packing.py"),
    "streaming": Benchmark(
        "streaming.py --data data/demo-shards --latency 50 --cache", data="data/demo-shards/manifest.json"
    ),
}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head.stdout.strip(),
        "gpus": gpus,
        "cpu": _cpu(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(benchmark: Benchmark) -> str | None:
    """Why a benchmark can't run here."""
    there = torch.cuda.device_count()
    if benchmark.gpus > there:
        return f"needs {benchmark.gpus} GPU{'s' * (benchmark.gpus > 1)}, there {'is' if there == 1 else 'are'} {there}"
    if benchmark.data and not (ROOT / benchmark.data).is_file():
        return f"needs {benchmark.data}, which make quickstart makes"
    return None


def run(name: str, benchmark: Benchmark, more: list[str], folder: Path, limit: float) -> dict[str, Any]:
    """What became of a benchmark. Its process, and those that it started, end with the time limit."""
    words = [*shlex.split(benchmark.command), *more]
    row: dict[str, Any] = {"command": shlex.join(["python", f"benchmarks/{words[0]}", *words[1:]])}
    if reason := missing(benchmark):
        return {**row, "status": "skipped", "reason": reason}
    numbers, log = (folder / f"{name}.{suffix}" for suffix in ("json", "log"))
    numbers.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            # before the other arguments: what follows a `--` is passed on
            [sys.executable, str(ROOT / "benchmarks" / words[0]), *_with_json(words[1:], numbers)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    row |= {"seconds": round(time.monotonic() - start, 1), "printed": log.read_text(errors="replace")}
    if code is None:
        return {**row, "status": "failed", "reason": f"it took longer than {limit:g} s"}
    if code or not numbers.is_file():
        last = (row["printed"].strip().splitlines() or [""])[-1]
        return {**row, "status": "failed", "reason": f"exit code {code}: {last}" if code else "it wrote no numbers"}
    return {**row, "status": "done", "numbers": json.loads(numbers.read_text())}


def _with_json(words: list[str], numbers: Path) -> list[str]:
    positional = words[:1] if words and not words[0].startswith("-") else []  # rays_step.py's stage comes first
    return [*positional, "--json", str(numbers), *words[len(positional) :]]


def outcome(row: dict[str, Any]) -> str:
    return f"{row['status']} ({row['reason']})" if "reason" in row else str(row["status"])


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Benchmarks", ""]
    lines += [f"* {name}: {', '.join(v) if isinstance(v, list) else v}" for name, v in result["machine"].items() if v]
    for name, row in result["benchmarks"].items():
        lines += ["", f"## {name}", "", f"`{row['command']}`: {outcome(row)}"]
        lines += [f"{row['seconds']:g} s"] if "seconds" in row else []
        if row.get("printed", "").strip():
            lines += ["", "```text", row["printed"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of all.json, all.md and logs")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds for each (default: 900)")
    parser.add_argument("--more", type=shlex.split, default=[], help="arguments for each, e.g. --more='--repeats 3'")
    arguments = parser.parse_args(argv)
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "benchmarks": {}}
    for name in arguments.only or BENCHMARKS:
        print(f"{name} ...", end=" ", flush=True)
        row = run(name, BENCHMARKS[name], arguments.more, folder, arguments.limit)
        print(outcome(row), flush=True)
        result["benchmarks"][name] = row
        # After each: what is there counts also if this is ended.
        (folder / "all.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "all.md").write_text(markdown(result))
    return int(any(row["status"] == "failed" for row in result["benchmarks"].values()))


if __name__ == "__main__":
    sys.exit(main())
