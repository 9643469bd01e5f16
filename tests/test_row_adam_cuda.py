# SPDX-License-Identifier: Apache-2.0
"""The rows' Adam as CUDA kernels: against the CPU's and torch's dense Adam, in graphs, and how it is compiled."""

from typing import Any

import pytest
import torch
from test_row_adam import ROWS, SHAPE, dense, history, run, start
from torch import Tensor

from igae.kernels import ARCHITECTURES, INSTALLED, compile_source
from igae.scenes import CudaRowAdam, RowAdam, make_row_adam
from igae.scenes.row_adam import horizon_of
from igae.scenes.row_adam_cuda import SOURCE, most_parts

DEVICE = "cuda:0"  # test_cuda_emulated.py runs tests of this file elsewhere
Moves = list[tuple[Tensor, Tensor, float]]


def on_gpu(test: Any) -> Any:
    available = torch.cuda.is_available() and INSTALLED
    return pytest.mark.gpu(pytest.mark.skipif(not available, reason="needs a CUDA device and cuda-core")(test))


def has_nvrtc() -> bool:
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) == 0
    except Exception:  # the package or its library is not there
        return False


@pytest.mark.skipif(not has_nvrtc(), reason="needs cuda-core and NVRTC")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_compiles_without_spills(arch: int) -> None:
    code, usage = compile_source(SOURCE, {}, arch)
    assert code[:4] == b"\x7fELF"
    assert usage.spilled == 0 and 0 < usage.registers <= 128


def test_parts_are_counted() -> None:
    # With the usual betas there are 12 at most (test_row_adam.py), and two are kept for rounding.
    assert most_parts((0.9, 0.999), horizon_of((0.9, 0.999))) == 14
    assert most_parts((0.0, 0.999), 1) == 3
    assert most_parts((0.999, 0.5), horizon_of((0.999, 0.5))) > 256


def test_parameters_on_the_cpu_stay_with_torch() -> None:
    assert type(make_row_adam(start())) is RowAdam
    with pytest.raises(ValueError, match="parameters are on cpu"):
        make_row_adam(start(), backend="cuda")


# --- on a GPU ---


def start_there(device: str | None = None) -> Tensor:
    return start().to(device or DEVICE)


def go(adam: RowAdam, moves: Moves) -> RowAdam:
    """Make these steps with visits; rows by turns from the CPU and from the device."""
    device = adam.parameters.device
    for i, (rows, gradient, rate) in enumerate(moves):
        rows = rows.to(device) if i % 2 else rows
        adam.visit(rows)
        adam.step(rows, gradient.to(adam.parameters), rate)
    return adam


def same_bits(a: RowAdam, b: RowAdam) -> bool:
    first, second = a.state() | {"p": a.parameters}, b.state() | {"p": b.parameters}
    return all(first[name].cpu().numpy().tobytes() == second[name].cpu().numpy().tobytes() for name in first)


@on_gpu
def test_rows_move_as_on_the_cpu_and_under_dense_adam() -> None:
    moves = history()
    truth, single = dense(torch.float64, moves), dense(torch.float32, moves)
    adam = make_row_adam(start_there())
    assert type(adam) is CudaRowAdam
    worst = 0.0
    for step, (rows, gradient, rate) in enumerate(moves):
        copies = adam.visit(rows)
        if step and len(rows):
            worst = max(worst, (copies.cpu() - truth[step - 1][rows]).abs().max().item())
        adam.step(rows, gradient.to(DEVICE), rate)
        if step % 97 == 0 or step == len(moves) - 1:
            adam.catch_up()
            error = (adam.parameters.cpu() - truth[step]).abs().amax((1, 2))
            own = (single[step] - truth[step]).abs().amax((1, 2))
            assert (error < 2.5 * own + 2e-7).all()  # as on the CPU; measured 0.5 of it
    print("copies", worst)
    assert worst < 1e-5  # measured 2.6e-6
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 6e-6)):  # measured 3.6e-7, 2.6e-6
        _, other = run(moves, parameters=start().to(dtype))
        other.catch_up()
        error = (adam.parameters.cpu() - other.parameters).abs().max().item()
        print(dtype, error)
        assert error < bound
        for name in ("updated", "visited"):
            assert torch.equal(getattr(adam, name).cpu(), getattr(other, name))
        for name, scale in (("exp_avg", 3e-6), ("exp_avg_sq", 2e-5)):
            own_moment, moment = getattr(adam, name).cpu(), getattr(other, name)
            error = ((own_moment - moment).abs().amax((1, 2)) / moment.abs().amax((1, 2)).clamp(min=1e-30)).max().item()
            print(name, error)
            assert error < scale  # measured 4.1e-7, 8.9e-6
    assert adam.state()["learning_rates"].tolist() == [rate for _, _, rate in moves]
    assert adam.step_count == len(moves)


