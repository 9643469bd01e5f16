# SPDX-License-Identifier: Apache-2.0
"""Shards that are truncated or have flipped bits: they are named with the byte, and nothing hangs."""

import io
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scene_files import open_images, open_views, picture, write_data

from igae.data import Manifest, PackOptions, RawSample, Shard, ShardError, ShardReader, pack, verify_packed

NAME = "scenes-00001.tar"


@dataclass
class Packed:
    """Packed data, the bytes of one shard, and (header, content, end of content, name) of its members."""

    root: Path
    manifest: Manifest
    shard: Shard
    raw: bytes
    members: list[tuple[int, int, int, str]]

    @property
    def end(self) -> int:
        """Byte at which the zeros at the end begin."""
        last = self.members[-1][2]
        return last + -last % 512

    def records(self, data: bytes, check: str = "off") -> list[RawSample]:
        (self.root / NAME).write_bytes(data)
        return list(ShardReader(str(self.root), verify=check).read(self.shard))

    def error(self, data: bytes, check: str = "off") -> str:
        with pytest.raises(ShardError) as error:
            self.records(data, check)
        text = str(error.value)
        assert text.startswith(f"shard {NAME} in {self.root} ") and "\n" not in text
        assert f"pack_shards.py --verify {self.root}" in text
        return text


def flip(raw: bytes, byte: int, bit: int) -> bytes:
    return raw[:byte] + bytes([raw[byte] ^ 1 << bit]) + raw[byte + 1 :]


def damaged_byte(text: str) -> int:
    found = re.search(r"is damaged at byte (\d+): ", text)
    assert found, text
    return int(found[1])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("faults")
    data = write_data(folder / "data", views=(9, 9, 9), images=4)
    root = folder / "out"
    sources = {"scenes": str(data / "scenes"), "images": str(data / "natural_images")}
    manifest, _ = pack(str(root), PackOptions(**sources, subset="square16", shard_size=32_000))
    with tarfile.open(root / NAME) as tar:
        members = [(m.offset, m.offset_data, m.offset_data + m.size, m.name) for m in tar]
    shard = next(shard for shard in manifest.shards if shard.name == NAME)
    return Packed(root, manifest, shard, (root / NAME).read_bytes(), members)


@pytest.fixture(autouse=True)
def mended(packed: Packed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ShardReader, "verified", set())
    yield
    (packed.root / NAME).write_bytes(packed.raw)


def test_offsets_of_records(packed: Packed) -> None:
    offsets = {name: header for header, _, _, name in packed.members}
    contents = {name: packed.raw[begin:end] for _, begin, end, name in packed.members}
    records = packed.records(packed.raw)
    assert len(records) == packed.shard.samples == len(packed.members) / 2
    for record in records:
        assert (record.image, record.image_offset) == (contents[f"{record.key}.png"], offsets[f"{record.key}.png"])
        assert (record.camera, record.camera_offset) == (contents[f"{record.key}.json"], offsets[f"{record.key}.json"])


@given(data=st.data())
@settings(max_examples=60)
def test_truncation(packed: Packed, data: st.DataObject) -> None:
    """Cut anywhere; often at the borders of members, where a tar reader that trusts the file notices nothing."""
    borders = [byte for header, begin, end, _ in packed.members for byte in (header, begin, end)]
    cut = data.draw(st.integers(0, len(packed.raw) - 1) | st.sampled_from([*borders, packed.end]))
    for check in ("size", "sha256"):
        text = packed.error(packed.raw[:cut], check)
        assert f"has {cut} bytes, the manifest says {len(packed.raw)}" in text
    if cut >= packed.end + 512:  # all samples are there
        assert packed.records(packed.raw[:cut]) == packed.records(packed.raw)
        return
    inside = [header for header, _, end, _ in packed.members if header <= cut < end]
    in_end = [packed.end] if cut >= packed.end else []
    assert damaged_byte(packed.error(packed.raw[:cut])) == [*inside, *in_end, cut][0]


