# SPDX-License-Identifier: Apache-2.0
"""Evaluation on several ranks: the metrics, the picture and the videos of one rank, from what each of them owns."""

import hashlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import runs
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from igae.data import DataConfig, Manifest, PackOptions, pack
from igae.evaluation import EvaluationConfig, Evaluator, grid
from igae.models import IGAE, AutoencoderConfig, load_autoencoder
from igae.ranks import Channel, rank
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig, SceneStore

CPU = torch.device("cpu")


@dataclass
class Case:
    """What is evaluated. The scenes that tests/runs.py packs have 12, 5, 1 and 20 views, 1, 1, 0 and 2 held out."""

    data: str
    settings: dict[str, int | None]
    identity: bool = False
    scenes: int = 4


@dataclass
class Result:
    """What a rank saw of a case, and what it returned."""

    metrics: dict[str, float]
    grids: dict[str, NDArray[np.uint8]]
    videos: dict[str, Path]
    read: set[int]
    natural_images: NDArray[np.uint8]
    files: dict[str, str] = field(default_factory=dict)


def build(case: Case, owned: list[int], cls: type[Evaluator] = Evaluator) -> tuple[Evaluator, IGAE, SceneStore]:
    manifest = Manifest.load(case.data)
    settings = EvaluationConfig(**{"views": 3, "pictures": 3, "orbits": 3, "orbit_frames": 3, **case.settings})
    data = DataConfig(root=case.data, workers=0)
    found = cls(settings, data, manifest, manifest.select(None), frozenset(owned), CPU, Channel())
    net = (
        load_autoencoder(AutoencoderConfig(path="identity"))
        if case.identity
        else runs.create_autoencoder("AutoencoderKL", scale=0.2)
    )
    options = RenderOptions(coarse_samples=5, fine_samples=5, patch=1 if case.identity else 2)
    planes = PlanesConfig(resolution=6, features=8, init_std=2.0)
    model = IGAE(net, planes, options, (16, 16), seed=3).eval()
    model.mlp.b2.data[0] += 2.0  # so that there are surfaces
    model.refresh_background()
    return found, model, SceneStore(planes, owned, 0, CPU)


def evaluate(case: Case, owned: list[int], folder: Path) -> Result:
    found, model, bank = build(case, owned)
    return Result(
        found.measure(model, bank),
        found.grids(model, bank),
        found.orbits(model, bank, folder / "new" / "orbits"),
        {int(scene) for views in found.splits.values() for scene in views.scene} | set(found.mean_views),
        np.zeros((0, 3, 16, 16), np.uint8) if found.natural_images is None else found.natural_images.numpy(),
    )


def evaluate_rank(cases: list[Case], owners: list[list[int]], folders: list[Path]) -> list[Result]:
    dist.init_process_group("gloo")
    results = [
        evaluate(case, [scene for scene in owners[rank()] if scene < case.scenes], folder)
        for case, folder in zip(cases, folders, strict=True)
    ]
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("data")
    shards = runs.packed_data(folder)
    pack(str(folder / "natural_images"), PackOptions(images=str(folder / "source/natural_images")))
    source = folder / "one" / "scenes"
    shutil.copytree(folder / "source/scenes/square16/scene_2", source / "square16/scene_2")
    pack(
        str(folder / "train"),
        PackOptions(scenes=str(source), subset="square16", images=str(folder / "source/natural_images")),
    )
    return {
        "all": Case(shards, {"scenes": None, "natural_images": 7}),
        "few": Case(shards, {"scenes": 2, "natural_images": 2}),  # scenes 0 and 2
        "one": Case(shards, {"scenes": 1, "natural_images": 0, "views": 1}),
        "identity": Case(shards, {"scenes": None, "natural_images": 4}, identity=True),
        "train": Case(str(folder / "train"), {"natural_images": 1}, scenes=1),  # one scene, which has no held-out view
        "natural_images": Case(str(folder / "natural_images"), {"natural_images": 8, "pictures": 5}, scenes=0),
        "nothing": Case(str(folder / "natural_images"), {"natural_images": 0}, scenes=0),
    }


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "new/orbits").glob("*")}


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    results = {}
    for name, case in cases.items():
        folder = tmp_path_factory.mktemp(name)
        results[name] = evaluate(case, list(range(case.scenes)), folder)
        results[name].files = digests(folder)
    return results


