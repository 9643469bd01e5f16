# SPDX-License-Identifier: Apache-2.0
"""Training data from an S3 server and over HTTP with a proxy in between that spoils answers: the same samples."""

import logging
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import object_store
import pytest
import torch
from object_store import Proxy
from scene_files import open_images, open_views, write_data

from igae.data import Manifest, PackOptions, ShardError, pack, verify_packed
from igae.storage import LIMITS, TensorFile, write_tensors

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytest.importorskip("aiohttp")

# s3fs tries again by itself after "reset", "short" and "stall", its HTTP sibling never.
S3_FAULTS = [500, 503, "reset", "short", "fewer", "stall"]
HTTP_FAULTS = [500, "close", "reset", "short", "fewer", "more", "stall"]
READ_TIMEOUT = 0.3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("remote")
    data = write_data(folder / "data", views=(5, 3, 5), images=4)
    sources = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    pack(str(folder / "out"), PackOptions(**sources, subset="square16", shard_size=15_000))
    return str(folder / "out")


@pytest.fixture(scope="module")
def server(local: str) -> Iterator[Proxy]:
    with object_store.moto() as port, Proxy(port).running() as proxy:
        with pytest.MonkeyPatch.context() as patch:
            object_store.use(patch, port)
            fs = fsspec.filesystem("s3")
            fs.mkdir("bucket", acl="public-read")
            for path in Path(local).iterdir():
                fs.pipe_file(f"bucket/packed/{path.name}", path.read_bytes(), ACL="public-read")
        yield proxy


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, which s3:// goes through; botocore's own tries are off, so that each fault meets s3fs and us."""
    object_store.use(monkeypatch, server.port, retries={"max_attempts": 0}, read_timeout=READ_TIMEOUT)
    monkeypatch.setattr(LIMITS, "first_wait", 0.001)
    monkeypatch.setattr(LIMITS, "remote_block", 5000)  # several requests a shard
    server.reset()
    yield server
    server.released.set()


@pytest.fixture
def roots(proxy: Proxy) -> dict[str, str]:
    return {"s3": "s3://bucket/packed", "http": f"http://127.0.0.1:{proxy.port}/bucket/packed"}


def epoch(root: str, manifest: Manifest, **options) -> list[torch.Tensor]:
    """All that an epoch of views and natural images gives, in order."""
    arguments = {"seed": 3, "workers": 0, "repeat": False, **options}
    views = open_views(root, manifest, manifest.scenes, batch_size=5, shuffle=6, **arguments)
    natural_images = open_images(root, manifest, batch_size=2, **arguments)
    return [tensor for batch in views for tensor in vars(batch).values()] + list(natural_images)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_no_fault(kind, roots, local, caplog):
    manifest = Manifest.load(roots[kind])
    assert manifest == Manifest.load(local)
    assert equal(epoch(roots[kind], manifest), epoch(local, manifest))
    assert not [record for record in caplog.records if record.name.startswith("igae")]


@pytest.mark.parametrize(
    ("kind", "fault"), [*(("s3", fault) for fault in S3_FAULTS), *(("http", fault) for fault in HTTP_FAULTS)]
)
def test_same_samples_with_faults(kind, fault, roots, proxy, local, monkeypatch):
    if kind == "http":  # its client has no timeout of seconds
        monkeypatch.setattr(LIMITS, "attempt_seconds", READ_TIMEOUT)
    proxy.faults.extend([None, fault, None, None, fault, fault])
    if fault in (500, 503, "close"):
        proxy.head_faults.extend([fault, None] * 4)
    manifest = Manifest.load(roots[kind])
    assert equal(epoch(roots[kind], manifest), epoch(local, manifest))
    counts = Counter(what for method, _, what in proxy.seen if method == "GET")
    assert counts[fault] == 3 and not proxy.faults


