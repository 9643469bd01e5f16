# SPDX-License-Identifier: Apache-2.0
"""One shard, a tar file of samples: writing it, reading its raw samples, checking it against its manifest entry.

A sample is an image member `<key>.png|jpg|webp` and, for views, a camera member `<key>.json`, next to each other. The
key of a view is `<scene>/<index>`, that of a natural image `images/<number>`.
"""

import hashlib
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import fsspec

from igae.data.manifest import Shard, ShardKind
from igae.errors import redact
from igae.storage import Cache, File, StoreError, join

IMAGES = ("png", "jpg", "jpeg", "webp")
BLOCK = 1 << 20
IMAGE_LIMIT = 256 << 20
CAMERA_LIMIT = 1 << 20
"""Bytes of a member. It is read into memory as a whole."""
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
    tarfile.GNUTYPE_LONGNAME: "a long name",
    tarfile.GNUTYPE_LONGLINK: "a long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

Verify = Literal["off", "size", "sha256"]

_verified: set[tuple[str, str, str]] = set()
"""(root or folder of copies, name, checksum) of shards whose bytes have been compared in this process."""


class ShardError(ValueError):
    """A shard is missing, damaged, or not what the manifest says. The message names it."""


class Record(NamedTuple):
    """A sample as it is stored.

    Attributes:
        key: `<scene>/<view>` or `images/<number>`.
        image: bytes of the image file.
        camera: bytes of the JSON; None for natural images.
        shard: its name.
        image_offset: byte in the shard at which the image's member begins.
        camera_offset: the same of the camera.
    """

    key: str
    image: bytes
    camera: bytes | None
    shard: str
    image_offset: int
    camera_offset: int


