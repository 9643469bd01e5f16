# SPDX-License-Identifier: Apache-2.0
"""Packing: raw scenes and natural images into tar shards with a manifest, and verifying what was packed.

The layout of the shards is planned from the sizes of the input files before anything is written, one shard is written
by one process, and every order comes from the seed: the result does not depend on the number of processes.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from igae.data.columns import SHARD_NAME, Scene
from igae.data.config import PackOptions
from igae.data.jobs import NOTE, Job, JobResult, Output, do_job
from igae.data.manifest import COLUMNS, NAME, CameraSummary, Manifest
from igae.data.processes import ItemFailed, ItemFunction, ProcessPool, ProgressCallback
from igae.data.shards import ShardReader, seeded
from igae.data.sources import find_scenes, formats, read_scene
from igae.data.sources.heldout import split
from igae.data.sources.images import find_images, open_image, read_files, size_of
from igae.data.sources.pixels import check_extras, is_inverted
from igae.data.sources.placement import check_cameras, normalization_of
from igae.data.sources.scene import BadInput, SceneRef
from igae.data.tables import Scenes, Shards
from igae.errors import counted, progress, redact
from igae.storage import (
    FileInfo,
    check_folder,
    file_system,
    join,
    look_up,
    make_folder,
    named_errors,
    remove_leftovers,
    sync_folder,
)

log = logging.getLogger("igae")

STAGED = ".partial"
TAR_OVERHEAD = 2560
"""Bytes of a view in a tar file besides its image: two headers, padding, the camera."""
FEW_VIEWS = 10
"""With fewer a scene is packed, but not without a word."""
FACTOR = 8
"""Pixels along a side that are one latent of most autoencoders: with sides that it does not divide, likewise."""
MOST = 0.9
"""Share of the scenes with masks above which inverted ones are told of."""

T = TypeVar("T")


class Refused(ValueError):
    """The input is bad and nothing was packed; `problems` has a sentence for each bad scene or natural image."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(f"nothing was packed because of {len(problems)} bad input(s), first: {problems[0]}")
        self.problems = list(problems)


@dataclass(frozen=True)
class _Scanned:
    """A scene as planned: bytes of its images, the (height, width) of its first, whether that one's mask is inverted
    (None: it has none), and a hash of all that is read."""

    ref: SceneRef
    bytes: int
    views: int
    size: tuple[int, int]
    inverted: bool | None
    version: str


def pack(output: str, options: PackOptions) -> tuple[Manifest, list[str]]:
    """Packs scenes and natural images into shards and a manifest in the folder or fsspec URL `output`.

    Local files have staging names until everything is written. Shards that were finished before packing was stopped are
    not written again.

    Returns:
        The manifest, and a sentence for everything that was left out.

    Raises:
        Refused: something in the input is bad and `skip_bad` is False, or nothing is left.
        ValueError: nothing to pack, unknown category, or there is a manifest already.
        OSError: files cannot be read or written, or a process died.
    """
    _check(output, options)
    fs, root = file_system(output)
    dataset, refs, problems = "images", list[SceneRef](), list[str]()
    if options.scenes:
        dataset, refs, problems = find_scenes(
            options.scenes, options.subset, options.categories, options.format, options.convention
        )
    natural_images, unreadable = find_images(options.images) if options.images else ({}, [])
    problems += unreadable
    processes = options.workers if options.workers > 1 else 0
    with ProcessPool(processes, _start, (processes,)) as pool:
        found = _run(pool, "scanning", "scenes", _scan, [(ref, options) for ref in refs])
        problems += [entry for entry in found if isinstance(entry, str)]
        scanned = [entry for entry in found if isinstance(entry, _Scanned)]
        if problems and not options.skip_bad:
            raise Refused(problems)
        size = (options.resize,) * 2 if options.resize else _common_size(scanned, options.images, natural_images)
        if size is None:
            raise Refused(problems or [f"no readable image in {redact(options.images or '')}"])
        _tell(scanned, options.resize, size)
        staged = STAGED if isinstance(fs, LocalFileSystem) else ""
        jobs = _plan(options, Output(output, staged, size), scanned, natural_images)
        make_folder(output)
        if staged:
            remove_leftovers(Path(root))
        if not staged and fs.exists(join(root, NAME)):
            # An object store has no renaming: the manifest is the marker, so it is removed before its shards are.
            fs.rm_file(join(root, NAME))
        total = sum(entry.views for entry in scanned) + len(natural_images)
        results = _run(pool, "packing", "images", do_job, jobs, total)
    problems += [sentence for result in results for sentence in result.bad.values()]
    manifest = _manifest(dataset, size, options.seed, [entry.ref for entry in scanned], results)
    names = {name for job in jobs for name in job.names.values()}
    if problems and not options.skip_bad or not manifest.shards:
        _remove(fs, root, [*(name + staged for name in names), *(job.note for job in jobs)])
        raise Refused(problems)
    _remove(fs, root, [name + staged for name in names - {shard.name for shard in manifest.shards}])
    _finish(output, manifest, staged)
    return manifest, problems