@on_gpu
def test_a_visit_leaves_rows_as_they_are_and_a_step_makes_what_they_owe() -> None:
    moves = history(12, 60)
    plain, settled, unvisited = (go(CudaRowAdam(start_there()), moves) for _ in range(3))
    rows, other = torch.tensor([1, 4, 6]), torch.tensor([0, 2])
    gradient = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = {name: value.clone() for name, value in (plain.state() | {"p": plain.parameters}).items()}
    copies = plain.visit(rows)
    after = plain.state() | {"p": plain.parameters}
    assert all(torch.equal(before[name], after[name]) for name in before)
    settled.catch_up(rows)
    assert not torch.equal(copies, before["p"][rows.to(DEVICE)]) and torch.equal(
        copies, settled.parameters[rows.to(DEVICE)]
    )
    plain.step(rows, gradient, 1e-2)
    settled.step(rows, gradient, 1e-2)  # owed moves that were made before
    unvisited.visit(rows)
    unvisited.visit(other)  # of other rows: what was found of the first is not used
    unvisited.step(rows, gradient, 1e-2)
    assert same_bits(plain, settled) and same_bits(plain, unvisited)
    # What was found at a visit is not used where rows have moved, or are others, since.
    for adam in (plain, settled):
        adam.step(other, gradient[:2], 1e-2)
    plain.visit(rows)
    plain.catch_up()
    settled.catch_up()
    plain.step(rows, gradient, 1e-2)
    settled.step(rows.clone(), gradient, 1e-2)
    assert same_bits(plain, settled)
    there = rows.to(DEVICE)
    plain.visit(there)
    there.copy_(torch.tensor([3, 5, 7]))
    plain.step(there, gradient, 1e-2)
    settled.step(torch.tensor([3, 5, 7]), gradient, 1e-2)
    assert same_bits(plain, settled)


@on_gpu
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.99, 0.99999), (0.3, 0.9), (0.0, 0.999), (0.9, 0.9)])
def test_other_betas(betas: tuple[float, float]) -> None:
    moves = history(5, 300)
    moves[100:250] = [(rows[:0], gradient[:0], rate) for rows, gradient, rate in moves[100:250]]
    adam = go(CudaRowAdam(start_there(), betas, 1e-6), moves)
    adam.catch_up()
    other = go(RowAdam(start().double(), betas, 1e-6), moves)
    other.catch_up()
    error = (adam.parameters.cpu() - other.parameters).abs().max().item()
    print(error)
    assert error < 1e-6  # measured 3.3e-7


