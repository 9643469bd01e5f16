#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Renders meshes into scenes that pack_shards.py packs. See docs/data-format.md.

    python data_tools/render_objects.py ~/.objaverse/hf-objaverse-v1/glbs --output data/objects
    python data_tools/pack_shards.py --scenes data/objects --subset square128 --images IMAGES --output data/shards

The same command continues where an earlier one ended.
"""

import argparse
import hashlib
import io
import json
import os
import posixpath
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the script's neighbors, however it was loaded

from make_demo import FOCAL, at_least, sphere_cameras  # noqa: E402
from object_files import SUFFIXES, BadMesh, Mesh, find_meshes  # noqa: E402

from igae.data import ItemFailed, ProcessPool, ProgressCallback, name_problem  # noqa: E402
from igae.errors import Parser, command, end, progress, redact, say  # noqa: E402

FORMAT = 1
TRANSFORMS = "transforms_opencv.json"
DRAWN_BY = (
    *("gltf_file.py", "gltf_keys.py", "obj_materials.py", "object_files.py", "object_gltf.py", "object_meshes.py"),
    *("object_obj.py", "object_parts.py", "object_renderer.py"),
)
"""Sources of what makes pictures of a mesh: with others, finished objects are rendered again."""


def renderer_version() -> str:
    """A hash of the renderer's sources."""
    here = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in DRAWN_BY)).hexdigest()[:16]


class NotedFiles:
    """A file system that notes what was read of it.

    Attributes:
        files: path relative to `folder` -> sha256 of the content, or None where there is no such file.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder
        self.files: dict[str, str | None] = {}

    def isfile(self, path: str) -> bool:
        found: bool = self._fs.isfile(path)
        if not found:
            self.files[posixpath.relpath(path, self._folder)] = None
        return found

    def cat_file(self, path: str) -> bytes:
        content: bytes = self._fs.cat_file(path)
        self.files[posixpath.relpath(path, self._folder)] = hashlib.sha256(content).hexdigest()
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def are(self, files: dict[str, str | None]) -> bool:
        """Whether these files are still as they were noted."""
        for name, digest in files.items():
            path = posixpath.normpath(posixpath.join(self._folder, name))
            if self.isfile(path):
                self.cat_file(path)
            if self.files[name] != digest:
                return False
        return True


@dataclass(frozen=True)
class Job:
    """What all objects have in common. `root`: folder or URL of the scenes' folders."""

    root: str
    views: int
    size: int
    supersample: int
    seed: int

    def settings(self) -> dict[str, int]:
        """What another run into the same folder must have too."""
        return {
            "format": FORMAT,
            "views": self.views,
            "size": self.size,
            "supersample": self.supersample,
            "seed": self.seed,
        }


def start_worker(job: Job) -> Callable[[Mesh, ProgressCallback], int]:
    """What a process does first: the slow imports and OpenGL; returns what it does with a mesh.

    Raises:
        ValueError: a library or OpenGL is missing.
    """
    # Mesa draws with a thread for each core, which as many processes would fight over.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        from object_meshes import load
        from object_renderer import Renderer

        if find_spec("trimesh") is None:  # it is imported where a mesh needs it
            raise ImportError("No module named 'trimesh'")
    except ImportError as error:
        raise ValueError(f"{error}: run pip install -e '.[objects]'") from None
    renderer = Renderer(job.size, job.supersample)
    fs, root = fsspec.core.url_to_fs(job.root)

    def work(mesh: Mesh, _: ProgressCallback) -> int:
        """Returns the number of views that were made: 0 where all were there."""
        folder = f"{root}/{mesh.name}"
        if is_complete(fs, folder, mesh, job):
            return 0
        if fs.exists(f"{folder}/{TRANSFORMS}"):  # of what the mesh was before, or half of one
            fs.rm_file(f"{folder}/{TRANSFORMS}")
        files = noted(mesh)
        parts, to_world = load(mesh, files)
        digest = hashlib.sha256(mesh.name.encode()).digest()
        poses = sphere_cameras(job.views, np.random.default_rng([job.seed, *digest]))
        pictures = renderer.render(parts, poses)
        if not pictures[..., 3].any():
            raise BadMesh("nothing of it can be seen")
        source = {"mesh": mesh.source, "files": files.files, "renderer": renderer_version()}
        write_scene(fs, folder, job, source | {"mesh_to_world": to_world.tolist()}, poses, pictures[..., :3])
        return job.views

    return work


def noted(mesh: Mesh) -> NotedFiles:
    """The file system of a mesh."""
    return NotedFiles(fsspec.core.url_to_fs(mesh.given)[0], posixpath.dirname(mesh.path))


