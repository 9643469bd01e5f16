# SPDX-License-Identifier: Apache-2.0
"""Streams: order, exact resumption, decoding, errors, and reading from an object store."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import object_store
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scene_files import open_images, open_views, picture, write_data

from igae.data import Manifest, PackOptions, ShardError, StreamState, ViewBatch, pack
from igae.errors import in_one_sentence

VIEWS = (12, 5, 1, 20, 9)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Manifest]:
    root = tmp_path_factory.mktemp("streams")
    data = write_data(root / "data", views=VIEWS, images=11)
    manifest, _ = pack(
        str(root / "out"),
        PackOptions(
            scenes=str(data / "scenes"), subset="square16", images=str(data / "natural_images"), shard_size=25_000
        ),
    )
    kinds = Counter(shard.kind for shard in manifest.shards)
    assert kinds["scenes"] >= 3 and kinds["heldout"] >= 2 and kinds["images"] >= 2
    return data, str(root / "out"), manifest


def keys(batches) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b.scene.tolist(), b.view.tolist(), strict=True)]


def take(loader, number: int) -> list[ViewBatch]:
    try:
        return [next(loader) for _ in range(number)]
    finally:
        loader.close()


def everything(loader) -> list[ViewBatch]:
    with_all = list(loader)
    loader.close()
    return with_all


def expected_views(scenes, split: str) -> list[tuple[int, int]]:
    train = [(s.id, v) for s in scenes for v in range(s.heldout, s.heldout + s.views)]
    return train if split == "train" else [(s.id, v) for s in scenes for v in range(s.heldout)]


def test_content(packed):
    data, root, manifest = packed
    for split in ("train", "heldout"):
        scenes = manifest.select(None)
        for batch in everything(open_views(root, manifest, scenes, batch_size=4, split=split, repeat=False)):
            assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 16, 16)
            assert batch.scene.dtype == batch.view.dtype == torch.int64
            assert batch.cam2world.dtype == batch.intrinsics.dtype == torch.float32
            for i, (scene, view) in enumerate(keys([batch])):
                folder = data / "scenes/square16" / manifest.scenes[scene].name
                image = np.asarray(Image.open(folder / f"images/{view:03d}.png"))
                assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), image)
                frame = json.loads((folder / "transforms_opencv.json").read_text())["frames"][view]
                assert torch.equal(batch.cam2world[i], torch.tensor(frame["transform_matrix"]))
                assert batch.intrinsics[i].tolist() == [[70 / 64, 0, 0.5], [0, 70 / 64, 0.5], [0, 0, 1]]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.sets(st.integers(0, len(VIEWS) - 1), min_size=1),
    batch=st.integers(1, 17),
    shuffle=st.sampled_from([0, 1, 3, 2000]),
    seed=st.integers(0, 9),
)
def test_an_epoch_is_the_data_set(packed, chosen, batch, shuffle, seed):
    _, root, manifest = packed
    scenes = [manifest.scenes[i] for i in sorted(chosen)]
    expected = sorted(expected_views(scenes, "train"))
    options = {"batch_size": batch, "seed": seed, "shuffle": shuffle, "workers": 0}
    once = everything(open_views(root, manifest, scenes, repeat=False, **options))
    assert [len(b.view) for b in once[:-1]] == [batch] * (len(once) - 1) and len(once[-1].view) <= batch
    assert sorted(keys(once)) == expected
    endless = open_views(root, manifest, scenes, **options)
    several = take(endless, -(-3 * len(expected) // batch))
    assert {len(b.view) for b in several} == {batch}
    stream = keys(several)
    epochs = [stream[i * len(expected) : (i + 1) * len(expected)] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    if shuffle == 2000 and len(expected) > 10:
        assert epochs[0] != epochs[1]


def test_heldout_views_are_never_trained_on(packed):
    _, root, manifest = packed
    scenes = manifest.select(None)
    train = keys(take(open_views(root, manifest, scenes, batch_size=10, workers=0), 15))
    heldout = keys(everything(open_views(root, manifest, scenes, batch_size=3, split="heldout", repeat=False)))
    assert heldout and not set(train) & set(heldout)
    assert set(heldout) == set(expected_views(scenes, "heldout"))


def test_order_is_a_function_of_the_seed(packed):
    _, root, manifest = packed
    scenes = manifest.select(None)

    def order(**options) -> list[tuple[int, int]]:
        return keys(take(open_views(root, manifest, scenes, batch_size=7, **options), 14))

    state = torch.get_rng_state()
    one = order(seed=5, workers=0)
    assert one == order(seed=5, workers=1) == order(seed=5, workers=2)
    assert one != order(seed=6, workers=0)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    stored = keys(everything(open_views(root, manifest, scenes, batch_size=7, shuffle=0, repeat=False)))
    with_tar = []
    for shard in manifest.shards:
        if shard.kind == "scenes":
            with tarfile.open(f"{root}/{shard.name}") as tar:
                with_tar += [name.removesuffix(".png").split("/") for name in tar.getnames() if name.endswith("png")]
    ids = {scene.name: scene.id for scene in scenes}
    assert stored == [(ids[scene], int(view)) for scene, view in with_tar]


@pytest.mark.parametrize("batch", [1, 5, 16, 100])
def test_resume_everywhere(packed, batch):
    _, root, manifest = packed
    scenes = manifest.select(None)
    options = {"batch_size": batch, "seed": 3, "shuffle": 8, "workers": 0}
    steps = -(-2 * 42 // batch) + 1  # 42 training views: over two epoch boundaries
    loader = open_views(root, manifest, scenes, **options)
    batches, states = [], [loader.state]
    for _ in range(steps):
        batches.append(next(loader))
        states.append(loader.state)
    loader.close()
    whole = keys(batches)
    assert loader.plan.samples == 42
    for step, state in enumerate(states[:-1]):
        state = StreamState(**json.loads(json.dumps(vars(state))))
        assert (state.epoch, state.position) == divmod(step * batch, 42)
        again = open_views(root, manifest, scenes, **options, state=state)
        assert keys(take(again, min(3, steps - step))) == whole[step * batch : (step + 3) * batch]


def test_resume_with_workers(packed):
    """The state counts what was yielded, not what the workers have decoded ahead."""
    _, root, manifest = packed
    scenes = manifest.select({"cars": (0, 2), "toys": (3, 5)})
    for batch, workers in ((4, 2), (9, 2), (4, 1)):
        whole = keys(take(open_views(root, manifest, scenes, batch_size=batch, workers=0), 12))
        for step in (0, 1, 5, 9):
            first = open_views(root, manifest, scenes, batch_size=batch, workers=workers)
            head = take(first, step)
            second = open_views(root, manifest, scenes, batch_size=batch, workers=2 - workers, state=first.state)
            assert keys(head) + keys(take(second, 12 - step)) == whole


def test_resume_of_a_single_pass(packed):
    _, root, manifest = packed
    options = {"batch_size": 10, "repeat": False, "workers": 0}
    whole = everything(open_images(root, manifest, **options))
    assert [len(b) for b in whole] == [10, 1]
    loader = open_images(root, manifest, **options)
    next(loader)
    rest = everything(open_images(root, manifest, **options, state=loader.state))
    assert len(rest) == 1 and torch.equal(rest[0], whole[1])
    next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert everything(open_images(root, manifest, **options, state=loader.state)) == []


def test_natural_images(packed):
    data, root, manifest = packed
    found = torch.cat(everything(open_images(root, manifest, batch_size=4, repeat=False, workers=1)))
    files = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in (data / "natural_images").rglob("*.jpg")]
    assert sorted(x.numpy().tobytes() for x in found) == sorted(x.tobytes() for x in files)


def test_transparent_and_gray_images(tmp_path):
    data = write_data(tmp_path, views=(4,))
    folder = data / "scenes/square16/scene_0/images"
    (folder / "001.png").write_bytes(picture(1, mode="RGBA"))
    (folder / "002.png").write_bytes(picture(2, mode="L"))
    Image.open(io.BytesIO(picture(3))).quantize(16).save(folder / "003.png", transparency=2)
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(data / "scenes"), subset="square16"))
    background = (0.25, 1.0, 0.0)
    options = {"batch_size": 4, "repeat": False, "workers": 0, "background": background, "shuffle": 0}
    (batch,) = everything(open_views(str(tmp_path / "out"), manifest, manifest.scenes, **options))
    got = {int(view): image.permute(1, 2, 0).double() for view, image in zip(batch.view, batch.images, strict=True)}
    for view in (1, 3):
        rgba = torch.from_numpy(np.asarray(Image.open(folder / f"00{view}.png").convert("RGBA")).copy()).double() / 255
        exact = 255 * (rgba[..., :3] * rgba[..., 3:] + torch.tensor(background).double() * (1 - rgba[..., 3:]))
        # half a step of rounding, and a quarter for the background's own rounding to 8 bits
        assert (got[view] - exact).abs().max() <= 0.76
        assert len(rgba[..., 3].unique()) > 1
    gray = torch.from_numpy(np.asarray(Image.open(folder / "002.png")).copy()).double()
    assert torch.equal(got[2], gray[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["missing", "truncated", "cut", "corrupt", "pickle", "outside", "extra"])
def test_damaged_shards_are_named(kind, workers, tmp_path):
    data = write_data(tmp_path, views=(9, 9, 9))
    root = tmp_path / "out"
    manifest, _ = pack(str(root), PackOptions(scenes=str(data / "scenes"), subset="square16", shard_size=32_000))
    shard = root / "scenes-00001.tar"
    raw = shard.read_bytes()
    with tarfile.open(shard) as tar:
        content = [(member, tar.extractfile(member).read()) for member in tar]

    def rewrite(entries) -> None:
        with tarfile.open(shard, "w") as tar:
            for name, body in entries:
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))

    plain = [(member.name, body) for member, body in content]
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(raw[: len(raw) // 2])
    elif kind == "cut":  # between two samples, where no tar reader notices
        shard.write_bytes(raw[: content[6][0].offset])
    elif kind == "corrupt":
        rewrite([(n, b[:200] if n.endswith("png") and i in (4, 5) else b) for i, (n, b) in enumerate(plain)])
    elif kind == "pickle":
        rewrite([*plain[:4], (plain[4][0].rpartition(".")[0] + ".pkl", b"cos\nsystem\n."), *plain[4:]])
    elif kind == "outside":
        rewrite([*plain[:4], ("../../etc/000.png", picture(1)), *plain[4:]])
    else:
        rewrite([*plain, ("scene_9/000.json", b"{}"), ("scene_9/000.png", picture(1))])
    loader = open_views(str(root), manifest, manifest.scenes, batch_size=2, workers=workers, repeat=False)
    with pytest.raises(ShardError, match=r"scenes-00001\.tar") as error:
        list(loader)
    assert "\n" not in str(error.value) and " object at 0x" not in str(error.value)
    assert list(loader) == []


def test_wrong_arguments(packed):
    _, root, manifest = packed
    lonely = [scene for scene in manifest.scenes if scene.views == 1 and not scene.heldout]
    with pytest.raises(ValueError, match="no heldout views"):
        open_views(root, manifest, lonely, batch_size=1, split="heldout")
    with pytest.raises(ValueError, match="batch_size 0"):
        open_views(root, manifest, manifest.scenes, batch_size=0)
    with pytest.raises(ValueError, match="background"):
        open_views(root, manifest, manifest.scenes, batch_size=1, background=(0, 0, 255))
    with pytest.raises(ValueError, match="does not fit"):
        open_views(root, manifest, manifest.scenes, batch_size=1, state=StreamState(0, 10**6))


def test_close_ends_threads_and_workers(packed):
    _, root, manifest = packed
    threads = set(threading.enumerate())  # earlier tests' may end meanwhile, so they are not counted
    children = f"/proc/self/task/{os.getpid()}/children"
    before = Path(children).read_text().split()
    loader = open_views(root, manifest, manifest.scenes, batch_size=4, workers=2)
    for _ in range(30):
        next(loader)
    assert len(Path(children).read_text().split()) == len(before) + 2
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5
    assert Path(children).read_text().split() == before
    # The feeders of the workers' queues are told to end, and do so a moment later.
    while set(threading.enumerate()) - threads and time.monotonic() - start < 5:
        time.sleep(0.01)
    assert set(threading.enumerate()) - threads == set()
    with pytest.raises(StopIteration):
        next(loader)


def test_only_their_own_process_ends_workers(packed):
    """Schedulers send SIGTERM to all processes, some of them several times, and SIGUSR1; a terminal SIGINT."""
    _, root, manifest = packed
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    loader = open_views(root, manifest, manifest.scenes, batch_size=4, workers=2)
    for _ in range(4):  # of both workers: until one makes a batch it may still be starting
        next(loader)
    workers = sorted(set(children.read_text().split()) - before)
    for number in ("TERM", "USR1", "INT", "TERM", "TERM"):
        subprocess.run(["sh", "-c", f"kill -{number} {' '.join(workers)}"], check=True)
        time.sleep(0.05)  # equal signals that wait are one
    for _ in range(30):
        next(loader)
    assert set(workers) <= set(children.read_text().split())
    for worker in workers:
        os.kill(int(worker), signal.SIGTERM)
    deadline = time.monotonic() + 10
    with pytest.raises(RuntimeError) as ended:
        while time.monotonic() < deadline:
            next(loader)
    sentence = in_one_sentence(ended.value) or ""
    assert sentence.startswith("a process that decodes images") and sentence.endswith("set data.workers lower")


def test_workers_end_with_a_process_that_was_killed_and_not_by_signals_of_others(packed):
    """They hold its sockets, so other ranks would not hear of its end. In a process that has set its threads, as
    training does, torch starts one in a worker before anything of ours runs there: it must not hear SIGTERM either."""
    _, root, _ = packed
    code = (
        "import torch\nfrom igae.data import DataConfig, Manifest, view_loader\ntorch.set_num_threads(2)\n"
        f"m = Manifest.load({root!r}); loader = view_loader(DataConfig(root={root!r}), m, m.scenes, batch_size=4)\n"
        "for _ in range(2):\n    [next(loader) for _ in range(4)]; print('ready', flush=True); input()"
    )
    # What it prints to is open until the last process that has inherited it ends.
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGTERM)
    time.sleep(0.1)
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    start = time.monotonic()
    assert process.stdout.read() == b""
    assert time.monotonic() - start < 3  # measured: 0.3; DataLoader's own watch needs 5
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_process_ends_with_a_loader_left_open(packed):
    _, root, _ = packed
    code = (
        "from igae.data import DataConfig, Manifest, view_loader\n"
        f"m = Manifest.load({root!r}); loader = view_loader(DataConfig(root={root!r}), m, m.scenes, batch_size=4)\n"
        "loader.cycle = loader; next(loader)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_local_data_needs_no_s3fs(packed):
    _, root, _ = packed
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from igae.data import DataConfig, Manifest, view_loader\n"
        f"m = Manifest.load({root!r}); loader = view_loader(DataConfig(root={root!r}), m, m.scenes, batch_size=4)\n"
        "print(len(next(loader).view))\n"
        "assert 'aiobotocore' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "4\n", done.stderr


def test_object_store(packed, monkeypatch):
    """Packs to an S3 server on this machine and trains from it, with decoding workers."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    data, root, _ = packed
    with object_store.moto() as port:
        object_store.use(monkeypatch, port)
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        fs.put(str(data / "scenes") + "/", "bucket/raw/", recursive=True)
        target = "s3://bucket/packed"
        with pytest.raises(ValueError, match="no manifest.json in s3://bucket/packed"):
            Manifest.load(target)
        pack(
            target,
            PackOptions(
                scenes="s3://bucket/raw", subset="square16", images=str(data / "natural_images"), shard_size=25_000
            ),
        )
        remote, local = Manifest.load(target), Manifest.load(root)
        assert remote == local  # every checksum too: the bytes are those of the local run
        options = {"batch_size": 6, "seed": 2, "workers": 2}
        one = open_views(target, remote, remote.scenes, **options)
        other = open_views(root, local, local.scenes, **options)
        assert keys(take(one, 20)) == keys(take(other, 20))
        fs.rm_file("bucket/packed/scenes-00000.tar")
        with pytest.raises(ShardError, match="scenes-00000.tar in s3://bucket/packed is missing"):
            take(open_views(target, remote, remote.scenes, **options), 20)
