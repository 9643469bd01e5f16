# SPDX-License-Identifier: Apache-2.0
"""Scenes in host memory or on a disk, some of them on the device at a time: the same bits as all on the device."""

import errno
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train
from igae import checkpoint, config
from igae.data import LatentCache, LatentLoader, StreamState, ViewBatch
from igae.export import take_settings
from igae.scenes import PlanesConfig, SceneStore, Storage, tiers
from igae.training import Fit, Recipe, memory

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


# --- Runs -----------------------------------------------------------------------------------------------------------

SMALL = [
    *(f"train.{stage}.{key}" for stage in ("warmup", "joint") for key in ("batch_size=2", "epochs=1")),
    *("train.warmup.group=0", "evaluation.every=5", "checkpoint.every=4", "tracking.every=1", "planes.resident=2"),
]
"""Four scenes and a pool of two, as many as a step needs."""
OTHER = [
    *(f"train.{stage}.{key}" for stage in ("warmup", "joint") for key in ("batch_size=1", "accumulate=2")),
    *("train.joint.alternate=true", "train.warmup.group=2", "planes.storage=disk"),
]


def trained(recipe: str, name: str, *settings: str) -> dict[str, str]:
    """Digests of what a run ends with."""
    assert train.main(["--config", recipe, *SMALL, f"experiment={name}", *settings]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return runs.digests(Path(recipe).parent / "outputs" / name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: str) -> tuple[str, dict[str, str]]:
    """A recipe, and what a run with all scenes on the device ends with."""
    recipe = str(runs.recipe_file(tmp_path_factory.mktemp("tiers"), shards))
    return recipe, trained(recipe, "device", "planes.storage=device")


def losses(recipe: str, name: str) -> list[dict[str, float]]:
    lines = (Path(recipe).parent / "outputs" / name / "metrics.jsonl").read_text().splitlines()
    keep = ("loss/", "eval/", "grad_norm/")
    return [{k: v for k, v in json.loads(line).items() if k.startswith(keep)} for line in lines]


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_ends_with_the_same_bits(
    tier: str, base: tuple[str, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """With evaluations and checkpoints in between."""
    recipe, expected = base
    with caplog.at_level(logging.INFO, "igae"):
        assert trained(recipe, tier, f"planes.storage={tier}", "checkpoint.background=true") == expected
    assert losses(recipe, tier) == losses(recipe, "device")
    text = caplog.text
    assert "planes and moments of 4 scenes" in text and "2 of them on cpu" in text
    assert "written while training waits" in text


def test_other_kinds_of_steps(base: tuple[str, dict[str, str]]) -> None:
    """Several batches a step, views and natural images in turns, views in groups, steps as a graph makes them."""
    recipe, _ = base
    expected = trained(recipe, "others", *OTHER, "planes.storage=device")
    assert trained(recipe, "others-disk", *OTHER) == expected
    weights = []
    for storage in ("device", "host"):
        own = [f"experiment=graph-{storage}", f"planes.storage={storage}", "train.warmup.group=2"]
        trainer = runs.StaticTrainer(config.load(Recipe, recipe, [*SMALL, *own]))
        trainer.run()
        AcceleratorState._reset_state(reset_partial_state=True)
        weights.append({**trainer.model.state_dict(), "rows": trainer.store.rows})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_killed_run_resumes_in_another_tier(base: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    recipe, expected = base
    scratch, folder = tmp_path / "scratch", Path(recipe).parent / "outputs" / "killed"
    scratch.mkdir()
    on_disk = [recipe, *SMALL, "experiment=killed", "planes.storage=disk", f"planes.scratch={scratch}"]
    for steps in (4, 12):  # kills in both stages
        run = ranks.Ranks(runs.train, 1, *on_disk, log=str(tmp_path / "log"))
        limit = time.monotonic() + 100
        while not any(int(Path(c).name[5:13]) >= steps for c in checkpoint.list_complete(str(folder / "checkpoints"))):
            assert time.monotonic() < limit and run.processes[0].is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.005)
        run.processes[0].kill()
        assert run.exit_codes() == [-9] and os.listdir(scratch) == []
    assert trained(recipe, "killed", "planes.storage=host") == expected
    assert "resumes from step" in (tmp_path / "log").read_text()


def test_a_fit_ends_with_the_same_bits(base: tuple[str, dict[str, str]], shards: str) -> None:
    folder = Path(base[0]).parent
    warmup = {"epochs": 2, "batch_size": 2, "learning_rates": {"planes": 5e-2}, "weights": {"latent": 1}}
    joint = {**warmup, "learning_rates": {"planes": 1e-2}, "weights": {"latent": 0, "rgb": 1}}
    own = {
        "experiment": "fit",
        "model": str(folder / "outputs" / "device"),
        "outputs": str(folder / "outputs"),
        "data": {"root": shards, "workers": 0},
        "fit": {"wave": 3},
        "train": {"warmup": {**warmup, "group": 0}, "joint": joint},
        "evaluation": {"views": 1, "pictures": 0, "orbits": 0},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(own))
    found = []
    for storage in ("device", "disk"):
        more = [f"experiment=fit-{storage}", f"planes.storage={storage}", "planes.resident=2"]
        Fit(config.load(Recipe, folder / "fit.yaml", more, complete=take_settings)).run()
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(runs.digests(folder / "outputs" / f"fit-{storage}"))
    assert found[0] == found[1] and any("planes" in name for name in found[0])


def test_a_pool_that_is_too_small_is_refused_before_anything_is_done(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["planes.storage=host", "planes.resident=3", "train.joint.batch_size=2"]
    assert train.main(["--config", recipe_file, *own]) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        "error: a step of train.warmup may need 4 scenes on cpu and planes.resident is 3: set planes.resident=4 or "
        "more, or lower train.warmup.batch_size"
    )
    assert not (Path(recipe_file).parent / "outputs").exists()


def test_groups_are_of_cached_latents(recipe_file: str) -> None:
    with pytest.raises(ValueError, match="train.joint: group is of cached latents, and this stage reads images"):
        config.load(Recipe, recipe_file, ["train.joint.group=2"])
