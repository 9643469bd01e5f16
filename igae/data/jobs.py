# SPDX-License-Identifier: Apache-2.0
"""The jobs of packing: one writes the shards of some scenes, or one shard of natural images.

A job that is done leaves a note beside its shards, so that packing that was stopped continues with the others. It says
what the job was and what it gave, and is removed when all is packed.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from igae.data.cameras import LARGEST
from igae.data.columns import Shard, ShardKind
from igae.data.config import PackOptions
from igae.data.processes import ProgressCallback
from igae.data.shards import ShardWriter, seeded
from igae.data.sources import read_scene
from igae.data.sources.heldout import split
from igae.data.sources.images import check_image, read_files
from igae.data.sources.pixels import pack_view
from igae.data.sources.scene import BadInput, SceneRef, View
from igae.errors import redact
from igae.storage import file_system, join, write_file

NOTE = ".done"


@dataclass(frozen=True)
class Output:
    """Where shards are written: folder or URL, end of the names until all is packed, (height, width) of all images."""

    url: str
    staged: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Job:
    """Shards to write: those of some scenes, or one of natural images (key, file).

    `options` has of the run's only what the shards depend on; `input` is a hash of the files that are read: another one
    when any of them was changed.
    """

    output: Output
    options: PackOptions
    index: int
    scenes: Sequence[SceneRef] = ()
    images: Sequence[tuple[str, str]] = ()
    input: str = ""

    @property
    def names(self) -> dict[ShardKind, str]:
        """Names of the shards that it may write."""
        if self.images:
            return {"images": f"images-{self.index:05d}.tar"}
        return {"scenes": f"scenes-{self.index:05d}.tar", "heldout": f"heldout-{self.index:05d}.tar"}

    @property
    def note(self) -> str:
        """Name of its note."""
        return next(iter(self.names.values())) + NOTE + self.output.staged

    @property
    def digest(self) -> str:
        """Hash of everything that the shards depend on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def open(self, kind: ShardKind) -> ShardWriter:
        """Begins a shard."""
        return ShardWriter(join(self.output.url, self.names[kind] + self.output.staged), self.names[kind], kind)


@dataclass
class JobResult:
    """What a job wrote, and the job's digest in its note."""

    job: str = ""
    shards: list[Shard] = field(default_factory=list)
    scenes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name -> numbers of training and of held-out views."""
    distances: list[tuple[float, float, float]] = field(default_factory=list)
    """Smallest, sum and largest of the cameras' distances from the origin, for each scene."""
    focal: float = 0.0
    """Sum of the views' normalized focal lengths."""
    bad: dict[str, str] = field(default_factory=dict)
    """Scene or natural image -> what is wrong with it."""


def do_job(job: Job, progress: ProgressCallback) -> JobResult:
    """Writes a job's shards, or finds that they have been written before. `progress` counts views and images.

    Raises:
        OSError: the store has not what was written to it.
    """
    result = _read_note(job)
    if result is not None:
        progress(sum(shard.samples for shard in result.shards))
        return result
    result = _write_images(job, progress) if job.images else _write_scenes(job, progress)
    if not result.bad or job.options.skip_bad:
        _write_note(job, result)
    return result


def _write_scenes(job: Job, progress: ProgressCallback) -> JobResult:
    """Writes the shards of the scenes that are not bad; without `skip_bad` shards that are not usable if one is bad."""
    result = _try_scenes(job, job.scenes, progress)
    bad = dict(result.bad)
    while result.bad and job.options.skip_bad:
        # The views of a shard are interleaved: leaving a scene out means to write the shard again.
        result = _try_scenes(job, [ref for ref in job.scenes if ref.name not in bad], lambda _: None)
        bad |= result.bad
    result.bad = bad
    return result


