# SPDX-License-Identifier: Apache-2.0
"""Scenes and shards of a manifest as columns, and what is checked of columns that anybody may have written."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

ShardKind = Literal["scenes", "heldout", "images"]
KINDS: tuple[ShardKind, ...] = ("scenes", "heldout", "images")
SHARD_NAME = re.compile(r"(scenes|heldout|images)-([0-9]{5,18})\.tar")
SHA256 = re.compile("[0-9a-f]{64}")
MOST = (1 << 31) - 1
"""Views, samples: sums of as many as a manifest can list are exact in 64 bits."""
MOST_BYTES = 1 << 60
MOST_OF_A_NAME = 128
"""Bytes."""
BATCH = 4096
"""Objects that are made at a time."""
Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
C = TypeVar("C", bound="_Columns")


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


def _scalar(hint: Any) -> type[np.generic] | None:
    """T of ``NDArray[T]``, which is ``ndarray[..., dtype[T]]`` before NumPy 2.5 and an alias of its own since."""
    while inner := get_args(hint):
        hint = inner[-1]
    return hint if isinstance(hint, type) and issubclass(hint, np.generic) else None


@dataclass(frozen=True, eq=False)
class _Columns:
    """Arrays of one table. ``WIDTHS`` has the number of columns of those that are matrices."""

    WIDTHS: ClassVar[dict[str, int]]

    @classmethod
    @functools.cache
    def types(cls) -> dict[str, np.dtype[Any]]:
        """Type of each array by its name, as it is annotated."""
        scalars = [(name, _scalar(hint)) for name, hint in get_type_hints(cls).items()]
        return {name: np.dtype(scalar) for name, scalar in scalars if scalar is not None}

    @classmethod
    def of_arrays(cls: type[C], arrays: Columns, **more: Any) -> C:
        """From arrays of these names. ValueError where their types or numbers of dimensions are others."""
        for name, dtype in cls.types().items():
            column, width = arrays.get(name), cls.WIDTHS.get(name)
            shape = () if width is None else (width,)
            if column is None or column.dtype != dtype or column.ndim != 1 + len(shape) or column.shape[1:] != shape:
                raise ValueError(f"column {name}")
        return cls(**{name: arrays[name] for name in cls.types()}, **more)

    def arrays(self) -> Columns:
        """All columns by name."""
        return {name: getattr(self, name) for name in self.types()}


@dataclass(frozen=True, eq=False)
class SceneColumns(_Columns):
    """N scenes.

    Attributes:
        scene_names: UTF-8, a line break after each name.
        scene_category: which of ``categories``.
        scene_normalization: [N, 4], NaN where a scene has none; [0, 4] where no scene has one.
        categories: their names.
    """

    scene_names: NDArray[np.uint8]
    scene_category: NDArray[np.int32]
    scene_views: NDArray[np.int32]
    scene_heldout: NDArray[np.int32]
    scene_normalization: NDArray[np.float64]
    categories: list[str]

    WIDTHS = {"scene_normalization": 4}

    @classmethod
    def of(cls, scenes: Iterable[Scene]) -> "SceneColumns":
        """Raises ValueError for what no column can hold."""
        scenes = list(scenes)
        if [scene.id for scene in scenes] != list(range(len(scenes))):
            raise ValueError("the scenes' ids do not count from 0")
        for scene in scenes:
            if problem := name_problem(scene.name):
                raise ValueError(f"scene {scene.name!r}: {problem}")
            if scene.normalization and not np.isfinite(scene.normalization).all():
                raise ValueError(f"the normalization of scene {scene.name!r}")
        known: dict[str, int] = {}
        codes = [known.setdefault(scene.category, len(known)) for scene in scenes]
        moves: Any = []
        if any(scene.normalization for scene in scenes):
            moves = [scene.normalization or (np.nan,) * 4 for scene in scenes]
        return cls(
            np.frombuffer("".join(f"{scene.name}\n" for scene in scenes).encode(), np.uint8),
            np.array(codes, np.int32),
            _counts([scene.views for scene in scenes], "views of a scene"),
            _counts([scene.heldout for scene in scenes], "held-out views of a scene"),
            np.array(moves, np.float64).reshape(-1, 4),
            list(known),
        )

    def __len__(self) -> int:
        return len(self.scene_views)

    @cached_property
    def ends(self) -> Ints:
        """Where in ``scene_names`` the names end."""
        return np.flatnonzero(self.scene_names == ord("\n"))

    @cached_property
    def lengths(self) -> Ints:
        """Bytes of the names."""
        return np.diff(self.ends, prepend=-1) - 1

    def names(self, ids: Ints) -> list[str]:
        """Of scenes by their ids."""
        ends = self.ends[ids]
        starts = ends - self.lengths[ids]
        text = self.scene_names.data
        return [str(text[start:end], "utf-8") for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def make(self, ids: Ints) -> Iterator[Scene]:
        """Scenes by their ids."""
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            moves: list[Any] = [None] * len(some)
            if len(self.scene_normalization):
                rows = self.scene_normalization[some]
                moves = [None if row[0] != row[0] else tuple(row) for row in rows.tolist()]
            kinds = [self.categories[code] for code in self.scene_category[some].tolist()]
            views, heldout = self.scene_views[some].tolist(), self.scene_heldout[some].tolist()
            yield from map(Scene, some.tolist(), self.names(some), kinds, views, heldout, moves)

    def problems(self) -> Iterator[str]:
        """What is wrong with the columns, in the order in which later checks rely on earlier ones."""
        count = len(self)
        if not len(self.scene_category) == len(self.scene_heldout) == count == len(self.ends):
            yield "the columns of the scenes have different lengths"
        if len(self.scene_normalization) not in (0, count):
            yield "the columns of the scenes have different lengths"
        if len(self.scene_names) and self.scene_names[-1] != ord("\n"):
            yield "the names of the scenes"
        if len(set(self.categories)) != len(self.categories) or not _within(
            self.scene_category, 0, len(self.categories) - 1
        ):
            yield "the categories of the scenes"
        yield from self._problems_of_names()
        if not _within(self.scene_views, 1, MOST) or not _within(self.scene_heldout, 0, MOST):
            yield "the numbers of the scenes' views"
        none = np.isnan(self.scene_normalization).all(1)
        good = np.isfinite(self.scene_normalization).all(1) & (self.scene_normalization[:, 3] > 0)
        if len(bad := np.flatnonzero(~(none | good))):
            yield f"the normalization of scene {self.names(bad[:1])[0]!r}"

    def _problems_of_names(self) -> Iterator[str]:
        try:
            bad = self._has_bad_name()
        except UnicodeDecodeError:
            yield "the names of the scenes are no UTF-8"
            return
        if bad:
            name = next(name for name in self.names(np.arange(len(self))) if name_problem(name))
            yield f"scene {name[:200]!r}: {name_problem(name)}"
        # A set of all of them would be the largest thing here.
        hashes, starts = np.empty(len(self), np.int64), self.ends - self.lengths
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            some = self.scene_names[starts[start] : self.ends[stop - 1]].tobytes().split(b"\n")
            hashes[start:stop] = np.fromiter(map(hash, some), np.int64, stop - start)
        ordered = np.sort(hashes)
        twice = np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])
        candidates = self.names(np.flatnonzero(twice))
        if len(set(candidates)) != len(candidates):
            yield "two scenes have one name"

    def _has_bad_name(self) -> bool:
        """Whether `name_problem` says something of a name: of all at once."""
        text, starts = self.scene_names, self.ends - self.lengths
        if not _within(self.lengths, 1, MOST_OF_A_NAME):
            str(text.data, "utf-8")
            return True
        dots, lines = text == ord("."), int(np.count_nonzero(text < ord(" ")))
        printable = lines == len(self) and not (len(text) and text.max() > ord("~"))
        return bool(
            (text == ord("/")).any()
            or (text == ord("\\")).any()
            or (dots[1:] & dots[:-1]).any()
            or dots[starts[self.lengths == 1]].any()
            or ((text[starts] == ord("_")) & (text[starts + 1] == ord("_"))).any()  # after each name is a line break
            or not (printable or str(text.data, "utf-8").replace("\n", "").isprintable())
        )


@dataclass(frozen=True, eq=False)
class ShardColumns(_Columns):
    """M shards with E entries, each of which says how many samples of a scene a shard has. Those of shard i end before
    ``shard_end[i]``.

    Attributes:
        shard_kind: which of KINDS.
        shard_number, shard_digits: what the name has after its kind, and with how many digits.
        shard_sha256: [M, 32].
        shard_end: [M].
        entry_scene: id [E].
        entry_samples: [E].
    """

    shard_kind: NDArray[np.uint8]
    shard_number: NDArray[np.int64]
    shard_digits: NDArray[np.uint8]
    shard_bytes: NDArray[np.int64]
    shard_sha256: NDArray[np.uint8]
    shard_samples: NDArray[np.int32]
    shard_end: NDArray[np.int64]
    entry_scene: NDArray[np.int32]
    entry_samples: NDArray[np.int32]

    WIDTHS = {"shard_sha256": 32}

    @classmethod
    def of(cls, shards: Iterable[Shard], scenes: SceneColumns) -> "ShardColumns":
        """Raises ValueError for what no column can hold."""
        shards = list(shards)
        ids = {name: i for i, name in enumerate(scenes.names(np.arange(len(scenes))))}
        kinds, numbers, digits = [], [], []
        for shard in shards:
            # Name and checksum become paths: nothing but our own may come out of a file that anybody can write.
            match = SHARD_NAME.fullmatch(shard.name)
            if not match or match[1] != shard.kind:
                raise ValueError(f"shard name {shard.name[:200]!r}")
            if not SHA256.fullmatch(shard.sha256):
                raise ValueError(f"sha256 {shard.sha256[:80]!r} of shard {shard.name}")
            kinds.append(KINDS.index(shard.kind))
            numbers.append(int(match[2]))
            digits.append(len(match[2]))
            for name in shard.scenes:
                if name not in ids:
                    raise ValueError(f"shard {shard.name} has views of {name[:200]!r}, which is no scene")
        if not all(0 < shard.bytes <= MOST_BYTES for shard in shards):
            raise ValueError("the bytes of a shard")
        return cls(
            np.array(kinds, np.uint8),
            np.array(numbers, np.int64),
            np.array(digits, np.uint8),
            np.array([shard.bytes for shard in shards], np.int64),
            np.frombuffer(bytes.fromhex("".join(shard.sha256 for shard in shards)), np.uint8).reshape(-1, 32),
            _counts([shard.samples for shard in shards], "samples of a shard"),
            np.cumsum([len(shard.scenes) for shard in shards], dtype=np.int64),
            np.array([ids[name] for shard in shards for name in shard.scenes], np.int32),
            _counts([number for shard in shards for number in shard.scenes.values()], "samples of a shard"),
        )

    def __len__(self) -> int:
        return len(self.shard_kind)

    @cached_property
    def starts(self) -> Ints:
        """Where each shard's entries begin."""
        return np.concatenate([np.zeros(1, np.int64), self.shard_end])[:-1]

    def problems(self, scenes: SceneColumns) -> Iterator[str]:
        """What is wrong with the columns, in the order in which later checks rely on earlier ones."""
        count, entries = len(self), len(self.entry_scene)
        if {len(column) for name, column in self.arrays().items() if name.startswith("shard")} != {count}:
            yield "the columns of the shards have different lengths"
        ends = np.concatenate([[0], self.shard_end])
        if len(self.entry_samples) != entries or ends[-1] != entries or (np.diff(ends) < 0).any():
            yield "the columns of the shards have different lengths"
        if not _within(self.shard_kind, 0, len(KINDS) - 1) or not _within(self.shard_digits, 5, 18):
            yield "the names of the shards"
        if (self.shard_number < 0).any() or (self.shard_number >= 10 ** self.shard_digits.astype(np.int64)).any():
            yield "the names of the shards"
        written = self.shard_kind * np.uint8(32) + self.shard_digits
        for way in np.unique(written):
            numbers = np.sort(self.shard_number[written == way])
            if (numbers[1:] == numbers[:-1]).any():
                yield "two shards have one name"
        if not (
            _within(self.shard_bytes, 1, MOST_BYTES)
            and _within(self.shard_samples, 1, MOST)
            and _within(self.entry_samples, 1, MOST)
        ):
            yield "the numbers of a shard"
        if not _within(self.entry_scene, 0, len(scenes) - 1):
            yield "the scenes of the shards"
        yield from self._problems_of_entries(scenes)

    def _problems_of_entries(self, scenes: SceneColumns) -> Iterator[str]:
        places = np.repeat(np.arange(len(self)), self.shard_end - self.starts)
        pairs = np.sort(places * max(1, len(scenes)) + self.entry_scene)
        if (pairs[1:] == pairs[:-1]).any():
            yield "a shard lists a scene twice"
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.entry_samples, dtype=np.int64)])
        sums = sums[self.shard_end] - sums[self.starts]
        images = self.shard_kind == KINDS.index("images")
        if (sums[~images] != self.shard_samples[~images]).any() or sums[images].any():
            yield "the counts of the shards"
        kinds = self.shard_kind[places]
        for kind, views, what in ((0, scenes.scene_views, "training"), (1, scenes.scene_heldout, "held-out")):
            of_kind = kinds == kind
            # Sums are floats: exact, or larger than any number of views.
            found = np.bincount(self.entry_scene[of_kind], self.entry_samples[of_kind], minlength=len(scenes))
            if (found != views).any():
                yield f"the shards' {what} views are not those of the scenes"


def name_problem(name: str) -> str | None:
    """Why a name cannot be the name of a scene, or None. Names become paths inside tar files."""
    if not name or "/" in name or "\\" in name or ".." in name or name == ".":
        return "the name is empty or has '/', '\\' or '..' in it"
    if not name.isprintable():
        return "the name has control characters in it"
    if name.startswith("__") or len(name.encode()) > MOST_OF_A_NAME:
        return f"the name starts with '__' or is longer than {MOST_OF_A_NAME} bytes"
    return None


def _within(column: NDArray[Any], low: int, high: int) -> bool:
    return not len(column) or bool(column.min() >= low and column.max() <= high)


def _counts(numbers: Sequence[int], what: str) -> NDArray[np.int32]:
    if not all(-MOST <= number <= MOST for number in numbers):
        raise ValueError(f"the number of {what}")
    return np.array(numbers, np.int32)
