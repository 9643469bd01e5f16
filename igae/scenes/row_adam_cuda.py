# SPDX-License-Identifier: Apache-2.0
"""The rows' Adam as CUDA kernels (kernels/row_adam.cu), with all that it keeps of rows and steps on the device."""

import ctypes
import functools
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from igae.kernels import LIBRARIES, Library, pointer, unavailable
from igae.scenes.row_adam import SPREAD, RowAdam, horizon_of

SOURCE = Path(__file__).parent / "kernels" / "row_adam.cu"
KERNELS: list[tuple[Path, dict[str, int]]] = [(SOURCE, {})]
"""What can be compiled ahead of time, with its macros."""
RECORD = 8
"""Floats of a slot's head and of each of its parts."""
THREADS, ITEMS = 256, 2
MOST_PARTS = 256


class Params(ctypes.Structure):
    """The kernels' argument: `struct Params` in kernels/row_adam.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "p m v copies gradient rows updated visited steps rates".split()),
        *((name, ctypes.c_void_p) for name in "records lr apply".split()),
        *((name, ctypes.c_int64) for name in "count size slots capacity horizon".split()),
        *((name, ctypes.c_double) for name in "lr_value log1 log2".split()),
        *((name, ctypes.c_float) for name in "eps scale new1 new2".split()),
        *((name, ctypes.c_int) for name in "parts settle".split()),
    ]


@functools.cache
def _load(kind: type[Library], device: torch.device) -> Library:
    """The kernels, compiled if need be. The device must be the current one."""
    return kind(SOURCE, {}, device, ("plan", "begin", "catch_up1", "catch_up4", "update1", "update4"))


def most_parts(betas: tuple[float, float], horizon: int) -> int:
    """Parts that deferred updates are applied in, at most: as by `RowAdam` after a first step, and two for rounding."""
    steps = torch.arange(2, horizon + 2, dtype=torch.float64)
    decay = math.log(betas[1])
    places = 0.5 * torch.log1p(-torch.exp(decay * steps)) - 0.5 * decay * steps  # negative logs, so that they ascend
    parts, start = 0, 0
    while start < horizon and parts < MOST_PARTS:
        start = int(torch.searchsorted(places, places[start] + math.log(SPREAD), right=True))
        parts += 1
    return parts + 2


def unsupported(parameters: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> str | None:
    """Why the kernels cannot do this, in a sentence; None: they can."""
    why = unavailable("parameters", parameters)
    if why is not None:
        return why
    if parameters.dtype != torch.float32:
        return f"parameters are {parameters.dtype}; the kernels take torch.float32"
    if not parameters.is_contiguous():
        return "parameters are not contiguous"
    if most_parts(betas, horizon_of(betas)) > MOST_PARTS:
        return f"with betas of {betas} the deferred updates of a row can't be applied together"
    return None


class _Plan(NamedTuple):
    """What was found of the deferred updates of rows; good for a step of the same rows if nothing has changed since."""

    rows: Tensor | None
    version: int
    captured: bool
    there: Tensor | None
    """Rows on the device; None: all."""
    slots: int
    records: Tensor
    """The kernels' own. Must live until what reads them is launched."""

    def holds(self, rows: Tensor) -> bool:
        unchanged = rows is self.rows and rows._version == self.version
        return unchanged and self.captured == torch.cuda.is_current_stream_capturing()