def _check(output: str, options: PackOptions) -> None:
    """Refuse (ValueError) what can be known before anything is read."""
    if options.scenes is None and options.images is None:
        raise ValueError("nothing to pack: give scenes, images or both")
    if options.fit != "refuse" and options.resize is None:
        raise ValueError(f"fit {options.fit} needs resize (--resize N), the side of the squares")
    fs, root = file_system(output)
    if isinstance(fs, LocalFileSystem):
        check_folder(root)
    with named_errors(output):
        there = fs.exists(join(root, NAME))
    if there and not options.overwrite:
        raise ValueError(f"{redact(output)} has a {NAME} already: choose another folder or --overwrite it")


def _tell(scanned: Sequence[_Scanned], resize: int | None, size: tuple[int, int]) -> None:
    """Say what was found, where a wrong guess would go unnoticed."""
    for format, count in Counter(entry.ref.format for entry in scanned).items():
        moved = sum(entry.ref.format == format and entry.ref.normalization is not None for entry in scanned)
        log.info("%s in the format %s; the cameras of %d moved into the box", counted(count, "scene"), format, moved)
    if few := sum(entry.views < FEW_VIEWS for entry in scanned):
        what = f"{counted(few, 'scene')} with fewer than {FEW_VIEWS} views"
        log.warning("%s: 40 or more from all sides make a scene", what)
    if resize and (small := sum(min(entry.size) < resize for entry in scanned)):
        log.warning("views of %s are smaller than --resize %d and are enlarged", counted(small, "scene"), resize)
    if any(side % FACTOR for side in size):
        way = f"--resize {max(FACTOR, min(size) // FACTOR * FACTOR)}{' --fit crop' * (size[0] != size[1])}"
        what = f"images of {size[1]} x {size[0]} pixels don't suit most autoencoders, which halve them three times"
        log.warning("%s: pack them with %s, or another multiple of %d", what, way, FACTOR)
    masked = [entry.inverted for entry in scanned if entry.inverted is not None]
    if sum(masked) > MOST * len(masked):
        log.warning("the masks seem to be inverted: white or opaque is the object, black or transparent the rest")


def _start(processes: int) -> ItemFunction:
    if processes:
        torch.set_num_threads(1)
    return lambda item, progress: item[0](item[1], progress)


def _run(
    pool: ProcessPool,
    what: str,
    unit: str,
    function: Callable[[T, ProgressCallback], Any],
    items: Sequence[T],
    total: int | None = None,
) -> list[Any]:
    """Calls a function for all items, with a progress bar; the first failure is raised. Results are in their order."""
    results: list[Any] = [None] * len(items)
    with progress(what, total or len(items), unit) as bar:
        for index, result in pool.run([(function, item) for item in items], bar.update):
            if isinstance(result, ItemFailed):
                raise result.error or result
            results[index] = result
    return results


def _common_size(
    scanned: Sequence[_Scanned], images: str | None, natural_images: Mapping[str, FileInfo]
) -> tuple[int, int] | None:
    """The size that most scenes' first views have, or most of the first 100 natural images; of equals the first."""
    sizes = Counter(entry.size for entry in scanned)
    if not sizes and images:
        some = list(natural_images)[:100]
        for file, data in zip(some, read_files((images, file) for file in some), strict=True):
            try:
                sizes[size_of(open_image(data, file))] += 1
            except BadInput:
                continue  # it is reported when it is packed
    return sizes.most_common(1)[0][0] if sizes else None


def _scan(item: tuple[SceneRef, PackOptions], progress: ProgressCallback) -> _Scanned | str:
    """Checks a scene without decoding its images, and decides how its cameras are moved."""
    (ref, options), how = item, item[1].normalize
    progress(1)
    try:
        views = read_scene(ref)
        split(ref, views, options.heldout, options.seed)
    except BadInput as error:
        return str(error)
    try:
        names = [name for view in views for name in view.files]
        files = look_up(ref.folder, names)
        for view in views:
            check_extras(view)
        for name in names:
            if name not in files:
                raise BadInput(f"{name} is missing")
        first = views[0]
        data, mask, *_ = *read_files((ref.folder, file) for file in first.files), None
        image = open_image(data, first.file)
        size = (image.height, image.width)
        focus = check_cameras(views, size, one_place=how != "none")
        if how == "cameras" or how == "auto" and not formats()[ref.format].UNIT_BOX:
            ref = replace(ref, normalization=normalization_of(views, size, focus))
    except BadInput as error:
        return f"scene {ref.name!r}: {error}"
    version = _digest([repr(views), *(info.version for info in files.values())])
    inverted = is_inverted(first, data, mask)
    return _Scanned(ref, sum(info.size for info in files.values()), len(views), size, inverted, version)


