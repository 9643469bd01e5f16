# SPDX-License-Identifier: Apache-2.0
"""Hostile packed data: foreign members, bombs, names. Sizes and checksums agree with the manifest in all of it."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_files import open_images, open_views, picture, write_data

from igae.data import Manifest, PackOptions, ShardError, Shards, decode_image, pack, verify_packed

NAME = "scenes-00000.tar"
IMAGE_LIMIT, CAMERA_LIMIT = 256 << 20, 1 << 20  # bytes
WHITE = np.full(3, 255, np.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("security")
    data = write_data(folder / "data", views=(4,), images=3)
    sources = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    return str(folder / "out"), pack(str(folder / "out"), PackOptions(**sources, subset="square16"))[0]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, body: bytes) -> bytes:
    return header(name, len(body)) + body + bytes(-len(body) % 512)


def error_with(packed: tuple[str, Manifest], extra: bytes, tail: bytes | None = None, decoding: bool = False) -> str:
    """The error of reading a shard that begins with `extra`, and whose size and checksum are those of the manifest.

    `tail`: what follows, else the samples that were there. `decoding`: `extra` takes the place of the first sample, so
    that only decoding finds something.
    """
    root, manifest = packed
    path = Path(root, NAME)
    good = path.read_bytes()
    if decoding:
        with tarfile.open(path) as tar:
            tail = good[tar.getmembers()[2].offset :]
    raw = extra + (good if tail is None else tail)
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    shards = [dataclasses.replace(shard, **entry) if shard.name == NAME else shard for shard in manifest.shards]
    hostile = dataclasses.replace(manifest, shards=Shards.of(shards, manifest.scenes))
    path.write_bytes(raw)
    try:
        with pytest.raises(ShardError) as error:
            list(open_views(root, hostile, hostile.scenes, batch_size=2, workers=0, repeat=False, verify="sha256"))
        Path(root, "manifest.json").write_bytes(hostile.to_json())
        problems = verify_packed(root)
        assert len(problems) == (not decoding) and all(NAME in problem for problem in problems)
    finally:
        path.write_bytes(good)
        Path(root, "manifest.json").write_bytes(manifest.to_json())
    assert f"shard {NAME} in {root} is damaged at byte " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.CONTTYPE, "b'7'"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (tarfile.XHDTYPE, "extended header"),
        (tarfile.XGLTYPE, "extended header"),
        (tarfile.GNUTYPE_LONGNAME, "long name"),
    ],
)
def test_only_plain_files(packed, kind, match):
    assert match in (text := error_with(packed, header("scene_0/001.png", kind=kind, link="/etc/passwd")))
    assert "'scene_0/001.png'" in text and "at byte 0" in text


@pytest.mark.parametrize(
    "name",
    ["/etc/000.png", "../000.png", "scene_0/../../000.png", "scene_0/000.png/../x.png", "scene_0\\..\\000.png"]
    + [f"scene_0/001.{end}" for end in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "cls", "json.gz", "PNG")]
    + ["__import__.py", "scene_0", "scene_0/", "", "scene_0/-1.png"]
    + ["/a/0.png", "a/../000.png", "../a/000.png", "a/b/000.png", "000.png", "a/0.pkl", "a/0x1.png", "a"],
)
def test_only_our_names(packed, name, tmp_path):
    body = pickle.dumps(Touch(str(tmp_path / "touched")))
    text = error_with(packed, member(name, body))
    assert repr(name.rstrip("/")) in text or repr(name) in text
    assert not (tmp_path / "touched").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_under_our_name_is_no_image(packed, tmp_path):
    body = pickle.dumps(Touch(str(tmp_path / "touched")))
    image, camera = member("scene_0/000.png", body), member("scene_0/000.json", b"{}")
    assert "no PNG, JPEG or WebP" in error_with(packed, image + camera, decoding=True)
    image, camera = member("scene_0/000.png", picture(0)), member("scene_0/000.json", body)
    assert "the camera of sample 'scene_0/000'" in error_with(packed, image + camera, decoding=True)
    assert not (tmp_path / "touched").exists()
    pickle.loads(body)
    assert (tmp_path / "touched").exists()


def test_names_of_views_stay_in_64_bits(packed):
    assert "is not of the kind" in error_with(packed, member(f"scene_0/{10**18}.png", picture(0)))


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("scene_0/000.png", IMAGE_LIMIT + 1, f"claims {IMAGE_LIMIT + 1} bytes"),
        ("scene_0/000.png", 1 << 60, "claims"),
        ("scene_0/000.png", -512, "claims -512 bytes"),
        ("scene_0/000.json", CAMERA_LIMIT + 1, "claims"),
        ("scene_0/000.png", 100_000_000, "the file ends at byte"),
    ],
)
def test_sizes_of_members(packed, name, size, match):
    tracemalloc.start()
    try:
        assert match in error_with(packed, header(name, size))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # measured: 0.25 MB
    finally:
        tracemalloc.stop()


def test_a_compressed_shard_is_not_unpacked(packed):
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        assert "at byte 0: the header of a member is damaged" in error_with(packed, bomb, tail=b"")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # measured: 0.15 MB
    finally:
        tracemalloc.stop()


def test_a_sample_twice_and_halves(packed):
    image = member("scene_0/000.png", picture(0))
    assert "is there twice" in error_with(packed, image + image)
    assert "has not one image" in error_with(packed, image + member("scene_0/001.png", picture(0)))
    assert "has not one image" in error_with(packed, image + member("scene_0/000.jpg", picture(0)))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(16 * 49)))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    raw = bytearray(picture(0, kind="JPEG"))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", 50_000, 50_000)
    return bytes(raw)


def huge_webp() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (16, 16), (1, 2, 3, 4)).save(out, "WEBP", lossless=True)
    frame = out.getvalue()[12:]
    size = 16383 - 1
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + 2 * size.to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(extended) + len(frame)) + b"WEBP" + extended + frame


BOMB = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    "bomb",
    [
        png(50_000, 50_000),
        png(16, 16, chunk(b"zTXt", b"Comment\0\0" + BOMB)),
        png(16, 16, chunk(b"iTXt", b"Comment\0\1\0en\0\0" + BOMB)),
        png(16, 16, chunk(b"iCCP", b"profile\0\0" + BOMB)),
        huge_jpeg(),
        huge_webp(),
    ],
    ids=["png", "zTXt", "iTXt", "iCCP", "jpeg", "webp"],
)
def test_decompression_bombs(packed, bomb):
    """Refused without the memory that they claim: 7.5 GB of pixels, 100 MB of text."""
    before = peak_memory(reset=True)
    with pytest.raises(Exception) as error:
        decode_image(bomb, (16, 16), WHITE)
    assert not isinstance(error.value, MemoryError)
    assert peak_memory() - before < 64 << 20  # measured: at most 2.3 MB
    text = error_with(packed, member("scene_0/000.png", bomb) + member("scene_0/000.json", b"{}"), decoding=True)
    assert "the image of sample 'scene_0/000' cannot be decoded" in text


def peak_memory(reset: bool = False) -> int:
    """Largest resident memory so far in bytes; `reset` makes it the present one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def test_the_measure_of_memory_measures():
    before = peak_memory(reset=True)
    np.ones(128 << 20, np.uint8)
    assert peak_memory() - before > 100 << 20


