# SPDX-License-Identifier: Apache-2.0
"""Copies of shards on a local disk: the same samples, each asked for once, and whatever ends a download."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from scene_files import open_images, open_views, write_data

from igae.data import Manifest, PackOptions, Shard, ShardError, ShardReader, pack
from igae.storage import LIMITS, Cache, StoreError


class Far(AbstractFileSystem):
    """Files of this machine, of which each request is noted in the file `noted`; `pause` is the seconds of one."""

    protocol = "far"
    noted: Path
    pause = 0.0

    def _note(self, what: str, path: str) -> str:
        path = path.removeprefix("far://")
        with open(Far.noted, "a") as log:
            log.write(f"{what} {Path(path).name}\n")
        return path

    def info(self, path, **_):
        path = self._note("info", path)
        return {"name": path, "size": os.stat(path).st_size, "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        with open(self._note("read", path), "rb") as file:
            file.seek(start)
            time.sleep(Far.pause)
            return file.read(end - start)


def use(log: Path, pause: float = 0.0, block: int = LIMITS.remote_block) -> None:
    fsspec.register_implementation("far", Far, clobber=True)
    Far.noted, Far.pause = log, pause
    LIMITS.remote_block = block


def asked(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines() if log.exists() else [])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("packed")
    data = write_data(folder / "data", views=(9, 9, 9), images=20)
    sources = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    manifest, _ = pack(str(folder / "out"), PackOptions(**sources, subset="square16", shard_size=20_000))
    return str(folder / "out"), manifest


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(LIMITS, "first_wait", 0.0)
    monkeypatch.setattr(LIMITS, "remote_block", LIMITS.remote_block)
    use(tmp_path / "log")
    yield tmp_path / "log"
    use(tmp_path / "log")


def test_samples_and_requests(packed, log, tmp_path):
    """Three epochs give what they give without copies, and the store is asked for each shard once."""
    root, manifest = packed
    arguments = {"batch_size": 4, "shuffle": 6, "seed": 2, "workers": 0}
    folder = str(tmp_path / "new" / "cache")
    for make, name in (
        (lambda root, **more: open_views(root, manifest, manifest.scenes, **arguments, **more), "scenes"),
        (lambda root, **more: open_images(root, manifest, **arguments, **more), "images"),
    ):
        plain, kept = make(root), make(f"far://{root}", cache=folder)
        for _ in range(3 * plain.plan.samples // 4):
            one, other = next(plain), next(kept)
            if name == "scenes":
                one, other = one.images, other.images
            assert torch.equal(one, other)
        assert plain.state == kept.state
        plain.close()
        kept.close()
        shards = [shard.name for shard in manifest.shards if shard.kind == name]
        assert len(shards) > 1
        assert all(asked(log)[f"{what} {shard}"] == 1 for what in ("info", "read") for shard in shards)
    assert set(asked(log).values()) == {1}
    log.unlink()
    again = open_views(f"far://{root}", manifest, manifest.scenes, batch_size=4, cache=folder, verify="sha256")
    next(again)
    again.close()
    assert not asked(log) and sorted(Path(folder).iterdir()) == sorted(
        Path(folder) / f"{shard.sha256}.tar" for shard in manifest.shards if shard.kind != "heldout"
    )


def test_one_shard_ahead(packed, log, tmp_path):
    """While a shard is read the next one is fetched, and no more."""
    root, manifest = packed
    shards = [shard for shard in manifest.shards if shard.kind == "scenes"]
    assert len(shards) == 3
    loader = open_views(
        f"far://{root}", manifest, manifest.scenes, batch_size=1, shuffle=0, workers=0, cache=str(tmp_path / "cache")
    )
    records = loader.plan.read(loader.state)
    next(records)
    cache = Cache(str(tmp_path / "cache"), root)
    deadline = time.monotonic() + 20
    while not cache.has(shards[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [cache.has(shard) for shard in shards] == [True, True, False]
    loader.close()


def test_the_next_shard_is_begun(packed, log, tmp_path):
    """Without copies: its first block is there when the shard before is read to its end."""
    root, manifest = packed
    first, second, third = (shard.name for shard in manifest.shards if shard.kind == "scenes")
    loader = open_views(f"far://{root}", manifest, manifest.scenes, batch_size=1, shuffle=0, workers=0)
    records = loader.plan.read(loader.state)
    for _ in range(loader.plan.counts[first]):
        next(records)
    deadline = time.monotonic() + 20
    while not asked(log)[f"read {second}"] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert asked(log) == {f"{what} {name}": 1 for what in ("info", "read") for name in (first, second)}
    next(records)
    assert asked(log)[f"read {second}"] == 1
    loader.close()


def fetching(log: Path, root: str, shard: Shard, folder: Path) -> multiprocessing.Process:
    """A process that downloads a shard slowly, in many requests; it exits with 1 if it gets something else."""

    def fetch() -> None:
        use(log, pause=0.05, block=1000)
        found = Path(Cache(str(folder), f"far://{root}").get(shard, "it")).read_bytes()
        os._exit(found != (Path(root) / shard.name).read_bytes())

    process = multiprocessing.get_context("fork").Process(target=fetch)
    process.start()
    return process


def test_processes_share_a_download(packed, log, tmp_path):
    root, manifest = packed
    shard = manifest.shards[0]
    processes = [fetching(log, root, shard, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # Of this shard: a thread of a test before, which opens the next shard, may still note its own.
    found = {what: count for what, count in asked(log).items() if what.endswith(shard.name)}
    assert found == {f"info {shard.name}": 1, f"read {shard.name}": -(-shard.bytes // 1000)}


def test_a_killed_download(packed, log, tmp_path):
    root, manifest = packed
    shard, cache = manifest.shards[0], Cache(str(tmp_path / "cache"), f"far://{root}")
    child = fetching(log, root, shard, cache.folder)
    deadline = time.monotonic() + 30
    while asked(log)[f"read {shard.name}"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (partial,) = cache.folder.glob("*.partial")
    assert not cache.has(shard) and not cache.path(shard).exists()
    assert Path(cache.get(shard, "it")).read_bytes() == (Path(root) / shard.name).read_bytes()
    assert partial.exists()
    assert Cache(str(cache.folder), root) and not partial.exists()


def test_a_copy_of_another_size(packed, log, tmp_path):
    root, manifest = packed
    shard, cache = manifest.shards[0], Cache(str(tmp_path), f"far://{root}")
    raw = (Path(root) / shard.name).read_bytes()
    for wrong in (b"", raw[:-1], raw + b"x"):
        cache.path(shard).write_bytes(wrong)
        assert Path(cache.get(shard, "it")).read_bytes() == raw


def test_a_damaged_copy(packed, log, tmp_path):
    root, manifest = packed
    shard, cache = manifest.shards[0], Cache(str(tmp_path), f"far://{root}")
    path = Path(cache.get(shard, "it"))
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=f"{path}, a copy of shard {shard.name}, is damaged: delete it"):
        list(ShardReader(f"far://{root}", verify="sha256", cache=cache).read(shard))


@pytest.mark.parametrize(("damage", "says"), [(b"x", "manifest says"), (None, "another sha256")])
def test_what_the_store_has_instead(damage, says, packed, log, tmp_path):
    root, manifest = packed
    shard = manifest.shards[0]
    raw = bytearray((Path(root) / shard.name).read_bytes())
    raw[700] ^= 1
    (tmp_path / shard.name).write_bytes(raw + (damage or b""))
    cache = Cache(str(tmp_path / "cache"), f"far://{tmp_path}")
    with pytest.raises(ShardError, match=f"shard {shard.name} in far://.* {says}"):
        next(ShardReader(f"far://{tmp_path}", cache=cache).read(shard))
    assert not any(cache.has(each) for each in manifest.shards) and not list(cache.folder.glob("*.partial"))


def test_no_room(packed, log, tmp_path, monkeypatch):
    root, manifest = packed
    shard, cache = manifest.shards[0], Cache(str(tmp_path / "cache"), f"far://{root}")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StoreError) as error:
        patch.setattr(os, "fsync", full)
        cache.get(shard, f"shard {shard.name}")
    told = (
        f"shard {shard.name} cannot be kept in data.cache {tmp_path / 'cache'}: {cache.path(shard)} can't be written: "
    )
    assert str(error.value).startswith(f"{told}No space left on device (")
    assert str(error.value).endswith("; make room there, choose another folder, or leave data.cache out")
    assert not any(cache.has(each) for each in manifest.shards) and not list(cache.folder.glob("*.partial"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=shard.bytes - 1))
    with pytest.raises(ValueError, match="0.0 GB left and 0.0 GB of shards are to be kept there"):
        open_views(root, manifest, manifest.scenes, batch_size=1, cache=str(tmp_path / "cache"))
    monkeypatch.undo()
    cache.get(shard, "it")
    cache.check_space([shard])


@pytest.mark.parametrize("folder", ["s3://bucket/cache", "/dev/null/cache", "/proc/cache"])
def test_no_folder(folder):
    with pytest.raises(ValueError, match=f"data.cache {folder} "):
        Cache(folder, "far://x")
