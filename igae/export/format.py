# SPDX-License-Identifier: Apache-2.0
"""Names and contents of an export's files."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.storage import Stamp

FORMAT = 1
INDEX, SCENES, SHARED, PLANES = "igae.json", "scenes.json", "igae.safetensors", "planes"
CARD, CONFIG = "README.md", "config.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OWN = {SCENES, SHARED, CARD, CONFIG}
"""Files beside ``igae.json`` that are none of the autoencoder's."""
MAX_SCENES = 1 << 30
"""Bytes of scenes.json: that of a million scenes has an eighth of them."""
MAX_SIDE, MAX_PIXELS = 16384, 4096 * 4096
Moved = tuple[float, float, float, float]
# Names in igae.json become paths: nothing but a plain name may come out of a file that anybody can write.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_HUB = re.compile(r"hf://(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>.+?))?/?")
_SCENE_FILE = re.compile(r"scenes-\d{5,}\.safetensors")


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
    files: dict[str, Stamp]

    @property
    def autoencoder_files(self) -> list[str]:
        return [name for name in self.files if name not in OWN]


@dataclass(frozen=True)
class SceneFile:
    """A file of scenes: their names in the order of its rows."""

    name: str
    bytes: int
    crc32: int
    scenes: list[str]
    normalizations: dict[str, Moved] = field(default_factory=dict)
    """Of those whose cameras packing moved: x, y, z and scale. A point p of the scene's source is at
    scale * (p - (x, y, z)) here."""


T = TypeVar("T")
_DESCRIPTION, _SCENE_FILES, _ANY = TypeAdapter(Description), TypeAdapter(list[SceneFile]), TypeAdapter(dict[str, Any])


def dump_description(description: Description) -> bytes:
    return _DESCRIPTION.dump_json(description, indent=1) + b"\n"


def dump_scenes(files: list[SceneFile]) -> bytes:
    listed = [{key: value for key, value in asdict(file).items() if value != {}} for file in files]
    return (json.dumps(listed, ensure_ascii=False) + "\n").encode()


def parse_description(data: bytes, where: str) -> Description:
    """Read back :func:`dump_description`; ValueError where it is damaged or of another format."""
    found = _parsed(_ANY, data, where).get("format")
    if found != FORMAT:
        raise ValueError(f"{where} can't be read: its format is {found!r}, and this version reads {FORMAT}")
    result = _parsed(_DESCRIPTION, data, where)
    if not {SCENES, SHARED} <= set(result.files) or not all(map(_NAME.fullmatch, result.files)):
        problem = "the files that it lists are not those of an export"
    elif not {"config.json", WEIGHTS} >= set(result.autoencoder_files):
        problem = "the autoencoder's files are none that diffusers writes today"  # no pickles, no names of other files
    elif (result.autoencoder is None) != (not result.autoencoder_files) or (
        result.autoencoder is not None and "config.json" not in result.files
    ):
        problem = "the autoencoder's files do not fit its class"
    elif not all(0 < side <= MAX_SIDE for side in result.image_size) or math.prod(result.image_size) > MAX_PIXELS:
        problem = "sizes are out of range"
    else:
        return result
    raise ValueError(f"{where} is damaged: {problem}")


def parse_scenes(data: bytes, count: int, where: str) -> list[SceneFile]:
    """Read back :func:`dump_scenes`; ValueError where it is damaged or does not hold ``count`` scenes."""
    files = _parsed(_SCENE_FILES, data, where)
    names = [name for file in files for name in file.scenes]
    if len(names) != count or len(set(names)) != count or not all(_SCENE_FILE.fullmatch(file.name) for file in files):
        raise ValueError(f"{where} is damaged: it does not list {count} scenes, each once")
    return files


def _parsed(adapter: TypeAdapter[T], data: bytes, where: str) -> T:
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def parse_hub(target: str) -> re.Match[str]:
    """Parts of ``hf://repo[@revision][/folder]``; ValueError where it is something else."""
    match = _HUB.fullmatch(target)
    if match is None or match["repo"].split("/")[0] in ("datasets", "spaces", "buckets"):
        raise ValueError(f"{target} names no model repository: write hf://user/name, or hf://user/name@branch/folder")
    return match
