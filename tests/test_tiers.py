# SPDX-License-Identifier: Apache-2.0
"""Scenes in host memory or on a disk, some of them on the device at a time: the same bits as all on the device."""

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igae import config
from igae.data import LatentCache, LatentLoader, StreamState, ViewBatch
from igae.scenes import PlanesConfig, SceneStore, Storage, tiers
from igae.training import Recipe, memory

CPU = torch.device("cpu")
PLANES = PlanesConfig(resolution=4, features=4)
TIERS = ["host", "disk"]


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


def store(count: int, tier: str, slots: int, folder: str, seed: int | None = 0) -> SceneStore:
    ids = [3 * i + 1 for i in reversed(range(count))]  # rows are not in the order of the ids
    return SceneStore(PLANES, ids, seed, CPU, Storage(tier, slots, folder))  # type: ignore[arg-type]


def state_of(own: SceneStore) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in own.state_dict().items()}


def assert_same(a: SceneStore, b: SceneStore) -> None:
    left, right = state_of(a), state_of(b)
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def step(own: SceneStore, scenes: list[int], seed: int, apply: bool = True) -> Tensor:
    rows, index = own.locate(torch.tensor(scenes))
    copies = own.take(rows)
    gradient = torch.randn(copies.shape, generator=torch.Generator().manual_seed(seed))
    own.step(rows, gradient, 1e-2, scale=0.5, apply=torch.tensor(apply))
    return copies[index]


COUNT = 9
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=3), st.booleans()),
    st.tuples(st.just("prefetch"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT)),
    st.tuples(
        st.just("read"), st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True), st.booleans()
    ),
    st.tuples(st.sampled_from(["catch_up", "save", "resume", "restart", "rows"])),
)


def run(plan: list[Any], own: SceneStore, other: Any, backend: Any = "torch") -> list[Tensor]:
    """What is seen of a store; ``other`` makes one that resumes from its state."""
    own.start_optimizer(backend)
    ids, found = own.ids.tolist(), list[Tensor]()
    for number, (what, *arguments) in enumerate(plan):
        scenes = [ids[place] for place in arguments[0]] if arguments else []
        if what == "step":
            found.append(step(own, scenes, number, arguments[1]))
        elif what == "prefetch":
            own.prefetch(torch.tensor(scenes))
        elif what == "read":
            found.append(own.read(scenes, catch_up=arguments[1]))
        elif what == "catch_up":
            own.catch_up()
        elif what == "rows":
            found.append(own.rows.clone())
        elif what == "save":
            found += state_of(own).values()
        elif what == "restart":
            own.start_optimizer(backend)
        else:
            state = state_of(own)
            own = other()
            own.start_optimizer(backend)
            for start in (0, 4):  # as a checkpoint is read, in parts
                rows = {k: v[start : start + 4 + start] for k, v in state.items() if k not in ("ids", "learning_rates")}
                own.load_state_dict(rows, start)
            own.load_state_dict({"learning_rates": state["learning_rates"]})
    return [*found, *state_of(own).values()]


def compare(plan: list[Any], tier: str, slots: int, folder: str, backend: str = "torch") -> None:
    every = []
    for where in (("device", 0), (tier, slots)):
        others = [store(COUNT, *where, folder, None) for what, *_ in plan if what == "resume"]
        every.append(run(plan, store(COUNT, *where, folder), others.pop, backend))
    expected, found = every
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tier", TIERS)
@given(plan=st.lists(actions, max_size=14), slots=st.integers(3, COUNT))
@settings(max_examples=60, deadline=None)
def test_whatever_is_done_the_bits_are_those_of_rows_on_the_device(
    tier: str, folder: str, plan: list[Any], slots: int
) -> None:
    compare(plan, tier, slots, folder)


@pytest.mark.parametrize("tier", TIERS)
def test_many_rows_and_long_waits(tier: str, folder: str) -> None:
    """More rows than are caught up together, in a pool that is just as large as a step needs; some rest already."""
    own, plain = store(150, tier, 8, folder), store(150, "device", 0, folder)
    generator = torch.Generator().manual_seed(0)
    for each in (own, plain):
        each.start_optimizer("torch")
    for number in range(260):
        few = 150 if number < 40 else 20
        scenes = plain.ids[torch.randperm(few, generator=generator)[:8]].tolist()
        assert torch.equal(step(own, scenes, number), step(plain, scenes, number))
        own.prefetch(plain.ids[torch.randperm(few, generator=generator)[:8]])
        if number == 100:
            assert torch.equal(own.read(plain.ids[5:140].tolist()), plain.read(plain.ids[5:140].tolist()))
    assert_same(own, plain)
    for each in (own, plain):
        each.catch_up()
    assert_same(own, plain)