class CudaRowAdam(RowAdam):
    """`RowAdam` for float32 on a CUDA device. Results differ from its by rounding; equal calls give equal bits.

    Nothing but :meth:`state` and :attr:`step_count` waits for the device. ``visit``, ``catch_up`` and ``step`` can be
    captured in a CUDA graph, with rows on the device and after :meth:`reserve`; what they capture is good for as many
    steps in all as were reserved, and one more ends in an error of the device. They run on the current stream. An index
    of a row on the device that is out of range ends in such an error, too.

    Args:
        parameters: [N, ...], contiguous. Updated in place.

    Raises:
        ValueError: with the sentence of `unsupported`.
    """

    def __init__(self, parameters: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(parameters, betas, eps)
        why = unsupported(parameters, betas)
        if why is not None:
            raise ValueError(f"optimizer of the planes: {why}")
        self._device = device = parameters.device
        self.updated, self.visited, self._rates = (x.to(device) for x in (self.updated, self.visited, self._rates))
        self._made = torch.zeros((), dtype=torch.int64, device=device)
        self._at_most = 0  # steps so far, as far as the host knows
        self._reserved, self._captured = False, False
        self._visit: _Plan | None = None
        self._size = parameters[0].numel() if len(parameters) > 0 else 0
        with torch.cuda.device_of(parameters):
            self._kernels = _load(LIBRARIES[device.type], device)
        self._params = Params(
            p=pointer(parameters),
            m=pointer(self.exp_avg),
            v=pointer(self.exp_avg_sq),
            updated=pointer(self.updated),
            visited=pointer(self.visited),
            steps=pointer(self._made),
            count=len(parameters),
            size=self._size,
            horizon=self.horizon,
            log1=math.log(betas[0]) if betas[0] > 0 else -1e100,
            log2=math.log(betas[1]),
            eps=eps,
            new1=1 - betas[0],
            new2=1 - betas[1],
            parts=most_parts(betas, self.horizon),
        )

    @property
    def step_count(self) -> int:
        """Steps so far. Waits for the device."""
        return int(self._made)

    def reserve(self, steps: int) -> None:
        """See :meth:`RowAdam.reserve`. Raises RuntimeError where a captured graph counts on less room."""
        if steps > len(self._rates) and self._captured:
            raise RuntimeError(
                f"optimizer of the planes: {steps} steps are more than the {len(self._rates)} that were reserved, "
                "and a graph was captured"
            )
        super().reserve(steps)
        self._reserved = True

    @torch.no_grad()
    def catch_up(self, rows: Tensor | None = None) -> None:
        """See :meth:`RowAdam.catch_up`."""
        self._visit = None
        with torch.cuda.device_of(self.parameters):
            plan = self._find(rows, settle=True)
            self._params.copies = None
            self._launch("catch_up", plan.slots)

    @torch.no_grad()
    def visit(self, rows: Tensor) -> Tensor:
        """See :meth:`RowAdam.visit`, but rows stay as they are: a step applies the deferred updates, too."""
        with torch.cuda.device_of(self.parameters):
            self._visit = self._find(rows)
            copies = self.parameters.new_empty(len(rows), *self.parameters.shape[1:])
            self._params.copies = pointer(copies)
            self._launch("catch_up", len(rows), copies)
        return copies

    @torch.no_grad()
    def step(
        self, rows: Tensor, gradient: Tensor, lr: float | Tensor, *, scale: float = 1.0, apply: Tensor | None = None
    ) -> None:
        """See :meth:`RowAdam.step`. Raises RuntimeError where a graph is captured and nothing was reserved."""
        wanted = [len(rows), *self.parameters.shape[1:]]
        if list(gradient.shape) != wanted:
            raise ValueError(f"the gradient of the planes is {list(gradient.shape)}, not {wanted}")
        if apply is not None and not apply.is_cuda:
            if not apply:
                return
            apply = None
        params = self._params
        with torch.cuda.device_of(self.parameters):
            gradient = gradient.to(self._device, torch.float32).contiguous()
            self._make_room()
            plan, self._visit = self._visit, None
            if plan is not None and plan.holds(rows):
                self._point_to(plan)
            else:
                plan = self._find(rows)
            if isinstance(lr, Tensor) and lr.is_cuda:
                lr = lr.double()
                params.lr = pointer(lr)
            else:
                params.lr, params.lr_value = None, float(lr)
            apply = apply if apply is None or apply.dtype == torch.bool else apply != 0
            params.apply, params.scale, params.gradient = pointer(apply), scale, pointer(gradient)
            self._kernels.launch("begin", 1, min(1024, max(32, len(rows))), params)
            self._launch("update", len(rows), gradient)

    def _find(self, rows: Tensor | None, settle: bool = False) -> _Plan:
        """Find the deferred updates of rows (None: of all); with ``settle`` mark them as applied."""
        there = None if rows is None else self._on_device(rows)
        capturing = torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        slots = len(self.parameters) if there is None else len(there)
        records = torch.empty(slots * (2 + self._params.parts) * RECORD, device=self._device)
        plan = _Plan(rows, 0 if rows is None else rows._version, capturing, there, slots, records)
        self._point_to(plan)
        self._params.settle = settle
        if slots > 0:
            self._kernels.launch("plan", slots, 32, self._params)
        return plan

    def _point_to(self, plan: _Plan) -> None:
        """Set what all kernels read."""
        params = self._params
        params.rows, params.slots, params.records = pointer(plan.there), plan.slots, pointer(plan.records)
        params.rates, params.capacity = pointer(self._rates), len(self._rates)

    def _launch(self, kernel: str, slots: int, other: Tensor | None = None) -> None:
        """Launch a kernel over all elements of all slots, four at a time where all rows start at multiples of four."""
        if slots * self._size == 0:
            return
        tensors = [self.parameters] if other is None else [self.parameters, other]
        width = 4 if self._size % 4 == 0 and not any(tensor.data_ptr() % 16 for tensor in tensors) else 1
        blocks = slots * -(-self._size // (THREADS * ITEMS * width))
        self._kernels.launch(f"{kernel}{width}", blocks, THREADS, self._params)

    def _on_device(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise ValueError(f"rows must be int64 [S], not {rows.dtype} {list(rows.shape)}")
        if rows.device.type == "cpu":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("rows are on the CPU: a CUDA graph would keep those of its capture")
            if len(rows) > 0 and int(rows.max()) >= len(self.parameters):
                raise IndexError(f"row {int(rows.max())} of {len(self.parameters)}")
            rows = self._sent(rows)
        return rows.contiguous()

    def _make_room(self) -> None:
        """For the learning rate of one more step."""
        if torch.cuda.is_current_stream_capturing() and not self._reserved:
            raise RuntimeError("a step is captured in a CUDA graph: call reserve(steps) before")
        self._at_most += 1
        if self._at_most > len(self._rates) and not self._captured:
            self.reserve(2 * len(self._rates))

    def _load_rates(self, rates: Tensor) -> None:
        reserved = self._reserved
        self.reserve(len(rates))
        self._reserved, self._visit = reserved, None
        self._rates[: len(rates)] = rates.to(self._device)
        self._made.fill_(len(rates))
        self._at_most = len(rates)


def make_row_adam(parameters: Tensor, backend: Literal["auto", "cuda", "torch"] = "auto") -> RowAdam:
    """The optimizer of rows: `CudaRowAdam` where it can do it (``auto``), or the one that is asked for.

    Raises ValueError where ``cuda`` is asked for and can't do it.
    """
    if backend == "torch" or (backend == "auto" and unsupported(parameters) is not None):
        return RowAdam(parameters)
    return CudaRowAdam(parameters)
