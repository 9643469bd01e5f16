# SPDX-License-Identifier: Apache-2.0
"""What training, evaluation and fitting ask an S3 server for: the manifest and what each rank owns, counted there."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import fsspec
import object_store
import pytest
import ranks
import runs
import yaml
from object_store import Proxy
from scene_files import open_images, open_views, write_data
from slow_ownership import assign
from test_fit import FIT

from igae.cli import evaluate
from igae.data import DataConfig, Manifest, PackOptions, pack
from igae.storage import LIMITS
from igae.training import RankData

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("one_run_a_process")

ROOT = "s3://bucket/packed"
SETTINGS = [f"data.root={ROOT}", "evaluation.natural_images=6", "train.warmup.epochs=1", "train.joint.epochs=2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """With the shards of four scenes, one in each, and natural images in four shards, packed straight to it."""
    data = write_data(tmp_path_factory.mktemp("data"), images=11)
    sources = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    with object_store.moto() as port, Proxy(port).running() as proxy:
        with pytest.MonkeyPatch.context() as patch:
            object_store.use(patch, port)
            fsspec.filesystem("s3").mkdir("bucket")
            found = pack(ROOT, PackOptions(**sources, subset="square16", shard_size=12_000))[0]
        assert [len(shard.scenes) for shard in found.shards if shard.kind == "scenes"] == [1, 1, 1, 1]
        assert sum(shard.kind == "images" for shard in found.shards) == 4
        yield proxy


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    object_store.use(monkeypatch, server.port)
    server.reset()
    return server


@pytest.fixture
def manifest(proxy: Proxy) -> Manifest:
    found = Manifest.load(ROOT)
    proxy.reset()
    return found


def asked(proxy: Proxy) -> dict[int, Counter[str]]:
    """How often each rank asked for what (method and file). Listings, and anything else, are none of the files."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for agent, method, path, _ in proxy.sent:
        name = re.fullmatch(r"/bucket/packed/([\w\-]+\.\w+)(\?x-id=\w+)?", path)
        assert name, f"{method} {path}"
        rank = re.search(r"rank-(\d)", agent)
        found[int(rank[1]) if rank else 0][f"{method} {name[1]}"] += 1
    proxy.reset()
    return found


def files(counts: Counter[str], kind: str) -> set[str]:
    return {name.split()[1] for name in counts if name.split()[1].startswith(kind)}


def train_from(port: int, *arguments: Any) -> None:
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    agent = f"rank-{os.environ['RANK']}"
    fsspec.config.conf["s3"] = object_store.options(port, user_agent_extra=agent)
    runs.train(*arguments)


@pytest.mark.parametrize("world", [1, 3])
def test_a_rank_reads_its_own(world, manifest, proxy, monkeypatch):
    """The first batches of views and natural images, of which only the beginning of a shard is fetched."""
    monkeypatch.setattr(LIMITS, "remote_block", 2000)
    monkeypatch.setattr("igae.data.loader.READ_AHEAD", 1)
    shards = [shard for shard in manifest.shards if shard.kind == "scenes"]
    owners = assign([{int(name[-1]): n for name, n in shard.scenes.items()} for shard in shards], world)
    for rank in range(world):
        parts = [manifest.scenes.take(part) for part in owners]
        data = RankData(DataConfig(root=ROOT), manifest, manifest.scenes, parts, rank, world)
        arguments: dict[str, Any] = {"batch_size": 1, "shuffle": 0, "workers": 0}
        for loader in (
            open_views(ROOT, manifest, data.owned, **arguments),
            open_images(ROOT, manifest, part=data.natural_images, **arguments),
        ):
            next(loader)
            loader.close()
        sent = sum(size for *_, size in proxy.sent)
        (counts,) = asked(proxy).values()
        own = {shard.name for shard in shards if {int(name[-1]) for name in shard.scenes} <= set(owners[rank])}
        ends, first = {}, 0
        for shard in manifest.shards:
            if shard.kind == "images":
                ends[shard.name] = range(first, first + shard.samples)
                first += shard.samples
        natural_images = {name for name, numbers in ends.items() if set(numbers) & set(data.natural_images)}
        assert files(counts, "scenes") <= own and files(counts, "images") <= natural_images
        assert not files(counts, "manifest") and not files(counts, "heldout")
        # A sample that is given out and two that may be read ahead, in two streams: 6 of about 2.4 kB, and the
        # natural images before the rank's own in their shard.
        assert sent <= 30_000 < sum(shard.bytes for shard in manifest.shards)


@pytest.mark.slow
def test_runs(manifest, proxy, tmp_path):
    """Two ranks of one machine with copies of shards: all is read once. Then resuming, evaluation and fitting."""
    recipe = str(runs.recipe_file(tmp_path, "unset"))
    cache = f"data.cache={tmp_path / 'cache'}"
    ranks.run(train_from, 2, proxy.port, recipe, cache, *SETTINGS)
    found = asked(proxy)
    assert set(found) == {0, 1}
    parts = [{name for name in files(found[rank], "scenes")} for rank in (0, 1)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {f"scenes-0000{i}.tar" for i in range(4)}
    for rank in (0, 1):
        # Held-out views of the rank's own scenes: those lie in shards of the same number.
        assert files(found[rank], "heldout") <= {name.replace("scenes", "heldout") for name in parts[rank]}
        assert all(found[rank][f"{method} manifest.json"] == 1 for method in ("HEAD", "GET"))
    both = found[0] + found[1]
    expected = {f"{method} {shard.name}": 1 for shard in manifest.shards for method in ("HEAD", "GET")}
    assert {name: count for name, count in both.items() if "manifest" not in name} == expected

    ranks.run(train_from, 2, proxy.port, recipe, cache, *SETTINGS[:-1], "train.joint.epochs=3", "--extend")
    found = asked(proxy)
    assert found == {rank: {"HEAD manifest.json": 1, "GET manifest.json": 1} for rank in (0, 1)}

    # Evaluation of one scene, without copies. The URL that the run names is asked if the command names it, too.
    run = str(tmp_path / "outputs/run")
    settings = ["data.cache=null", "evaluation.scenes=1", "evaluation.natural_images=2", "data.workers=0"]
    assert evaluate.main(["--checkpoint", run, *settings]) == 2 and not asked(proxy)
    assert evaluate.main(["--checkpoint", run, f"data.root={ROOT}", *settings]) == 0
    (counts,) = asked(proxy).values()
    (scenes,) = files(counts, "scenes")
    assert files(counts, "heldout") <= {scenes.replace("scenes", "heldout")}
    assert len(files(counts, "images")) == 1 and counts["GET manifest.json"] == 1

    # Fitting of one scene: its two shards.
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump({**FIT, "data": {"root": ROOT, "workers": 0}, "outputs": str(tmp_path / "outputs")}))
    ranks.run(train_from, 1, proxy.port, str(path), f"model={run}", "data.categories={cars: [0, 1]}")
    (counts,) = asked(proxy).values()
    (shard,) = (shard.name for shard in manifest.shards if shard.kind == "scenes" and "scene_1" in shard.scenes)
    assert files(counts, "scenes") == {shard} and files(counts, "heldout") == {shard.replace("scenes", "heldout")}
    assert not files(counts, "images") and counts["GET manifest.json"] == 1