def test_prefetched_scenes_are_there_when_they_are_located(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And take the place of none that the last step uses, nor of those that were used after others."""
    brought: list[list[int]] = []
    move = tiers.RowPool._submit

    def submit(self: Any, saved: Any, placed: Any, after: Any) -> Any:
        brought.append([row for row, _ in placed])
        return move(self, saved, placed, after)

    monkeypatch.setattr(tiers.RowPool, "_submit", submit)
    own = store(6, "host", 4, folder)
    ids = own.ids.tolist()
    own.start_optimizer("torch")
    brought.clear()
    own.locate(torch.tensor([ids[0], ids[1]]))
    own.locate(torch.tensor([ids[2], ids[3]]))
    own.prefetch(torch.tensor([ids[4], ids[5], ids[2]]))
    own.locate(torch.tensor([ids[5], ids[2], ids[4], ids[3]]))
    own.locate(torch.tensor([ids[2], ids[3]]))
    own.prefetch(torch.tensor([ids[1]]))
    own.locate(torch.tensor([ids[2], ids[3], ids[1]]))
    assert brought == [[0, 1], [2, 3], [4, 5], [1]]
    own.locate(torch.tensor([ids[2]]))
    own.locate(torch.tensor([ids[0]]))  # in the place of another
    own.locate(torch.tensor([ids[2]]))
    assert brought[4:] == [[0]]


def test_a_full_disk_is_told_in_a_sentence(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = store(4, "disk", 2, folder)
    own.start_optimizer("torch")
    ids = own.ids.tolist()
    step(own, ids[:2], 0)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        OSError, match=f"^{folder} can't be written: No space left on device .* are left on the disk at"
    ):
        step(own, ids[2:], 1)


def test_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """It has no name, and takes no more of the disk than what was written."""
    shape = (1000, 3, 32, 32, 16)
    rows = tiers.FileRows(shape, CPU, str(tmp_path))
    rows.put([7], torch.ones(1, *shape[1:]))
    status = os.fstat(rows._file.fileno())
    assert os.listdir(tmp_path) == [] and status.st_size == 4 * 1000 * 49152
    assert 4 * 49152 <= 512 * status.st_blocks < 8 * 49152
    assert int(rows.tensor[7].sum()) == 49152 and rows.tensor[6].count_nonzero() == 0


# --- Where planes are -----------------------------------------------------------------------------------------------


class OtherRanks:
    """A channel of this rank and one on which other tiers have room."""

    def __init__(self, other: int = 0) -> None:
        self.other = other

    def together(self, action: Any) -> Any:
        return action()

    def gather(self, value: int) -> list[int]:
        return [value, self.other]


SIZE = 3 * 4 * 3 * 8 * 8 * 8  # of a scene
ROOMS = {
    # room on the device, in host memory and on the disk, in scenes; setting; other rank -> tier and slots, or words
    "device": ((200, 200, 200), "auto", 0, ("device", 100)),
    "host": ((100, 200, 200), "auto", 0, ("host", 50)),
    "disk": ((60, 100, 200), "auto", 0, ("disk", 30)),
    "another rank": ((200, 200, 200), "auto", 1, ("host", 100)),
    "set": ((200, 200, 200), "disk", 0, ("disk", 100)),
    "none": ((60, 60, 60), "auto", 0, "meta has .* GiB free for it, host memory has .*, the disk of /.* has "),
    "not that": ((200, 60, 200), "host", 0, "need 0.0 GiB, and host memory has 0.0 GiB free for it: lower .*, or go$"),
    "no room for a step": ((7, 200, 200), "auto", 0, "a step of train.warmup may need 4 scenes on meta .* is 3 by its"),
}


@pytest.mark.parametrize("case", ROOMS)
def test_the_first_tier_with_room(case: str, recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, wanted, other, expected = ROOMS[case]
    device, host, disk = (SIZE * room for room in rooms)
    monkeypatch.setattr(memory, "free_memory", lambda where: device if where.type == "meta" else host)
    monkeypatch.setattr(memory, "free_disk", lambda folder, needed: disk)
    arguments: Any = (config.load(Recipe, recipe_file, [f"planes.storage={wanted}"]), 100, torch.device("meta"))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            memory.choose_storage(*arguments, OtherRanks(other), "go")
        return
    found = memory.choose_storage(*arguments, OtherRanks(other), "go")
    assert (found.tier, found.slots, found.folder) == (*expected, tempfile.gettempdir())


def test_folders_that_are_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free = memory.free_disk(str(tmp_path), needed=True)
    assert 0 < free <= os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 3
    assert 0 < memory.free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    for folder, why in (("/dev/shm", "is in memory"), (str(tmp_path / "none"), "can't be used .No such file")):
        assert memory.free_disk(folder, needed=False) == 0
        with pytest.raises(ValueError, match=f"^planes.scratch: {folder} {why}.*: set it to a folder on a disk"):
            memory.free_disk(folder, needed=True)


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_memory(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the process, those above it, and what is in use there; a cache is no use."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    root = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    limit, used, cache = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
        ("memory.max", "memory.current", "file"),
    ][version - 1]
    for path, numbers in {"job": ("1000", 700, 300), "job/step": ("max", 600, 250), "other": ("5", 5, 0)}.items():
        folder = root / path
        folder.mkdir(parents=True)
        for name, text in ((limit, numbers[0]), (used, numbers[1]), ("memory.stat", f"anon 1\n{cache} {numbers[2]}")):
            (folder / name).write_text(f"{text}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:       2 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/other\n{'4:memory' if version == 1 else '0:'}:/job/step\n")
    assert memory.free_memory(CPU, str(tmp_path)) == 1000 - (700 - 300)
    (root / "job" / limit).write_text("max")
    assert memory.free_memory(CPU, str(tmp_path)) == 2048


# --- Groups of scenes -----------------------------------------------------------------------------------------------


def cached(views: list[int], variants: int) -> LatentCache:
    """Views of scenes that are not beside each other; there are ``views[i]`` of scene i."""
    scene = torch.tensor([scene for turn in range(max(views)) for scene, n in enumerate(views) if turn < n])
    pose = torch.zeros(len(scene), 4, 4)
    batch = ViewBatch(pose[:, None], scene, scene, pose, pose[:, 1:, 1:], pose, scene > 0)
    return LatentCache([batch], lambda batch, _: {"latents": batch.images}, variants)


@given(
    views=st.lists(st.integers(1, 5), min_size=1, max_size=9),
    group=st.integers(1, 10),
    variants=st.integers(1, 2),
    batch=st.integers(1, 7),
)
@settings(max_examples=40)
def test_views_come_in_groups_of_scenes(views: list[int], group: int, variants: int, batch: int) -> None:
    cache, count, epochs = cached(views, variants), sum(views), 3

    def places(batch_size: int, state: StreamState, number: int) -> list[int]:
        loader = LatentLoader(cache, batch_size, 5, replace(state), group)
        return [int(place) for _ in range(number) for place in loader.take()]

    whole = places(1, StreamState(), epochs * count)
    for epoch in range(epochs):
        part = whole[epoch * count : (epoch + 1) * count]
        assert sorted(place // variants for place in part) == list(range(count))
        left = cache.scene[part].tolist()
        while left:
            some = first_group(left, views, group)
            assert len(some) == min(group, len(set(left)))
            left = left[sum(views[scene] for scene in some) :]
    at, further = 2 * batch, [*whole, *places(1, StreamState(epochs), 5 * batch)]
    assert places(batch, StreamState(*divmod(at, count)), 3) == further[at : at + 3 * batch]


def first_group(order: list[int], views: list[int], group: int) -> set[int]:
    """The first scenes that have all been seen when the next one comes."""
    seen: dict[int, int] = {}
    for scene in order:
        seen[scene] = seen.get(scene, 0) + 1
        if len(seen) == min(group, len(set(order))) and all(seen[other] == views[other] for other in seen):
            return set(seen)
    raise AssertionError("scenes of several groups are mixed")


def test_groups_are_shuffled() -> None:
    cache = cached([4] * 12, 1)
    orders = [
        cache.scene[LatentLoader(cache, 48, seed, StreamState(epoch), 3).take()] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert len({tuple(sorted(set(order[:12].tolist()))) for order in orders}) == 4  # of other scenes
    assert all(len(set(order[:4].tolist())) > 1 for order in orders)  # within a group, too