def test_same_samples_with_a_mixture(roots, proxy, local):
    """With checksums, so each shard is read twice."""
    generator = torch.Generator().manual_seed(0)
    faults = [fault for fault in HTTP_FAULTS if fault != "stall"]
    for _ in range(10):
        order = torch.randperm(len(faults), generator=generator).tolist()
        proxy.faults.extend([None, *(faults[i] for i in order[:3]), None, *(faults[i] for i in order[3:])])
    manifest = Manifest.load(roots["http"])
    assert equal(epoch(roots["http"], manifest, verify="sha256"), epoch(local, manifest))
    assert {what for _, _, what in proxy.seen} == {None, *faults}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("s3", 503), ("s3", "reset"), ("s3", "stall"), ("http", "fewer"), ("http", "stall"), ("http", 500)],
)
def test_a_store_that_stays_down(kind, fault, roots, proxy, local, monkeypatch, caplog):
    root = roots[kind]
    manifest = Manifest.load(root)
    proxy.after = fault
    monkeypatch.setattr(LIMITS, "attempts", 3)
    monkeypatch.setattr(LIMITS, "attempt_seconds", 0.2)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "igae"), pytest.raises(ShardError) as error:
        epoch(root, manifest)
    # Three tries of 0.2 s and what surrounds them; measured: at most 0.63 s.
    assert time.monotonic() - start < 5
    text = str(error.value)
    assert ".tar in " + root in text and " cannot be read, it was tried 3 times: " in text and "\n" not in text
    warnings = [record.getMessage() for record in caplog.records if record.name == "igae.storage.reading"]
    assert len(warnings) == 2 and all(".tar in " + root in warning for warning in warnings)
    with pytest.raises(ValueError, match="manifest.json.* cannot be read, it was tried 3 times"):
        Manifest.load(root)
    if fault == 503:
        assert all("cannot be read, it was tried 3 times" in problem for problem in verify_with(root, manifest))


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_rows_of_tensors_with_faults(kind, roots, proxy, monkeypatch, caplog, tmp_path):
    rows, places = torch.randn(40, 25), np.arange(20)
    stamp = write_tensors(str(tmp_path / "file"), {"one": torch.ones(3)}, {"rows": rows})
    monkeypatch.setattr(LIMITS, "gap", 0)  # every second row is a request of its own
    store = fsspec.filesystem("s3", **object_store.options(proxy.upstream))
    store.pipe_file("bucket/packed/file", (tmp_path / "file").read_bytes(), ACL="public-read")
    proxy.head_faults.append(500)
    proxy.faults.extend([500, None, None, "fewer", *[None] * 9, "short", *[None] * 3, 500])
    found = torch.zeros(20, 25)
    file = TensorFile(f"{roots[kind]}/file", stamp)
    file.rows_into("rows", range(0, 40, 2), found, places)
    assert torch.equal(found, rows[::2]) and torch.equal(file.tensors()["one"], torch.ones(3)) and not proxy.faults
    assert caplog.messages and all(line.startswith(f"{roots[kind]}/file: try ") for line in caplog.messages)
    proxy.after = 500
    monkeypatch.setattr(LIMITS, "attempts", 3)
    with pytest.raises(ValueError, match=f"{roots[kind]}/file cannot be read, it was tried 3 times"):
        file.rows_into("rows", range(0, 40, 2), found, places)


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_refused_access_is_not_tried_again(kind, roots, proxy, local):
    manifest = Manifest.load(local)
    for fault, folder, match in (
        (403, "", "cannot be read: "),
        (400, "", "cannot be read: "),
        (None, "/gone", "is missing"),
    ):
        proxy.reset()
        proxy.after = fault
        with pytest.raises(ShardError, match=match):
            epoch(roots[kind] + folder, manifest)
        # HTTP asks for the size with HEAD and then with GET.
        assert 1 <= len(proxy.seen) <= 2


def test_credentials_are_in_no_message(proxy, local, caplog):
    """A root with user, password and token, over HTTP, where the client's own messages have the URL in them."""
    root = f"http://user:hunter2@127.0.0.1:{proxy.port}/bucket/packed?token=hunter3"
    manifest = Manifest.load(local)
    found = []
    for fault in (403, 503, "short", None):
        proxy.reset()
        proxy.after = fault
        target = root if fault else root.replace("packed", "nothing")
        with caplog.at_level(logging.DEBUG, "igae"):
            with pytest.raises(ShardError) as error:
                epoch(target, manifest)
            with pytest.raises(ValueError) as other:
                Manifest.load(target)
        found += [traceback.format_exception(error.value), traceback.format_exception(other.value)]
        found += [[str(error.value), str(other.value)], verify_with(target, manifest)]
    found.append([record.getMessage() for record in caplog.records if record.name.startswith("igae")])
    assert all("token=hunter3" in path for _, path, _ in proxy.seen)  # the store did get them
    assert not [line for lines in found for line in lines if "hunter" in line]
    assert any("http://***@127.0.0.1" in line and "?token=***" in line for line in found[-1])


def verify_with(root: str, manifest: Manifest) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "load", lambda root: manifest)
        return verify_packed(root, workers=4)
