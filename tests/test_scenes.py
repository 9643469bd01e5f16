# SPDX-License-Identifier: Apache-2.0
"""Latent scenes: where their planes start, and the order of cached latents."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igae.data import LatentCache, LatentLoader, StreamState, ViewBatch
from igae.ranks import derive_seed, rank, world_size
from igae.scenes import PlanesConfig, SceneStore, make_row_adam

CPU = torch.device("cpu")
SEED = 601897789664990678


def store(ids: Sequence[int], seed: int = 0, **settings: float) -> SceneStore:
    return SceneStore(PlanesConfig(resolution=6, features=5, **settings), ids, seed, CPU)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True), st.integers(0, 10**9), st.data())
@settings(max_examples=30)
def test_the_start_of_a_scene_depends_on_seed_and_id_alone(ids: list[int], seed: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    before = torch.get_rng_state()
    every = store(ids, seed)
    assert torch.equal(torch.get_rng_state(), before)
    others = data.draw(st.permutations([*ids, 10**6 + 1]))
    assert every.rows.shape == (len(ids), 3, 6, 6, 5) and every.rows.dtype == torch.float32
    mixed = store(others, seed)
    for row, scene in enumerate(ids):
        assert torch.equal(every.rows[row], store([scene], seed).rows[0])
        assert torch.equal(every.rows[row], mixed.rows[others.index(scene)])
        assert not torch.equal(every.rows[row], store([scene], seed + 1).rows[0])
        assert not torch.equal(every.rows[row], store([scene + 1], seed).rows[0])


def test_planes_start_from_normal_noise() -> None:
    planes = store(range(100), init_std=0.3).rows.double() / 0.3
    count = planes.numel()
    assert abs(planes.mean()) < 4 / count**0.5 and abs(planes.var() - 1) < 4 * (2 / count) ** 0.5
    assert store([3], init_std=0).rows.count_nonzero() == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True), st.data())
def test_rows_of_a_batch(ids: list[int], data: st.DataObject) -> None:
    own = store(ids)
    scene = torch.tensor(data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=12)))
    rows, index = own.locate(scene)
    assert rows.dtype == index.dtype == torch.int64 and index.shape == scene.shape
    assert torch.equal(own.ids[rows[index]], scene)
    assert len(set(rows.tolist())) == len(rows) == len(set(scene.tolist()))
    assert len(own) == len(ids)


# --- Rows and their optimizer ---------------------------------------------------------------------------------------


def stepped(own: SceneStore, steps: int, seed: int = 0) -> None:
    """Steps of random rows with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(own), generator=generator)[:2]
        leaf = own.take(rows).requires_grad_()
        leaf.backward(torch.randn(leaf.shape, generator=generator))
        assert leaf.grad is not None
        own.step(rows, leaf.grad, 1e-2)


def test_a_store_moves_its_rows_as_the_optimizer_of_all_rows_does() -> None:
    own, other = store([5, 3, 8, 1]), store([5, 3, 8, 1])
    own.start_optimizer("torch")
    adam = make_row_adam(other.rows, backend="torch")
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        rows, index = own.locate(torch.tensor([[5, 3, 3], [8, 8, 8], [1, 5, 1]][step % 3]))
        gradient = torch.randn(len(rows), 3, 6, 6, 5, generator=generator)
        assert torch.equal(own.take(rows), adam.visit(rows))
        own.step(rows, gradient, 0.1, scale=0.5, apply=torch.tensor(step != 3))
        adam.step(rows, gradient, 0.1, scale=0.5, apply=torch.tensor(step != 3))
    assert torch.equal(own.rows, other.rows) and not own.can_be_captured
    adam.catch_up()
    assert torch.equal(own.read([8, 5]), other.rows[[2, 0]])
    own.catch_up()
    assert torch.equal(own.rows, other.rows)
    assert not torch.equal(own.rows, store([5, 3, 8, 1]).rows)


