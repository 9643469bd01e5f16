# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the scenes' rows, against torch's dense Adam and closed forms."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igae.scenes import RowAdam
from igae.scenes.row_adam import NODES, quadrature

ROWS, STEPS, SHAPE = 8, 2000, (3, 4)


def visits(step: int, generator: torch.Generator) -> Tensor:
    """Rows of a step. 0: each, 1: never, 2: in the first ten and then far apart, 3: thrice; others: at random."""
    wanted = torch.rand(ROWS, generator=generator) < torch.tensor([2, -1, 0, 0, 0.3, 0.05, 0.01, 0.004])
    wanted[2] = step < 10 or step in (400, 401, 1100, 1999)
    wanted[3] = step in (7, 700, 1300)
    return wanted.nonzero()[:, 0]


def history(seed: int = 0, steps: int = STEPS) -> list[tuple[Tensor, Tensor, float]]:
    """(rows, gradient, learning rate) of each step; gradients of very different sizes, a rate that decays."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        rows = visits(step, generator)
        size = 10 ** (4 * torch.rand(len(rows), 1, 1, generator=generator) - 3)
        found.append((rows, size * torch.randn(len(rows), *SHAPE, generator=generator), 2e-2 * 0.998**step))
    return found


def start() -> Tensor:
    return 0.1 * torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(42))


def dense(dtype: torch.dtype, moves: list[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """Parameters after each step of torch's Adam over all rows, where a row without a visit has gradient zero."""
    parameter = start().to(dtype).requires_grad_()
    adam = torch.optim.Adam([parameter], lr=1.0)
    after = []
    for rows, gradient, rate in moves:
        adam.param_groups[0]["lr"] = rate
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[rows] = gradient.to(dtype)
        adam.step()
        after.append(parameter.detach().clone())
    return after


def run(moves: list[tuple[Tensor, Tensor, float]], parameters: Tensor | None = None) -> tuple[Tensor, RowAdam]:
    parameters = start() if parameters is None else parameters
    adam = RowAdam(parameters)
    for rows, gradient, rate in moves:
        adam.catch_up(rows)
        adam.step(rows, gradient, rate)
    return parameters, adam


def test_rows_move_as_under_dense_adam() -> None:
    moves = history()
    gaps = [step for step, (rows, _, _) in enumerate(moves) if 3 in rows]
    assert max(b - a for a, b in zip(gaps, gaps[1:], strict=False)) > RowAdam(start()).horizon > 100
    truth, single = dense(torch.float64, moves), dense(torch.float32, moves)
    parameters = start()
    adam = RowAdam(parameters)
    for step, (rows, gradient, rate) in enumerate(moves):
        adam.catch_up(rows)
        if step:  # where the gradient of this step is taken
            assert (parameters[rows] - truth[step - 1][rows]).abs().max().item() < 1e-5  # measured 2.7e-6
        adam.step(rows, gradient, rate)
        if step % 97 == 0 or step == STEPS - 1:
            adam.catch_up()
            error = (parameters - truth[step]).abs().amax((1, 2))
            own = (single[step] - truth[step]).abs().amax((1, 2))
            # Measured over three histories: rows with gaps are up to 20 times nearer to the truth than float32's own
            # dense Adam, which rounds each of their moves. The row of every step: at most 1.8 times its error.
            assert (error < 2.5 * own + 2e-7).all()
    assert (error[2:4] < own[2:4] / 2).all()  # hundreds of steps between visits; measured 0.035 and 0.19
    assert (truth[-1] - start()).abs().max() > 0.1
    assert torch.equal(parameters[1], start()[1])  # never visited


def test_a_row_without_gradient_goes_on_by_its_momentum() -> None:
    one = [(torch.tensor([0]), torch.ones(1, *SHAPE), 1e-2)]
    parameters, adam = run([*one, *[(torch.tensor([1]), torch.ones(1, *SHAPE), 1e-2)] * 20])
    still = parameters[0].clone()
    adam.catch_up()
    # A first gradient of one and then none: the sum over t of lr m_t / sqrt(v_t), with bias corrections.
    expected = sum(
        1e-2 * (0.1 * 0.9 ** (t - 1) / (1 - 0.9**t)) / (0.001 * 0.999 ** (t - 1) / (1 - 0.999**t)) ** 0.5
        for t in range(2, 22)
    )
    assert (still - parameters[0]).double().mean().item() == pytest.approx(expected, rel=1e-5)  # measured 2e-7


