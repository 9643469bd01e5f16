# SPDX-License-Identifier: Apache-2.0
"""The only file that knows Accelerate: devices, precision, and the shared modules with their optimizer."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from igae import distributed


class Engine:
    """One training engine a process.

    Raises:
        ValueError: the launch is one that this version can't train under.
    """

    def __init__(self, precision: str) -> None:
        # cpu=True in code: `accelerate launch --cpu` with several processes silently starts independent ones.
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if precision == "bf16" else "no"
        )
        world = distributed.world_size()
        if self._accelerator.num_processes != world:
            raise ValueError(
                f"the launcher started {world} processes but Accelerate sees {self._accelerator.num_processes}: launch "
                "with `accelerate launch --config_file launch/one_process.yaml`"
            )
        if world > 1:
            raise ValueError(
                f"igae trains on one process so far, and {world} were launched: launch with "
                "`accelerate launch --config_file launch/one_process.yaml`"
            )
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")

    @property
    def device(self) -> torch.device:
        device: torch.device = self._accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        return bool(self._accelerator.is_main_process)

    def prepare(self, module: nn.Module, groups: Sequence[tuple[str, list[nn.Parameter]]]) -> None:
        """Take the shared module and make its Adam, with one named group of parameters for each learning rate.

        Parameters that are in no group are frozen. An earlier optimizer and its moments are dropped.
        """
        trained = {id(p) for _, parameters in groups for p in parameters}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        # Accelerate wraps forward in place: undo it, or the wraps of all stages would pile up.
        self.module = self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        self._accelerator.free_memory()
        self.wrapped = self._accelerator.prepare_model(module)
        self._optimizer = None
        if groups:
            settings = [{"params": parameters, "name": name, "lr": 0.0} for name, parameters in groups]
            adam = torch.optim.Adam(settings, fused=self.device.type == "cuda")
            self._optimizer = self._accelerator.prepare_optimizer(adam)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def step(self, learning_rates: dict[str, float]) -> None:
        """Adam's step with a learning rate for each group, and gradients cleared."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rates[group["name"]]
            self._optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, as ``<parameter name>/<moment>``."""
        state: dict[str, Tensor] = {}
        if self._optimizer is not None:
            for name, parameter in self.module.named_parameters():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    state[f"{name}/{key}"] = value
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`optimizer_state` gave."""
        if self._optimizer is None:
            return
        adam: torch.optim.Optimizer = self._optimizer.optimizer
        parameters = dict(self.module.named_parameters())
        on_device = self.device.type == "cuda"  # the fused Adam keeps its step counts there too
        for key, value in state.items():
            name, moment = key.rsplit("/", 1)
            stays = moment == "step" and not on_device
            adam.state[parameters[name]][moment] = value.clone() if stays else value.to(self.device, copy=True)