def _plan(
    options: PackOptions, output: Output, scanned: Sequence[_Scanned], natural_images: Mapping[str, FileInfo]
) -> list[Job]:
    """Divides scenes, in their order, and natural images, in a seeded order, over shards."""

    def stored(entry: _Scanned) -> int:
        ratio = math.prod(output.size) / math.prod(entry.size) if options.resize else 1.0
        return int(entry.bytes * ratio) + entry.views * TAR_OVERHEAD

    kept = {name: getattr(options, name) for name in ("images", "resize", "fit", "seed", "skip_bad", "heldout")}
    shared = PackOptions(**kept)
    jobs = [
        Job(output, shared, index, [entry.ref for entry in group], input=_digest(entry.version for entry in group))
        for index, group in enumerate(_groups(scanned, stored, options.shard_size))
    ]
    files = list(natural_images)
    seeded(options.seed, "images").shuffle(files)
    keyed = [(f"images/{number:08d}", file) for number, file in enumerate(files)]
    groups = _groups(keyed, lambda entry: natural_images[entry[1]].size + TAR_OVERHEAD, options.shard_size)
    return jobs + [
        Job(output, shared, index, images=group, input=_digest(natural_images[file].version for _, file in group))
        for index, group in enumerate(groups)
    ]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _groups(items: Sequence[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def _manifest(
    dataset: str, size: tuple[int, int], seed: int, refs: Sequence[SceneRef], results: Sequence[JobResult]
) -> Manifest:
    counts = {name: number for result in results for name, number in result.scenes.items()}
    packed = [ref for ref in refs if ref.name in counts]
    scenes = [Scene(i, ref.name, ref.category, *counts[ref.name], ref.normalization) for i, ref in enumerate(packed)]
    shards = [shard for result in results for shard in result.shards]
    shards.sort(key=lambda shard: (("scenes", "heldout", "images").index(shard.kind), shard.name))
    cameras = None
    if scenes:
        nearest, sums, farthest = zip(*(entry for result in results for entry in result.distances), strict=True)
        views = sum(scene.views + scene.heldout for scene in scenes)
        focal = sum(result.focal for result in results) / views
        cameras = CameraSummary(min(nearest), sum(sums) / views, max(farthest), focal)
    images = sum(shard.samples for shard in shards if shard.kind == "images")
    listed = Scenes.of(scenes)
    return Manifest(size, seed, dataset, Shards.of(shards, listed), listed, images, cameras)


def _remove(fs: fsspec.AbstractFileSystem, root: str, names: Iterable[str]) -> None:
    for name in names:
        if fs.exists(join(root, name)):
            fs.rm_file(join(root, name))


def _finish(output: str, manifest: Manifest, staged: str) -> None:
    """Gives the shards their names and writes the manifest, which says that all of them are there, last."""
    fs, root = file_system(output)
    manifest_file = join(root, NAME)
    names = {shard.name for shard in manifest.shards}

    def present() -> list[str]:
        return [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]

    if fs.exists(manifest_file):
        fs.rm_file(manifest_file)
        _remove(fs, root, [name for name in present() if SHARD_NAME.fullmatch(name) and name not in names])
    if staged:
        for name in sorted(names):
            fs.mv(join(root, name + staged), join(root, name))
        sync_folder(output)  # before the notes go, and the manifest says so
    fs.invalidate_cache(root)
    _remove(fs, root, [name for name in present() if name.endswith(NOTE + staged)])
    if staged:  # of packing that was stopped and had more shards
        _remove(fs, root, [name for name in present() if re.fullmatch(SHARD_NAME.pattern + re.escape(staged), name)])
    _remove(fs, root, [COLUMNS])  # of what was packed here before
    manifest.save(output)


def verify_packed(root: str, workers: int = 1) -> list[str]:
    """Reads all packed data in `root` again; returns a sentence for each shard that is not what the manifest says.

    Raises:
        ValueError: there is no readable manifest.
    """
    shards = Manifest.load(root).shards
    # Threads are enough: reading and hashing release the GIL.
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(ShardReader(root).check, shards)
        return [problem for problem in progress("verifying", len(shards), "shards", found) if problem]
