#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains one recipe on one rank, on many, and on many that are killed twice, and compares what comes out.

    python benchmarks/ranks.py --data SHARDS --autoencoder AE --output FOLDER
    python benchmarks/ranks.py --data SHARDS --autoencoder AE --output FOLDER --ranks 8 --one-gpu

All runs see the same number of views in a step. The third, `killed`, twice loses all its processes to SIGKILL, a moment
after --checkpoints new ones: it goes on with half the ranks, then with all of them again. With --one-gpu all ranks
share the first GPU, each as a machine of its own for NCCL, which is the same code, and slow unless NVIDIA's MPS runs
(an all-reduce of eight ranks takes 8 ms with it and 160 without). `key=value` at the end goes to all runs.

Exit codes: 0 all metrics agree within --within dB, 1 they don't or a run failed.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import quality

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["evaluation.scenes=null", "evaluation.every=0", "evaluation.orbits=0", "evaluation.pictures=0"]
COMPLETE = "checkpoints/step-*/state.json"
COLUMNS = {name: key for name, key in quality.COLUMNS.items() if key.endswith("psnr")}


def free_port() -> int:
    """Where ranks of this machine can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(arguments: argparse.Namespace, name: str, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a run, which log to a file beside its folder."""
    views, joint, natural = (batch // ranks for batch in arguments.batches)
    command = [sys.executable, str(ROOT / "train.py"), "--config", arguments.config, f"experiment={name}"]
    command += [f"outputs={arguments.output}", f"data.root={arguments.data}"]
    command += [f"autoencoder.path={arguments.autoencoder}", f"train.warmup.batch_size={views}"]
    command += [f"train.joint.batch_size={joint}", f"train.joint.natural_images={natural}"]
    command += [*QUIET, *arguments.overrides]
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = dict(os.environ)
        if ranks > 1:
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            if arguments.one_gpu:
                local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "NCCL_HOSTID": f"rank-{rank}"}
            rendezvous = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {key: str(value) for key, value in (local | rendezvous).items()}
        with (arguments.output / f"{name}.log").open("ab") as log:
            new = {"stdout": log, "stderr": log, "start_new_session": True, "env": environment, "cwd": ROOT}
            processes.append(subprocess.Popen(command, **new))  # type: ignore[call-overload]
    return processes


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its data workers, too
        process.wait()


def finish(processes: list[subprocess.Popen[bytes]], run: Path) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{run.name} failed with exit codes {codes}: {run}.log")


def wait_for_checkpoints(processes: list[subprocess.Popen[bytes]], run: Path, number: int) -> int:
    """Wait until that many new ones have been written, also those that newer ones replaced; returns the newest step."""
    before = {path.parent.name for path in run.glob(COMPLETE)}
    seen: set[str] = set()
    while len(seen) < number:
        if any(process.poll() is not None for process in processes):
            raise SystemExit(f"{run.name} ended before {number} checkpoints: {run}.log")
        time.sleep(0.2)
        seen |= {path.parent.name for path in run.glob(COMPLETE)} - before
    return max(int(found[1]) for name in seen if (found := re.match(r"step-(\d+)", name)))


def whole(arguments: argparse.Namespace, name: str, ranks: int) -> None:
    """A run without disturbance."""
    finish(start(arguments, name, ranks), arguments.output / name)


def killed(arguments: argparse.Namespace) -> list[str]:
    """A run that is killed twice; returns what happened."""
    run, happened = arguments.output / "killed", []
    for ranks in (arguments.ranks, arguments.ranks // 2):
        processes = start(arguments, run.name, ranks)
        try:
            step = wait_for_checkpoints(processes, run, arguments.checkpoints)
            time.sleep(arguments.later)
        finally:
            kill(processes)
        happened.append(f"{ranks} ranks killed {arguments.later:g} s after the checkpoint of step {step}")
    finish(start(arguments, run.name, arguments.ranks), run)
    return happened


def metrics(run: Path) -> dict[str, float]:
    found = json.loads((run / "metrics.json").read_text())["joint"]
    return {column: float(found[key]) for column, key in COLUMNS.items() if key in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="packed scenes")
    parser.add_argument("--autoencoder", required=True, help="folder of a diffusers autoencoder, or demo")
    parser.add_argument("--output", type=Path, required=True, help="new folder for runs and logs")
    parser.add_argument("--config", default="igae_improved.yaml")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument(
        "--batches", type=int, nargs=3, default=[32, 16, 8], metavar=("WARMUP", "JOINT", "NATURAL"),
        help="views of a warm-up and a joint step, and natural images, of all ranks together (default: 32 16 8)",
    )  # fmt: skip
    parser.add_argument("--checkpoints", type=int, default=2, help="kill after so many new ones (default: 2)")
    parser.add_argument("--later", type=float, default=3.0, help="and so many seconds (default: 3)")
    parser.add_argument("--within", type=float, default=0.05, help="dB (default: 0.05)")
    parser.add_argument("--together", action="store_true", help="make the runs that are not killed at the same time")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.ranks % 2 or any(batch % arguments.ranks for batch in arguments.batches):
        parser.error("the number of ranks must be even and divide each of the batches")
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True)
    with ThreadPoolExecutor(2 if arguments.together else 1) as pool:
        list(pool.map(lambda run: whole(arguments, *run), [("one", 1), ("many", arguments.ranks)]))
    happened = killed(arguments)  # alone: under MPS a process that is killed in a kernel ends all others
    found: dict[str, Any] = {name: metrics(arguments.output / name) for name in ("one", "many", "killed")}
    for line in happened:
        print(line)
    print(f"{'':14s}" + "".join(f"{name:>10s}" for name in found) + "   many - one  killed - many")
    agree = bool(found["one"])
    for column in found["one"]:
        one, many, again = (found[name][column] for name in found)
        agree &= abs(many - one) <= arguments.within and abs(again - many) <= arguments.within  # not if one is NaN
        print(f"{column:14s}{one:10.3f}{many:10.3f}{again:10.3f}{many - one:+13.3f}{again - many:+15.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "killed at": happened}, indent=1) + "\n")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
