# SPDX-License-Identifier: Apache-2.0
"""CPU threads of this process: its share of the cores that it may use, not one for each core of the machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igae.ranks import local_world_size

GIVEN = "OMP_NUM_THREADS"
FEW = 4
"""Threads of an evaluation on a CPU, and of what is no step beside a GPU, at most. Evaluations on busy cores, of images
of 16 and 64 pixels: two were faster than one (0.17 s instead of 0.36, 4.5 instead of 7.8); on 64 cores 31 took three
times as long as one."""
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = CGROUP, cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: those of its affinity, and no more than the quota of its control groups.

    Args:
        cgroup: names the groups of this process, as /proc/self/cgroup.
        cgroups: where the files of groups are, of version 1 or 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroup, cgroups)])))


def _quotas(cgroup: Path, cgroups: Path) -> list[float]:
    """The quotas of this process's groups and of those around them, in cores."""
    found = []
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container without a cgroup namespace the path is the host's, and the container's own group is at the top.
        group = cgroups / ("cpu" if controllers else "") / path.strip("/")
        for folder in (group, *group.parents):
            if controllers:
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:
                words = _read(folder / "cpu.max").split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):  # not "max", -1
                found.append(int(words[0]) / int(words[1]))
            if folder == cgroups:
                break
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def share() -> int:
    """Cores of this rank, where all ranks of this machine get as many; at least one."""
    return max(1, available_cores() // local_world_size())


def use_share(steps: bool = False) -> int:
    """Have torch compute on this process's share of the cores, on few of them beside a GPU; returns the number of
    threads. OMP_NUM_THREADS of the user decides instead. It may be called again: libraries set numbers of their own.

    Args:
        steps: training steps follow. Beside a GPU they have one thread: what is left to the CPU are launches and small
            tensors, for which threads wait for each other longer than they compute.
    """
    import torch

    if not _is_given():
        beside_gpu = 1 if steps else min(FEW, share())
        torch.set_num_threads(beside_gpu if torch.cuda.is_available() else share())
    return torch.get_num_threads()


@contextmanager
def few_threads() -> Iterator[None]:
    """For an evaluation, which takes images one after another: no more threads than have something to do."""
    import torch

    before = torch.get_num_threads()
    if before > FEW and not _is_given():
        torch.set_num_threads(FEW)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_asleep() -> None:
    """Have threads that wait for each other sleep, of which OpenMP hears when torch is imported: it must not be yet.

    They would spin: with two threads on two cores that others use too, a joint step of the demo took 15 s instead of
    1.7, and six times the processor time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _is_given() -> bool:
    """Whether the number of threads is the user's wish: launchers set it to 1 where they find none."""
    number = os.environ.get(GIVEN)
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if number is None or not launched or number != "1":  # another number is an option of the launch
        return number is not None
    return f"\0{GIVEN}=" in "\0" + _read(Path(f"/proc/{os.getppid()}/environ"))  # what the launcher was started with