def test_a_store_resumes_from_its_state() -> None:
    ids = [4, 2, 9]
    whole, first, second = store(ids), store(ids), SceneStore(PlanesConfig(resolution=6, features=5), ids, None, CPU)
    for own in (whole, first, second):
        own.start_optimizer()
    for seed in (1, 2):
        stepped(whole, 4, seed)
    stepped(first, 4, 1)
    state = first.state_dict()
    assert list(state) == ["ids", "planes", "exp_avg", "exp_avg_sq", "updated", "visited", "learning_rates"]
    assert state["ids"].tolist() == ids and len(state["learning_rates"]) == 4
    second.load_state_dict({"planes": state.pop("planes")})
    second.load_state_dict(state)
    stepped(second, 4, 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    # A new stage begins with the rows as they are, and nothing else.
    second.start_optimizer()
    assert second.state_dict()["exp_avg"].count_nonzero() == 0 and torch.equal(second.rows, whole.rows)
    assert list(store(ids).state_dict()) == ["ids", "planes"]


# --- Cached latents ------------------------------------------------------------------------------------------------


def cache(views: int, variants: int = 1) -> LatentCache:
    def batches() -> list[ViewBatch]:
        number = torch.arange(views)
        pose = number[:, None, None].float().expand(-1, 4, 4)
        images = number.byte()[:, None, None, None].expand(-1, 3, 2, 2)
        whole = ViewBatch(images, 100 + number, number, pose, pose[:, 1:, 1:], images[:, 0], number > 0)
        return [ViewBatch(*(value[i : i + 4] for value in vars(whole).values())) for i in range(0, views, 4)]

    def encode(batch: ViewBatch, variant: int) -> dict[str, Tensor]:
        latents = batch.images[:, :1] + 1000.0 * batch.scene[:, None, None, None] + 1e6 * variant
        return {"latents": latents, "cam2world": batch.cam2world, "intrinsics": batch.intrinsics}

    return LatentCache(batches(), encode, variants)


def test_the_cache_keeps_views_with_their_cameras() -> None:
    kept = cache(10)
    assert len(kept) == 10 and kept.tensors["latents"].shape == (10, 1, 2, 2)
    assert kept.tensors["latents"][:, 0, 0, 0].tolist() == [i + 1000 * (100 + i) for i in range(10)]
    loader = LatentLoader(kept, 7, seed=1)
    for _ in range(5):
        places = loader.take()
        view = kept.tensors["latents"][places, 0, 0, 0].long() % 1000
        assert torch.equal(kept.scene[places], 100 + view) and kept.scene.dtype == torch.int64
        assert torch.equal(kept.tensors["cam2world"][places, 0, 0].long(), view)
        assert torch.equal(kept.tensors["intrinsics"][places, 0, 0].long(), view)


def test_epochs_take_the_variants_of_a_view_in_turns() -> None:
    kept = cache(5, variants=3)
    assert len(kept) == 5 and kept.tensors["latents"].shape == (15, 1, 2, 2)
    loader, seen = LatentLoader(kept, 5, seed=1), dict[int, list[int]]()
    for _ in range(6):
        places = loader.take()
        number = kept.tensors["latents"][places, 0, 0, 0].long()
        assert torch.equal(kept.scene[places], number % 1_000_000 // 1000)
        assert sorted(number % 1000) == list(range(5))
        for value in number.tolist():
            seen.setdefault(value % 1000, []).append(value // 1_000_000)
    assert all(sorted(turns[:3]) == [0, 1, 2] and turns[3:] == turns[:3] for turns in seen.values())


def order(loader: LatentLoader, batches: int) -> list[int]:
    return [int(scene) - 100 for _ in range(batches) for scene in loader.cache.scene[loader.take()]]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=40)
def test_each_epoch_is_a_permutation(views: int, batch_size: int, seed: int) -> None:
    kept = cache(views)
    epochs = 4
    batches = -(-epochs * views // batch_size)
    found = order(LatentLoader(kept, batch_size, seed), batches)
    assert len(found) == batches * batch_size  # batches are always full, also across epochs
    for epoch in range(epochs):
        assert sorted(found[epoch * views : (epoch + 1) * views]) == list(range(views))
    # The order of an epoch does not depend on the batch size.
    assert order(LatentLoader(kept, 1, seed), epochs * views) == found[: epochs * views]


def test_orders_differ_by_epoch_and_seed() -> None:
    kept = cache(12)
    orders = [
        tuple(order(LatentLoader(kept, 12, seed, StreamState(epoch, 0)), 1)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 25])
def test_a_loader_goes_on_at_every_position(batch_size: int) -> None:
    kept = cache(5)
    batches = 12
    loader, states = LatentLoader(kept, batch_size, 9), []
    expected = []
    for _ in range(batches):
        states.append(replace(loader.state))
        expected.append(order(loader, 1))
    for at, state in enumerate(states):
        samples = at * batch_size
        assert (state.epoch * 5 + state.position) == samples
        again = LatentLoader(kept, batch_size, 9, replace(state))
        assert [order(again, 1) for _ in range(batches - at)] == expected[at:]
    # A state at the end of an epoch is the one at the start of the next.
    ends, starts = LatentLoader(kept, 4, 9, StreamState(0, 5)), LatentLoader(kept, 4, 9, StreamState(1, 0))
    assert order(ends, 3) == order(starts, 3)


# --- Ranks and seeds -----------------------------------------------------------------------------------------------


def test_rank_facts_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (rank(), world_size()) == (3, 8)


@given(st.lists(st.integers(-(10**6), 10**6) | st.text("abc ,/", max_size=4), min_size=1, max_size=4))
def test_seeds_depend_on_every_part(parts: list[int | str]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63 and derive_seed(*parts) == seed
    torch.Generator().manual_seed(seed)
    for place in range(len(parts)):
        changed = [*parts]
        changed[place] = f"{parts[place]}x"
        assert derive_seed(*changed) != seed
    assert derive_seed(*parts, "") != seed and derive_seed("".join(map(str, parts)), "y") != seed


def test_seeds_are_the_same_in_every_process() -> None:
    # BLAKE2b of "0\x1fjoint\x1f7" with 8 bytes, little endian, without its lowest bit.
    assert derive_seed(0, "joint", 7) != derive_seed(0, "joint", "", 7)
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed(0, "joint", 7) == SEED
