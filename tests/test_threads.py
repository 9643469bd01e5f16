# SPDX-License-Identifier: Apache-2.0
"""How many threads a process computes with, and on how many cores."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import runs
import torch

from igae import config
from igae.ranks import FEW, available_cores, few_threads, share, use_share
from igae.training import Recipe, Trainer

ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores, without a launcher."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


# What /proc/self/cgroup says, files below /sys/fs/cgroup, and the cores of 64 that are left.
GROUPS = {
    "none": ("", {}, 64),
    "version 2, of a container": ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    "version 2, unlimited": ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    "version 2, the group around it is tighter": (
        "0::/slurm/job_7/step_0\n",
        {"slurm/job_7/step_0/cpu.max": "max 100000\n", "slurm/job_7/cpu.max": "850000 100000\n"},
        8,
    ),
    "version 2, more than there are": ("0::/a\n", {"a/cpu.max": "20000000 100000\n"}, 64),
    "a third of a core": ("0::/\n", {"cpu.max": "33000 100000\n"}, 1),
    "version 1": (
        "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/docker/1\n",
        {"cpu/docker/1/cpu.cfs_quota_us": "600000\n", "cpu/docker/1/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "version 1, unlimited": (
        "3:cpu,cpuacct:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        64,
    ),
    "version 1, the path is the host's": (
        "3:cpu:/kubepods/pod7\n",
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "another controller's": ("3:memory:/\n", {"cpu.max": "100000 100000\n"}, 64),
    "damaged": ("no colons\n0::/\n", {"cpu.max": "all of them\n"}, 64),
}


@pytest.mark.parametrize("name", GROUPS)
def test_cores_that_groups_leave(name: str, cores: None, tmp_path: Path) -> None:
    text, files, expected = GROUPS[name]
    (tmp_path / "cgroup").write_text(text)
    for file, content in files.items():
        path = tmp_path / "groups" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert available_cores(tmp_path / "cgroup", tmp_path / "groups") == expected


def test_ranks_of_a_machine_share_its_cores(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = share()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert share() == all_of_them // 8
    monkeypatch.setenv("WORLD_SIZE", "1000")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert share() == 1


def test_affinity_of_a_real_process() -> None:
    core = min(os.sched_getaffinity(0))
    code = "from igae.ranks import use_share; print(use_share())"
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    command = ["taskset", "-c", str(core), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1


@pytest.mark.parametrize(
    ("asked", "launched", "option", "given"),
    [
        (None, False, None, False),
        ("3", False, None, True),
        ("1", False, None, True),
        (None, True, "1", False),  # the launcher's own number
        ("1", True, "1", True),  # the user's, which the launcher passes on
        (None, True, "3", True),  # accelerate launch --num_cpu_threads_per_process 3
    ],
)
def test_the_users_number_counts_and_a_launchers_does_not(
    asked: str | None, launched: bool, option: str | None, given: bool
) -> None:
    """A parent process stands for the launcher: it sets variables of its child's."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    if asked is not None:
        environment["OMP_NUM_THREADS"] = asked
    code = (
        "import torch, igae.ranks as threads\n"
        "before, threads.share = torch.get_num_threads(), lambda: 5\n"
        "print(before, threads.use_share())"
    )
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": option} if launched else {}
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {code!r}], env=os.environ | {variables!r}, check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    before, threads = map(int, done.stdout.split())
    assert threads == (before if given else 5)


def test_one_thread_beside_a_gpu(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr("igae.ranks.share", lambda: 8)
        assert use_share(steps=True) == torch.get_num_threads() == 1
        assert 1 < use_share() == torch.get_num_threads() <= FEW
        monkeypatch.setattr("igae.ranks.share", lambda: 1)  # of a machine with as many ranks as cores
        assert use_share() == 1
    finally:
        torch.set_num_threads(before)


def test_waiting_threads_sleep(tmp_path: Path) -> None:
    """OpenMP reads how it waits when torch is imported, so a command says it before; a user's word counts."""
    code = (
        "import os, sys, igae.cli.train as train\n"
        "print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'), file=sys.stderr)\n"
        "train.main(['--config', 'igae.yaml', '--print-config'])\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", code]
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(command, cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True)
        assert done.stderr.split() == ["False", given.get("OMP_WAIT_POLICY", "None"), expected]


def test_an_evaluation_has_few_threads_and_then_they_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 31)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    with pytest.raises(KeyError), few_threads():
        raise KeyError
    assert seen == [FEW, 31]
    monkeypatch.setenv("OMP_NUM_THREADS", "31")
    with few_threads():
        assert seen == [FEW, 31]
    monkeypatch.undo()
    assert torch.get_num_threads() == before


def trained(recipe_file: str) -> tuple[int, int, float]:
    """Threads of a rank after its run, those that Linux counts in a data worker's place, and its cores' mean use."""
    os.environ.pop("OMP_NUM_THREADS")
    torch.set_num_threads(8)  # as torch begins on a machine of eight cores
    trainer = Trainer(config.load(Recipe, recipe_file))
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    trainer.run()
    now, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return torch.get_num_threads(), share(), busy / seconds


def test_a_run_stays_within_its_share(tmp_path: Path, shards: str) -> None:
    file = str(runs.recipe_file(tmp_path, shards))
    for threads, cores, busy in ranks.run(trained, 2, file):
        assert threads == cores == max(1, available_cores() // 2)
        assert busy < cores + 0.4  # one thread more reads, another waits for workers


def test_workers_have_a_thread_each(shards: str) -> None:
    """A DataLoader sees to it, whatever its parent has."""
    code = (
        "import json, sys, torch\n"
        "from igae.data import DataConfig, Manifest, view_loader\n"
        "import igae.data.decoding as decoding\n"
        "from igae.ranks import use_share\n"
        "torch.set_num_threads(4)\n"
        "decode = decoding.Decoder.__getitems__\n"
        "def watched(self, samples):\n"
        "    print(torch.get_num_threads(), flush=True)\n"
        "    return decode(self, samples)\n"
        "decoding.Decoder.__getitems__ = watched\n"
        f"root = {shards!r}\n"
        "manifest = Manifest.load(root)\n"
        "settings = DataConfig(root=root, workers=1)\n"
        "list(view_loader(settings, manifest, manifest.scenes, batch_size=8, repeat=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() and set(done.stdout.split()) == {"1"}
