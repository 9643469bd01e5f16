# SPDX-License-Identifier: Apache-2.0
"""Adam over the rows of a large tensor, at the cost of the rows that a step touches."""

import math

import torch
from torch import Tensor

CHUNK = 64
"""Rows that are updated together: their moments are copied meanwhile."""
SPREAD = 1.2
"""Deferred updates are applied together while the scale of their second moment changes by no more than this factor:
with the usual betas all of them from step 700 on, and in 12 parts at most before that."""
NODES = 3
"""Of :func:`quadrature`."""


def horizon_of(betas: tuple[float, float]) -> int:
    """Steps after which a row without gradient rests. Raises ValueError for betas that are out of range."""
    if not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
        raise ValueError(f"optimizer of the planes: betas must be in [0, 1) and (0, 1), not {betas}")
    return math.ceil(math.log(1e-9) / math.log(betas[0])) if betas[0] > 0 else 1


class RowAdam:
    """Adam (Kingma & Ba, ICLR 2015) for a tensor of which each step has gradients of a few rows only.

    It computes what ``torch.optim.Adam`` over the whole tensor computes. There momentum goes on updating a row without
    gradient. Here these updates are deferred and applied on access, all in one go (see :func:`quadrature`), to
    6e-8 of their sum or better: about float32's rounding. After ``horizon`` steps without a gradient the momentum is
    below float32's resolution, and the row rests. Equal calls give equal bits, but updates that are applied in two
    parts may differ in the last bits from those applied at once: runs are equal only if they catch up at equal steps.

    Rows are int64 [S], distinct; entries of -1 are padding and stand for no row. No method waits for the device, but
    :meth:`state` and :meth:`load_state` and what is given rows, a learning rate or a flag there. For planes on a GPU
    :class:`igae.scenes.CudaRowAdam` does the same and waits for nothing.

    Args:
        parameters: [N, ...], float32 or float64. Updated in place.
        betas: decays of the two moments, in [0, 1) and (0, 1), ValueError otherwise. ``horizon`` counts on the first to
            be well below the root of the second, as Adam's analysis does.
    """

    def __init__(self, parameters: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.horizon = horizon_of(betas)
        self.parameters, self.betas, self.eps = parameters, betas, eps
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        # On the CPU: they decide what is launched, and reading them must not wait for the device.
        self.updated = torch.zeros(len(parameters), dtype=torch.int64)  # last step applied
        self.visited = torch.zeros(len(parameters), dtype=torch.int64)  # step of the last gradient, 0 = never
        self._rates = torch.zeros(1024, dtype=torch.float64)  # learning rate of every step so far, grown by doubling
        self._steps = 0
        self._eps = torch.full((), eps, dtype=parameters.dtype, device=parameters.device)

    @property
    def step_count(self) -> int:
        """Steps so far."""
        return self._steps

    def reserve(self, steps: int) -> None:
        """Make room for the learning rates of so many steps in all, those so far among them."""
        if steps > len(self._rates):
            self._rates = torch.cat([self._rates, self._rates.new_zeros(steps - len(self._rates))])

    def deferred(self, updated: Tensor, visited: Tensor) -> Tensor:
        """How many updates of rows are deferred, from what :attr:`updated` and :attr:`visited` say of them."""
        until = (visited + self.horizon).clamp(max=self.step_count)
        return torch.where(visited > 0, until - updated, 0)

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None = None) -> None:
        """Apply the deferred updates of rows, up to the current step.

        Args:
            rows: None for all rows.
        """
        rows = torch.arange(len(self.parameters)) if rows is None else rows.cpu()
        rows = rows[rows >= 0]
        deferred = self.deferred(self.updated[rows], self.visited[rows])
        rows, deferred = rows[deferred > 0], deferred[deferred > 0]
        for some, left in zip(rows.split(CHUNK), deferred.split(CHUNK), strict=True):
            while len(some) > 0:
                left = left - self._apply_first(some, left)
                some, left = some[left > 0], left[left > 0]

    @torch.no_grad()
    def visit(self, rows: Tensor) -> Tensor:
        """Catch rows up and return copies of them, [S, ...]; zeros for padding."""
        rows = rows.cpu()
        self.catch_up(rows)
        copies = self.parameters[self._sent(rows.clamp(min=0))]
        padding = (rows < 0).nonzero()[:, 0]
        return copies.index_fill_(0, self._sent(padding), 0.0) if len(padding) > 0 else copies

    @torch.no_grad()
    def step(
        self, rows: Tensor, gradient: Tensor, lr: float | Tensor, *, scale: float = 1.0, apply: Tensor | None = None
    ) -> None:
        """One Adam step of the whole tensor, of which only some rows have a gradient.

        Args:
            rows: caught up since the last step, as their gradient was taken where they stand now. What the gradient is
                of padding doesn't matter.
            gradient: [S, ...], of the loss times 1 / scale.
            lr: learning rate of this step, a number or 0-d.
            scale: factor of the gradient.
            apply: 0-d; where it is zero there is no step and nothing changes.
        """
        if apply is not None and not apply:
            return
        rows, rate = rows.cpu(), float(lr)
        if scale != 1:
            gradient = gradient * scale
        kept = (rows >= 0).nonzero()[:, 0]
        if len(kept) < len(rows):
            rows, gradient = rows[kept], gradient[self._sent(kept)]
        if self._steps == len(self._rates):
            self.reserve(max(1024, 2 * self._steps))
        self._rates[self._steps] = rate
        self._steps += 1
        steps = torch.full_like(rows, self._steps)
        # Steps beyond the horizon updated nothing, but the moments decayed in them.
        decayed = torch.where(self.visited[rows] > 0, self._steps - self.updated[rows], 1)
        size, root = self._factors(steps, torch.full(rows.shape, rate, dtype=torch.float64))
        self._update(rows, size[None], root[None], decayed, gradient)
        self.updated[rows] = steps
        self.visited[rows] = self._steps

    def _apply_first(self, rows: Tensor, deferred: Tensor) -> Tensor:
        """Apply the first of the deferred updates that can be applied in one go; returns their number, [S], >= 1."""
        past = torch.arange(1, int(deferred.max()) + 1)[:, None]
        steps = self.updated[rows] + past
        size, root = self._factors(steps, self._rates[(steps - 1).clamp(max=self._steps - 1)])
        # In a step without gradient the moments are decayed by the steps since the last one that was applied.
        size, root = size * self.betas[0] ** past.double(), root * self.betas[1] ** (0.5 * past.double())
        together = (past <= deferred) & (root * SPREAD >= root[0])  # the scale falls from step to step
        count = together.sum(0)
        self._update(rows, *quadrature(torch.where(together, size, 0), root), count)
        self.updated[rows] += count
        return count

    def _factors(self, steps: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), in float64."""
        return rates / (1 - self.betas[0] ** steps.double()), (1 - self.betas[1] ** steps.double()).rsqrt()

    def _update(
        self, rows: Tensor, weights: Tensor, scales: Tensor, decayed: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Subtract the sum over k of weights[k] m / (scales[k] sqrt(v) + eps) from rows, whose moments decay by
        ``decayed`` steps: before it and with the gradient where there is one, else after it."""
        decays = torch.stack([beta ** decayed.double() for beta in self.betas])
        # One transfer to the device.
        table = self._sent(torch.cat([weights, scales, decays]).to(self.parameters.dtype))
        table = table[(...,) + (None,) * (self.parameters.ndim - 1)]
        weights, scales, (decay1, decay2) = table.split([len(weights), len(scales), 2])
        where = self._sent(rows)
        p, m, v = self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where]
        if gradient is not None:
            m.mul_(decay1).add_(gradient, alpha=1 - self.betas[0])
            v.mul_(decay2).addcmul_(gradient, gradient, value=1 - self.betas[1])
        x = v.sqrt()
        total = weights[0] / torch.addcmul(self._eps, x, scales[0])
        for weight, scale in zip(weights[1:], scales[1:], strict=True):
            total.addcdiv_(weight, torch.addcmul(self._eps, x, scale))
        p.addcmul_(m, total, value=-1)
        if gradient is None:
            m.mul_(decay1)
            v.mul_(decay2)
        self.parameters[where], self.exp_avg[where], self.exp_avg_sq[where] = p, m, v

    def _sent(self, table: Tensor) -> Tensor:
        """Copy a CPU tensor to the device."""
        if self.parameters.device.type == "cuda":  # a copy of pageable memory would wait for all work before it
            table = table.pin_memory()
        return table.to(self.parameters.device, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters, by name; rows first in all but ``learning_rates`` (on the CPU)."""
        tensors = {name: getattr(self, name) for name in ("exp_avg", "exp_avg_sq", "updated", "visited")}
        return {**tensors, "learning_rates": self._rates[: self.step_count].to("cpu", copy=True)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises ValueError where shapes differ."""
        for name in ("exp_avg", "exp_avg_sq", "updated", "visited"):
            own: Tensor = getattr(self, name)
            if own.shape != state[name].shape:
                raise ValueError(f"optimizer of the planes: {name} is {list(state[name].shape)}, not {list(own.shape)}")
            own.copy_(state[name])
        self._load_rates(state["learning_rates"])

    def _load_rates(self, rates: Tensor) -> None:
        self._rates = rates.to("cpu", torch.float64, copy=True)
        self._steps = len(rates)


def quadrature(masses: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Few masses that stand for many: Gauss's rule (Golub & Welsch, 1969) for each column.

    The deferred updates of a row add up to m times the sum over j of masses[j] / (places[j] x + eps), with x the root
    of the second moment. NODES masses with the same first 2 NODES moments give the same sum but for
    4 ((r - 1) / 4)^(2 NODES) of it, where r is the largest place over the smallest: 6e-8 for r = SPREAD, whatever x.

    Args:
        masses, places: [J, S], float64, not negative. Places without mass don't count.

    Returns:
        masses, places: [NODES, S], float64. Where all masses are 0, zeros at the first place.
    """
    total = masses.sum(0)
    share = torch.where(total > 0, masses / total, 0)
    center = torch.where(total > 0, (share * places).sum(0), places[0])
    # Lanczos's iteration gives the matrix whose eigenvalues are the new places. With fewer places than NODES it ends
    # early; what remains of the matrix is then coupled to nothing, and its eigenvalues get no mass.
    offset, vector = places - center, share.sqrt()
    before, diagonal, links = torch.zeros_like(vector), [], [torch.zeros_like(total)]
    for _ in range(NODES):
        image = offset * vector
        diagonal.append((image * vector).sum(0))
        image = image - diagonal[-1] * vector - links[-1] * before
        links.append(torch.linalg.vector_norm(image, dim=0))
        before, vector = vector, image / links[-1].clamp(min=1e-300)
    lower = torch.diag_embed(torch.stack(diagonal, -1)) + torch.diag_embed(torch.stack(links[1:NODES], -1), -1)
    values, vectors = torch.linalg.eigh(lower)
    return total * vectors[:, 0].square().T, center + values.T
