# SPDX-License-Identifier: Apache-2.0
"""Facts about the ranks of a run, the seeds that every rank derives alike, exchanges of small things, and the CPU
threads of a rank: its share of the cores, not one for each core of the machine."""

import hashlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and `accelerate launch` of several processes set, all of it."""
SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
TASKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Number of processes that something else than these launchers has started."""
_FLAG = (r"true|false", "write true or false")
HONORED = {
    "ACCELERATE_MIXED_PRECISION": ("no", "set mixed_precision to no, and train.precision to bf16"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "set dynamo_backend to no: train.kernels does more"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1|auto",
        "set gradient_accumulation_steps to 1, and train.*.accumulate",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (r"0(\.0)?|auto", "leave gradient_clipping out, gradients are not clipped"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("[1-3]", "set zero_stage to 1, 2 or 3"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "set offload_optimizer_device to none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "set offload_param_device to none"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "use a file of launch/accelerate"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "use a file of launch/accelerate"),
    "ACCELERATE_TORCH_DEVICE": (r"(cpu|cuda)(:\d+)?", "name cpu or cuda"),
    **dict.fromkeys((*SWITCHES, "ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE"), _FLAG),
}
"""Variables that `accelerate launch` sets: the values that igae honors, and what to do instead of others."""
HONORED_OF_FSDP = {
    "FSDP_VERSION": ("2", "set fsdp_version to 2, as launch/accelerate/fsdp2.yaml does"),
    "FSDP_OFFLOAD_PARAMS": ("false", "set fsdp_offload_params to false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set fsdp_activation_checkpointing to false"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "set fsdp_reshard_after_forward to true"),
}
THREADS = "OMP_NUM_THREADS"
FEW = 4
"""Threads of an evaluation on a CPU, and of what is no step beside a GPU, at most. Evaluations on busy cores, of images
of 16 and 64 pixels: two were faster than one (0.17 s instead of 0.36, 4.5 instead of 7.8); on 64 cores 31 took three
times as long as one."""
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def rank() -> int:
    """Rank of this process, as the launcher set it (0 without a launcher)."""
    return _variable("RANK", 0)


def world_size() -> int:
    """Number of processes, as the launcher set it (1 without a launcher)."""
    return _variable("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes on this machine, as the launcher set it."""
    return max(1, _variable("LOCAL_WORLD_SIZE", world_size()))


def _variable(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    return int(text) if text.isdecimal() else otherwise


def check_rank_variables() -> None:
    """Refuse an environment that training can't work in as it says: variables that no launcher sets together, which are
    left over from something else, and options of `accelerate launch` that igae does not honor.

    Raises:
        ValueError: the sentence names the variable.
    """
    env, fsdp = os.environ, os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    for name, (pattern, advice) in (HONORED | HONORED_OF_FSDP if fsdp else HONORED).items():
        value = env.get(name, "1" if name == "FSDP_VERSION" else None)  # what Accelerate takes where it is not set
        if value is not None and not re.fullmatch(pattern, value, re.ASCII | re.IGNORECASE):
            raise ValueError(f"{name}={value} of the launch is not supported: {advice}, or unset it")
    for name in (*LAUNCH[:3], "LOCAL_WORLD_SIZE", *TASKS):
        if not re.fullmatch(r"\d{1,9}", env.get(name, "0"), re.ASCII):
            raise ValueError(f"{name}={env[name]} in the environment is no number: unset it")
    world = world_size()
    there = [name for name in (*LAUNCH[:3], *SWITCHES) if env.get(name, "false").lower() != "false"]
    needed = LAUNCH if world > 1 or set(there) & {*LAUNCH[2:], *SWITCHES} else LAUNCH[:2] if there else ()
    if missing := [name for name in needed if not env.get(name)]:
        raise ValueError(
            f"{there[-1]}={env[there[-1]]} is in the environment and {missing[0]} is not: unset {there[-1]}, or start "
            "with accelerate launch or torchrun, which set both"
        )
    if set(SWITCHES) <= set(there):
        raise ValueError(f"{' and '.join(SWITCHES)} are both true in the environment: unset one of them")
    local, local_world = _variable("LOCAL_RANK", 0), _variable("LOCAL_WORLD_SIZE", world)
    for name, number, bound, limit in (
        ("RANK", rank(), "WORLD_SIZE", world),
        ("LOCAL_RANK", local, "RANK", rank() + 1),
        ("LOCAL_RANK", local, "LOCAL_WORLD_SIZE", local_world),
        ("LOCAL_WORLD_SIZE", local_world, "WORLD_SIZE", world + 1),
    ):
        if number >= limit:
            raise ValueError(
                f"{name}={number} and {bound}={_variable(bound, world)} in the environment don't belong together: "
                "unset both, or start with accelerate launch"
            )
    if needed == LAUNCH and not (env["MASTER_PORT"].isdecimal() and 0 < int(env["MASTER_PORT"]) < 2**16):
        raise ValueError(f"MASTER_PORT={env['MASTER_PORT']} in the environment is no port: set one from 1 to 65535")
    if tasks := [name for name in TASKS if world == 1 and _variable(name, 1) > 1]:
        raise ValueError(
            f"{tasks[0]}={env[tasks[0]]}: as many processes were started, and none of them would know of the others: "
            f"start accelerate launch on each machine, as launch/slurm does, or unset {tasks[0]}"
        )


def join(timeout: float = 600.0) -> None:
    """Join the process group, where there is one and this process is not in it.

    Args:
        timeout: seconds after which a rank that waits for another one gives up, here and in collectives.

    Raises:
        ValueError: the ranks don't meet; the sentence names address and port.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    wait, met = timedelta(seconds=timeout), queue.SimpleQueue[Any]()

    def meet() -> None:
        try:
            met.put(next(rendezvous("env://", timeout=wait)))
        except Exception as error:
            met.put(error)

    # In a thread: torch waits for ever for what takes the connection and does not answer.
    threading.Thread(target=meet, name="igae-rendezvous", daemon=True).start()
    try:
        found = met.get(timeout=timeout)
    except queue.Empty:
        found = TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(found, Exception):
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"rank {rank()} can't meet the other ranks at {where}, which MASTER_ADDR and MASTER_PORT say "
            f"({str(found).splitlines()[0].strip('. ')}): start all {world_size()} of them, with the address of the "
            "first rank's machine and a port that is free there"
        )
    store, number, world = found
    store.set_timeout(wait)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=wait)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else.

    All random numbers of a run come from seeds like ``derive_seed(seed, "joint", step, rank)``: no generator state
    has to be saved for a resumed run to be equal to an uninterrupted one.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values.get(key), default=str)[:200]  # as recipes are written: true, null


class OfAllRanks(Exception):
    """All ranks raise it alike, and the first one tells it."""


class RefusedByAll(OfAllRanks, ValueError):
    """Wrong input, as the ranks have found together."""


class Channel:
    """Exchanges small things between all ranks, over the CPU, apart from training's collectives.

    All methods are collective: every rank calls them, in the same order. A thread needs a channel of its own. Channels
    are made on all ranks, in the same order. With one rank everything returns at once.

    Args:
        timeout: seconds after which a rank that waits for another one gives up.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        self._group: Any = None
        self.timeout = timeout
        if world_size() > 1:
            import torch.distributed as dist  # here: configurations are checked before torch is imported

            self._dist = dist
            # gloo would wait for half an hour, whatever the main group does
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank (pickled: only what the ranks of this run themselves made)."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def on_first_rank(self, action: Callable[[], T]) -> T:
        """Run an action on the first rank only and return its result on all. Where it fails with a ValueError or
        OSError, all ranks raise the same RefusedByAll."""
        result = self.together(lambda: action() if rank() == 0 else None)
        return cast(T, self.gather(result)[0])

    def together(self, action: Callable[[], T]) -> T:
        """Run an action on all ranks and return what it returns here. Where it fails with a ValueError or OSError on
        some, all ranks raise RefusedByAll: their own sentence, or that of another."""
        result, problem = None, None
        try:
            result = action()
        except (OSError, ValueError) as error:
            problem = str(error)
        for number, other in enumerate(self.gather(problem)):
            if other is not None:
                raise RefusedByAll(problem or (f"rank {number}: {other}" if number else other))
        return cast(T, result)

    def agree(self, values: Mapping[str, Any], where: str = "") -> None:
        """Refuse, on all ranks alike, values that are not the same on all of them, which raises RefusedByAll.

        Args:
            values: by the names of what they are.
            where: what this rank has them of.
        """
        found = self.gather((dict(values), f" ({where})" if where else ""))
        first, of_first = found[0]
        for number, (other, of_other) in enumerate(found):
            if differing := [key for key in {**first, **other} if first.get(key) != other.get(key)]:
                key, more = differing[0], f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
                raise RefusedByAll(
                    f"{key} is {_shown(first, key)}{of_first} on rank 0 and {_shown(other, key)}{of_other} on "
                    f"rank {number}{more}: start all ranks with the same command, files and version of igae"
                )

    def sum(self, values: "Tensor") -> "Tensor":
        """Element-wise sum over the ranks of a CPU tensor."""
        total = values.clone()
        if self._group is not None:
            self._dist.all_reduce(total, group=self._group)
        return total


def available_cores(cgroup: Path = CGROUP, cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: those of its affinity, and no more than the quota of its control groups.

    Args:
        cgroup: names the groups of this process, as /proc/self/cgroup.
        cgroups: where the files of groups are, of version 1 or 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(cgroup, cgroups)])))


def control_groups(
    controller: str, cgroup: Path = CGROUP, cgroups: Path = CGROUPS
) -> Iterator[tuple[Literal[1, 2], Path]]:
    """The control groups of this process that have a controller (cpu, memory), and those around them: version and
    folder. The arguments are those of :func:`available_cores`."""
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        if controllers and controller not in controllers.split(","):
            continue
        # In a container without a cgroup namespace the path is the host's, and the container's own group is at the top.
        group = cgroups / (controller if controllers else "") / path.strip("/")
        around = (folder for folder in (group, *group.parents) if folder.is_relative_to(cgroups))
        yield from ((1 if controllers else 2, folder) for folder in around)


def _quotas(cgroup: Path, cgroups: Path) -> Iterator[float]:
    """The quotas of this process's groups and of those around them, in cores."""
    for version, folder in control_groups("cpu", cgroup, cgroups):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(_read(folder / name) for name in names).split()
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):  # not "max", -1
            yield int(words[0]) / int(words[1])


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
    number = os.environ.get(THREADS)
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if number is None or not launched or number != "1":  # another number is an option of the launch
        return number is not None
    return f"\0{THREADS}=" in "\0" + _read(Path(f"/proc/{os.getppid()}/environ"))  # what the launcher was started with
