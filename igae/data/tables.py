# SPDX-License-Identifier: Apache-2.0
"""The scenes and shards of a manifest as sequences: a million of them are a few arrays, and an object is made where one
is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from igae.data.columns import BATCH, KINDS, Ints, Scene, SceneColumns, Shard, ShardColumns, ShardKind


class Scenes(Sequence[Scene]):
    """Scenes of a manifest: all, or some. A slice is one of these too.

    Attributes:
        columns: of all scenes of the manifest.
        ids: int64 [n].
    """

    def __init__(self, columns: SceneColumns, ids: ArrayLike) -> None:
        self.columns, self.ids = columns, np.asarray(ids, np.int64).reshape(-1)

    @classmethod
    def of(cls, scenes: Iterable[Scene]) -> "Scenes":
        """All scenes of a manifest. ValueError: the sentence says which can't be one."""
        columns = SceneColumns.of(scenes)
        return cls(columns, np.arange(len(columns)))

    @property
    def names(self) -> list[str]:
        """Their names."""
        return self.columns.names(self.ids)

    @property
    def views(self) -> Ints:
        """Their numbers of training views, int64 [n]."""
        return self.columns.scene_views[self.ids].astype(np.int64)

    @property
    def heldout(self) -> Ints:
        """Their numbers of held-out views, int64 [n]."""
        return self.columns.scene_heldout[self.ids].astype(np.int64)

    def take(self, places: ArrayLike) -> "Scenes":
        """The scenes at some places."""
        return Scenes(self.columns, self.ids[np.asarray(places, np.int64)])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Scene]:
        return self.columns.make(self.ids)

    @overload
    def __getitem__(self, place: int) -> Scene: ...
    @overload
    def __getitem__(self, place: slice) -> "Scenes": ...
    def __getitem__(self, place: int | slice) -> "Scene | Scenes":
        if isinstance(place, slice):
            return Scenes(self.columns, self.ids[place])
        return next(self.columns.make(self.ids[place].reshape(1)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Shards(Sequence[Shard]):
    """All shards of a manifest."""

    def __init__(self, columns: ShardColumns, scenes: SceneColumns) -> None:
        self.columns, self._scenes = columns, scenes

    @classmethod
    def of(cls, shards: Iterable[Shard], scenes: Scenes) -> "Shards":
        """Of all scenes of the manifest. ValueError: the sentence says which shard can't be one."""
        return cls(ShardColumns.of(shards, scenes.columns), scenes.columns)

    def samples(self, kind: ShardKind) -> int:
        """How many samples those of a kind have together."""
        return int(self.columns.shard_samples[self.places(kind)].sum(dtype=np.int64))

    def places(self, kind: ShardKind) -> Ints:
        """Where the shards of a kind are."""
        return np.flatnonzero(self.columns.shard_kind == KINDS.index(kind))

    def entries(self, kind: ShardKind) -> tuple[Ints, Ints, Ints]:
        """What the shards of a kind hold, in their order: place of a shard, id of a scene, and its samples there."""
        columns = self.columns
        places = np.repeat(np.arange(len(columns)), columns.shard_end - columns.starts)
        of_kind = columns.shard_kind[places] == KINDS.index(kind)
        scenes, samples = columns.entry_scene[of_kind], columns.entry_samples[of_kind]
        return places[of_kind], scenes.astype(np.int64), samples.astype(np.int64)

    def take(self, places: ArrayLike) -> list[Shard]:
        """The shards at some places."""
        return list(self._make(np.asarray(places, np.int64)))

    def _make(self, places: Ints) -> Iterator[Shard]:
        columns = self.columns
        for first in range(0, len(places), BATCH):
            some = places[first : first + BATCH]
            lengths = columns.shard_end[some] - columns.starts[some]
            stops = np.cumsum(lengths)
            entries = np.arange(lengths.sum()) + np.repeat(columns.starts[some] - stops + lengths, lengths)
            names = self._scenes.names(columns.entry_scene[entries].astype(np.int64))
            counts = list(zip(names, columns.entry_samples[entries].tolist(), strict=True))
            start = 0
            for kind, number, digits, size, sha256, samples, stop in zip(
                columns.shard_kind[some].tolist(),
                columns.shard_number[some].tolist(),
                columns.shard_digits[some].tolist(),
                columns.shard_bytes[some].tolist(),
                columns.shard_sha256[some],
                columns.shard_samples[some].tolist(),
                stops.tolist(),
                strict=True,
            ):
                name = f"{KINDS[kind]}-{number:0{digits}d}.tar"
                yield Shard(name, KINDS[kind], size, sha256.tobytes().hex(), samples, dict(counts[start:stop]))
                start = stop

    def __len__(self) -> int:
        return len(self.columns)

    def __iter__(self) -> Iterator[Shard]:
        return self._make(np.arange(len(self)))

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> list[Shard]: ...
    def __getitem__(self, place: int | slice) -> Shard | list[Shard]:
        places = np.arange(len(self))[place]
        return self.take(places) if isinstance(place, slice) else self.take(places.reshape(1))[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
