# SPDX-License-Identifier: Apache-2.0
"""One shard, a tar file of samples: writing it, reading its raw samples, checking it against its manifest entry.

A sample is an image member `<key>.png|jpg|webp` and, for views, a camera member `<key>.json`, next to each other. The
key of a view is `<scene>/<index>`, that of a photograph `images/<number>`.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from webdataset.tariterators import group_by_keys, tar_file_expander

from igae.data.manifest import Shard, ShardKind, join

IMAGES = ("png", "jpg", "jpeg", "webp")
BLOCK = 1 << 20


class ShardError(ValueError):
    """A shard is missing, damaged, or not what the manifest says. The message names it."""


class Record(NamedTuple):
    """A sample as it is stored: `key`, bytes of the image, bytes of the camera (None for photographs), shard's name."""

    key: str
    image: bytes
    camera: bytes | None
    shard: str


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

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data


def split_member(name: str) -> tuple[str, str]:
    """Checks the name of a tar member and splits it: key, extension.

    Raises:
        ShardError: the name is none that the packer writes.
    """
    stem, _, suffix = name.rpartition(".")
    folder, _, number = stem.partition("/")
    ours = suffix in IMAGES or suffix == "json"
    if not ours or not folder or not number.isascii() or not number.isdigit() or ".." in folder or "\\" in folder:
        raise ShardError(f"member {name!r} is not of the kind that data_tools/pack_shards.py writes")
    return stem, suffix


def read_records(root: str, shard: Shard, wanted: Callable[[str], bool] | None = None) -> Iterator[Record]:
    """Reads the samples of a shard in their order, without decoding.

    Args:
        root: folder or URL of the packed data.
        shard: its manifest entry.
        wanted: takes a scene's name; the views of other scenes are passed over.

    Raises:
        ShardError: missing, unreadable, members or counts that are not those of the manifest.
    """
    seen = Counter[str]()

    def take(name: str) -> bool:
        key, suffix = split_member(name)
        scene = key.partition("/")[0]
        seen[scene] += suffix != "json"
        return wanted is None or wanted(scene)

    try:
        fs, path = fsspec.core.url_to_fs(join(root, shard.name))
        # Object stores answer a request in tens of milliseconds: few large ones.
        options = {} if isinstance(fs, LocalFileSystem) else {"block_size": 8 * BLOCK}
        with fs.open(path, "rb", **options) as stream:
            source = iter([{"url": shard.name, "stream": stream}])
            for sample in group_by_keys(tar_file_expander(source, select_files=take)):
                images = [sample[suffix] for suffix in IMAGES if suffix in sample]
                camera = sample.get("json")
                if len(images) != 1 or (camera is None) != (shard.kind == "images"):
                    raise ShardError(f"sample {sample['__key__']!r} has no image or no camera")
                yield Record(sample["__key__"], images[0], camera, shard.name)
        found = {"images": shard.samples} if shard.kind == "images" else shard.scenes
        if seen != found:
            raise ShardError(f"it has {sum(seen.values())} of {shard.samples} samples, or not those of the manifest")
    except FileNotFoundError as error:
        raise ShardError(f"shard {shard.name} is missing in {root}") from error
    except (ValueError, OSError, tarfile.TarError) as error:
        # webdataset adds its stream objects to the message and to the arguments.
        message = str(error.args[0] if error.args else type(error).__name__).partition(" @ <")[0]
        raise ShardError(f"shard {shard.name} in {root} cannot be read: {message}") from error


def verify_shard(root: str, shard: Shard) -> str | None:
    """Reads a whole shard and compares size, checksum and counts with the manifest; returns what is wrong, or None."""
    where = f"shard {shard.name} in {root}"
    images, cameras = Counter[str](), 0
    try:
        fs, path = fsspec.core.url_to_fs(join(root, shard.name))
        with fs.open(path, "rb") as stream:
            digest: Any = _Digest(stream)
            problem = None
            try:
                with tarfile.open(fileobj=digest, mode="r|", bufsize=BLOCK) as tar:
                    for member in tar:
                        key, suffix = split_member(member.name)
                        images[key.partition("/")[0]] += suffix != "json"
                        cameras += suffix == "json"
            except (tarfile.TarError, ShardError, OSError) as error:
                problem = f"{where} is no readable tar file: {error}"
            while digest.read(BLOCK):
                pass
    except FileNotFoundError:
        return f"{where} is missing"
    except OSError as error:
        return f"{where} cannot be read: {error}"
    if digest.bytes != shard.bytes:
        return f"{where} has {digest.bytes} bytes, the manifest says {shard.bytes}"
    if digest.hash.hexdigest() != shard.sha256:
        return f"{where} has another sha256 than the manifest says"
    if problem:
        return problem
    counts = {"images": shard.samples} if shard.kind == "images" else shard.scenes
    if images != counts or cameras != (0 if shard.kind == "images" else shard.samples):
        return f"{where} has not the samples that the manifest says"
    return None