def _try_scenes(job: Job, refs: Sequence[SceneRef], progress: ProgressCallback) -> JobResult:
    """Writes the shards of all these scenes; with a bad one among them they are not usable."""
    result = JobResult()
    orders: dict[ShardKind, list[tuple[SceneRef, View]]] = {"scenes": [], "heldout": []}
    for ref in refs:
        try:
            views = read_scene(ref)
            training, heldout = split(ref, views, job.options.heldout, job.options.seed)
            if (farthest := max(_distance(view) for view in views)) > LARGEST:
                raise BadInput(f"scene {ref.name!r}: a camera is {farthest:g} from the middle: check the poses")
        except BadInput as error:
            result.bad[ref.name] = str(error)
            continue
        orders["scenes"] += [(ref, view) for view in training]
        orders["heldout"] += [(ref, view) for view in heldout]
        distances = [_distance(view) for view in views]
        result.distances.append((min(distances), sum(distances), max(distances)))
        result.scenes[ref.name] = (len(training), len(heldout))
    seeded(job.options.seed, f"scenes/{job.index}").shuffle(orders["scenes"])
    for kind, order in orders.items():
        if order:
            with job.open(kind) as out:
                _write_views(job, order, out, result, progress)
            result.shards.append(out.entry())
    return result


def _distance(view: View) -> float:
    return math.hypot(*(row[3] for row in view.cam2world[:3]))


def _write_views(
    job: Job, order: Sequence[tuple[SceneRef, View]], out: ShardWriter, result: JobResult, progress: ProgressCallback
) -> None:
    """Adds views to a shard, and to the result their focal lengths and what is wrong; one bad view ends the writing."""
    contents = read_files((ref.folder, file) for ref, view in order for file in view.files)
    for ref, view in order:
        name = ref.name
        data, mask = next(contents), next(contents) if view.mask else None
        progress(1)
        if name in result.bad:
            continue
        try:
            resize = bool(job.options.resize)
            suffix, body, intrinsics = pack_view(view, data, mask, job.output.size, resize, job.options.fit)
        except BadInput as error:
            result.bad[name] = f"scene {name!r}: {error}"
            continue
        result.focal += intrinsics[0][0]
        if not result.bad:
            camera = json.dumps({"cam2world": view.cam2world, "intrinsics": intrinsics})
            out.add(f"{name}/{view.index:03d}", {suffix: body, "json": camera.encode()}, name)


def _write_images(job: Job, progress: ProgressCallback) -> JobResult:
    result = JobResult()
    with job.open("images") as out:
        contents = read_files((job.options.images or "", file) for _, file in job.images)
        for (key, file), data in zip(job.images, contents, strict=True):
            progress(1)
            try:
                suffix, body = check_image(data, file, job.output.size, bool(job.options.resize))
            except BadInput as error:
                result.bad[file] = f"natural image {error}"
                continue
            out.add(key, {suffix: body})
    if out.entry().samples:
        result.shards.append(out.entry())
    return result


_NOTE = TypeAdapter(JobResult)


def _read_note(job: Job) -> JobResult | None:
    """What an earlier run wrote for this very job, if its shards are there in their sizes. Otherwise the note is
    removed, so that it is never taken for one about the shards that are written now."""
    fs, root = file_system(job.output.url)
    fs.invalidate_cache(root)
    path = join(root, job.note)
    try:
        result = _NOTE.validate_python(json.loads(fs.cat_file(path)))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        result = JobResult()
    if result.job == job.digest and not _incomplete(job, result):
        return result
    fs.rm_file(path)
    return None


def _write_note(job: Job, result: JobResult) -> None:
    fs, root = file_system(job.output.url)
    fs.invalidate_cache(root)
    if name := _incomplete(job, result):
        raise OSError(f"{name} in {redact(job.output.url)} is not as large as what was written to it")
    # pydantic's JSON has no place for file names that are not UTF-8.
    note = json.dumps(_NOTE.dump_python(replace(result, job=job.digest)))
    write_file(join(job.output.url, job.note), note.encode())


def _incomplete(job: Job, result: JobResult) -> str | None:
    fs, root = file_system(job.output.url)
    for shard in result.shards:
        size = None
        with contextlib.suppress(FileNotFoundError):
            size = fs.info(join(root, shard.name + job.output.staged))["size"]
        if size != shard.bytes:
            return shard.name
    return None
