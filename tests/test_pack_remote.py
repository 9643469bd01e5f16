# SPDX-License-Identifier: Apache-2.0
"""Packed data that is read again: verification, and stores without renaming."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import object_store
import pytest
from huggingface_hub import HfFileSystem
from scene_files import interrupted_at, write_data
from test_pack import SMALL, TOOL, sources

from igae.cli import pack as packing
from igae.data import Manifest, PackOptions, Refused, pack, verify_packed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", images=7)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "swapped"])
def test_verify_finds_damage(kind, data, tmp_path):
    out = tmp_path / "out"
    pack(str(out), PackOptions(**sources(data), shard_size=SMALL))
    shard = out / "scenes-00001.tar"
    raw = bytearray(shard.read_bytes())
    if kind == "flipped":
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    elif kind == "truncated":
        shard.write_bytes(raw[:-10240])
    elif kind == "missing":
        shard.unlink()
    else:
        shutil.copy(out / "scenes-00000.tar", shard)
    problems = verify_packed(str(out), workers=2)
    assert len(problems) == 1 and "scenes-00001.tar" in problems[0]


def test_memory_store(data):
    """A store without renaming: no staging names, and nothing is left after a refusal."""
    fs = fsspec.filesystem("memory")
    pack("memory://packed/one", PackOptions(**sources(data), shard_size=SMALL))
    assert verify_packed("memory://packed/one") == []
    assert not [path for path in fs.find("/packed") if path.endswith(".partial")]
    (data / "scenes/square16/scene_1/images/003.png").write_bytes(b"")
    with pytest.raises(Refused):
        pack("memory://packed/two", PackOptions(**sources(data), shard_size=SMALL))
    assert fs.find("/packed/two") == []


@pytest.mark.parametrize("options", [["--scenes"], ["--images"], ["--images", "images", "--output"]])
def test_a_hub_that_can_not_be_reached_is_named(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # which nothing listens at
    HfFileSystem.clear_instance_cache()
    assert packing.main(["--output", str(tmp_path / "out"), *options, "hf://datasets/user/absent"]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("error: hf://datasets/user/absent can't be read: ConnectError: ")


@pytest.mark.slow
def test_from_and_to_s3_in_two_runs(tmp_path, monkeypatch):
    """The command reads from a bucket and writes to it; no shard that an earlier run has finished is written again."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    data = write_data(tmp_path, views=(6,) * 10, images=7)
    with object_store.moto() as port:
        object_store.use(monkeypatch, port)
        s3 = fsspec.filesystem("s3")
        s3.mkdir("bucket")
        s3.put(str(data), "bucket/raw", recursive=True)
        access = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        access |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        access |= {"PYTHONPATH": str(TOOL.parent.parent)}
        client = boto3.client(
            "s3",
            endpoint_url=access["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})

        def versions() -> dict[str, int]:
            found: dict[str, int] = {}
            for entry in client.list_object_versions(Bucket="bucket", Prefix="packed/").get("Versions", []):
                name = entry["Key"].removeprefix("packed/")
                found[name] = found.get(name, 0) + 1
            return found

        options: dict[str, Any] = {"scenes": "s3://bucket/raw/scenes", "images": "s3://bucket/raw/natural_images"}
        with interrupted_at("scenes-00003.tar"), pytest.raises(KeyboardInterrupt):
            pack("s3://bucket/packed", PackOptions(**options, subset="square16", shard_size=12_000))
        names = {f"{kind}-0000{i}.tar" for kind in ("scenes", "heldout") for i in range(3)}
        assert versions() == dict.fromkeys([*names, *(f"scenes-0000{i}.tar.done" for i in range(3))], 1)
        with pytest.raises(ValueError, match=r"no manifest.json"):
            Manifest.load("s3://bucket/packed")

        command = [sys.executable, str(TOOL), "--output", "s3://bucket/packed", "--subset", "square16"]
        command += [text for name, value in options.items() for text in (f"--{name}", value)]
        command += ["--shard-size", "12000", "--workers", "1"]
        done = subprocess.run(command, env={**os.environ, **access}, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        manifest = Manifest.load("s3://bucket/packed")
        after = versions()
        assert {name: n for name, n in after.items() if n > 1} == {} and len(manifest.shards) > 20
        names = {path.rsplit("/", 1)[-1] for path in s3.ls("bucket/packed", detail=False, refresh=True)}
        assert names == {"manifest.json", *(shard.name for shard in manifest.shards)}
        assert verify_packed("s3://bucket/packed", workers=4) == []
        local = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
        assert pack(str(tmp_path / "local"), PackOptions(**local, subset="square16", shard_size=12_000))[0] == manifest


def test_a_store_that_loses_bytes(data, monkeypatch):
    """What was written is compared with what is there: a shard that is too short has no note."""
    write = fsspec.filesystem("memory").info
    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem,
        "info",
        lambda self, path, **more: {**write(path, **more), "size": write(path, **more)["size"] - 1},
    )
    with pytest.raises(OSError, match="scenes-00000.tar in memory://lossy is not as large as what was written to it"):
        pack("memory://lossy", PackOptions(**sources(data), shard_size=SMALL))
    assert not [path for path in fsspec.filesystem("memory").find("/lossy") if path.endswith(".done")]