@on_gpu
@pytest.mark.parametrize("size", [1, 3, 6, 511, 1024, 2049, 4100])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_of_any_size(size: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(size)
    memory = torch.randn(offset + ROWS * size, generator=generator)
    there = memory.to(DEVICE)
    parameters = there[offset:].view(ROWS, size)
    adam, other = CudaRowAdam(parameters), RowAdam(memory[offset:].view(ROWS, size).clone())
    for step in range(30):
        rows = torch.randperm(ROWS, generator=generator)[: 1 + step % 4]
        gradient = torch.randn(len(rows), size, generator=generator)
        torch.testing.assert_close(adam.visit(rows).cpu(), other.visit(rows), rtol=0, atol=2e-6)
        adam.step(rows, gradient.to(DEVICE), 1e-2, scale=0.25)
        other.step(rows, gradient, 1e-2, scale=0.25)
    adam.catch_up()
    other.catch_up()
    error = (parameters.cpu() - other.parameters).abs().max().item()
    print(error)
    assert error < 2e-6  # measured 4.8e-7
    assert torch.equal(there[:offset].cpu(), memory[:offset])


@on_gpu
@pytest.mark.parametrize("count", [150, 1500])
def test_many_rows_of_the_cpu(count: int) -> None:
    adam, other = (CudaRowAdam(torch.zeros(2000, 12, device=DEVICE)) for _ in range(2))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(2000, generator=generator)[:count]
        gradient = torch.randn(count, 12, generator=generator).to(DEVICE)
        assert torch.equal(adam.visit(rows), other.visit(rows.to(DEVICE)))
        adam.step(rows, gradient, 1e-2)
        other.step(rows.to(DEVICE), gradient, 1e-2)
    adam.catch_up()
    other.catch_up(torch.arange(2000))
    assert same_bits(adam, other) and torch.equal(adam.parameters.abs().amax(1) > 0, adam.visited > 0)


@on_gpu
def test_padding_is_no_row() -> None:
    adam, other = (CudaRowAdam(start_there()) for _ in range(2))
    padded = torch.tensor([-1, 5, 0, -1, 2, -1])
    for step in range(20):
        rows = (padded + step * (padded >= 0)) % ROWS * (padded >= 0) - 1 * (padded < 0)
        gradient = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        kept = rows >= 0
        copies, plain = adam.visit(rows.to(DEVICE)), other.visit(rows[kept])
        assert torch.equal(copies[kept.to(DEVICE)], plain) and not copies[~kept.to(DEVICE)].any()
        adam.step(rows.to(DEVICE), gradient.masked_fill(~kept.to(DEVICE)[:, None, None], torch.nan), 1e-2)
        other.step(rows[kept], gradient[kept.to(DEVICE)], 1e-2)
    assert same_bits(adam, other)
    only = torch.full((3,), -1)
    assert not adam.visit(only).any()
    adam.step(only, torch.ones(3, *SHAPE, device=DEVICE), 1e-2)
    other.step(only[:0], torch.ones(0, *SHAPE, device=DEVICE), 1e-2)
    assert same_bits(adam, other) and adam.step_count == 21


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_step_that_is_not_to_be_made_changes_nothing(dtype: torch.dtype) -> None:
    moves = history(6, 40)
    plain, adam = (CudaRowAdam(start_there()) for _ in range(2))
    for i, (rows, gradient, rate) in enumerate(moves):
        plain.visit(rows)
        plain.step(rows, gradient.to(DEVICE), rate)
        adam.visit(rows)
        bad = torch.full_like(gradient, torch.nan).to(DEVICE)
        adam.step(rows, bad, 1.0, apply=torch.zeros((), dtype=dtype, device=DEVICE if i % 2 else "cpu"))
        adam.step(rows, gradient.to(DEVICE), rate, apply=torch.ones((), dtype=dtype, device=DEVICE))
    assert same_bits(plain, adam)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_may_be_on_the_device(dtype: torch.dtype) -> None:
    moves = [(rows, gradient, float(torch.tensor(rate).float())) for rows, gradient, rate in history(7, 60)]
    plain, adam = go(CudaRowAdam(start_there()), moves), CudaRowAdam(start_there())
    for rows, gradient, rate in moves:
        adam.visit(rows)
        adam.step(rows, gradient.to(DEVICE), torch.tensor(rate, dtype=dtype, device=DEVICE))
    assert same_bits(plain, adam)


@on_gpu
def test_a_captured_step_does_what_a_launched_one_does() -> None:
    adam, other = (CudaRowAdam(start_there()) for _ in range(2))
    adam.reserve(2000)
    rows = torch.full((4,), -1, device="cuda")
    target, rate = torch.zeros(4, *SHAPE, device="cuda"), torch.zeros((), dtype=torch.float64, device="cuda")
    wanted = torch.ones((), dtype=torch.bool, device="cuda")

    def step(adam: RowAdam) -> Tensor:
        leaf = adam.visit(rows)
        adam.step(rows, leaf - target, rate, scale=0.5, apply=wanted)
        return leaf

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(adam)
    assert adam.step_count == 0
    generator = torch.Generator().manual_seed(0)
    for i in range(1500):  # more than the rates that there is room for at first
        some = torch.randperm(ROWS, generator=generator)[: i % 4]
        rows.copy_(torch.cat([some, torch.full((4 - len(some),), -1)]))
        target.copy_(torch.randn(4, *SHAPE, generator=generator))
        rate.fill_(1e-2 * 0.999**i)
        wanted.fill_(i % 7 != 3)
        graph.replay()
        leaf = step(other)
        assert i % 100 or torch.equal(captured, leaf)
    assert same_bits(adam, other) and adam.step_count == sum(i % 7 != 3 for i in range(1500))
    go(adam, history(8, 5))
    with pytest.raises(RuntimeError, match="more than the 2000 that were reserved"):
        adam.reserve(2001)


@on_gpu
def test_what_a_graph_cannot_hold_is_refused() -> None:
    rows, gradient = torch.arange(2, device="cuda"), torch.ones(2, *SHAPE, device="cuda")
    adam = CudaRowAdam(start_there())
    with pytest.raises(RuntimeError, match="call reserve"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        adam.step(rows, gradient, 1e-2)
    adam.reserve(10)
    with pytest.raises(RuntimeError, match="rows are on the CPU"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        adam.step(torch.arange(2), gradient, 1e-2)
    with pytest.raises(IndexError, match="row 8 of 8"):
        adam.visit(torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"\[1, 3, 4\], not \[2, 3, 4\]"):
        adam.step(rows, gradient[:1], 1e-2)
    assert adam.step_count == 0


@on_gpu
def test_a_run_may_go_from_the_gpu_to_the_cpu_and_back() -> None:
    moves = history(9, 1100)  # more than the rates that there is room for at first
    plain = go(CudaRowAdam(start_there()), moves)
    adam = go(CudaRowAdam(start_there()), moves[:300])
    state = adam.state()
    assert {name: (value.dtype, list(value.shape)) for name, value in state.items()} == {
        name: (value.dtype, list(value.shape)) for name, value in run(moves[:300])[1].state().items()
    }
    again = CudaRowAdam(adam.parameters.clone())
    again.load_state(state)
    assert same_bits(go(again, moves[300:]), plain)
    there = RowAdam(adam.parameters.cpu())
    there.load_state(state)
    go(there, moves[300:1060])
    back = CudaRowAdam(there.parameters.cuda())
    back.load_state(there.state())
    go(back, moves[1060:])
    for found in (plain, back):
        found.catch_up()
    error = (plain.parameters - back.parameters).abs().max().item()
    print(error)
    assert error < 1e-6  # measured 1.2e-7
    assert torch.equal(plain.updated, back.updated) and torch.equal(plain.visited, back.visited)


@on_gpu
def test_equal_calls_give_equal_bits_and_wait_for_nothing() -> None:
    moves = [(rows, gradient.cuda(), rate) for rows, gradient, rate in history(10, 1100)]
    found = []
    for _ in range(2):
        adam = CudaRowAdam(start_there())
        flag = torch.ones((), device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for rows, gradient, rate in moves:
                adam.visit(rows)
                adam.step(rows, gradient, rate, apply=flag)
            adam.catch_up()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(adam)
    assert same_bits(*found)


@on_gpu
def test_planes_beyond_four_billion_bytes_and_two_billion_elements() -> None:
    count, size = 5600, 393_216
    if torch.cuda.mem_get_info()[0] < 13.0 * count * size:
        pytest.skip("needs 29 GB")
    adam = CudaRowAdam(torch.zeros(count, size, device="cuda"))
    rows = torch.tensor([0, 2730, count - 1])
    small = CudaRowAdam(torch.zeros(3, size, device="cuda"))
    for step in range(4):
        some = torch.tensor([0, 1, 2][step % 2 :])
        gradient = torch.randn(len(some), size, generator=torch.Generator().manual_seed(step)).cuda()
        assert torch.equal(adam.visit(rows[some]), small.visit(some))
        adam.step(rows[some], gradient, 1e-2)
        small.step(some, gradient, 1e-2)
    adam.catch_up()
    small.catch_up()
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(adam, name)[rows.cuda()], getattr(small, name))
        assert all(not getattr(adam, name)[row].any() for row in (1, 2729, 2731, count - 2))


@on_gpu
def test_the_choice() -> None:
    assert type(make_row_adam(start_there(), backend="torch")) is RowAdam
    assert type(make_row_adam(start_there().double())) is RowAdam
    assert type(make_row_adam(start_there().transpose(1, 2))) is RowAdam
    with pytest.raises(ValueError, match="can't be applied together"):
        CudaRowAdam(start_there(), betas=(0.999, 0.5))
    with pytest.raises(ValueError, match="torch.float64; the kernels take torch.float32"):
        make_row_adam(start_there().double(), backend="cuda")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device() -> None:
    moves = history(11, 50)
    first, second = (go(CudaRowAdam(start_there(f"cuda:{i}")), moves) for i in range(2))
    assert same_bits(first, second)