def is_complete(fs: fsspec.AbstractFileSystem, folder: str, mesh: Mesh, job: Job) -> bool:
    """Whether an object is finished, as its mesh and the renderer are now: its transforms file is written last.
    ValueError if it is of another mesh."""
    try:
        written = json.loads(fs.cat_file(f"{folder}/{TRANSFORMS}"))
        views, source = len(written["frames"]), written["mesh"]
        files, renderer = dict(written.get("files") or {}), written.get("renderer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or half of one
        return False
    if source != mesh.source:
        raise ValueError(f"{folder} has views of {source}: remove that folder, or choose another --output")
    return views == job.views and renderer == renderer_version() and bool(files) and noted(mesh).are(files)


def write_scene(
    fs: fsspec.AbstractFileSystem,
    folder: str,
    job: Job,
    source: dict[str, Any],
    poses: np.ndarray,
    pictures: np.ndarray,
) -> None:
    """Writes the pictures [views, size, size, 3], and then the file that says that they are complete, and of what."""
    size = job.size
    camera = {"fl_x": FOCAL * size, "fl_y": FOCAL * size, "cx": size / 2, "cy": size / 2, "w": size, "h": size}
    frames, files = [], {}
    fs.makedirs(f"{folder}/images", exist_ok=True)
    for view, (pose, picture) in enumerate(zip(poses, pictures, strict=True)):
        path = f"images/{view:03d}.png"
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files[f"{folder}/{path}"] = buffer.getvalue()
        frames.append({"file_path": path, "transform_matrix": pose.tolist(), **camera})
    fs.pipe(files)  # an object store takes them at the same time
    content = {"camera_model": "OPENCV", **source, "frames": frames}
    fs.pipe_file(f"{folder}/{TRANSFORMS}", (json.dumps(content) + "\n").encode())


def claim(output: str, job: Job) -> dict[str, Any]:
    """Writes the settings beside the scenes, or compares them with those of an earlier run; returns the earlier map.

    Raises:
        ValueError: the folder has scenes of other settings, or its map is damaged.
    """
    fs, root = fsspec.core.url_to_fs(job.root)
    file, text = f"{root}/render.json", json.dumps(job.settings()) + "\n"
    fs.makedirs(root, exist_ok=True)
    if not fs.exists(file):
        fs.pipe_file(file, text.encode())
    elif (before := fs.cat_file(file).decode(errors="replace")) != text:
        raise ValueError(
            f"{redact(job.root)} has renders with {before.strip()}, not {text.strip()}: "
            "choose another --output, or remove that folder"
        )
    path = f"{fsspec.core.url_to_fs(output)[1].rstrip('/')}/dataset_map.json"
    if not fs.exists(path):
        return {}
    try:
        lists = json.loads(fs.cat_file(path))
    except ValueError:
        lists = None
    if not isinstance(lists, dict):
        raise ValueError(f"{redact(output)}/dataset_map.json is damaged: remove it")
    return lists


def write_map(output: str, job: Job, dataset: str, lists: dict[str, Any]) -> int:
    """Lists all finished scenes, those of earlier runs too, and returns their number."""
    fs, root = fsspec.core.url_to_fs(job.root)
    fs.invalidate_cache()
    names = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))
    names = [name for name in names if fs.exists(f"{root}/{name}/{TRANSFORMS}")]
    path = f"{fsspec.core.url_to_fs(output)[1].rstrip('/')}/dataset_map.json"
    fs.pipe_file(path, (json.dumps({**lists, dataset: names}, indent=0) + "\n").encode())
    return len(names)


def render(arguments: argparse.Namespace) -> int:
    """Renders and says what there is now; returns the exit code."""
    output = arguments.output.rstrip("/")
    root = f"{output}/square{arguments.size}"
    job = Job(root, arguments.views, arguments.size, arguments.supersample, arguments.seed)
    meshes = find_meshes(arguments.meshes)
    lists = claim(output, job)
    begin = time.perf_counter()
    rendered = views = there = 0
    damaged: list[str] = []
    with progress("rendering", len(meshes), "objects") as bar:

        def refuse(mesh: Mesh, reason: object) -> None:
            damaged.append(f"{mesh.source}: {reason}")
            bar.write(damaged[-1], file=sys.stderr)  # at once: the rest may take days

        good = []
        for mesh in meshes:
            if problem := name_problem(mesh.name):
                refuse(mesh, f"{mesh.name!r} can't be the name of a scene: {problem}: rename the file")
                bar.update()
            else:
                good.append(mesh)
        with ProcessPool(arguments.workers, start_worker, (job,)) as pool:
            for index, result in pool.run(good):
                if isinstance(result, ItemFailed):
                    refuse(good[index], result)
                else:
                    rendered, views, there = rendered + (result > 0), views + result, there + (result == 0)
                bar.update()
    listed = write_map(output, job, arguments.dataset, lists)
    seconds = time.perf_counter() - begin
    print(
        f"{redact(output)}: {listed} objects; now rendered: {rendered} with {views} views in {seconds:.0f} s "
        f"({views / seconds:.1f} views/s), finished before: {there}, damaged: {len(damaged)}"
    )
    if damaged:
        say(f"damaged, and left out: {len(damaged)} of {len(meshes)}")
    if not listed:
        raise ValueError("nothing was rendered")
    scenes = f"--scenes {redact(output)} --subset square{job.size}"
    print(f"next: python data_tools/pack_shards.py {scenes} --output SHARDS   (--images FOLDER adds natural images)")
    return 0


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done (damaged meshes are listed), 2 nothing was done, 130 interrupted."""
    parser = Parser(description="Render meshes into scenes for pack_shards.py.")
    kinds = ", ".join(SUFFIXES)
    parser.add_argument("meshes", nargs="+", help=f"files ({kinds}), globs, folders, or fsspec URLs of these")
    parser.add_argument("--output", required=True, help="folder or fsspec URL that the scenes are written to")
    parser.add_argument("--views", type=at_least(1), default=100, help="pictures of each object")
    parser.add_argument("--size", type=at_least(8), default=128, help="width and height of the pictures in pixels")
    parser.add_argument("--supersample", type=at_least(1), default=4, help="samples along each side of a pixel")
    parser.add_argument("--dataset", default="objaverse", help="the name that stands for all scenes in data.categories")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the cameras")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=at_least(1), default=cores, help="processes; default: all cores")
    try:
        return render(parser.parse_args(argv))
    except KeyboardInterrupt:
        say("interrupted; the same command continues from here")
        return 130


if __name__ == "__main__":
    end(main())
