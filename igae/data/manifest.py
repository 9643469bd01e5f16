# SPDX-License-Identifier: Apache-2.0
"""The manifest of packed data: which shards there are, what is in them, and which scenes they hold.

It has two layouts. Format 1 is one JSON file with an object for each scene and shard. In format 2, that of large data,
these are columns in a file beside it, and the JSON file has the rest.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load

from igae.data.columns import Scene, SceneColumns, Shard, ShardColumns
from igae.data.tables import Scenes, Shards
from igae.errors import Key, did_you_mean, origin_of, redact
from igae.storage import (
    MAX_SMALL,
    Damaged,
    File,
    Missing,
    Stamp,
    StoreError,
    join,
    named_errors,
    read_whole,
    reason,
    write_file,
    write_tensors,
)

NAME, COLUMNS = "manifest.json", "manifest.safetensors"
READABLE = 10_000
"""Scenes and shards together: more are written as columns."""
LIMIT = 1 << 30
"""Bytes that each file may have: a million scenes have about a quarter of them."""
MAX_SIDE = 16384
"""Pixels. Memory for a batch is allocated by what the manifest says."""
NO_ORIGINS: Mapping[Key, str] = MappingProxyType({})


@dataclass(frozen=True)
class CameraSummary:
    """Distances of all cameras (training and held-out) from the origin, and their mean normalized focal length."""

    min_distance: float
    mean_distance: float
    max_distance: float
    mean_focal: float


@dataclass(frozen=True)
class Manifest:
    """What is said of packed data.

    Attributes:
        image_size: (height, width) of every view and natural image, in pixels.
        seed: seed of the order of the views in the shards.
        dataset: name that stands for all scenes in `select`.
        shards: all tar files next to the manifest.
        scenes: all scenes; a scene's `id` is its place here.
        images: number of natural images.
        cameras: None where there are no scenes.
    """

    image_size: tuple[int, int]
    seed: int
    dataset: str
    shards: Shards
    scenes: Scenes
    images: int
    cameras: CameraSummary | None

    @cached_property
    def digest(self) -> str:
        """Of the content of all shards: checkpoints say with it what they were trained on."""
        digest, sums, step = hashlib.sha256(), self.shards.columns.shard_sha256, 1 << 16
        for start in range(0, len(sums), step):
            digest.update(sums[start : start + step].tobytes().hex().encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of all that is said: another one where anything differs. The layout makes no difference."""
        digest = hashlib.sha256(_HEAD.dump_json(self._head(Stamp(0, 0))))
        for name, column in self._columns().items():
            digest.update(f"{name} {column.shape}".encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

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
            if version not in (1, 2):
                raise ValueError(
                    f"{where} has format {str(version)[:80]}, this version reads 1 and 2: pack the data again"
                )
            head = (_WHOLE if version == 1 else _HEAD).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
            raise ValueError(f"{where} is damaged ({what}): pack the data again") from error
        del text  # as large as all that is made of it
        arrays = {} if isinstance(head, _Whole) else _read_columns(root, head.columns)
        try:
            manifest = cls._of_whole(head) if isinstance(head, _Whole) else cls._of_columns(head, arrays)
            if problem := next(manifest._problems(), None):
                raise ValueError(problem)
        except ValueError as error:
            raise ValueError(f"{where} is damaged ({error}): pack the data again") from None
        return manifest

    @classmethod
    def _of_whole(cls, whole: "_Whole") -> "Manifest":
        scenes = Scenes.of(whole.scenes)
        shards = Shards.of(whole.shards, scenes)
        return cls(whole.image_size, whole.seed, whole.dataset, shards, scenes, whole.images, whole.cameras)

    @classmethod
    def _of_columns(cls, head: "_Head", arrays: dict[str, Any]) -> "Manifest":
        """With columns that are right by themselves and no others; `_problems` looks at what is in them."""
        if arrays.keys() != SceneColumns.types().keys() | ShardColumns.types().keys():
            raise ValueError("its columns are others")
        columns = SceneColumns.of_arrays(arrays, categories=head.categories)
        scenes = Scenes(columns, np.arange(len(columns)))
        shards = Shards(ShardColumns.of_arrays(arrays), columns)
        return cls(head.image_size, head.seed, head.dataset, shards, scenes, head.images, head.cameras)

    def save(self, root: str) -> None:
        """Writes it to the folder or URL `root`: in format 1, or in format 2 where there are more than READABLE scenes
        and shards. `manifest.json` comes last: what it refers to is there."""
        text = self.to_json() if len(self.scenes) + len(self.shards) <= READABLE else self.save_columns(root)
        write_file(join(root, NAME), text)

    def to_json(self) -> bytes:
        """The text of `manifest.json` in format 1; the same manifest always gives the same bytes."""
        rest = self.image_size, self.seed, self.dataset, list(self.shards), list(self.scenes), self.images, self.cameras
        return _WHOLE.dump_json(_Whole(1, *rest), indent=1, exclude_defaults=True) + b"\n"

    def save_columns(self, root: str) -> bytes:
        """Writes the columns; returns the text of `manifest.json` in format 2."""
        arrays = {name: np.require(column, requirements=["C", "W"]) for name, column in self._columns().items()}
        columns = {name: torch.from_numpy(column) for name, column in arrays.items()}
        return _HEAD.dump_json(self._head(write_tensors(join(root, COLUMNS), columns)), indent=1) + b"\n"

    def _head(self, stamp: Stamp) -> "_Head":
        categories = self.scenes.columns.categories
        return _Head(2, self.image_size, self.seed, self.dataset, categories, self.images, self.cameras, stamp)

    def _columns(self) -> dict[str, Any]:
        return self.scenes.columns.arrays() | self.shards.columns.arrays()

    def select(
        self, categories: Mapping[str, tuple[int, int]] | None = None, origins: Mapping[Key, str] = NO_ORIGINS
    ) -> Scenes:
        """The scenes of some categories, each once, in the order of the manifest.

        Args:
            categories: category -> [start, stop) among its scenes, counted in the order of the manifest; the name of
                the data set stands for all scenes. A range that goes beyond the end takes what is there. None: all.
            origins: of the configuration that has them as `data.categories`.

        Raises:
            ValueError: unknown category; the sentence says where it comes from.
        """
        if categories is None:
            return self.scenes
        codes, known = self.scenes.columns.scene_category, {self.dataset: -1}
        for code, category in enumerate(self.scenes.columns.categories):
            known.setdefault(category, code)
        chosen = np.zeros(len(codes), bool)
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
            code = known[category]
            chosen[(np.arange(len(codes)) if code < 0 else np.flatnonzero(codes == code))[start:stop]] = True
        return self.scenes.take(np.flatnonzero(chosen))

    def _problems(self) -> Iterator[str]:
        if not all(0 < side <= MAX_SIDE for side in self.image_size):
            yield f"image_size {list(self.image_size)}"
        yield from self.scenes.columns.problems()
        yield from self.shards.columns.problems(self.scenes.columns)
        if self.shards.samples("images") != self.images:
            yield "the shards' natural images are not as many as it says"


@dataclass(frozen=True)
class _Version:
    format: Any = None


@dataclass(frozen=True)
class _Whole:
    """`manifest.json` of format 1."""

    format: Literal[1]
    image_size: tuple[int, int]
    seed: int
    dataset: str
    shards: list[Shard]
    scenes: list[Scene]
    images: int
    cameras: CameraSummary | None


@dataclass(frozen=True)
class _Head:
    """`manifest.json` of format 2; `columns` is the stamp of the file of columns."""

    format: Literal[2]
    image_size: tuple[int, int]
    seed: int
    dataset: str
    categories: list[str]
    images: int
    cameras: CameraSummary | None
    columns: Stamp


_VERSION, _WHOLE, _HEAD = TypeAdapter(_Version), TypeAdapter(_Whole), TypeAdapter(_Head)


def _read_columns(root: str, stamp: Stamp) -> dict[str, Any]:
    where = join(root, COLUMNS)
    with named_errors(where):
        if stamp.bytes > LIMIT:
            raise Damaged(f"it has {stamp.bytes} bytes, more than the {LIMIT} that it may have")
        with File(where, redact(where), stamp.bytes) as file:
            if file.size != stamp.bytes:
                raise Damaged(f"it has {file.size} bytes and had {stamp.bytes}")
            data = file.read(file.size)
        if zlib.crc32(data) != stamp.crc32:
            raise Damaged("its checksum differs")
        if int.from_bytes(data[:8], "little") > MAX_SMALL:
            raise Damaged("its header has no possible length")
        try:
            return dict(load(data))
        except Exception as error:  # of the library, which anybody's file may be given to
            raise Damaged(reason(error)) from None


def unknown_category(category: str, known: Mapping[str, object]) -> ValueError:
    """The error for a category that is not among the known ones, with the nearest of them."""
    return ValueError(f"unknown category {category!r}{did_you_mean(repr(category), map(repr, known), cutoff=0)}")
