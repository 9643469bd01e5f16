# SPDX-License-Identifier: Apache-2.0
"""The scenes that a rank owns: a row of numbers for each, and the optimizer state of the rows."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from igae.ranks import derive_seed
from igae.scenes.config import PlanesConfig
from igae.scenes.planes import initial_row
from igae.scenes.row_adam import CHUNK, RowAdam
from igae.scenes.row_adam_cuda import CudaRowAdam, make_row_adam
from igae.scenes.tiers import RowPool, Storage


class SceneStore:
    """Rows of scenes with their optimizer: what checkpoints call a rank's scenes.

    A row is a scene's tri-planes [3, R, R, C] or, with base planes, the part of them that is its own (see
    `igae.scenes.planes`). In training, a step takes the rows of its scenes as a leaf of autograd and hands their
    gradient back:

        rows, index = store.locate(scenes)
        leaf = store.take(rows).requires_grad_()
        ...
        store.step(rows, leaf.grad, learning_rate)

    Rows that a step does not touch still move by their momentum. These updates are deferred until a row is accessed by
    :meth:`take`, :meth:`read` or :meth:`catch_up`; ``rows`` alone are as they were last written.

    Rows may be in a tier below the device (`igae.scenes.tiers`). Then rows that steps work on are slots of a pool, and
    scenes come into slots when they are located. All results have the same bits as those of rows on the device.

    Attributes:
        ids: int64 [N] on the CPU, global ids of the scenes in the order of the rows.
        slots: scenes that can be on the device together.

    Args:
        seed: rows start from noise that depends on (seed, scene id) alone, not on the other scenes. None: rows are
            unset until :meth:`load_state_dict`.
        storage: where the rows are.
    """

    def __init__(
        self,
        config: PlanesConfig,
        ids: Sequence[int],
        seed: int | None,
        device: torch.device,
        storage: Storage = Storage(),  # noqa: B008
    ) -> None:
        assert len(set(ids)) == len(ids)
        self.ids = torch.tensor(list(ids), dtype=torch.int64)
        self._row_of = {int(scene): row for row, scene in enumerate(ids)}
        self._adam: RowAdam | None = None
        self._pool = None if storage.tier == "device" else RowPool(config.row_shape, len(ids), storage, device)
        self._on_device = (
            self._pool.parameters if self._pool else torch.empty(len(ids), *config.row_shape, device=device)
        )
        self.slots = len(self._on_device)
        for start in range(0, len(ids) if seed is not None else 0, CHUNK):
            rows = []
            for scene in ids[start : start + CHUNK]:
                generator = torch.Generator().manual_seed(derive_seed(seed or 0, "planes", int(scene)))
                rows.append(initial_row(config, generator))
            self.load_state_dict({"planes": torch.stack(rows)}, start)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> Tensor:
        """float32 [N, *row_shape], on the device or in their tier, good until the next step."""
        return self._on_device if self._pool is None else self._pool.state()["planes"]

    def locate(self, scenes: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows of the scenes of some views, and the place of each view's scene among them.

        Args:
            scenes: global scene ids [B], on the CPU, of no more scenes than there are slots.

        Returns:
            rows [S] in the order of the scenes' ``ids`` and index [B] with ``ids[rows[index]] == scenes``, both int64
            on the CPU. Where rows are in a tier below the device, slots in their place, good until the next call.
        """
        rows, index = torch.unique(self._rows_of(scenes.tolist()), return_inverse=True)
        return (rows if self._pool is None else torch.tensor(self._pool.locate(rows.tolist()))), index

    def prefetch(self, scenes: Tensor) -> None:
        """Begin to bring scenes to the device, beside those that were located last, whose step has been launched."""
        if self._pool is not None:
            self._pool.prefetch(torch.unique(self._rows_of(scenes.tolist())).tolist())

    def start_optimizer(self, backend: Literal["auto", "cuda", "torch"] = "auto") -> None:
        """Drop the optimizer state, if there is some, and start with moments of zero; see `make_row_adam`."""
        if self._pool is not None:
            self._pool.start_optimizer(None)
        self._adam = None  # first: moments are as large as the rows
        self._adam = make_row_adam(self._on_device, backend=backend)
        if self._pool is not None:
            self._pool.start_optimizer(self._adam)

    @property
    def can_be_captured(self) -> bool:
        """Whether :meth:`take` and :meth:`step` can be part of a CUDA graph (after :meth:`reserve`)."""
        return isinstance(self._adam, CudaRowAdam)

    def take(self, rows: Tensor) -> Tensor:
        """Up-to-date copies [S, *row_shape] of rows (int64 [S], distinct); zeros where a row is -1 (padding)."""
        return self._optimizer.visit(rows)

    def step(
        self,
        rows: Tensor,
        gradient: Tensor,
        learning_rate: float | Tensor,
        *,
        scale: float = 1.0,
        apply: Tensor | None = None,
    ) -> None:
        """One Adam step of all rows, of which ``rows`` have a gradient. They must have been taken since the last step.

        Args:
            gradient: [S, *row_shape], of the loss times 1 / ``scale``.
            apply: 0-d; where it is 0, nothing changes.
        """
        self._optimizer.step(rows, gradient, learning_rate, scale=scale, apply=apply)

    def read(self, ids: Sequence[int], *, catch_up: bool = True) -> Tensor:
        """Rows [n, *row_shape] of n different scenes on the device, in the order of ``ids``: up to date, or without
        ``catch_up`` as they were last written."""
        rows = self._rows_of(ids)
        if self._pool is not None:
            return self._pool.read(rows, catch_up)
        if self._adam is not None and catch_up:
            self._adam.catch_up(rows)
        return self._on_device[rows.to(self._on_device.device)]

    def catch_up(self) -> None:
        """Apply all deferred updates."""
        if self._pool is not None:
            self._pool.catch_up(torch.arange(len(self)))
        elif self._adam is not None:
            self._adam.catch_up()

    def reserve(self, steps: int) -> None:
        """Make room for so many further steps. Waits for the device."""
        self._optimizer.reserve(self._optimizer.step_count + steps)

    def state_dict(self) -> dict[str, Tensor]:
        """``ids``, the rows as ``planes`` and, where the optimizer was started, its tensors with a row for each scene
        and ``learning_rates`` of all steps. Not copies."""
        if self._pool is not None:
            return {"ids": self.ids, **self._pool.state()}
        state = {"ids": self.ids, "planes": self._on_device}
        return state if self._adam is None else state | self._adam.state()

    def load_state_dict(self, state: dict[str, Tensor], start: int = 0) -> None:
        """Take back what is given of :meth:`state_dict`, rows in the order of ``ids`` from that at ``start`` on:
        ``planes``, the tensors of the optimizer (which must have been started), or both."""
        if "learning_rates" in state:
            self._optimizer.load_state(self._optimizer.state() | {"learning_rates": state["learning_rates"]})
        if self._pool is not None:
            self._pool.load(state, start)
            return
        own = self.state_dict()
        for name in state.keys() - {"ids", "learning_rates"}:
            place, rows = own[name][start : start + len(state[name])], state[name]
            if place.shape != rows.shape:
                raise ValueError(f"{name} of the planes is {list(rows.shape)}, not {list(place.shape)}")
            place.copy_(rows)

    @property
    def _optimizer(self) -> RowAdam:
        assert self._adam is not None, "start_optimizer comes first"
        return self._adam

    def _rows_of(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([self._row_of[int(scene)] for scene in ids], dtype=torch.int64)