class ShardWriter:
    """Writes a shard; `entry()` is its manifest entry once it is closed. The same samples give the same bytes."""

    def __init__(self, url: str, name: str, kind: ShardKind) -> None:
        self._name, self._kind = name, kind
        self._samples, self._scenes = 0, Counter[str]()
        fs, path = fsspec.core.url_to_fs(url)
        self._target = _Digest(fs.open(path, "wb"))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            # A tar file ends with two empty blocks and is a multiple of the record size.
            end = self._target.bytes + 2 * tarfile.BLOCKSIZE
            self._target.write(bytes(end + -end % tarfile.RECORDSIZE - self._target.bytes))
        finally:
            self._target.file.close()

    def add(self, key: str, members: Mapping[str, bytes], scene: str | None = None) -> None:
        """Appends a sample: extension -> content."""
        blocks = []
        for suffix, body in members.items():
            # Nothing but name and size: no time and no user, so the bytes depend on the content alone.
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(body)
            padding = bytes(-len(body) % tarfile.BLOCKSIZE)
            blocks += [header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"), body, padding]
        self._target.write(b"".join(blocks))
        self._samples += 1
        if scene is not None:
            self._scenes[scene] += 1

    def entry(self) -> Shard:
        """What the manifest says about this shard."""
        return Shard(
            self._name, self._kind, self._target.bytes, self._target.hash.hexdigest(), self._samples, dict(self._scenes)
        )


class _Digest:
    """Passes a stream on and keeps count and checksum of what goes through."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash, self.bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return int(self.file.write(data))


def split_member(name: str) -> tuple[str, str]:
    """Checks the name of a tar member and splits it: key, extension.

    Raises:
        ShardError: the name is none that the packer writes.
    """
    stem, _, suffix = name.rpartition(".")
    folder, _, number = stem.partition("/")
    ours = (suffix in IMAGES or suffix == "json") and re.fullmatch("[0-9]{1,18}", number)
    if not ours or not folder or ".." in folder or "\\" in folder:
        raise ShardError(f"member {name!r} is not of the kind that data_tools/pack_shards.py writes")
    return stem, suffix


def read_records(
    root: str,
    shard: Shard,
    wanted: Callable[[str], bool] | None = None,
    part: range | None = None,
    verify: Verify = "size",
    cache: Cache | None = None,
    opening: "Opening | None" = None,
) -> Iterator[Record]:
    """Reads the samples of a shard in their order, without decoding.

    Args:
        root: folder or URL of the packed data.
        shard: its manifest entry.
        wanted: takes a scene's name; the views of other scenes are passed over.
        part: numbers of the samples that are wanted, of all in the shard; it is not read beyond them.
        verify: what is compared with the manifest before the first sample; see `view_loader`.
        cache: reads a copy there, which is made first if there is none.
        opening: the shard, if it was begun to be opened before.

    Raises:
        ShardError: missing, unreadable, damaged, members or counts that are not those of the manifest.
    """
    try:
        with opening.wait() if opening is not None else _open(root, shard, cache=cache) as file:
            if verify != "off" and file.size != shard.bytes:
                raise wrong(root, shard.name, f"has {file.size} bytes, the manifest says {shard.bytes}")
            key = (root if cache is None else str(cache.folder), shard.name, shard.sha256)
            if verify == "sha256" and key not in _verified:
                if _sha256(file) != shard.sha256:
                    if cache is not None:
                        raise ShardError(f"{cache.path(shard)}, a copy of shard {shard.name}, is damaged: delete it")
                    raise wrong(root, shard.name, "has another sha256 than the manifest says")
                _verified.add(key)
                file.rewind()
            yield from _samples(file, shard, wanted, part)
    except StoreError as error:
        raise ShardError(str(error)) from None
    except _Damage as error:
        raise wrong(root, shard.name, str(error)) from None


class Opening:
    """Opens a shard and fetches its beginning (all of it into a cache) in the background."""

    def __init__(self, root: str, shard: Shard, cache: Cache | None) -> None:
        self._future: Future[File] = Future()

        def work() -> None:
            try:
                file = _open(root, shard, cache=cache)
                file.begin()
                self._future.set_result(file)
            except BaseException as error:  # whatever it is, who waits has to hear of it
                self._future.set_exception(error)

        # A daemon: a store that does not answer keeps no process.
        threading.Thread(target=work, name="igae-open", daemon=True).start()

    def wait(self) -> File:
        """The file; raises what went wrong."""
        return self._future.result()


def _open(root: str, shard: Shard, digest: Any = None, cache: Cache | None = None) -> File:
    what = f"shard {shard.name} in {redact(root)}"
    url = join(root, shard.name) if cache is None else cache.get(shard, what)
    return File(url, what, shard.bytes, digest)


def wrong(root: str, shard: str, how: str) -> ShardError:
    """The error for a shard that is not as it was packed, with what to do."""
    hidden = redact(root)
    todo = f"copy or pack it again, and check all with python data_tools/pack_shards.py --verify {hidden}"
    return ShardError(f"shard {shard} in {hidden} {how}; {todo}")


def _sha256(file: File) -> str:
    digest = hashlib.sha256()
    while data := file.read(BLOCK):
        digest.update(data)
    return digest.hexdigest()


class _Damage(Exception):
    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"is damaged at byte {offset}: {what}")


class _Member(NamedTuple):
    """A member of a tar file: byte of its header, and its name in parts."""

    offset: int
    key: str
    suffix: str
    size: int


def _members(file: File) -> Iterator[_Member]:
    """The members of a tar file that holds nothing but plain files, as the packer writes it.

    After each the file is at its content; what is not read of it is passed over. tarfile itself takes a damaged header
    for the end, unpacks compressed files, and reads extended headers of any size.
    """
    while True:
        offset = file.position
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE:
            raise _Damage(offset, "the file ends here, without the end of a tar file")
        if header.count(0) == len(header):
            rest = file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE)
            if file.position < file.size or any(rest):
                raise _Damage(offset, "zeros in place of a header")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            raise _Damage(offset, "the header of a member is damaged") from None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = KINDS.get(info.type, f"of type {info.type!r}")
            raise _Damage(offset, f"member {info.name!r} is {kind}, not a plain file")
        try:
            key, suffix = split_member(info.name)
        except ShardError as error:
            raise _Damage(offset, str(error)) from None
        limit = CAMERA_LIMIT if suffix == "json" else IMAGE_LIMIT
        start = file.position
        if not 0 <= info.size <= limit:
            raise _Damage(offset, f"member {info.name!r} claims {info.size} bytes, more than the {limit} it may have")
        if info.size > file.size - start:
            raise _Damage(offset, f"the file ends at byte {file.size}, in the middle of member {info.name!r}")
        yield _Member(offset, key, suffix, info.size)
        file.skip(start + info.size + -info.size % tarfile.BLOCKSIZE - file.position)


def _samples(file: File, shard: Shard, wanted: Callable[[str], bool] | None, part: range | None) -> Iterator[Record]:
    key: str | None = None
    number = -1
    found: dict[str, tuple[int, bytes]] = {}
    seen = Counter[str]()
    left = sum(count for scene, count in _counts(shard).items() if wanted is None or wanted(scene))
    some = left < shard.samples
    for member in _members(file):
        if member.key != key:
            if found:
                yield _record(shard, key or "", found)
                left -= 1
            if some and not left:
                return  # held-out views lie scene after scene: those that follow are not read
            key, number, found = member.key, number + 1, {}
            if part is not None and number >= part.stop:
                return
        scene = member.key.partition("/")[0]
        seen[scene] += member.suffix != "json"
        if (wanted is None or wanted(scene)) and (part is None or number in part):
            if member.suffix in found:
                raise _Damage(member.offset, f"member '{member.key}.{member.suffix}' is there twice")
            found[member.suffix] = member.offset, file.read(member.size)
    if found:
        yield _record(shard, key or "", found)
    if seen != _counts(shard):
        total = sum(seen.values())
        raise _Damage(file.size, f"it ends after {total} of {shard.samples} samples, or has not those of the manifest")


def _record(shard: Shard, key: str, found: dict[str, tuple[int, bytes]]) -> Record:
    images = [suffix for suffix in IMAGES if suffix in found]
    if len(images) != 1 or ("json" in found) == (shard.kind == "images"):
        offset = min(offset for offset, _ in found.values())
        raise _Damage(offset, f"sample {key!r} has not one image and, if it is a view, one camera")
    image_offset, image = found[images[0]]
    camera_offset, camera = found.get("json", (0, None))
    return Record(key, image, camera, shard.name, image_offset, camera_offset)


def _counts(shard: Shard) -> dict[str, int]:
    return {"images": shard.samples} if shard.kind == "images" else shard.scenes


def verify_shard(root: str, shard: Shard) -> str | None:
    """Reads a whole shard and compares size, checksum and counts with the manifest; returns what is wrong, or None."""
    digest = hashlib.sha256()
    try:
        with _open(root, shard, digest) as file:
            if file.size != shard.bytes:
                raise _Damage(min(file.size, shard.bytes), f"it has {file.size} bytes, the manifest says {shard.bytes}")
            for _ in _samples(file, shard, None, None):
                pass
    except StoreError as error:
        return str(error)
    except _Damage as error:
        return f"shard {shard.name} in {redact(root)} {error}"
    if digest.hexdigest() != shard.sha256:
        return f"shard {shard.name} in {redact(root)} has another sha256 than the manifest says"
    return None
