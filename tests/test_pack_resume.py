# SPDX-License-Identifier: Apache-2.0
"""Packing that was interrupted continues, with what is still the same."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from scene_files import interrupted_at, picture, write_data
from test_pack import SMALL, TOOL, digests, sources

from igae.data import Manifest, PackOptions, pack, verify_packed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", images=7)


def interrupt(out: Path, arguments: dict) -> None:
    """Ctrl-C when all scenes are written and no natural image is."""
    with interrupted_at("images-00000.tar"), pytest.raises(KeyboardInterrupt):
        pack(str(out), PackOptions(**arguments))
    assert all(path.name.endswith(".partial") for path in out.iterdir())


def test_interrupted_packing_continues(data, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    interrupt(out, sources(data))

    def written(end: str) -> dict[str, tuple[int, int]]:
        found = {path.name.removesuffix(end): path.stat() for path in out.glob(f"scenes-*.tar{end}")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    kept = written(".partial")
    pack(str(out), PackOptions(**sources(data)))
    assert kept and written("") == kept
    pack(str(again), PackOptions(**sources(data)))
    assert verify_packed(str(out)) == [] and digests(out) == digests(again)


def change_in_place(file: Path, content: bytes) -> None:
    """Other content of the same size, and the time of the last change as it was."""
    before = file.stat()
    assert len(content) == before.st_size and content != file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", ["seed", "size", "image", "link", "transforms", "shard", "note"])
def test_what_is_no_longer_the_same_is_packed_again(change, data, tmp_path):
    out, again, options = tmp_path / "out", tmp_path / "again", {}
    transforms = data / "scenes/square16/scene_1/transforms_opencv.json"
    image, other = (transforms.parent / "images" / name for name in ("002.png", "003.png"))
    for number, file in enumerate((image, other)):
        file.write_bytes(b"".join([picture(number), bytes(4000)])[:2000])  # decoders read to the end of the image
    if change == "link":
        image.rename(tmp_path / "a.png")
        shutil.copy2(other, tmp_path / "b.png")
        image.symlink_to(tmp_path / "a.png")
    interrupt(out, sources(data))
    if change == "seed":
        options["seed"] = 5
    elif change == "size":
        image.write_bytes(image.read_bytes() + b"more")
    elif change == "image":
        change_in_place(image, other.read_bytes())
    elif change == "link":
        image.unlink()
        image.symlink_to(tmp_path / "b.png")
    elif change == "transforms":
        text = transforms.read_bytes()
        change_in_place(transforms, text.replace(b'"fl_x": 17.5', b'"fl_x": 17.6'))
    else:
        path = out / ("scenes-00000.tar.partial" if change == "shard" else "scenes-00000.tar.done.partial")
        path.write_bytes(path.read_bytes()[:-100])
    for target in (out, again):
        pack(str(target), PackOptions(**sources(data), **options))
    assert verify_packed(str(out)) == [] and digests(out) == digests(again)


def test_natural_images_that_were_changed_are_packed_again(data, tmp_path):
    for number, file in enumerate(sorted((data / "natural_images").rglob("*.jpg"))):
        file.write_bytes(b"".join([picture(number, kind="JPEG"), bytes(4000)])[:4000])
    options = PackOptions(images=str(data / "natural_images"), shard_size=SMALL)
    out, again = tmp_path / "out", tmp_path / "again"
    with interrupted_at("images-00001.tar"), pytest.raises(KeyboardInterrupt):
        pack(str(out), options)
    assert (out / "images-00000.tar.done.partial").exists()
    for number, file in enumerate(sorted((data / "natural_images").rglob("*.jpg"))):
        change_in_place(file, b"".join([picture(100 + number, kind="JPEG"), bytes(4000)])[:4000])
    for target in (out, again):
        pack(str(target), options)
    assert verify_packed(str(out)) == [] and digests(out) == digests(again)


@pytest.mark.parametrize("told", ["by the store", "by nothing"])
def test_stores_whose_files_were_changed(told, data, monkeypatch):
    """Also where a store says nothing about a file but its name and size."""
    fs = fsspec.filesystem("memory")
    if fs.exists("/store"):
        fs.rm("/store", recursive=True)
    file = data / "scenes/square16/scene_0/images/004.png"
    file.write_bytes(picture(3).ljust(900, b"\0"))
    fs.put(str(data) + "/", "/store/raw/", recursive=True)
    if told == "by nothing":
        monkeypatch.setattr(MemoryFileSystem, "modified", fsspec.AbstractFileSystem.modified)
    options = PackOptions(scenes="memory://store/raw/scenes", subset="square16", shard_size=SMALL)

    written = []
    for _ in range(2):
        with interrupted_at("scenes-00002.tar"), pytest.raises(KeyboardInterrupt):
            pack("memory://store/out", options)
        written.append([fs.store[f"/store/out/scenes-0000{i}.tar"].created for i in range(2)])
    assert written[0] == written[1]
    assert len(picture(4)) < 900
    fs.pipe_file("/store/raw/scenes/square16/scene_0/images/004.png", picture(4).ljust(900, b"\0"))
    found = []
    for folder in ("out", "again"):
        pack(f"memory://store/{folder}", options)
        assert verify_packed(f"memory://store/{folder}") == []
        found.append({path.rsplit("/", 1)[1]: fs.cat_file(path) for path in fs.find(f"/store/{folder}")})
    assert found[0] == found[1]


def test_killed_packing_leaves_no_manifest(tmp_path):
    """kill -9 while shards are written: nothing final, and the next run is as if nothing had been there."""
    data = write_data(tmp_path / "data", views=(400,) * 6)
    out, again = tmp_path / "out", tmp_path / "again"
    command = [sys.executable, str(TOOL), "--scenes", str(data / "scenes"), "--subset", "square16"]
    options = ["--shard-size", "1MB", "--workers", "1", "--output"]
    process = subprocess.Popen([*command, *options, str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("scenes-00001.tar.partial")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert out.exists() and all(path.name.endswith(".partial") for path in out.iterdir())
    with pytest.raises(ValueError, match="no manifest.json"):
        Manifest.load(str(out))
    for target in (out, again):
        pack(str(target), PackOptions(scenes=str(data / "scenes"), subset="square16", shard_size=1_000_000))
    assert digests(out) == digests(again)