def write_manifest(root: Path, manifest: Manifest, change) -> None:
    content = json.loads(manifest.to_json())
    change(content)
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_text(json.dumps(content))


def rename_scene(name: str):
    def change(content) -> None:
        content["scenes"][0]["name"] = name
        for shard in content["shards"]:
            shard["scenes"] = {name: sum(shard["scenes"].values())} if shard["scenes"] else {}

    return change


def set_in(*keys, value):
    def change(content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *[rename_scene(name) for name in ("../x", "a/b", "a\\b", "", ".", "a\x1b[2J", "a\nb", "__x__", "x" * 200)],
        *[
            set_in("shards", 0, "name", value=name)
            for name in (
                "/etc/passwd",
                "../scenes-00000.tar",
                "scenes-00000.tar\n",
                "http://h/scenes-00000.tar",
                "x.tar",
            )
        ],
        set_in("shards", 0, "bytes", value=-1),
        set_in("shards", 0, "samples", value=-3),
        set_in("image_size", value=[10**9, 10**9]),
        set_in("image_size", value=[0, 16]),
        set_in("images", value=10**9),
        lambda content: content["shards"].append(content["shards"][-1]),
        lambda content: content["scenes"].append({**content["scenes"][0], "id": 1}),
    ],
)
def test_hostile_manifests(packed, tmp_path, change):
    write_manifest(tmp_path, packed[1], lambda content: None)
    assert Manifest.load(str(tmp_path)) == packed[1]
    write_manifest(tmp_path, packed[1], change)
    with pytest.raises(ValueError, match=f"{tmp_path}/manifest.json is damaged") as error:
        Manifest.load(str(tmp_path))
    assert str(error.value).isprintable()


def test_a_manifest_has_a_limit(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: it takes no room
    with pytest.raises(ValueError, match=f"more than the {1 << 30} that it may have"):
        Manifest.load(str(tmp_path))


def test_natural_images_have_no_cameras(packed):
    root, manifest = packed
    name = "images-00000.tar"
    path = Path(root, name)
    good = path.read_bytes()
    path.write_bytes(member("images/00000009.png", picture(0)) + member("images/00000009.json", b"{}") + good)
    try:
        with pytest.raises(ShardError, match=name):
            list(open_images(root, manifest, batch_size=2, workers=0, repeat=False, verify="off"))
    finally:
        path.write_bytes(good)
