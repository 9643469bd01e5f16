# SPDX-License-Identifier: Apache-2.0
"""The only file that knows Accelerate and DeepSpeed: processes, devices, and the shared modules with their optimizer.

What is shared between ranks (autoencoder and decoding MLP) is trained under the strategy that the launch names:

* one process, or ``MULTI_GPU``: the whole module on each rank, its gradients exchanged (DDP);
* ``FSDP`` (version 2): torch's ``fully_shard``, called here and not through Accelerate, which shards nothing on CPUs;
* ``DEEPSPEED``: ZeRO stage 1, 2 or 3.

Plane rows are an input of the wrapped module: no strategy ever sees a plane.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from igae.ranks import check_rank_variables, join, use_share, world_size
from igae.training.parallel.ddp import DDP
from igae.training.parallel.deepspeed import DeepSpeed
from igae.training.parallel.fsdp import FSDP
from igae.training.parallel.sharded import Sharded
from igae.training.parallel.strategy import Groups, Rates, Strategy

LAUNCH = "launch with one of the files in launch/accelerate, e.g. `accelerate launch --config_file "


class Engine:
    """One training engine a process; making it joins the process group.

    Args:
        timeout: seconds after which a rank that waits for another one gives up.
        async_steps: on a GPU, leave steps out on the device, without telling the host first; not where sharded.
        alone: each rank makes steps of its own; nothing that they share is trained.

    Raises:
        ValueError: the launch is one that training can't work under.
    """

    def __init__(self, timeout: float = 600.0, async_steps: bool = False, alone: bool = False) -> None:
        check_rank_variables()
        deepspeed = _switch("ACCELERATE_USE_DEEPSPEED")
        _check_launch(deepspeed)
        join(timeout)
        world, on_gpu = world_size(), torch.cuda.is_available()
        ahead = on_gpu and async_steps
        if ahead:
            # Captured steps run one after another, and other collectives wait until they have ended (see ddp.py): NCCL
            # need not separate them with fences, which cost more than a small collective.
            os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
        # cpu=True in code: `accelerate launch --cpu` with several processes silently starts independent ones.
        # DeepSpeed refuses it, and needs to be told gloo instead.
        backend = {}
        if deepspeed and not on_gpu:
            from deepspeed import ops

            backend = {"backend": "gloo"}
            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of g++, for what gloo does
        self._accelerator = Accelerator(
            cpu=not on_gpu and not deepspeed,
            mixed_precision="no",  # the model has its own autocast, alike under every strategy
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout), **backend)],
        )
        seen = self._accelerator.num_processes
        if seen != world or (world > 1 and not dist.is_initialized()):
            raise ValueError(
                f"the launcher started {world} processes but Accelerate sees {seen}: {LAUNCH}"
                f"launch/accelerate/ddp.yaml --num_processes {world}`"
            )
        self.device: torch.device = self._accelerator.device
        self._strategy: Strategy = Strategy(self.device, ahead)
        if alone:
            pass
        elif deepspeed:
            self._strategy = DeepSpeed(self.device, self._accelerator)
        elif world > 1:
            self._strategy = FSDP(self.device) if _switch("ACCELERATE_USE_FSDP") else DDP(self.device, ahead)
        use_share()  # here: Accelerate may have set a number of its own
        if on_gpu:
            torch.set_float32_matmul_precision("high")

    @property
    def strategy(self) -> str:
        return self._strategy.name

    @property
    def replicated(self) -> bool:
        """Each rank has all of the module."""
        return not isinstance(self._strategy, Sharded)

    @property
    def forward_waits(self) -> bool:
        """A forward pass waits for other ranks: it takes as long as theirs."""
        return self._strategy.forward_waits

    @property
    def asynchronous(self) -> bool:
        """Forward, backward and step ask the host for nothing: it need not know whether steps were left out, and they
        can be captured in a CUDA graph."""
        return self._strategy.async_steps

    def compute_in(self, bf16: bool) -> None:
        """Modules that are prepared from now on compute in bfloat16, or don't: DDP sends large gradients in it, too."""
        self._strategy.bf16 = bf16

    def prepare(self, module: nn.Module, groups: Groups) -> None:
        """Take the shared module and make its Adam, with one named group of parameters for each learning rate.

        Parameters that are in no group are frozen. An earlier optimizer and its moments are dropped. Collective.
        """
        trained = {id(p) for _, parameters in groups for p in parameters}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._strategy.prepare(module, groups)

    def forward(self, *arguments: Any, last: bool = True) -> Any:
        """Call the wrapped module; ``last``: no other backward pass comes before the step."""
        return self._strategy.forward(arguments, last)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of a loss; after the ``last`` one comes :meth:`agree`."""
        if loss.requires_grad:
            self._strategy.backward(loss, last)

    def agree(self, watched: Tensor, stop: bool | Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Make shared gradients the mean over the ranks, and agree on the step. Collective.

        Args:
            watched: a number on the device that is finite where this rank's own losses and gradients are: their sum.
            stop: this rank was asked to stop; as a tensor 1 or 0, float32.

        Returns:
            1 where they and all shared gradients are finite on all ranks, else 0; 0 where no rank is to stop, else
            more; and, of the shared gradients that this rank holds, by group the norms [n] of their tensors. On the
            device.
        """
        if not isinstance(stop, Tensor):
            stop = torch.full((), float(stop), device=self.device)
        if self.replicated:  # the same gradients on all ranks, afterwards
            watched, stop = self._strategy.agree(watched, stop)
        norms = self._norms()
        watched = sum((norm.sum() for norm in norms.values()), watched)
        if not self.replicated:
            watched, stop = self._strategy.agree(watched, stop)
        return (watched - watched == 0).float(), stop, norms  # infinite less infinite is not a number

    def _norms(self) -> dict[str, Tensor]:
        groups = {name: grads for name, grads in self._strategy.gradients().items() if grads}
        if not groups:
            return {}
        norms = torch.stack(torch._foreach_norm([grad for grads in groups.values() for grad in grads]))
        return dict(zip(groups, norms.split([len(grads) for grads in groups.values()]), strict=True))

    def step(self, learning_rates: Rates, apply: Tensor) -> Tensor:
        """Adam's step with a learning rate for each group (or nothing, where ``apply`` is 0), and gradients cleared.

        Returns:
            1 or 0 on the device, whether it was applied: DeepSpeed leaves steps out whose gradients are not finite.
        """
        return self._strategy.step(learning_rates, apply)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The module that was prepared has the trained weights, on the device. Collective."""
        self._strategy.gather()
        try:
            yield
        finally:
            self._strategy.release()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, whole, as ``<parameter name>/<moment>``. Collective."""
        return self._strategy.optimizer_state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`optimizer_state` gave, under any strategy and number of ranks. Collective."""
        if state:
            self._strategy.load_optimizer_state(state)

    def finish(self) -> None:
        """Training of the module is over: it has its weights, and the optimizer is gone. Collective."""
        self._strategy.gather()
        self._strategy.drop()

    def close(self) -> None:
        """Leave the process group, when all stages are closed."""
        self._strategy.drop()
        if dist.is_initialized():
            gc.collect()  # NCCL waits until no CUDA graph has its collectives any more
            dist.destroy_process_group()


def _switch(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _check_launch(deepspeed: bool) -> None:
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local >= gpus:
        raise ValueError(f"this machine has {gpus} GPUs, and more processes than that were launched on it")
    if deepspeed:
        missing = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"the launch asks for DeepSpeed and {missing[0]} is missing: pip install -e '.[deepspeed]'"
            )
