# SPDX-License-Identifier: Apache-2.0
"""Packed data that is read again: verification, and stores without renaming."""

import shutil
from pathlib import Path

import fsspec
import pytest
from scene_files import write_data
from test_pack import SMALL, sources

from igae.data.pack import Refused, pack, verify


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", images=7)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "swapped"])
def test_verify_finds_damage(kind, data, tmp_path):
    out = tmp_path / "out"
    pack(str(out), **sources(data), shard_size=SMALL)
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
    problems = verify(str(out), workers=2)
    assert len(problems) == 1 and "scenes-00001.tar" in problems[0]


def test_memory_store(data):
    """A store without renaming: no staging names, and nothing is left after a refusal."""
    fs = fsspec.filesystem("memory")
    pack("memory://packed/one", **sources(data), shard_size=SMALL)
    assert verify("memory://packed/one") == []
    assert not [path for path in fs.find("/packed") if path.endswith(".partial")]
    (data / "scenes/square16/scene_1/images/003.png").write_bytes(b"")
    with pytest.raises(Refused):
        pack("memory://packed/two", **sources(data), shard_size=SMALL)
    assert fs.find("/packed/two") == []
