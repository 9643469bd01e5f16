# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at random moments end as if nothing had happened."""

import hashlib
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import runs
from safetensors.torch import load_file

import train
from igae import checkpoint

KILLS = 20
SHORT = ["train.warmup.epochs=2", "train.joint.epochs=2", "checkpoint.every=3"]


def _train(recipe: str, arguments: list[str], log: str) -> None:
    import os
    import sys

    import torch

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(train.main(["--config", recipe, *arguments]))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    # Real processes, forked from one that has the imports behind it: a launch costs a fraction of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["igae.trainer", "diffusers.models.autoencoders.autoencoder_kl"])
    return context


def _digests(run: Path) -> dict[str, str]:
    """Digest of every tensor of the newest checkpoint."""
    newest = checkpoint.list_complete(run / "checkpoints")[-1]
    return {
        f"{newest.name}/{file.name}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _exported(run: Path) -> str:
    return hashlib.sha256((run / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def _figures(run: Path) -> dict[str, float]:
    stages = json.loads((run / "metrics.json").read_text())
    return {f"{stage}/{name}": value for stage, figures in stages.items() for name, value in figures.items()}


def test_twenty_kills_change_no_bit(tmp_path: Path, processes: multiprocessing.context.ForkServerContext) -> None:
    recipe = str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))

    def start(name: str) -> multiprocessing.context.ForkServerProcess:
        process = processes.Process(
            target=_train, args=(recipe, [f"experiment={name}", *SHORT], str(tmp_path / f"{name}.log"))
        )
        process.start()
        return process

    first = processes.Process(target=int)  # the server's imports must not count in the duration of a run
    first.start()
    first.join()
    began = time.monotonic()
    whole = start("whole")
    whole.join(300)
    duration = time.monotonic() - began
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    whole_run, killed_run = tmp_path / "outputs" / "whole", tmp_path / "outputs" / "killed"
    expected = _digests(whole_run)
    assert len(expected) > 100

    rng, kills, finished = random.Random(0), 0, 0
    resumed_in = set()
    while kills < KILLS or finished == 0:
        process = start("killed")
        if kills < KILLS:
            process.join(rng.uniform(0, duration))
            if process.exitcode is None:
                process.kill()
                kills += 1
                complete = checkpoint.list_complete(killed_run / "checkpoints")
                resumed_in |= {path.name for path in complete[-1:]}
        process.join(300)
        if process.exitcode == 0:
            assert _digests(killed_run) == expected
            assert _exported(killed_run) == _exported(whole_run)
            # Measured: 7e-7 dB. Weights are equal to the bit, but a process that was killed between checkpoint and
            # results computes them with convolutions that have not trained before.
            assert _figures(killed_run) == pytest.approx(_figures(whole_run), abs=1e-4)
            finished += 1
            if kills < KILLS:
                shutil.rmtree(killed_run)
        else:
            assert process.exitcode == -9, (tmp_path / "killed.log").read_text()
    # The kills were spread over the run, not all before its first checkpoint.
    assert len(resumed_in) >= 3, resumed_in
