# SPDX-License-Identifier: Apache-2.0
"""One shard, a tar file of samples: writing it, reading its raw samples, checking it against its manifest entry.

A sample is an image member `<key>.png|jpg|webp` and, for views, a camera member `<key>.json`, next to each other. The
key of a view is `<scene>/<index>`, that of a natural image `images/<number>`.
"""

import hashlib
import random
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from webdataset import TarWriter

from igae.data.columns import Shard, ShardKind
from igae.data.config import Verify
from igae.errors import redact
from igae.storage import Cache, File, StoreError, file_system, join, sync, writes_to

IMAGES = ("png", "jpg", "jpeg", "webp")
MEMBER = re.compile(r"((?!.*\.\.)[^/\\]+/[0-9]{1,18})\.(png|jpg|jpeg|webp|json)", re.DOTALL)
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


class ShardError(ValueError):
    """A shard is missing, damaged, or not what the manifest says. The message names it."""


class RawSample(NamedTuple):
    """A sample as stored: key (`<scene>/<view>` or `images/<number>`), image file, camera as JSON (None for natural
    images), name of the shard, and the bytes in the shard at which the members of image and camera begin."""

    key: str
    image: bytes
    camera: bytes | None
    shard: str
    image_offset: int
    camera_offset: int


def seeded(seed: int, use: str) -> random.Random:
    """Random numbers that depend on the seed and on what they are for."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}/{use}".encode()).digest()[:8], "big"))


class ShardWriter:
    """Writes a shard; `entry()` is its manifest entry once it is closed. The same samples give the same bytes. One that
    an error ends is removed."""

    def __init__(self, url: str, name: str, kind: ShardKind) -> None:
        self._name, self._kind = name, kind
        self._samples, self._scenes = 0, Counter[str]()
        fs, path = file_system(url)
        self._fs, self._path, self._url = fs, path, url
        with writes_to(url):
            self._target = _Digest(fs.open(path, "wb"))
        # Nothing but name and size, no time and no user: the bytes depend on the content alone.
        self._tar = TarWriter(self._target, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False)
        tar = self._tar.tarstream  # the writer's own format argument has no effect
        tar.format, tar.encoding, tar.errors = tarfile.USTAR_FORMAT, "utf-8", "strict"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            with writes_to(self._url):
                try:
                    self._tar.close()
                finally:
                    self._target.file.close()
                if isinstance(self._fs, LocalFileSystem):
                    sync(Path(self._path))  # before anything says that it is there
                whole = kind is None
        finally:
            if not whole:
                with suppress(Exception):
                    self._fs.rm_file(self._path)

    def add(self, key: str, members: Mapping[str, bytes], scene: str | None = None) -> None:
        """Appends a sample: extension -> content."""
        with writes_to(self._url):
            for suffix, body in members.items():  # one by one: a sample's members would be sorted
                self._tar.write({"__key__": key, suffix: body})
        self._tar.tarstream.members.clear()  # it would keep all headers
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


class ShardReader:
    """Reads shards without decoding their samples.

    Args:
        root: folder or URL of the packed data.
        verify: what of a shard is compared with the manifest before its first sample; see `DataConfig`.
        cache: reads copies there, which are made first where there are none.

    Attributes:
        verified: (root or folder of copies, name, checksum) of shards that were found to have that checksum, by all
            readers of this process.
    """

    verified: ClassVar[set[tuple[str, str, str]]] = set()

    def __init__(self, root: str, verify: Verify = "size", cache: Cache | None = None) -> None:
        self.root, self.verify, self.cache = root, verify, cache

    def open(self, shard: Shard) -> "Future[File]":
        """Opens a shard and fetches its beginning (all of it into the cache) in the background."""
        future: Future[File] = Future()

        def work() -> None:
            try:
                file = self._open(shard)
                file.begin()
                future.set_result(file)
            except BaseException as error:  # whatever it is, who waits has to hear of it
                future.set_exception(error)

        # A daemon: a store that does not answer keeps no process.
        threading.Thread(target=work, name="igae-open", daemon=True).start()
        return future

    def read(
        self,
        shard: Shard,
        wanted: Callable[[str], bool] | None = None,
        part: range | None = None,
        opening: "Future[File] | None" = None,
    ) -> Iterator[RawSample]:
        """The samples of a shard in their order.

        Args:
            wanted: takes a scene's name; the views of other scenes are passed over.
            part: numbers of the samples that are wanted, of all in the shard; it is not read beyond them.
            opening: what `open` gave, if it was called before.

        Raises:
            ShardError: missing, unreadable, damaged, members or counts that are not those of the manifest.
        """
        try:
            with opening.result() if opening is not None else self._open(shard) as file:
                self._verify(file, shard)
                yield from _samples(file, shard, wanted, part)
        except StoreError as error:
            raise ShardError(str(error)) from None
        except _Damage as error:
            raise damaged_shard(self.root, shard.name, str(error)) from None

    def check(self, shard: Shard) -> str | None:
        """Reads a whole shard and compares size, checksum and counts with the manifest; returns what is wrong, if
        anything is."""
        what, digest = f"shard {shard.name} in {redact(self.root)}", hashlib.sha256()
        try:
            with self._open(shard, digest) as file:
                if file.size != shard.bytes:
                    size = f"it has {file.size} bytes, the manifest says {shard.bytes}"
                    raise _Damage(min(file.size, shard.bytes), size)
                for _ in _samples(file, shard, None, None):
                    pass
        except StoreError as error:
            return str(error)
        except _Damage as error:
            return f"{what} {error}"
        return None if digest.hexdigest() == shard.sha256 else f"{what} has another sha256 than the manifest says"

    def _open(self, shard: Shard, digest: Any = None) -> File:
        what = f"shard {shard.name} in {redact(self.root)}"
        url = join(self.root, shard.name) if self.cache is None else self.cache.get(shard, what)
        return File(url, what, shard.bytes, digest)

    def _verify(self, file: File, shard: Shard) -> None:
        if self.verify != "off" and file.size != shard.bytes:
            how = f"has {file.size} bytes, the manifest says {shard.bytes}"
            raise damaged_shard(self.root, shard.name, how)
        key = (self.root if self.cache is None else str(self.cache.folder), shard.name, shard.sha256)
        if self.verify != "sha256" or key in self.verified:
            return
        digest = hashlib.sha256()
        while data := file.read(BLOCK):
            digest.update(data)
        if digest.hexdigest() != shard.sha256:
            if self.cache is not None:
                raise ShardError(f"{self.cache.path(shard)}, a copy of shard {shard.name}, is damaged: delete it")
            raise damaged_shard(self.root, shard.name, "has another sha256 than the manifest says")
        self.verified.add(key)
        file.rewind()


def damaged_shard(root: str, shard: str, how: str) -> ShardError:
    """The error for a shard that is not as it was packed, with what to do."""
    hidden = redact(root)
    todo = f"copy or pack it again, and check all with python data_tools/pack_shards.py --verify {hidden}"
    return ShardError(f"shard {shard} in {hidden} {how}; {todo}")


class _Damage(Exception):
    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"is damaged at byte {offset}: {what}")


def _members(file: File) -> Iterator[tuple[int, str, str, int]]:
    """The members of a tar file that holds nothing but plain files, as the packer writes it: byte of the header, key,
    extension, size.

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
        name = MEMBER.fullmatch(info.name)
        if name is None:
            raise _Damage(offset, f"member {info.name!r} is not of the kind that data_tools/pack_shards.py writes")
        key, suffix = name.groups()
        limit = CAMERA_LIMIT if suffix == "json" else IMAGE_LIMIT
        start = file.position
        if not 0 <= info.size <= limit:
            raise _Damage(offset, f"member {info.name!r} claims {info.size} bytes, more than the {limit} it may have")
        if info.size > file.size - start:
            raise _Damage(offset, f"the file ends at byte {file.size}, in the middle of member {info.name!r}")
        yield offset, key, suffix, info.size
        file.skip(start + info.size + -info.size % tarfile.BLOCKSIZE - file.position)


