# SPDX-License-Identifier: Apache-2.0
"""The jobs of packing, and notes of those that are done, by which a run that was stopped goes on.

A note lies beside the shards of a job, says what the job was and what it gave, and is removed when all is packed.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import fsspec
from pydantic import TypeAdapter, ValidationError

from igae.data.manifest import Shard, ShardKind
from igae.data.sources import SceneRef
from igae.errors import redact
from igae.storage import join

NOTE = ".done"


@dataclass(frozen=True)
class Options:
    """What all jobs of a run share. `size`: (height, width) of all images."""

    output: str
    staged: str
    size: tuple[int, int]
    resize: bool
    seed: int
    skip_bad: bool


@dataclass(frozen=True)
class Job:
    """Shards to write: the scenes of one group or the natural images (key, file) of one shard; bytes of input."""

    options: Options
    index: int
    scenes: Sequence[SceneRef] = ()
    root: str = ""
    images: Sequence[tuple[str, str]] = ()
    bytes: int = 0

    @property
    def names(self) -> dict[ShardKind, str]:
        """Names of the shards that it may write."""
        if self.images:
            return {"images": f"images-{self.index:05d}.tar"}
        return {"scenes": f"scenes-{self.index:05d}.tar", "heldout": f"heldout-{self.index:05d}.tar"}

    @property
    def note(self) -> str:
        """Name of its note."""
        return next(iter(self.names.values())) + NOTE + self.options.staged

    @property
    def digest(self) -> str:
        """Of all that its shards depend on, but for the bytes of the input, of which their number stands here."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass
class Written:
    """What a job wrote: shards, scenes (name -> training views, held-out views), their cameras, and what was bad."""

    shards: list[Shard] = field(default_factory=list)
    scenes: dict[str, tuple[int, int]] = field(default_factory=dict)
    distances: list[tuple[float, float, float]] = field(default_factory=list)
    focal: float = 0.0
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Note:
    job: str
    written: Written


_NOTE = TypeAdapter(_Note)


def finished(job: Job) -> Written | None:
    """What an earlier run wrote for this very job, if its shards are there in their sizes; otherwise its note goes, so
    that it is never taken for one about the shards that are written now."""
    fs, root = fsspec.core.url_to_fs(job.options.output)
    fs.invalidate_cache(root)
    path = join(root, job.note)
    try:
        note = _NOTE.validate_json(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValidationError:
        note = _Note("", Written())
    if note.job == job.digest and not _missing(job, note.written):
        return note.written
    fs.rm_file(path)
    return None


def finish(job: Job, written: Written) -> None:
    """Leaves a note.

    Raises:
        OSError: the store has not what was written to it.
    """
    fs, root = fsspec.core.url_to_fs(job.options.output)
    fs.invalidate_cache(root)
    if wrong := _missing(job, written):
        raise OSError(f"{wrong} in {redact(job.options.output)} is not as large as what was written to it")
    fs.pipe_file(join(root, job.note), _NOTE.dump_json(_Note(job.digest, written)))


def _missing(job: Job, written: Written) -> str | None:
    fs, root = fsspec.core.url_to_fs(job.options.output)
    for shard in written.shards:
        size = None
        with contextlib.suppress(FileNotFoundError):
            size = fs.info(join(root, shard.name + job.options.staged))["size"]
        if size != shard.bytes:
            return shard.name
    return None
