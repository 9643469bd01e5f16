# SPDX-License-Identifier: Apache-2.0
"""FSDP2: torch's `fully_shard`. Not through Accelerate, which shards nothing on CPUs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from igae.training.parallel.sharded import Sharded


class FSDP(Sharded):
    name = "FSDP2"
    forward_waits = True

    def shard(self) -> Any:
        net = getattr(getattr(self.trained, "autoencoder", None), "net", None)
        for part in (net.encoder, net.decoder) if net is not None else ():
            fully_shard(part)
        return fully_shard(self.trained)

    def forward(self, arguments: Sequence[Any], last: bool) -> Any:
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        return self.wrapped(*arguments)

    def part(self, parameter: nn.Parameter, moment: str, value: Tensor) -> Tensor:
        if moment == "step" or not isinstance(parameter, DTensor):
            return value.clone()
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
