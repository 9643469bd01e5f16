# SPDX-License-Identifier: Apache-2.0
"""Packing: raw scenes and natural images into tar shards with a manifest, and checking what was packed.

The layout of the shards is planned from the sizes of the input files before anything is written, one shard is written
by one process, and every order comes from the seed: the result does not depend on the number of processes.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from igae.data import sources
from igae.data.jobs import NOTE, Job, Options, Written, finish, finished
from igae.data.manifest import FORMAT, NAME, SHARD_NAME, CameraSummary, Manifest, Scene, ShardKind
from igae.data.pool import Progress, processes
from igae.data.shards import ShardWriter, verify_shard
from igae.data.sources import BadInput, SceneRef, SourceScene, View
from igae.errors import redact
from igae.storage import file_system, join

STAGED = ".partial"
TAR_OVERHEAD = 2560
"""Bytes of a view in a tar file besides its image: two headers, padding, the camera."""

T = TypeVar("T")


class Refused(ValueError):
    """The input is bad and nothing was packed; `problems` has a sentence for each scene or natural image."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(f"nothing was packed because of {len(problems)} bad input(s), first: {problems[0]}")
        self.problems = list(problems)


@dataclass(frozen=True)
class Scanned:
    """A scene as planned: bytes of its images, and the (height, width) of its first."""

    ref: SceneRef
    bytes: int
    views: int
    size: tuple[int, int]


