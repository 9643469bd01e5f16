#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures how far data from an object store starve training, compared with the same data in a local folder.

Both stages of a configuration (the quickstart's) are opened and stepped from either, in turns, in one process. The
store is a process on this machine that answers what S3 answers to reads of objects and nothing else, so that s3fs, the
real client, is in the way; moto, made for tests, takes four times the processor time for an answer (5.8 against 1.5 ms
for 1.2 MB), which two cores miss in training. It adds `--latency` to each answer, and counts requests and bytes.

Starvation: what a step waits longer for data than it does with local files, of the time of a step with local files.
The step time itself differs between turns by whatever else the machine does.
"""

import argparse
import email.utils
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fsspec
import torch

from igae import config
from igae.training import RankData, Recipe, Stage, StageName, StageState, Trainer

ROOT = Path(__file__).resolve().parent.parent
STAGES: tuple[StageName, ...] = ("warmup", "joint")


def serve(folder: str, latency: float, counts: Any, ready: Any) -> None:
    """Answers HEAD and GET (with ranges) of `/bucket/...`, files of a folder; counts requests and bytes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            time.sleep(latency)
            path = Path(folder) / Path(self.path.partition("?")[0]).name
            data = path.read_bytes() if path.is_file() else b""
            status, headers = 200 if path.is_file() else 404, {}
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                start, stop = int(span[1]), min(int(span[2]) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                data, status = data[start:stop], 206
            self.send_response(status)
            headers |= {"ETag": '"0"', "Last-Modified": email.utils.formatdate(0, usegmt=True)}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            with counts.get_lock():
                counts[0] += 1
                counts[1] += len(data) if self.command == "GET" else 0
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    ready.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def store(folder: str, latency: float) -> Iterator[Any]:
    """Makes s3:// mean a server with the files of a folder; gives its [requests, bytes]."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 2)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(folder, latency, counts, send), daemon=True)
    process.start()
    endpoint = f"http://127.0.0.1:{receive.recv()}"
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "none", "secret": "none"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    try:
        yield counts
    finally:
        process.terminate()


def measure(trainer: Trainer, name: StageName, recipe: Recipe) -> dict[str, float]:
    """Seconds of opening a stage (the warm-up reads and encodes all views there), of its steps, of waiting for data."""
    start = time.perf_counter()
    stage = Stage(name, recipe, trainer.engine, trainer.model, trainer.store, RankData.split(recipe), StageState())
    opened = time.perf_counter() - start
    stage.meter.restart(0)
    start = time.perf_counter()
    for step in range(stage.steps):
        stage.step(step)
    seconds = time.perf_counter() - start
    stage.close()
    trainer.engine.finish()
    return {"opened": opened, "steps": stage.steps, "seconds": seconds, "wait": stage.meter.data_wait}


def main() -> None:
    """Runs the measurements and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--data", default="data/demo-shards", help="packed data in a local folder (`make quickstart`)")
    parser.add_argument("--epochs", type=float, default=2, help="of each stage in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0, metavar="MS", help="of each answer; S3's are 20 to 100")
    parser.add_argument("--cache", action="store_true", help="also with data.cache, empty at the start of each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the results to a file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # which igae leaves as it is
    torch.set_num_threads(arguments.threads)
    if not (Path(arguments.data) / "manifest.json").is_file():
        parser.error(f"no packed data in {arguments.data}: make quickstart makes them, or give --data")
    sources = ["local", "s3", *(["s3, cache"] if arguments.cache else [])]
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    with tempfile.TemporaryDirectory() as scratch, store(arguments.data, arguments.latency / 1000) as counts:

        def recipe_of(source: str, turn: str) -> Recipe:
            epochs = [f"train.{stage}.epochs={arguments.epochs}" for stage in STAGES]
            root = arguments.data if source == "local" else "s3://bucket/data"
            cache = f"data.cache={scratch}/{turn}" if source == "s3, cache" else "data.cache=null"
            overrides = [f"data.root={root}", f"outputs={scratch}", *epochs, cache, *arguments.overrides]
            return config.load(Recipe, str(ROOT / "configs" / arguments.config), overrides)

        trainer = Trainer(recipe_of("local", "-"))
        for number in range(-1, arguments.rounds):  # the first turns make everything warm
            shift = number % len(sources)
            for source in sources[shift:] + sources[:shift]:
                for stage in STAGES:
                    before = list(counts)
                    measured = measure(trainer, stage, recipe_of(source, f"{number}-{stage}"))
                    measured |= {"requests": counts[0] - before[0], "bytes": counts[1] - before[1]}
                    if number >= 0:
                        for key, value in measured.items():
                            totals[stage, source][key] += value
                    print(f"round {number}, {stage}, {source}: {measured}", file=sys.stderr)
    print(
        f"{arguments.rounds} rounds of {arguments.epochs:g} epochs, latency {arguments.latency:g} ms, {arguments.data}"
    )
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {arguments.threads} threads\n")
    print("| stage | data | opening, s | step, ms | data wait | starvation | requests | MB |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for stage in STAGES:
        local = totals[stage, "local"]
        for source in sources:
            found = totals[stage, source]
            extra = found["wait"] / found["steps"] - local["wait"] / local["steps"]
            rows.append(
                {
                    "stage": stage,
                    "data": source,
                    "opening_s": found["opened"] / arguments.rounds,
                    "step_ms": 1000 * found["seconds"] / found["steps"],
                    "data_wait": found["wait"] / found["seconds"],
                    "starvation": extra / (local["seconds"] / local["steps"]),
                    "requests": found["requests"] / arguments.rounds,
                    "mb": found["bytes"] / arguments.rounds / 1e6,
                }
            )
            print(
                "| {stage} | {data} | {opening_s:.2f} | {step_ms:.1f} | {data_wait:.2%} | {starvation:.2%} | "
                "{requests:.0f} | {mb:.1f} |".format(**rows[-1])
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
