# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO, stages 1 to 3."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from igae.ranks import rank, world_size
from igae.training.parallel.sharded import Sharded
from igae.training.parallel.strategy import Groups, Rates, adam


class DeepSpeed(Sharded):
    def __init__(self, device: torch.device, accelerator: Accelerator) -> None:
        super().__init__(device)
        self._accelerator = accelerator
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        self._stage = zero.get("stage", 0)
        self.name = f"DeepSpeed ZeRO-{self._stage}"
        self.forward_waits = self._stage == 3
        problem = None
        if self._stage not in (1, 2, 3):
            problem = f"ZeRO stage {self._stage}: choose 1, 2 or 3"
        elif config.get("fp16", {}).get("enabled") in (True, "true") or config.get("bf16", {}).get("enabled") is True:
            problem = "fp16 or bf16: leave them out, train.precision says what the arithmetic is"
        elif config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
            problem = "gradient_accumulation_steps: leave it out, and set train.*.accumulate"
        elif config.get("gradient_clipping", "auto") not in ("auto", 0, 0.0):
            problem = "gradient_clipping: leave it out, gradients are not clipped"
        elif any(zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("optimizer", "param")):
            problem = "offloading: leave it out"
        if problem is not None:
            raise ValueError(f"the DeepSpeed configuration asks for {problem}")
        # Batches and accumulation are the recipe's; DeepSpeed must not scale by them. Accelerate would clip at 1.0.
        config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, gradient_clipping=0.0)
        for key in [key for key, value in zero.items() if value == "auto"]:
            del zero[key]  # DeepSpeed's own defaults: Accelerate can only derive these for language models

    def shard(self) -> Any:
        return self.trained  # together with the optimizer

    def start(self, groups: Groups) -> None:
        self.wrapped, _ = self._accelerator.prepare(self.trained, adam(groups, self.device))
        self.optimizer = self.wrapped.optimizer
        # What Adam makes in its first step, for all groups at once: DeepSpeed links them when the first has stepped.
        on = self.device if self.device.type == "cuda" else torch.device("cpu")
        for flat in self._flat():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), device=on),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self._stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def drop(self) -> None:
        if self.optimizer is not None:
            self.wrapped.destroy()
        self._accelerator.free_memory()
        super().drop()

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.optimizer is None:
            loss.backward()
            return
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss)

    def gradients(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        if self.optimizer is None:
            return found
        for i, grads in self.optimizer.averaged_gradients.items():
            number = self.optimizer.sub_group_to_group_id[i] if self._stage == 3 else i
            found.setdefault(self.optimizer.param_groups[number]["name"], []).extend(grads or [])
        return found

    def step(self, learning_rates: Rates, apply: Tensor) -> Tensor:
        if self.optimizer is None:
            return apply
        from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["name"]]
        if not apply:
            # The way in which DeepSpeed discards a step on all ranks: a gradient that is not finite.
            parameter = next(iter(self.parameters().values()))
            if self._stage < 3:
                safe_set_full_grad(parameter, torch.full(parameter.shape, torch.nan, device=self.device))
            elif rank() == 0:  # the parts of others may be padding, which would keep it
                gradient = safe_get_local_grad(parameter).clone()
                gradient.view(-1)[0] = torch.nan
                safe_set_local_grad(parameter, gradient)
        self.wrapped.step()
        return torch.full_like(apply, not self.optimizer.overflow)

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.parameters().values())):
            yield

    def _flat(self) -> list[Tensor]:
        """What the inner Adam steps: this rank's parts of the groups, each in one tensor."""
        if self._stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        state, step = {}, self.optimizer.optimizer.state[self._flat()[0]]["step"]
        for name, parameter in self.parameters().items():
            state[f"{name}/step"] = step.clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        if self.optimizer is None:
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        step = next(value for key, value in state.items() if key.endswith("/step"))
        for flat in self._flat():
            self.optimizer.optimizer.state[flat]["step"].copy_(step)
        for name, parameter in self.parameters().items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if f"{name}/{moment}" not in state:  # frozen before
                    continue
                value = state[f"{name}/{moment}"].to(self.device)
                if self._stage < 3:
                    safe_set_full_optimizer_state(parameter, value, moment)
                    continue
                size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined] # the last rank's part is padded
                padded = torch.zeros(size * world_size(), device=self.device)
                padded[: value.numel()] = value.flatten()
                own = padded[size * rank() : size * (rank() + 1)]
                safe_set_local_optimizer_state(parameter, own, moment)