def _samples(file: File, shard: Shard, wanted: Callable[[str], bool] | None, part: range | None) -> Iterator[RawSample]:
    number, current = -1, ""
    found: dict[str, tuple[int, bytes]] = {}
    seen = Counter[str]()
    left = sum(count for scene, count in _counts(shard).items() if wanted is None or wanted(scene))
    some = left < shard.samples
    for offset, key, suffix, size in _members(file):
        if key != current:
            if found:
                yield _sample(shard, current, found)
                left -= 1
            if some and not left:
                return  # held-out views lie scene after scene: those that follow are not read
            current, number, found = key, number + 1, {}
            if part is not None and number >= part.stop:
                return
        scene = key.partition("/")[0]
        seen[scene] += suffix != "json"
        if (wanted is None or wanted(scene)) and (part is None or number in part):
            if suffix in found:
                raise _Damage(offset, f"member '{key}.{suffix}' is there twice")
            found[suffix] = offset, file.read(size)
    if found:
        yield _sample(shard, current, found)
    if seen != _counts(shard):
        total = sum(seen.values())
        raise _Damage(file.size, f"it ends after {total} of {shard.samples} samples, or has not those of the manifest")


def _sample(shard: Shard, key: str, found: dict[str, tuple[int, bytes]]) -> RawSample:
    images = [suffix for suffix in IMAGES if suffix in found]
    if len(images) != 1 or ("json" in found) == (shard.kind == "images"):
        offset = min(offset for offset, _ in found.values())
        raise _Damage(offset, f"sample {key!r} has not one image and, if it is a view, one camera")
    image_offset, image = found[images[0]]
    camera_offset, camera = found.get("json", (0, None))
    return RawSample(key, image, camera, shard.name, image_offset, camera_offset)


def _counts(shard: Shard) -> dict[str, int]:
    return {"images": shard.samples} if shard.kind == "images" else shard.scenes
