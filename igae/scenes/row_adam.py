# SPDX-License-Identifier: Apache-2.0
"""Adam over the rows of a large tensor, at the cost of the rows that a step touches."""

import math
from typing import Literal

import torch
from torch import Tensor

# Rows that move together: their moments are copied while they do.
CHUNK = 64


class RowAdam:
    """Adam (Kingma & Ba, ICLR 2015) for a tensor of which each step has gradients of a few rows only.

    ``exact`` computes what ``torch.optim.Adam`` over the whole tensor computes. There a row without gradient goes on
    moving by its momentum; here those moves are made when the row is next read (:meth:`catch_up`), in the same
    order and with the learning rates of their steps, so it makes no difference when or how often that happens.
    After ``horizon`` steps without a gradient the momentum is below float32's resolution, and the row rests.

    ``lazy`` leaves a row as it is between its visits; its bias correction counts its own visits.

    Args:
        parameters: [N, ...], float32. Updated in place.
    """

    def __init__(
        self,
        parameters: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        mode: Literal["exact", "lazy"] = "exact",
    ) -> None:
        self.parameters = parameters
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        self.betas, self.eps, self.mode = betas, eps, mode
        self.horizon = math.ceil(math.log(1e-9) / math.log(betas[0])) if betas[0] > 0 else 1
        count = len(parameters)
        # On the CPU: they decide what is launched, and reading them must not wait for the device.
        self.updated = torch.zeros(count, dtype=torch.int64)  # exact: last step applied; lazy: number of visits
        self.visited = torch.zeros(count, dtype=torch.int64)  # exact: step of the last gradient, 0 = never
        self.step_count = 0
        self._rates = torch.zeros(1024, dtype=torch.float64)  # learning rate of every step so far, grown by doubling

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None = None) -> None:
        """Apply the moves that rows still owe, up to the current step (exact mode; nothing to do in lazy mode).

        Args:
            rows: int64 [S] on the CPU, distinct; None for all rows.
        """
        if self.mode == "lazy":
            return
        rows = torch.arange(len(self.parameters)) if rows is None else rows
        until = torch.minimum(self.visited[rows] + self.horizon, torch.tensor(self.step_count))
        owed = torch.where(self.visited[rows] > 0, until - self.updated[rows], 0)
        # Longest debt first: the rows that still owe a j-th move are then a prefix.
        owed, order = torch.sort(owed, descending=True, stable=True)
        rows, owed = rows[order][owed > 0], owed[owed > 0]
        if len(rows) == 0:
            return
        for start in range(0, len(rows), CHUNK):
            self._move(rows[start : start + CHUNK], owed[start : start + CHUNK])

    def _move(self, rows: Tensor, owed: Tensor) -> None:
        device, beta1, beta2 = self.parameters.device, *self.betas
        longest = int(owed[0])
        steps = self.updated[rows][None, :] + torch.arange(1, longest + 1)[:, None]
        rates = self._rates[(steps - 1).clamp(max=self.step_count - 1)]
        size, root = self._factors(steps, rates)
        size, root = size.to(device), root.to(device)
        where = rows.to(device)
        p, m, v = self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where]
        shape = (-1,) + (1,) * (p.ndim - 1)
        for j in range(longest):
            active = int((owed > j).sum())
            m[:active].mul_(beta1)
            v[:active].mul_(beta2)
            self._apply(p[:active], m[:active], v[:active], size[j, :active].view(shape), root[j, :active].view(shape))
        self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where] = p, m, v
        self.updated[rows] += owed

    def _factors(self, steps: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), computed in float64, given in float32."""
        t = steps.double()
        size = rates / (1.0 - torch.pow(torch.tensor(self.betas[0], dtype=torch.float64), t))
        root = (1.0 - torch.pow(torch.tensor(self.betas[1], dtype=torch.float64), t)).rsqrt()
        return size.float(), root.float()

    def _apply(self, p: Tensor, m: Tensor, v: Tensor, size: Tensor, root: Tensor) -> None:
        p.sub_((m * size).div_(v.sqrt().mul_(root).add_(self.eps)))

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """One Adam step of the whole tensor, of which only some rows have a gradient.

        Args:
            rows: int64 [S] on the CPU, distinct. In exact mode they must have been caught up since the last step:
                their gradient was taken where they stand now.
            gradient: [S, ...].
            lr: learning rate of this step.
        """
        if self.step_count == len(self._rates):
            self._rates = torch.cat([self._rates, torch.zeros(max(1024, self.step_count), dtype=torch.float64)])
        self._rates[self.step_count] = lr
        self.step_count += 1
        now = self.step_count
        device, (beta1, beta2) = self.parameters.device, self.betas
        where = rows.to(device)
        p, m, v = self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where]
        shape = (-1,) + (1,) * (p.ndim - 1)
        if self.mode == "exact":
            # Steps beyond the horizon moved nothing, but the moments decayed in them.
            rest = torch.where(self.visited[rows] > 0, now - 1 - self.updated[rows], 0)
            if bool((rest > 0).any()):
                m *= torch.pow(torch.tensor(beta1, dtype=torch.float64), rest).float().to(device).view(shape)
                v *= torch.pow(torch.tensor(beta2, dtype=torch.float64), rest).float().to(device).view(shape)
            steps = torch.full_like(rows, now)
        else:
            steps = self.updated[rows] + 1
        m.lerp_(gradient, 1.0 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        size, root = self._factors(steps, torch.full(rows.shape, lr, dtype=torch.float64))
        self._apply(p, m, v, size.to(device).view(shape), root.to(device).view(shape))
        self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where] = p, m, v
        self.updated[rows] = steps
        self.visited[rows] = now

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters, by name; rows first in all but ``learning_rates``."""
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "updated": self.updated,
            "visited": self.visited,
            "learning_rates": self._rates[: self.step_count].clone(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises ValueError where shapes differ."""
        for name in ("exp_avg", "exp_avg_sq", "updated", "visited"):
            own: Tensor = getattr(self, name)
            if own.shape != state[name].shape:
                raise ValueError(f"optimizer of the planes: {name} is {list(state[name].shape)}, not {list(own.shape)}")
            own.copy_(state[name])
        self._rates = state["learning_rates"].clone()
        self.step_count = len(self._rates)
