# SPDX-License-Identifier: Apache-2.0
"""Data parallel: the whole module on each rank, gradients averaged while the backward pass goes on."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from igae.training.parallel.all_reduce import BucketedAllReduce
from igae.training.parallel.strategy import Groups, Strategy, on_all_ranks


class DDP(Strategy):
    """Each rank has all of the module, gradients are averaged in the backward pass."""

    name = "DDP"

    def __init__(self, device: torch.device, async_steps: bool = False) -> None:
        super().__init__(device, async_steps)
        self._all_reduce: BucketedAllReduce | None = None

    def prepare(self, module: nn.Module, groups: Groups) -> None:
        super().prepare(module, groups)
        if self.device.type == "cuda":  # no collective of a captured step must be under way at the next one
            torch.cuda.synchronize()
        if groups:
            trained = list(self.parameters().values())
            for parameter in trained:
                dist.broadcast(parameter.detach(), 0)
            self._all_reduce = self.all_reduce(trained)

    @property
    def _sent_as(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def all_reduce(self, parameters: list[nn.Parameter]) -> BucketedAllReduce:
        return BucketedAllReduce(parameters, sent_as=self._sent_as)

    def drop(self) -> None:
        if self._all_reduce is not None:
            self._all_reduce.close()
        self._all_reduce = None
        super().drop()

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._all_reduce is not None and last:
            self._all_reduce.expect()
        loss.backward()

    def agree(self, watched: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        if self._all_reduce is None:
            return on_all_ranks(watched, stop)
        watched, stop = self._all_reduce.finish([watched, stop])
        return watched, stop
