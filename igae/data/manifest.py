# SPDX-License-Identifier: Apache-2.0
"""The manifest of packed data: which shards there are, what is in them, and which scenes they hold."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from igae.errors import Key, did_you_mean, origin_of, redact
from igae.storage import Missing, StoreError, join, read_whole

FORMAT = 1
NAME = "manifest.json"
LIMIT = 1 << 30
"""Bytes that a manifest may have: that of a million scenes has about a quarter of them."""
MAX_SIDE = 16384
"""Pixels. Memory for a batch is allocated by what the manifest says."""
ShardKind = Literal["scenes", "heldout", "images"]
SHARD_NAME = re.compile(r"(scenes|heldout|images)-\d{5,}\.tar")
NO_ORIGINS: Mapping[Key, str] = MappingProxyType({})
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Scene:
    """A packed scene.

    Attributes:
        id: position in the manifest.
        name: folder of the scene in its data set, unique.
        category: most specific category that lists the scene.
        views: number of training views.
        heldout: number of held-out views; they are in no training shard.
        normalization: x, y, z and scale: a point p of the source's world is at scale * (p - (x, y, z)) in the packed
            scene's; None: its cameras are as the source has them.
    """

    id: int
    name: str
    category: str
    views: int
    heldout: int
    normalization: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Shard:
    """A tar file of samples: its size in bytes, its checksum, and how many samples of which scene it holds."""

    name: str
    kind: ShardKind
    bytes: int
    sha256: str
    samples: int
    scenes: dict[str, int]


@dataclass(frozen=True)
class CameraSummary:
    """Distances of all cameras (training and held-out) from the origin, and their mean normalized focal length."""

    min_distance: float
    mean_distance: float
    max_distance: float
    mean_focal: float


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        format: version of the layout.
        image_size: (height, width) of every view and natural image, in pixels.
        seed: seed of the order of the views in the shards.
        dataset: name that stands for all scenes in `select`.
        shards: all tar files next to the manifest.
        scenes: all scenes; a scene's `id` is its place here.
        images: number of natural images.
        cameras: None where there are no scenes.
    """

    format: int
    image_size: tuple[int, int]
    seed: int
    dataset: str
    shards: list[Shard]
    scenes: list[Scene]
    images: int
    cameras: CameraSummary | None

    @property
    def digest(self) -> str:
        """Of the content of all shards: checkpoints say with it what they were trained on."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @classmethod
    def load(cls, root: str) -> "Manifest":
        """Reads the manifest in the folder `root`, a local path or any fsspec URL.

        Raises:
            ValueError: there is none, it is damaged, or another version of the format.
        """
        where = redact(join(root, NAME))
        try:
            text = read_whole(join(root, NAME), where, LIMIT)
        except Missing:
            hidden = redact(root)
            raise ValueError(f"no {NAME} in {hidden}: pack the data first with data_tools/pack_shards.py") from None
        except StoreError as error:  # it has no credentials in it, its causes may
            raise ValueError(str(error)) from None
        try:
            version = _VERSION.validate_json(text).format
            if version is None:
                raise ValueError(f"{where} names no format: it is no manifest of packed data")
            if version != FORMAT:
                raise ValueError(f"{where} has format {version}, this version reads {FORMAT}: pack the data again")
            manifest = _MANIFEST.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
            raise ValueError(f"{where} is damaged ({what}): pack the data again") from error
        if problem := next(manifest._problems(), None):
            raise ValueError(f"{where} is damaged ({problem}): pack the data again")
        return manifest

    def to_json(self) -> bytes:
        """The text of `manifest.json`; the same manifest always gives the same bytes."""
        return _MANIFEST.dump_json(self, indent=1, exclude_defaults=True) + b"\n"

    def select(
        self, categories: Mapping[str, tuple[int, int]] | None = None, origins: Mapping[Key, str] = NO_ORIGINS
    ) -> list[Scene]:
        """The scenes of some categories, each once, in the order of the manifest.

        Args:
            categories: category -> [start, stop) among its scenes, counted in the order of the manifest; the name of
                the data set stands for all scenes. A range that goes beyond the end takes what is there. None: all.
            origins: of the configuration that has them as `data.categories`.

        Raises:
            ValueError: unknown category; the sentence says where it comes from.
        """
        if categories is None:
            return list(self.scenes)
        known = {self.dataset: self.scenes}
        for scene in self.scenes:
            if scene.category != self.dataset:
                known.setdefault(scene.category, []).append(scene)
        chosen: set[int] = set()
        for category, (start, stop) in categories.items():
            where = origin_of(("data", "categories", category), origins, "")
            where = f"{where}: data.categories: " if where else "data.categories: "
            if category not in known:
                hint = did_you_mean(repr(category), map(repr, known), cutoff=0).rstrip("?")
                raise ValueError(f"{where}unknown category {category!r}{hint}, or all scenes, data.categories=null?")
            if not 0 <= start <= stop:
                raise ValueError(
                    f"{where}range [{start}, {stop}] of category {category!r}: it takes 0 <= start <= stop"
                )
            chosen.update(scene.id for scene in known[category][start:stop])
        return [scene for scene in self.scenes if scene.id in chosen]

    def _problems(self) -> Iterator[str]:
        if not all(0 < side <= MAX_SIDE for side in self.image_size):
            yield f"image_size {list(self.image_size)}"
        if [scene.id for scene in self.scenes] != list(range(len(self.scenes))):
            yield "the scenes' ids do not count from 0"
        for scene in self.scenes:
            if problem := name_problem(scene.name):
                yield f"scene {scene.name!r}: {problem}"
            if scene.normalization and not (
                all(map(math.isfinite, scene.normalization)) and scene.normalization[3] > 0
            ):
                yield f"the normalization of scene {scene.name!r}"
        if len({scene.name for scene in self.scenes}) != len(self.scenes):
            yield "two scenes have one name"
        if len({shard.name for shard in self.shards}) != len(self.shards):
            yield "two shards have one name"
        counts: dict[str, dict[str, int]] = {"scenes": {}, "heldout": {}, "images": {}}
        for shard in self.shards:
            # Name and checksum become paths: nothing but our own may come out of a file that anybody can write.
            if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(f"{shard.kind}-"):
                yield f"shard name {shard.name!r}"
            if not SHA256.fullmatch(shard.sha256):
                yield f"sha256 {shard.sha256[:80]!r} of shard {shard.name}"
            if min([shard.bytes, shard.samples, *shard.scenes.values()]) < 1:
                yield f"the numbers of shard {shard.name}"
            if shard.kind != "images" and sum(shard.scenes.values()) != shard.samples:
                yield f"the counts of shard {shard.name}"
            for name, number in shard.scenes.items():
                counts[shard.kind][name] = counts[shard.kind].get(name, 0) + number
        if counts["scenes"] != {scene.name: scene.views for scene in self.scenes}:
            yield "the shards' training views are not those of the scenes"
        if counts["heldout"] != {scene.name: scene.heldout for scene in self.scenes if scene.heldout}:
            yield "the shards' held-out views are not those of the scenes"
        if sum(shard.samples for shard in self.shards if shard.kind == "images") != self.images:
            yield "the shards' natural images are not as many as it says"


@dataclass(frozen=True)
class _Version:
    format: Any = None


_MANIFEST = TypeAdapter(Manifest)
_VERSION = TypeAdapter(_Version)


def name_problem(name: str) -> str | None:
    """Why a name cannot be the name of a scene, or None. Names become paths inside tar files."""
    if not name or "/" in name or "\\" in name or ".." in name or name == ".":
        return "the name is empty or has '/', '\\' or '..' in it"
    if not name.isprintable():
        return "the name has control characters in it"
    if name.startswith("__") or len(name.encode()) > 128:
        return "the name starts with '__' or is longer than 128 bytes"
    return None


def unknown_category(category: str, known: Mapping[str, object]) -> ValueError:
    """The error for a category that is not among the known ones, with the nearest of them."""
    return ValueError(f"unknown category {category!r}{did_you_mean(repr(category), map(repr, known), cutoff=0)}")
