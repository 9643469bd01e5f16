# SPDX-License-Identifier: Apache-2.0
"""How the module that ranks share is trained: by one process, the base of the other strategies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Groups = Sequence[tuple[str, list[nn.Parameter]]]
"""Named groups of parameters, one for each learning rate."""
Rates = Mapping[str, float | Tensor]
"""Learning rates by the names of groups; as tensors only where steps are captured in a CUDA graph."""


def adam(groups: Groups, device: torch.device, capturable: bool = False) -> torch.optim.Adam:
    """With `capturable`, which a CUDA graph needs, learning rates are tensors on the device."""
    settings = [
        {"params": parameters, "name": name, "lr": torch.zeros((), device=device) if capturable else 0.0}
        for name, parameters in groups
    ]
    return torch.optim.Adam(settings, fused=device.type == "cuda", capturable=capturable)


class Strategy:
    """One process: the module itself is trained. The base of the other strategies."""

    name = "one process"
    forward_waits = False
    """A forward pass waits for other ranks."""
    bf16 = False
    """The module computes in bfloat16."""

    def __init__(self, device: torch.device, async_steps: bool = False) -> None:
        self.device, self.async_steps = device, async_steps
        self.optimizer: Any = None
        self.module: nn.Module = nn.Module()  # what was given to prepare
        self.trained: nn.Module = self.module  # what is trained: the same, or a sharded copy of it
        self.wrapped: Any = None

    def prepare(self, module: nn.Module, groups: Groups) -> None:
        self.drop()
        self.module = self.trained = self.wrapped = module
        self.optimizer = adam(groups, self.device, capturable=self.async_steps) if groups else None

    def drop(self) -> None:
        """Let go of what was trained with; the module stays as it is."""
        self.optimizer, self.wrapped, self.trained = None, None, self.module

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trained.named_parameters() if p.requires_grad}

    def forward(self, arguments: Sequence[Any], last: bool) -> Any:
        return self.wrapped(*arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def agree(self, watched: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """A number that is finite where `watched` is on all ranks, and one that is 0 where `stop` is on all, else more.
        The gradients of :meth:`gradients` are the mean over the ranks afterwards. Collective."""
        return watched, stop

    def gradients(self) -> dict[str, list[Tensor]]:
        """By the names of groups: this rank's part of their gradients, those that there are."""
        found = {}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            grads = [p.grad for p in group["params"] if p.grad is not None]
            found[group["name"]] = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        return found

    def step(self, learning_rates: Rates, apply: Tensor) -> Tensor:
        if self.optimizer is None:
            return apply
        if self.async_steps:
            self.optimizer.found_inf = 1.0 - apply  # a fused Adam looks at it there: gradient scalers do the same
        if self.async_steps or apply:
            for group in self.optimizer.param_groups:
                rate = learning_rates[group["name"]]
                if not self.async_steps:
                    group["lr"] = rate
                elif isinstance(rate, Tensor):
                    group["lr"].copy_(rate)
                else:
                    group["lr"].fill_(rate)
                for parameter in group["params"]:
                    # All parameters step together, as in DeepSpeed's flat ones: one that a step does not reach still
                    # moves by its momentum.
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return apply

    def gather(self) -> None:
        """Bring the trained weights into the module."""

    def release(self) -> None:
        """The weights in the module are not needed any more."""

    def optimizer_state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.parameters().items():
            for key, value in (self.optimizer.state.get(parameter, {}) if self.optimizer else {}).items():
                state[f"{name}/{key}"] = value.full_tensor() if isinstance(value, DTensor) else value
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        on_device = self.device.type == "cuda"  # the fused Adam keeps its step counts there too
        parameters = self.parameters()
        for key, value in state.items():
            name, moment = key.rsplit("/", 1)
            stays = moment == "step" and not on_device
            if name not in parameters:  # frozen since
                continue
            own = self.optimizer.state[parameters[name]]
            own[moment] = value.clone() if stays else self.part(parameters[name], moment, value.to(self.device))

    def part(self, parameter: nn.Parameter, moment: str, value: Tensor) -> Tensor:
        """This rank's part of a moment."""
        return value.clone()


def on_all_ranks(watched: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """See :meth:`Strategy.agree`; gradients are left alone."""
    sums = torch.stack([watched.float(), stop])
    dist.all_reduce(sums)
    return sums[0], sums[1]