OWNERS = {
    2: [[0, 3], [1, 2]],
    # The first rank draws, and in the case `few` it owns nothing of what is shown and no natural image.
    3: [[1], [0], [2, 3]],
}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_rank_sees(
    cases: dict[str, Case], alone: dict[str, Result], world: int, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in cases]
    by_rank = ranks.run(evaluate_rank, world, list(cases.values()), OWNERS[world], folders)
    for index, name in enumerate(cases):
        expected, found = alone[name], [results[index] for results in by_rank]
        for result in found:
            assert result.metrics == found[0].metrics and list(result.metrics) == list(expected.metrics)
            for key, value in expected.metrics.items():
                assert result.metrics[key] == pytest.approx(value, abs=1e-6, rel=0), (name, key)  # measured 3e-7
        # The first rank draws, the others have nothing.
        assert all(result.grids == {} and result.videos == {} for result in found[1:])
        assert list(found[0].grids) == list(expected.grids)
        assert all(np.array_equal(found[0].grids[key], grid) for key, grid in expected.grids.items()), name
        assert [path.name for path in found[0].videos.values()] == [path.name for path in expected.videos.values()]
        assert digests(folders[index]) == expected.files and len(expected.files) == len(expected.videos), name
        # Nobody reads what is another's.
        assert [result.read for result in found] == [expected.read & set(owned) for owned in OWNERS[world]]
        assert np.array_equal(np.concatenate([result.natural_images for result in found]), expected.natural_images)
        sizes = [len(result.natural_images) for result in found]
        assert max(sizes) - min(sizes) <= 1
    few = [results[list(cases).index("few")] for results in by_rank]
    assert world == 2 or (few[0].read == set() and len(few[0].natural_images) == 0)


def test_the_cases_are_what_they_are_meant_to_be(alone: dict[str, Result]) -> None:
    kinds = {name: {key.split("/")[0] for key in result.metrics} for name, result in alone.items()}
    assert kinds["all"] == kinds["few"] == {"heldout", "train", "natural", "gap"}
    assert (
        kinds["train"] == {"train", "natural"} and kinds["natural_images"] == {"natural"} and kinds["nothing"] == set()
    )
    some = {"gap/rgb_psnr", *(f"heldout/{name}" for name in ("depth_error", "opacity_background", "opacity_object"))}
    assert all(some <= alone[name].metrics.keys() for name in ("all", "identity"))
    assert [len(result.videos) for result in alone.values()] == [3, 2, 1, 3, 1, 0, 0]
    for key, expected in (("views", [3, 1, 1, 3, 1, 5, 0]), ("latents", [3, 1, 1, 0, 1, 0, 0])):
        assert [len(r.grids[key]) // 132 if key in r.grids else 0 for r in alone.values()] == expected


def draw_slowly(case: Case, owners: list[list[int]], folder: Path) -> None:
    done = folder / "done"

    def slow(*args: Any) -> Any:
        until = time.monotonic() + 60
        while not done.exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert done.exists(), "the other rank waits for the drawing"
        return grid(*args)

    class Slow(Evaluator):
        draw = staticmethod(slow)

    dist.init_process_group("gloo")
    found, model, bank = build(case, owners[rank()], Slow)
    found.grids(model, bank)
    if rank() == 1:
        done.touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["few", "natural_images"])
def test_nobody_waits_for_the_drawing(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    ranks.run(draw_slowly, 2, cases[name], OWNERS[2] if name == "few" else [[], []], tmp_path)
