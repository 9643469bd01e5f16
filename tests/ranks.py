# SPDX-License-Identifier: Apache-2.0
"""Real processes for tests, as ranks of one run. They are forked from a server that has the slow imports behind it, so
that a start costs a fraction of a second."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from igae.training import DDP, BucketedAllReduce

# With GPUs each process imports for itself: modules look for GPUs, after which a fork can not use CUDA.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PRELOADED = ["tests.conftest"]  # the first, for how it imports diffusers
PRELOADED += ["igae.training.trainer", "igae.training.fit", "igae.viewer.report.page", "train", "runs", "pytest"]
PRELOADED += ["diffusers.models.autoencoders.autoencoder_kl"]
# DeepSpeed imports it when ZeRO starts, and it compiles something: three seconds of a core.
PRELOADED += ["deepspeed.runtime.zero.muon.muon_optimizer"]
CONTEXT.set_forkserver_preload(PRELOADED)
TIMEOUT = 300.0
STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


def send_in_buckets() -> None:
    """From now on this process sends gradients of small models in buckets, which else would all go at the end, in one
    piece."""
    DDP.all_reduce = lambda self, parameters: BucketedAllReduce(  # type: ignore[method-assign]
        parameters, bucket_bytes=2**13, last_bytes=2**11, small_bytes=2**9, sent_as=self._sent_as
    )


def launch_environment(strategy: str) -> dict[str, str]:
    """What `accelerate launch` sets for the files in launch/accelerate (tests/test_launch.py starts them for real)."""
    if strategy.startswith("zero"):
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
    if strategy == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _child(
    rank: int, world: int, port: int, log: str | None, answer: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",  # else Accelerate sets the number of threads to that of the cores
        }
    )
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    try:
        answer.send_bytes(pickle.dumps((True, function(*args))))  # not send: tensors would be shared memory
    except SystemExit:
        raise
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sys.stderr.flush()
        os._exit(1)  # exit handlers of a broken process group may wait for the others
    finally:
        answer.close()


class Ranks:
    """Processes of one run: `function(*args)` in each of them, under the environment that a launcher would set.

    Args:
        log: file that all ranks write their standard streams to.
    """

    def __init__(self, function: Callable[..., Any], world: int, *args: Any, log: str | None = None) -> None:
        port = free_port()
        self.processes: list[BaseProcess] = []
        self._answers: list[Connection] = []
        for rank in range(world):
            receive, send = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_child, args=(rank, world, port, log, send, function, args))
            process.start()
            send.close()
            self.processes.append(process)
            self._answers.append(receive)

    def exit_codes(self, timeout: float = TIMEOUT) -> list[int | None]:
        """Waits for all processes; None for those that the timeout found running (they are killed)."""
        codes = []
        for process in self.processes:
            process.join(timeout)
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes

    def results(self, timeout: float = TIMEOUT) -> list[Any]:
        """What the function returned, by rank; AssertionError with the traceback of a rank that failed."""
        results, problems = [], []
        for rank, (process, answer) in enumerate(zip(self.processes, self._answers, strict=True)):
            try:
                good, value = pickle.loads(answer.recv_bytes()) if answer.poll(timeout) else (False, "no answer")
            except EOFError:
                good, value = False, "died without an answer"
            results.append(value)
            if not good:
                problems.append(f"rank {rank}: {value}")
                for other in self.processes:
                    other.join(5)
                    other.kill()
            process.join(10)
        assert not problems, "\n".join(problems)
        return results


def run(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Results of `function(*args)`, a module's top-level function, called in each of `world` ranks."""
    return Ranks(function, world, *args).results()
