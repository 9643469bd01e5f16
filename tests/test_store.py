# SPDX-License-Identifier: Apache-2.0
"""Reading from stores that fail now and then, in this process: the same bytes, or an error after a bounded time."""

import asyncio
import errno
import logging
import os
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_files import write_data

from igae.data import Manifest, PackOptions, RawSample, ShardError, ShardReader, pack
from igae.models.autoencoder import HUB
from igae.storage import LIMITS, File, Missing, StoreError, join, read_whole, retry

DATA = bytes(range(256)) * 40
SECRETS = "https://user:hunter2@host/x?X-Amz-Signature=hunter3"


class CredentialsError(Exception):
    """Named as those of clients that find no credentials; not a class of Python's own."""


class ClientError(Exception):
    """As clients of stores raise them for HTTP statuses and broken connections."""

    def __init__(self, status: int | None = None) -> None:
        super().__init__(f"answer {status} of {SECRETS}")
        if status is not None:
            self.status = status


PASSING = {
    "io": OSError(errno.EIO, "input/output error"),
    "reset": ConnectionResetError("reset"),
    "timeout": TimeoutError(),
    "asyncio": asyncio.TimeoutError(),
    "500": ClientError(500),
    "503": ClientError(503),
    "429": ClientError(429),
    "client": ClientError(),
}
FINAL = {
    "missing": FileNotFoundError("x"),
    "permission": PermissionError(f"no access to {SECRETS}"),
    "403": ClientError(403),
    "416": ClientError(416),
    "credentials": CredentialsError("unable to locate credentials"),
    "mistake": TypeError("unexpected argument"),
}
ANSWERS = {"short": lambda data: data[:-1], "half": lambda data: data[: len(data) // 2], "empty": lambda data: b""}
ANSWERS["long"] = lambda data: data + b"x"


class Flaky(MemoryFileSystem):
    """Files of memory://; `plan` has what goes wrong with the next calls, `after` with all that follow."""

    protocol = "flaky"
    plan: deque[str | None] = deque()
    after: str | None = None
    calls: list[str] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _spoil(self, call: str) -> str | None:
        Flaky.calls.append(call)
        fault = Flaky.plan.popleft() if Flaky.plan else Flaky.after
        if fault in PASSING or fault in FINAL:
            raise {**PASSING, **FINAL}[fault]
        return fault

    def cat_file(self, path, start=None, end=None, **options):
        fault = self._spoil("cat_file")
        data = super().cat_file(path, start, end, **options)
        return ANSWERS[fault](data) if fault in ANSWERS else data

    def info(self, path, **options):
        self._spoil("info")
        return super().info(path, **options)


class Hanging(AsyncFileSystem):
    """Answers no request for content."""

    protocol = "hanging"

    async def _info(self, path, **_):
        return {"name": path, "size": 100, "type": "file"}

    async def _cat_file(self, path, start=None, end=None, **_):
        await asyncio.sleep(3600)


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    monkeypatch.setattr(LIMITS, "first_wait", 0.0)
    monkeypatch.setattr(LIMITS, "remote_block", 1000)
    fsspec.filesystem("memory").pipe_file("/file", DATA)
    reset()
    yield
    reset()
    fsspec.filesystem("memory").rm("/", recursive=True)


def reset(plan: tuple[str | None, ...] = (), after: str | None = None) -> None:
    Flaky.plan, Flaky.after, Flaky.calls = deque(plan), after, []


def runs_are_bounded(plan: list[str | None]) -> bool:
    return all(any(fault is None for fault in plan[i : i + LIMITS.attempts]) for i in range(len(plan)))


@given(
    plan=st.lists(st.sampled_from([None, *PASSING, *ANSWERS]), max_size=40).map(lambda plan: [*plan, None]),
    pieces=st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=20),
)
@settings(max_examples=150)
def test_faults_change_no_byte(plan, pieces):
    """The file as a list of bytes and a position is what every sequence of reads and skips is compared with."""
    if not runs_are_bounded(plan):
        plan = [fault if i % 2 else None for i, fault in enumerate(plan)]
    reset(tuple(plan))
    with File("flaky:///file", "it") as file:
        assert file.size == len(DATA)
        position = 0
        for skip, number in pieces:
            if skip:
                file.skip(number)
            else:
                assert file.read(number) == DATA[position : position + number]
            position = min(position + number, len(DATA))
            assert file.position == position
        assert file.read(len(DATA)) == DATA[position:]
        file.rewind()
        assert file.read(len(DATA) + 5) == DATA


@given(block=st.integers(1, 3000), pieces=st.lists(st.integers(0, 700)))
@settings(max_examples=30)
def test_local_files(tmp_path_factory, block, pieces):
    path = tmp_path_factory.mktemp("local") / "file"
    path.write_bytes(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LIMITS, "local_block", block)
        with File(str(path), "it") as file:
            assert b"".join(file.read(number) for number in [*pieces, len(DATA)]) == DATA


def test_requests_are_few(monkeypatch):
    reset()
    monkeypatch.setattr(LIMITS, "remote_block", 4000)
    assert read_whole("flaky:///file", "it", 10**6) == DATA
    assert Flaky.calls == ["info", *["cat_file"] * -(-len(DATA) // 4000)]


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "local_block", 1000)
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(DATA)
    other.write_bytes(DATA[::-1])
    with File(str(path), "it") as file:
        first = file.read(10)
        os.replace(other, path)
        assert first + file.read(len(DATA)) == DATA


@pytest.mark.parametrize("fault", [*PASSING, *ANSWERS])
def test_a_store_that_stays_down(fault, caplog):
    reset((None,), after=fault)
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError) as error:
        read_whole("flaky:///file", "shard x in flaky://", 10**6)
    text = str(error.value)
    assert text.startswith(f"shard x in flaky:// cannot be read, it was tried {LIMITS.attempts} times: ")
    assert "\n" not in text and Flaky.calls == ["info", *["cat_file"] * LIMITS.attempts]
    warnings = [record.getMessage() for record in caplog.records if record.name == "igae.storage.reading"]
    assert len(warnings) == LIMITS.attempts - 1  # each further try is announced once
    for number, warning in enumerate(warnings, start=1):
        assert warning.startswith(f"shard x in flaky://: try {number} of {LIMITS.attempts} failed (")
    printed = "".join(traceback.format_exception(error.value)) + "".join(warnings)
    assert "hunter" not in printed and "object at" not in text


@pytest.mark.parametrize("fault", FINAL)
def test_what_does_not_pass_is_not_tried_again(fault, caplog):
    for plan in ((fault,), (None, fault)):
        reset(plan)
        with pytest.raises(Missing if fault == "missing" else StoreError) as error:
            read_whole("flaky:///file", "shard x", 10**6)
        assert len(Flaky.calls) == len(plan) and not caplog.records
        assert "hunter" not in "".join(traceback.format_exception(error.value))
        assert str(error.value).startswith("shard x is missing" if fault == "missing" else "shard x cannot be read: ")


def test_what_http_calls_missing(monkeypatch):
    """fsspec's HTTP client raises FileNotFoundError for all that goes wrong when it asks for the size."""

    def info(status):
        def call(self, path, **_):
            Flaky.calls.append("info")
            raise FileNotFoundError(path) from ClientError(status)

        return call

    for status, tries in ((500, LIMITS.attempts), (None, LIMITS.attempts), (403, 1)):
        reset()
        monkeypatch.setattr(Flaky, "info", info(status))
        with pytest.raises(StoreError, match="cannot be read") as error:
            File("flaky:///file", "it")
        assert not isinstance(error.value, Missing) and len(Flaky.calls) == tries
    monkeypatch.setattr(Flaky, "info", info(404))
    with pytest.raises(Missing):
        File("flaky:///file", "it")


class Clock:
    """Time that passes only in sleeps and in attempts."""

    def __init__(self, attempt: float) -> None:
        self.now, self.attempt, self.sleeps = 0.0, attempt, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.mark.parametrize("attempt", [0.0, 1.0, 13.0, 60.0])
@pytest.mark.parametrize("which", [LIMITS, HUB], ids=["store", "hub"])
def test_time_is_bounded(which, attempt, monkeypatch):
    clock = Clock(attempt)
    monkeypatch.setattr(LIMITS, "first_wait", 1.0)
    limits = []

    def fail(limit):
        limits.append(limit)
        clock.now += min(limit, attempt)
        raise TimeoutError

    with pytest.raises(StoreError):
        retry(fail, "it", clock, which)
    assert clock.now <= which.total_seconds
    assert 1 < len(limits) <= which.attempts and max(limits) <= which.attempt_seconds
    for number, wait in enumerate(clock.sleeps):
        assert 0.75 * 2**number <= wait / which.first_wait <= 1.25 * 2**number
    if attempt == 0 or attempt == 1 and which is LIMITS:
        assert len(limits) == which.attempts and 23 <= sum(clock.sleeps) / which.first_wait <= 39
        assert len(set(clock.sleeps)) == len(clock.sleeps)


def test_a_request_that_is_never_answered(monkeypatch):
    monkeypatch.setattr(LIMITS, "attempt_seconds", 0.1)
    monkeypatch.setattr(LIMITS, "attempts", 3)
    with (
        File("hanging://x/file", "it") as file,
        pytest.raises(StoreError, match="tried 3 times: FSTimeoutError: no answer"),
    ):
        file.read(1)


def test_unknown_stores():
    with pytest.raises(StoreError, match="it cannot be read: .*nonsense"):
        File("nonsense://x", "it")


@pytest.mark.parametrize(
    ("scheme", "client"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp"), ("simplecache::s3", "s3fs")]
)
def test_clients_that_are_not_installed(scheme, client, monkeypatch):
    """One sentence with what to do, for reading and for packing."""

    def absent(*_):
        raise ImportError("not installed")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match=f"^x:// cannot be used: ImportError: not installed; pip install {client}$"):
        try:
            pack(f"{scheme}://bucket/out", PackOptions(images="natural_images"))
        except ValueError as error:
            raise ValueError(str(error).replace(f"{scheme}://bucket/out", "x://")) from None
    with pytest.raises(ValueError, match=f"manifest.json cannot be read: ImportError: .*; pip install {client}$"):
        Manifest.load(f"{scheme}://bucket/out")


@pytest.fixture
def packed(tmp_path: Path) -> Manifest:
    data = write_data(tmp_path, views=(9, 9), images=3)
    arguments = {"scenes": str(data / "scenes"), "images": str(data / "natural_images"), "shard_size": 32_000}
    return pack("memory://packed", PackOptions(subset="square16", **arguments))[0]


def read(root: str, manifest: Manifest) -> list[RawSample]:
    return [record for shard in manifest.shards for record in ShardReader(root, verify="sha256").read(shard)]


@pytest.mark.parametrize("fault", [*PASSING, *ANSWERS])
def test_shards_and_manifest(fault, packed):
    plain = read("memory://packed", packed)
    info = None if fault in ANSWERS else fault
    for plan in ((info, None, fault, None), (info, info, None, fault, fault, fault, None)):
        for shard in packed.shards:
            reset(plan)
            found = list(ShardReader("flaky:///packed").read(shard))
            assert found == [record for record in plain if record.shard == shard.name]
            assert not Flaky.plan
    reset((info, info, fault, fault, None))
    assert Manifest.load("flaky:///packed") == packed and not Flaky.plan


def test_shards_and_manifest_of_a_store_that_is_down(packed):
    reset(after="io")
    shard = packed.shards[0]
    with pytest.raises(ShardError, match=f"shard {shard.name} in flaky:///packed cannot be read, it was tried 6 times"):
        next(ShardReader("flaky:///packed").read(shard))
    with pytest.raises(ValueError, match="flaky:///packed/manifest.json cannot be read, it was tried 6 times: OSError"):
        Manifest.load("flaky:///packed")


def test_chained_file_systems(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {"simplecache": {"cache_storage": str(tmp_path / "cache")}})
    root = "simplecache::memory://packed"
    assert Manifest.load(root) == packed
    assert read(root, packed) == read("memory://packed", packed)
    assert len(list((tmp_path / "cache").iterdir())) == len(packed.shards) + 1


def test_the_query_of_a_url_stays_at_its_end():
    assert join("https://host/data/?token=a/b", "x.tar") == "https://host/data/x.tar?token=a/b"
    assert join("/data/a?b", "x.tar") == "/data/a?b/x.tar"
    assert join(str(Path("/data")) + "/", "x.tar") == "/data/x.tar"
