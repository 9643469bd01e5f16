# SPDX-License-Identifier: Apache-2.0
"""Runs as users start them: `accelerate launch` with the files in launch/accelerate, and torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import runs
import yaml

from igae import checkpoint

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "launch" / "accelerate"
SHORT = ["train.warmup.epochs=0.25", "train.joint.epochs=0.5"]


@pytest.fixture
def recipe(tmp_path: Path, shards: str) -> str:
    return str(runs.recipe_file(tmp_path, shards))


def accelerate(file: str, world: int, *arguments: str) -> list[str]:
    options = ["--config_file", str(FILES / file), "--num_processes", str(world), "--num_cpu_threads_per_process", "1"]
    port = ["--main_process_port", str(ranks.free_port())]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *port, str(ROOT / "train.py"), *arguments]


@pytest.mark.parametrize(
    ("file", "strategy"),
    [("zero2.yaml", "DeepSpeed ZeRO-2"), ("fsdp2.yaml", "FSDP2")],  # ddp.yaml: tests/test_hosts.py
)
def test_each_file_starts_its_strategy(tmp_path: Path, recipe: str, file: str, strategy: str) -> None:
    command = accelerate(file, 2, "--config", recipe, *SHORT)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # One table for all ranks, and the strategy that the file names.
    assert done.stderr.count(f"2 ranks, {strategy}; 4 scenes") == 1, done.stderr
    assert done.stderr.count("farthest from the mean: rank") == 1
    assert (tmp_path / "outputs" / "run" / "metrics.json").is_file()


def test_the_other_files_differ_in_the_stage_alone() -> None:
    stages = {}
    for stage in (1, 2, 3):
        settings = yaml.safe_load((FILES / f"zero{stage}.yaml").read_text())
        stages[settings["deepspeed_config"].pop("zero_stage")] = settings
    assert sorted(stages) == [1, 2, 3] and stages[1] == stages[2] == stages[3]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_goes_on_with_fewer_ranks(tmp_path: Path, recipe: str) -> None:
    """Two nodes of one rank each; one node dies, and the other goes on alone from the newest checkpoint."""
    port = ranks.free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "igae"]
    command += ["--local_addr", "127.0.0.1", "--max_restarts", "3"]
    command += ["--rdzv_conf", "last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=4"]
    command += [str(ROOT / "train.py"), "--config", recipe, "train.warmup.epochs=0", "checkpoint.every=5"]
    command += ["train.joint.epochs=10", "train.timeout=30"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = []
    for name in ("first", "second"):
        with open(tmp_path / f"{name}.log", "w") as log:
            nodes.append(subprocess.Popen(command, cwd=tmp_path, stderr=log, start_new_session=True, env=environment))
        deadline = time.monotonic() + 60  # the first one hosts the rendezvous
        while name == "first" and not ranks.listens(port):
            assert time.monotonic() < deadline and nodes[0].poll() is None
            time.sleep(0.05)
    first, second = nodes
    try:
        checkpoints = tmp_path / "outputs" / "run" / "checkpoints"
        deadline = time.monotonic() + 120
        while not checkpoint.list_complete(str(checkpoints)):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.1)
        for pid in [second.pid, *children(second.pid)]:  # torchrun's workers are sessions of their own
            os.kill(pid, signal.SIGKILL)
        assert first.wait(240) == 0, (tmp_path / "first.log").read_text()
    finally:
        for node in nodes:
            for pid in [node.pid, *children(node.pid)] if node.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            node.wait()
    log = (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert "2 ranks, DDP" in log and "1 rank, one process" in log, log
    assert "2 ranks trained before this restart, and 1 do now" in log
    assert (tmp_path / "outputs" / "run" / "metrics.json").is_file()