@given(st.integers(0, 10**6), st.floats(0.0, 0.3), st.booleans())
@settings(max_examples=3)
def test_a_debt_may_be_paid_in_parts(seed: int, often: float, whole: bool) -> None:
    def disturbed() -> tuple[Tensor, RowAdam]:
        generator = torch.Generator().manual_seed(seed + 1)
        parameters = start()
        adam = RowAdam(parameters)
        for rows, gradient, rate in moves:
            if torch.rand((), generator=generator) < often:
                some = torch.randperm(ROWS, generator=generator)[: 1 + seed % ROWS]
                adam.catch_up(None if whole else some)
            adam.catch_up(rows)
            adam.step(rows, gradient, rate)
        adam.catch_up()
        return parameters, adam

    moves = history(seed, 300)
    plain, adam = run(moves)
    adam.catch_up()
    parted, other = disturbed()
    assert (plain - parted).abs().max() < 1e-6  # measured over 60 histories 3e-7, of parameters up to 1
    first, second = adam.state(), other.state()
    for name in ("updated", "visited", "learning_rates"):
        assert torch.equal(first[name], second[name])
    for name in ("exp_avg", "exp_avg_sq"):  # measured 3e-7
        assert (first[name] - second[name]).abs().max() < 1e-6 * second[name].abs().max()
    again, _ = disturbed()
    assert torch.equal(parted, again)


