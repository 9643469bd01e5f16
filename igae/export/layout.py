# SPDX-License-Identifier: Apache-2.0
"""Names and contents of an export's files."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.storage import Stamp

FORMAT = 1
INDEX, SCENES, SHARED = "igae.json", "scenes.json", "igae.safetensors"
CARD, CONFIG = "README.md", "config.yaml"
OWN = {SCENES, SHARED, CARD, CONFIG}
"""Files beside ``igae.json`` that are none of the autoencoder's."""
MAX_JSON = 1 << 30
MAX_SIDE = 16384
# Names in igae.json become paths: nothing but a plain name may come out of a file that anybody can write.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_SHARD = re.compile(r"scenes-\d{5,}\.safetensors")


@dataclass(frozen=True)
class File:
    """A file: its size and its CRC-32 (that of :class:`igae.storage.tensors.Stamp` for tensors)."""

    bytes: int
    crc32: int

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.bytes, self.crc32)


@dataclass(frozen=True)
class Description:
    """What ``igae.json`` says."""

    format: int
    image_size: tuple[int, int]
    """(H, W) of the decoded images."""
    background: tuple[float, float, float]
    """RGB color in [0, 1] behind the objects."""
    planes: PlanesConfig
    """What a scene's row is."""
    autoencoder: str | None
    """diffusers' class of it; None for the identity (RGB scenes)."""
    render: RenderOptions
    scenes: int
    """How many there are."""
    files: dict[str, File]

    @property
    def autoencoder_files(self) -> list[str]:
        return [name for name in self.files if name not in OWN]


@dataclass(frozen=True)
class Shard:
    """A file of scenes: their names in the order of its rows."""

    name: str
    bytes: int
    crc32: int
    scenes: list[str]


class _Wrong(Exception):
    pass


T = TypeVar("T")
_DESCRIPTION, _SHARDS = TypeAdapter(Description), TypeAdapter(list[Shard])


def dump_description(description: Description) -> bytes:
    return _DESCRIPTION.dump_json(description, indent=1) + b"\n"


def dump_scenes(shards: list[Shard]) -> bytes:
    return (json.dumps([asdict(shard) for shard in shards], ensure_ascii=False) + "\n").encode()


def parse_description(data: bytes, where: str) -> Description:
    """Read back :func:`dump_description`; ValueError where it is damaged or of another format."""
    try:
        tree: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is damaged: it is no JSON") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise ValueError(f"{where} can't be read: its format is {found!r}, and this version reads {FORMAT}")
    result = _validated(_DESCRIPTION, tree, where)
    try:
        if not {SCENES, SHARED} <= set(result.files) or not all(map(_NAME.fullmatch, result.files)):
            raise _Wrong("the files that it lists are not those of an export")
        if not all(name.endswith((".json", ".safetensors")) for name in result.autoencoder_files):
            raise _Wrong("the autoencoder's files are none that diffusers writes today")  # no pickles
        if (result.autoencoder is None) != (not result.autoencoder_files):
            raise _Wrong("the autoencoder's files do not fit its class")
        if not all(
            0 < side <= MAX_SIDE for side in (*result.image_size, result.planes.resolution, result.planes.features)
        ):
            raise _Wrong("sizes are out of range")
    except _Wrong as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    return result


def parse_scenes(data: bytes, count: int, where: str) -> list[Shard]:
    """Read back :func:`dump_scenes`; ValueError where it is damaged or does not hold ``count`` scenes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is damaged: it is no JSON") from None
    shards = _validated(_SHARDS, tree, where)
    names = [name for shard in shards for name in shard.scenes]
    if len(names) != count or len(set(names)) != count or not all(_SHARD.fullmatch(shard.name) for shard in shards):
        raise ValueError(f"{where} is damaged: it does not list {count} scenes, each once")
    return shards


def _validated(adapter: TypeAdapter[T], tree: Any, where: str) -> T:
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
