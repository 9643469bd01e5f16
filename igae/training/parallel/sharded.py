# SPDX-License-Identifier: Apache-2.0
"""What strategies have in common that shard the module over the ranks."""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from igae.training.parallel.strategy import Groups, Strategy, adam, on_all_ranks


class Sharded(Strategy):
    """A copy of the module is trained, of which each rank keeps a part. The module itself waits on the CPU until its
    weights are asked for."""

    def prepare(self, module: nn.Module, groups: Groups) -> None:
        self.drop()
        self.module = self.trained = module
        if not groups:
            self.wrapped = module
            return
        names = {id(p): name for name, p in module.named_parameters()}
        self.trained = copy.deepcopy(module)
        self.wrapped = self.shard()
        # By name: sharding may have replaced the parameters.
        copies = dict(self.trained.named_parameters())
        self.start([(group, [copies[names[id(p)]] for p in parameters]) for group, parameters in groups])
        self.release()

    @abstractmethod
    def shard(self) -> Any:
        """Shard the copy and return what is called."""

    def agree(self, watched: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        return on_all_ranks(watched, stop)

    def start(self, groups: Groups) -> None:
        """Make the optimizer of the copy."""
        self.optimizer = adam(groups, self.device)

    @torch.no_grad()
    def gather(self) -> None:
        if self.trained is self.module:
            return
        self.module.to(self.device)
        own = dict(self.module.named_parameters())
        with self.whole():
            for name, parameter in self.parameters().items():
                own[name].copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
        for mine, theirs in zip(self.module.buffers(), self.trained.buffers(), strict=True):
            mine.copy_(theirs)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The parameters of the trained copy are whole on this rank, or tensors that know how to become so."""
        yield

    def release(self) -> None:
        if self.trained is not self.module:
            self.module.cpu()