@given(data=st.data())
@settings(max_examples=100)
def test_a_flipped_bit_in_a_header(packed: Packed, data: st.DataObject) -> None:
    header = data.draw(st.sampled_from([member[0] for member in packed.members]))
    byte, bit = data.draw(st.integers(0, 511)), data.draw(st.integers(0, 7))
    flipped = flip(packed.raw, header + byte, bit)
    if 148 <= byte < 156:  # the checksum itself can be written in several ways
        try:
            assert packed.records(flipped) == packed.records(packed.raw)
            return
        except ShardError:
            pass
    assert damaged_byte(packed.error(flipped)) == header


@given(byte=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_end(packed: Packed, byte: int, bit: int) -> None:
    byte = packed.end + byte % (len(packed.raw) - packed.end)
    assert damaged_byte(packed.error(flip(packed.raw, byte, bit))) == packed.end


def test_zeros_in_place_of_a_header(packed: Packed) -> None:
    header = packed.members[5][0]
    assert damaged_byte(packed.error(packed.raw[:header] + bytes(512) + packed.raw[header + 512 :])) == header
    hole = bytes(len(packed.raw) - header)  # more than the end of a tar file has
    assert damaged_byte(packed.error(packed.raw[:header] + hole)) == header


@given(byte=st.integers(0, 10**6), bit=st.integers(0, 7))
@example(byte=0, bit=0)
@settings(max_examples=60)
def test_sha256_finds_any_flipped_bit_before_the_first_sample(packed: Packed, byte: int, bit: int) -> None:
    (packed.root / NAME).write_bytes(flip(packed.raw, byte % len(packed.raw), bit))
    records = ShardReader(str(packed.root), verify="sha256").read(packed.shard)
    with pytest.raises(ShardError, match=f"{NAME} in .* has another sha256 than the manifest says; copy or pack"):
        next(records)


@given(member=st.integers(0, 10**6), byte=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=100)
def test_flipped_content(packed: Packed, member: int, byte: int, bit: int) -> None:
    """Without a checksum some flips change a sample; none ends in anything but samples or an error with the place."""
    header, begin, end, name = packed.members[member % len(packed.members)]
    (packed.root / NAME).write_bytes(flip(packed.raw, begin + byte % (end - begin), bit))
    scenes = packed.manifest.select(None)
    loader = open_views(str(packed.root), packed.manifest, scenes, batch_size=4, repeat=False, workers=0, verify="off")
    try:
        assert sum(len(batch.view) for batch in loader) == sum(scene.views for scene in scenes)
    except ShardError as error:
        text = str(error)
        assert damaged_byte(text) == header and "\n" not in text and " at 0x" not in text
        assert f"the {'camera' if name.endswith('json') else 'image'} of sample '{name.rpartition('.')[0]}'" in text


@pytest.mark.parametrize(
    ("suffix", "content", "match"),
    [
        ("png", b"", "no PNG, JPEG or WebP"),
        ("png", picture(1)[:400], "truncated"),
        ("png", picture(1, size=8), "it is 8x8 pixels, the manifest says 16x16"),
        ("json", b"{", "camera"),
        ("json", b'{"cam2world": [[1]]}', "camera"),
        ("json", b"[" * 100_000, "recursion|camera"),
        ("json", b'{"cam2world": %s, "intrinsics": %s}' % (b"[NaN%s]" % (b",0" * 15), b"[0%s]" % (b",0" * 8)), "NaN"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_content_that_cannot_be_decoded(packed: Packed, suffix, content, match, workers) -> None:
    out, place = io.BytesIO(), None
    with tarfile.open(fileobj=out, mode="w") as tar:
        for _, begin, end, name in packed.members:
            body = packed.raw[begin:end]
            if place is None and name.endswith(suffix) and name != packed.members[0][3]:
                place, body = tar.offset, content
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    (packed.root / NAME).write_bytes(out.getvalue())
    options = {"batch_size": 4, "repeat": False, "workers": workers, "verify": "off"}
    with pytest.raises(ShardError, match=match) as error:
        list(open_views(str(packed.root), packed.manifest, packed.manifest.scenes, **options))
    assert damaged_byte(str(error.value)) == place and NAME in str(error.value)


@pytest.mark.parametrize("check", ["off", "size", "sha256"])
def test_verification_changes_no_sample(packed: Packed, check) -> None:
    def batches(check: str) -> list[torch.Tensor]:
        views = open_views(str(packed.root), packed.manifest, packed.manifest.scenes, batch_size=5, verify=check)
        natural_images = open_images(str(packed.root), packed.manifest, batch_size=3, workers=0, verify=check)
        try:
            return [next(views).images for _ in range(9)] + [next(natural_images) for _ in range(3)]
        finally:
            views.close()
            natural_images.close()

    assert all(torch.equal(a, b) for a, b in zip(batches(check), batches("size"), strict=True))


def test_each_shard_is_hashed_once(packed: Packed, monkeypatch) -> None:
    hashed: list[str] = []

    class Noting(set[tuple[str, str, str]]):
        def add(self, key: tuple[str, str, str]) -> None:
            hashed.append(key[1])
            super().add(key)

    monkeypatch.setattr(ShardReader, "verified", Noting())
    scene = next(scene for scene in packed.manifest.scenes if scene.name in packed.shard.scenes)
    options = {"batch_size": scene.views, "workers": 0, "verify": "sha256"}
    for _ in range(2):
        loader = open_views(str(packed.root), packed.manifest, [scene], **options)
        for _ in range(3):
            next(loader)
        loader.close()
    assert hashed == [NAME]
    for check in ("size", "off"):
        list(ShardReader(str(packed.root), verify=check).read(packed.shard))
    assert hashed == [NAME]
    with pytest.raises(ShardError, match="another sha256"):
        list(ShardReader(str(packed.root), verify="sha256").read(replace(packed.shard, sha256="0" * 64)))


def test_size_is_compared_before_the_first_sample(packed: Packed) -> None:
    (packed.root / NAME).write_bytes(packed.raw + bytes(512))
    with pytest.raises(ShardError, match=f"has {len(packed.raw) + 512} bytes, the manifest says {len(packed.raw)}; "):
        next(ShardReader(str(packed.root)).read(packed.shard))
    assert len(packed.records(packed.raw + bytes(512), "off")) == packed.shard.samples


def test_the_tool_finds_what_the_reader_finds(packed: Packed) -> None:
    header, begin, _, _ = packed.members[4]
    for damaged, expected in (
        (flip(packed.raw, header + 3, 0), f"is damaged at byte {header}"),
        (flip(packed.raw, begin, 0), "another sha256"),
        (packed.raw[:-1], f"it has {len(packed.raw) - 1} bytes, the manifest says {len(packed.raw)}"),
    ):
        (packed.root / NAME).write_bytes(damaged)
        (problem,) = verify_packed(str(packed.root))
        assert NAME in problem and expected in problem


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_before_the_damage_are_given_out(packed: Packed, workers: int) -> None:
    """The order is the stored one: what was whole comes, then the error."""
    (packed.root / NAME).write_bytes(packed.raw[: packed.members[6][0]])  # three samples of the second shard
    options = {"batch_size": 2, "shuffle": 0, "repeat": False, "workers": workers, "verify": "off"}
    first = packed.manifest.shards[0].samples
    assert first % 2 == 0
    loader = open_views(str(packed.root), packed.manifest, packed.manifest.scenes, **options)
    found = 0
    with pytest.raises(ShardError, match=NAME):
        for batch in loader:
            found += len(batch.view)
    assert found == first + 2  # the third is in a batch that is not full
    assert list(loader) == []


@pytest.mark.parametrize("how", ["damage", "interrupt"])
def test_a_process_ends_after_an_error_before_the_first_batch(packed: Packed, how: str, tmp_path: Path) -> None:
    """Workers have been started then, and the interpreter keeps the traceback of what nobody catches until it ends."""
    (tmp_path / "manifest.json").write_bytes(packed.manifest.to_json())
    for shard in packed.manifest.shards:
        (tmp_path / shard.name).write_bytes(b"x" * shard.bytes)
    interrupt = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background starts without it
        "File.read = lambda self, number: os.kill(os.getpid(), signal.SIGINT) or time.sleep(100)\n"
    )
    code = (
        "from igae.data import DataConfig, Manifest, view_loader\nfrom igae.storage import File\n"
        f"m = Manifest.load({str(tmp_path)!r})\n{interrupt if how == 'interrupt' else ''}"
        f"next(view_loader(DataConfig(root={str(tmp_path)!r}), m, m.scenes, batch_size=4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = "ShardError: shard scenes-" if how == "damage" else "KeyboardInterrupt"
    assert done.returncode != 0 and expected in done.stderr