def pack(
    output: str,
    *,
    scenes: str | None = None,
    subset: str | None = None,
    categories: Mapping[str, tuple[int, int]] | None = None,
    images: str | None = None,
    resize: int | None = None,
    shard_size: int = 500_000_000,
    seed: int = 0,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> tuple[Manifest, list[str]]:
    """Packs scenes and natural images into shards and a manifest in the folder or URL `output`.

    Args:
        output: a local folder or any fsspec URL. Locally all files have staging names until everything is written. The
            shards that a run which was stopped has finished are not written again.
        scenes: folder of the scenes, with or without a dataset_map.json; None: natural images only.
        subset: folder below `scenes/` or below which the scenes are (`square128`).
        categories: category -> [start, stop) in the lists of dataset_map.json; None: all scenes.
        images: folder of natural images; None: scenes only.
        resize: side of the square that images of other sizes are brought to; None: image bytes are copied as they are.
        shard_size: bytes a shard should not exceed; one scene is never split.
        seed: of the order of views and natural images in the shards.
        workers: processes; 1 works in this one.
        skip_bad: leave bad scenes and natural images out instead of refusing.
        overwrite: replace what a manifest in `output` describes.

    Returns:
        The manifest, and a sentence for everything that was left out.

    Raises:
        Refused: something in the input is bad and `skip_bad` is False, or nothing is left.
        ValueError: nothing to pack, unknown category, or there is a manifest already.
    """
    if scenes is None and images is None:
        raise ValueError("nothing to pack: give scenes, images or both")
    fs, root = file_system(output)
    if fs.exists(join(root, NAME)) and not overwrite:
        hidden = redact(output)
        raise ValueError(f"{hidden} has a {NAME} already: choose another folder or overwrite it")
    with processes(workers) as run:
        dataset, refs, problems = sources.find_scenes(scenes, subset, categories) if scenes else ("images", [], [])
        found = run("scanning scenes", _scan, refs)
        problems += [entry for entry in found if isinstance(entry, str)]
        scanned = [entry for entry in found if isinstance(entry, Scanned)]
        natural_images = sources.find_images(images) if images else {}
        if problems and not skip_bad:
            raise Refused(problems)
        size = (resize, resize) if resize else _common_size(scanned, images, natural_images)
        if size is None:
            raise Refused(problems or [f"no readable image in {redact(images or '')}"])
        staged = STAGED if isinstance(fs, LocalFileSystem) else ""
        options = Options(output, staged, size, bool(resize), seed, skip_bad)
        jobs = _plan(options, scanned, images or "", natural_images, shard_size)
        fs.makedirs(root, exist_ok=True)
        if not staged and fs.exists(join(root, NAME)):
            # An object store has no renaming: the manifest is the marker, so it goes before its shards do.
            fs.rm_file(join(root, NAME))
        names = {name for job in jobs for name in job.names.values()}
        try:
            total = sum(entry.views for entry in scanned) + len(natural_images)
            written = run("packing", _write, jobs, total)
            problems += [sentence for part in written for sentence in part.bad.values()]
            manifest = _manifest(options, dataset, scanned, written)
            if problems and not skip_bad or not manifest.shards:
                raise Refused(problems)
        except Refused:
            _remove(fs, root, [*(name + staged for name in names), *(job.note for job in jobs)])
            raise
    _remove(fs, root, [name + staged for name in names - {shard.name for shard in manifest.shards}])
    _finish(fs, root, manifest, staged)
    return manifest, problems


def _common_size(
    scanned: Sequence[Scanned], images: str | None, natural_images: Mapping[str, int]
) -> tuple[int, int] | None:
    """The size that most scenes' first views have, or most of the first 100 natural images; of equals the first."""
    sizes = Counter(entry.size for entry in scanned)
    if not sizes and images:
        some = list(natural_images)[:100]
        for file, data in zip(some, sources.read_files((images, file) for file in some), strict=True):
            try:
                image = sources.open_image(data, file)
                sizes[image.height, image.width] += 1
            except BadInput:
                continue  # it is reported when it is packed
    return sizes.most_common(1)[0][0] if sizes else None


def _scan(ref: SceneRef, progress: Progress) -> Scanned | str:
    """Checks a scene without decoding its images."""
    progress(1)
    try:
        scene = sources.read_scene(ref)
        fs, folder = file_system(ref.folder)
        prefix = folder.rstrip("/") + "/"
        sizes = {path.removeprefix(prefix): info["size"] for path, info in fs.find(folder, detail=True).items()}
        total = 0
        for view in scene.views:
            if view.file not in sizes:
                raise BadInput(f"scene {ref.name!r}: {view.file} is missing")
            total += int(sizes[view.file] or 0)
        first = scene.views[0]
        data = next(sources.read_files([(ref.folder, first.file)]))
        image = sources.open_image(data, f"scene {ref.name!r}: {first.file}")
        size = (image.height, image.width)
        try:
            first.intrinsics(size)
        except BadInput as error:
            raise BadInput(f"scene {ref.name!r}: {error}") from error
        return Scanned(ref, total, len(scene.views), size)
    except BadInput as error:
        return str(error)


def _plan(
    options: Options, scanned: Sequence[Scanned], root: str, natural_images: Mapping[str, int], shard_size: int
) -> list[Job]:
    """Divides scenes, in their order, and natural images, in a seeded order, over shards."""
    pixels = options.size[0] * options.size[1]

    def stored(entry: Scanned) -> int:
        ratio = pixels / (entry.size[0] * entry.size[1]) if options.resize else 1.0
        return int(entry.bytes * ratio) + entry.views * TAR_OVERHEAD

    jobs = [
        Job(options, index, scenes=[entry.ref for entry in group], bytes=sum(entry.bytes for entry in group))
        for index, group in enumerate(_groups(scanned, stored, shard_size))
    ]
    files = list(natural_images)
    _rng(options.seed, "images").shuffle(files)
    keyed = [(f"images/{number:08d}", file) for number, file in enumerate(files)]
    groups = _groups(keyed, lambda entry: natural_images[entry[1]] + TAR_OVERHEAD, shard_size)
    return jobs + [
        Job(options, index, root=root, images=group, bytes=sum(natural_images[file] for _, file in group))
        for index, group in enumerate(groups)
    ]


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


def _rng(seed: int, use: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}/{use}".encode()).digest()[:8], "big"))


def _write(job: Job, progress: Progress) -> Written:
    written = finished(job)
    if written is not None:
        progress(sum(shard.samples for shard in written.shards))
        return written
    written = _write_images(job, progress) if job.images else _write_groups(job, progress)
    if not written.bad or job.options.skip_bad:
        finish(job, written)
    return written


def _write_groups(job: Job, progress: Progress) -> Written:
    bad: dict[str, str] = {}
    while True:
        written = _write_scenes(job, [ref for ref in job.scenes if ref.name not in bad], progress)
        bad.update(written.bad)
        if not written.bad or not job.options.skip_bad:
            written.bad = bad
            return written
        # The views of a shard are interleaved: leaving a scene out means to write the shard again.
        progress = _ignore


def _ignore(_: int) -> None:
    pass


def _write_scenes(job: Job, refs: Sequence[SceneRef], progress: Progress) -> Written:
    """Writes the training and held-out shard of some scenes. With a bad scene among them the shards are not usable."""
    written = Written()
    scenes: list[SourceScene] = []
    for ref in refs:
        try:
            scenes.append(sources.read_scene(ref))
        except BadInput as error:
            written.bad[ref.name] = str(error)
    orders: dict[ShardKind, list[tuple[SourceScene, View]]] = {
        "scenes": [(scene, view) for scene in scenes for view in scene.views[scene.heldout :]],
        "heldout": [(scene, view) for scene in scenes for view in scene.views[: scene.heldout]],
    }
    _rng(job.options.seed, f"scenes/{job.index}").shuffle(orders["scenes"])
    for kind, order in orders.items():
        if not order:
            continue
        with _open(job, kind) as out:
            contents = sources.read_files((scene.ref.folder, view.file) for scene, view in order)
            for (scene, view), data in zip(order, contents, strict=True):
                name = scene.ref.name
                progress(1)
                if name in written.bad:
                    continue
                try:
                    suffix, body, found = sources.check_image(data, view.file, job.options.size, job.options.resize)
                    intrinsics = view.intrinsics(found)
                except BadInput as error:
                    written.bad[name] = f"scene {name!r}: {error}"
                    continue
                camera = {"cam2world": view.cam2world, "intrinsics": intrinsics}
                written.focal += intrinsics[0][0]
                if not written.bad:
                    members = {suffix: body, "json": json.dumps(camera).encode()}
                    out.add(f"{name}/{view.index:03d}", members, name)
        written.shards.append(out.entry())
    for scene in scenes:
        distances = [math.hypot(*(row[3] for row in view.cam2world[:3])) for view in scene.views]
        written.distances.append((min(distances), sum(distances), max(distances)))
        written.scenes[scene.ref.name] = (len(scene.views) - scene.heldout, scene.heldout)
    return written


def _write_images(job: Job, progress: Progress) -> Written:
    written = Written()
    with _open(job, "images") as out:
        contents = sources.read_files((job.root, file) for _, file in job.images)
        for (key, file), data in zip(job.images, contents, strict=True):
            progress(1)
            try:
                suffix, body, _ = sources.check_image(data, file, job.options.size, job.options.resize, crop=True)
            except BadInput as error:
                written.bad[file] = f"natural image {error}"
                continue
            out.add(key, {suffix: body})
    if out.entry().samples:
        written.shards.append(out.entry())
    return written


def _open(job: Job, kind: ShardKind) -> ShardWriter:
    name = job.names[kind]
    return ShardWriter(join(job.options.output, name + job.options.staged), name, kind)


def _manifest(options: Options, dataset: str, scanned: Sequence[Scanned], written: Sequence[Written]) -> Manifest:
    counts = {name: number for part in written for name, number in part.scenes.items()}
    packed = [entry.ref for entry in scanned if entry.ref.name in counts]
    scenes = [Scene(i, ref.name, ref.category, *counts[ref.name]) for i, ref in enumerate(packed)]
    shards = [shard for part in written for shard in part.shards]
    shards.sort(key=lambda shard: (("scenes", "heldout", "images").index(shard.kind), shard.name))
    cameras = None
    if scenes:
        distances = [entry for part in written for entry in part.distances]
        views = sum(scene.views + scene.heldout for scene in scenes)
        cameras = CameraSummary(
            min_distance=min(entry[0] for entry in distances),
            mean_distance=sum(entry[1] for entry in distances) / views,
            max_distance=max(entry[2] for entry in distances),
            mean_focal=sum(part.focal for part in written) / views,
        )
    images = sum(shard.samples for shard in shards if shard.kind == "images")
    return Manifest(FORMAT, options.size, options.seed, dataset, shards, scenes, images, cameras)


def _remove(fs: fsspec.AbstractFileSystem, root: str, names: Iterable[str]) -> None:
    for name in names:
        if fs.exists(join(root, name)):
            fs.rm_file(join(root, name))


def _finish(fs: fsspec.AbstractFileSystem, root: str, manifest: Manifest, staged: str) -> None:
    """Gives the shards their names and writes the manifest, which says that all of them are there, last."""
    manifest_file = join(root, NAME)
    names = {shard.name for shard in manifest.shards}
    if fs.exists(manifest_file):
        fs.rm_file(manifest_file)
        present = [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
        _remove(fs, root, [name for name in present if SHARD_NAME.fullmatch(name) and name not in names])
    if staged:
        for name in sorted(names):
            fs.mv(join(root, name + staged), join(root, name))
    fs.invalidate_cache(root)
    present = [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
    _remove(fs, root, [name for name in present if name.endswith(NOTE + staged)])
    fs.pipe_file(manifest_file + staged, manifest.to_json())
    if staged:
        fs.mv(manifest_file + staged, manifest_file)


def verify(root: str, workers: int = 1) -> list[str]:
    """Reads all packed data in `root` again; returns a sentence for each shard that is not what the manifest says.

    Raises:
        ValueError: there is no readable manifest.
    """
    shards = Manifest.load(root).shards
    # Threads do: reading and hashing leave the interpreter to the others.
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: verify_shard(root, shard), shards)
        return [problem for problem in tqdm(found, "verifying", len(shards), disable=None) if problem]