# Masses and places of a debt that is paid in one go: places fall, by at most the factor 1.2.
debts = st.lists(st.tuples(st.just(0.0) | st.floats(1e-12, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=40)


@given(debts, st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
@settings(max_examples=100)
def test_few_moves_stand_for_many(debt: list[tuple[float, float]], first: float, x: float) -> None:
    masses = torch.tensor([mass for mass, _ in debt], dtype=torch.float64)
    places = first * 1.2 ** -torch.tensor([place for _, place in debt], dtype=torch.float64)
    # A second column, longer than the first has any use for, must not matter.
    few, where = quadrature(torch.stack([masses, masses.flip(0)], 1), torch.stack([places, places.flip(0)], 1))
    assert few.shape == where.shape == (NODES, 2) and (few >= 0).all() and (where > 0).all()
    for column in (0, 1):
        for power in range(2 * NODES):
            assert (few * where**power)[:, column].sum().item() == pytest.approx(
                (masses * places**power).sum().item(), rel=1e-12
            )
        expected = (masses / (places * x + 1)).sum().item()
        found = (few[:, column] / (where[:, column] * x + 1)).sum().item()
        assert found == pytest.approx(expected, rel=6e-8)  # the stated bound; measured 3.2e-8


def reference(
    moves: list[tuple[Tensor, Tensor, float]], betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """Parameters after torch's Adam in float64 over all rows, and how far each has gone on the way."""
    parameter = start().double().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=eps)
    path = torch.zeros_like(parameter.detach())
    for rows, gradient, rate in moves:
        before = parameter.detach().clone()
        adam.param_groups[0]["lr"] = rate
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[rows] = gradient
        adam.step()
        path += (parameter.detach() - before).abs()
    return parameter.detach(), path


@given(
    st.integers(0, 10**6),
    st.integers(1, 260),
    st.floats(0.0, 1.0),
    # Momentum must fall faster than the root of the second moment.
    st.sampled_from([(0.9, 0.999), (0.9, 0.99), (0.99, 0.99999), (0.3, 0.9), (0.01, 0.5), (0.0, 0.999), (0.0, 0.01)]),
    st.sampled_from([1e-15, 1e-8, 1e-2]),
    st.lists(st.just(0.0) | st.floats(1e-6, 0.1), min_size=1, max_size=6),
)
@settings(max_examples=12)
def test_any_visits_rates_and_betas(
    seed: int, steps: int, often: float, betas: tuple[float, float], eps: float, rates: list[float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chance = often ** torch.arange(1, ROWS + 1)
    moves = []
    for step in range(steps):
        rows = torch.randperm(ROWS, generator=generator)
        rows = rows[torch.rand(ROWS, generator=generator) < chance[rows]] if step else rows[: ROWS - 1]
        size = 10 ** (6 * torch.rand(len(rows), 1, 1, generator=generator, dtype=torch.float64) - 5)
        gradient = size * torch.randn(len(rows), *SHAPE, generator=generator, dtype=torch.float64)
        moves.append((rows, gradient, rates[step * len(rates) // steps]))
    # In float64, where what is left is the error of the method.
    parameters = start().double()
    adam = RowAdam(parameters, betas, eps)
    for rows, gradient, rate in moves:
        adam.catch_up(rows)
        adam.step(rows, gradient, rate)
    adam.catch_up()
    truth, path = reference(moves, betas, eps)
    # Its bound, and what dense Adam still moves beyond the horizon, where rates may rise after a pause. Measured in 400
    # histories: 0.21 of this sum, 1.4e-8 of the path where nothing was left at the horizon.
    assert ((parameters - truth).abs() <= 7e-8 * path + 1e-7 * max(rates)).all()


def trained(step: int, debts: Tensor, device: str = "cpu") -> RowAdam:
    """At a step, with rows whose last gradient is that many steps ago."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(debts), *SHAPE)
    adam = RowAdam(torch.zeros(shape, device=device))
    state = {
        "exp_avg": 1e-3 * torch.randn(shape, generator=generator),
        "exp_avg_sq": 1e-6 * torch.rand(shape, generator=generator),
        "updated": step - debts,
        "visited": step - debts,
        "learning_rates": torch.full((step,), 1e-3, dtype=torch.float64),
    }
    adam.load_state(state)
    return adam


class Operations(TorchDispatchMode):
    """What torch is asked to do, and how many rows of parameters or moments it writes to their place."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func is torch.ops.aten.index_put_.default and args[0].ndim == 1 + len(SHAPE):
            self.rows += len(args[1][0])
        return func(*args, **(kwargs or {}))


def catching_up(step: int, debts: list[int]) -> Operations:
    adam = trained(step, torch.tensor(debts))
    with Operations() as counted:
        adam.catch_up(torch.arange(len(debts)))
    assert (adam.parameters != 0).all()
    return counted


def test_the_length_of_a_debt_costs_nothing() -> None:
    late = catching_up(20_000, [5, 3])
    assert late.rows == 2 * 3
    for step, debts in ((20_000, [500, 3]), (20_000, [500, 500]), (20_000, [7, 190]), (950, [1, 250])):
        assert catching_up(step, debts).names == late.names
    # The bias corrections of the first steps differ much: rows move in parts, each in as many as it needs.
    parts = [catching_up(1 + debt, [debt]).rows / 3 for debt in (1, 10, 197, 400)]
    assert parts == [1, 4, 12, 12]
    assert catching_up(1001, [1000, 9, 9, 9, 9]).rows == (12 + 4) * 3


def test_nothing_waits_for_the_device() -> None:
    # Tensors of the device "meta" have no values: reading one raises an error.
    adam = trained(300, torch.tensor([5, 200, 0, 299]), "meta")
    with pytest.raises(RuntimeError):
        bool(adam.parameters.sum() > 0)
    for rows in (torch.tensor([0, 1, 3]), torch.tensor([2]), torch.tensor([1, 2])):
        adam.catch_up(rows)
        adam.step(rows, torch.ones(len(rows), *SHAPE, device="meta"), 1e-3)
    adam.catch_up()
    assert adam.updated.tolist() == [303, 303, 303, 303]


def test_rows_are_taken_in_chunks() -> None:
    debts = torch.arange(150) * 2
    adam, alone = trained(400, debts), trained(400, debts)
    adam.catch_up()
    for row in torch.randperm(150, generator=torch.Generator().manual_seed(0)):
        alone.catch_up(row[None])
    assert torch.equal(adam.updated, alone.updated)
    assert adam.updated.tolist() == [min(400, 400 - debt + 197) for debt in debts.tolist()]
    for name in ("parameters", "exp_avg", "exp_avg_sq"):  # measured 0
        torch.testing.assert_close(getattr(adam, name), getattr(alone, name), rtol=3e-7, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_points_without_any_gradient(eps: float) -> None:
    gradient = torch.ones(1, *SHAPE)
    gradient[0, 0] = 0
    adam = RowAdam(start(), eps=eps)
    adam.step(torch.tensor([0]), gradient, 1e-2)
    for _ in range(50):
        adam.step(torch.tensor([1]), torch.ones(1, *SHAPE), 0.0)
    adam.catch_up()
    if eps > 0:
        assert torch.equal(adam.parameters[0, 0], start()[0, 0])
    else:  # torch's Adam divides 0 by 0, too
        assert adam.parameters[0, 0].isnan().all()
    assert (start()[0, 1:] - adam.parameters[0, 1:]).numpy() == pytest.approx(1e-2, rel=1e-5)  # measured 6e-7
    assert torch.equal(adam.parameters[1:], start()[1:])  # rates of 0


@pytest.mark.parametrize("betas", [(1.0, 0.999), (-0.1, 0.999), (0.9, 1.0), (0.9, 0.0)])
def test_betas_out_of_range_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas must be in"):
        RowAdam(start(), betas)


@functools.cache
def long_run() -> tuple[list[tuple[Tensor, Tensor, float]], Tensor, RowAdam]:
    moves = history(3, 1040)  # more than the rates that are allocated at first
    parameters, adam = run(moves)
    adam.catch_up()
    return moves, parameters, adam


@pytest.mark.parametrize("at", [0, 250, 1024, 1030])
def test_a_saved_state_changes_no_bit(at: int) -> None:
    moves, plain, adam = long_run()
    before, saved = run(moves[:at])
    state = {name: value.clone() for name, value in saved.state().items()}
    parameters = before.clone()
    other = RowAdam(parameters)
    other.load_state(state)
    for rows, gradient, rate in moves[at:]:
        other.catch_up(rows)
        other.step(rows, gradient, rate)
    other.catch_up()
    assert torch.equal(plain, parameters)
    assert [name for name, value in adam.state().items() if not torch.equal(value, other.state()[name])] == []


def test_a_state_of_other_planes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exp_avg is \[3, 3, 4\], not \[8, 3, 4\]"):
        RowAdam(start()).load_state(RowAdam(start()[:3].clone()).state())


def test_a_step_touches_only_its_rows() -> None:
    parameters, adam = run(history(1, 60))
    adam.catch_up()
    rows = torch.tensor([5, 0])
    rest = [row for row in range(ROWS) if row not in rows]
    tensors = (adam.parameters, adam.exp_avg, adam.exp_avg_sq)
    before = [tensor.clone() for tensor in tensors]
    adam.catch_up(rows)
    adam.step(rows, torch.ones(2, *SHAPE), 1e-2)
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor[rest].numpy().tobytes() == old[rest].numpy().tobytes()
        assert (tensor[rows] != old[rows]).all()
    assert parameters is adam.parameters


def test_rows_may_come_in_any_order() -> None:
    moves = history(2, 50)
    plain, _ = run(moves)
    turned, _ = run([(rows.flip(0), gradient.flip(0), rate) for rows, gradient, rate in moves])
    assert (plain - turned).abs().max() < 1e-6


def test_visits_padding_scales_and_steps_that_are_not_made() -> None:
    moves = history(13, 60)
    plain, adam = run(moves)
    parameters = start()
    other = RowAdam(parameters)
    for rows, gradient, rate in moves:
        padded, more = torch.cat([rows, torch.tensor([-1])]), torch.cat([gradient, torch.full((1, *SHAPE), torch.nan)])
        copies = other.visit(padded)
        assert torch.equal(copies[:-1], parameters[rows]) and not copies[-1].any()
        copies.fill_(torch.nan)
        other.step(padded, torch.full_like(more, torch.nan), 1.0, apply=torch.tensor(False))
        other.step(padded, 4 * more, torch.tensor(rate, dtype=torch.float64), scale=0.25, apply=torch.tensor(1))
    other.reserve(5000)
    assert torch.equal(plain, parameters) and other.step_count == len(moves)
    assert [name for name, value in adam.state().items() if not torch.equal(value, other.state()[name])] == []
