# SPDX-License-Identifier: Apache-2.0
"""Input formats: raw data as users have it.

A format has `UNIT_BOX`, `is_scene` and `read` (see `scene.SourceFormat`): a module of this folder with a line in
`FORMATS`, or what an installed package has as an entry point of `igae.formats`.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points

from igae.config import plug_in
from igae.data.columns import name_problem
from igae.data.config import Convention
from igae.data.manifest import unknown_category
from igae.data.sources import blender, co3d, colmap, eg3d, gobjaverse, igae_data, srn, transforms, trellis, zero123
from igae.data.sources.placement import move
from igae.data.sources.scene import BadInput, SceneRef, SourceFormat, View
from igae.errors import redact
from igae.storage import base_name, file_system, in_archive, join

FORMATS: dict[str, SourceFormat] = {
    "igae-data": igae_data,
    "trellis": trellis,
    "blender": blender,
    "transforms": transforms,
    "srn": srn,
    "gobjaverse": gobjaverse,
    "zero123": zero123,
    "colmap": colmap,
    "co3d": co3d,
    "eg3d": eg3d,
}
DEPTH = 4
"""Folders below the given one that are looked at."""


@functools.cache
def formats() -> dict[str, SourceFormat]:
    """All formats, those of installed packages last; the first to which a folder is a scene reads it. ValueError: one
    can't be imported."""
    names = sorted(entry_points(group="igae.formats").names - FORMATS.keys())
    return FORMATS | {name: plug_in("formats", name) for name in names}


def find_scenes(
    root: str,
    subset: str | None = None,
    categories: Mapping[str, tuple[int, int]] | None = None,
    format: str | None = None,
    convention: Convention | None = None,
) -> tuple[str, list[SceneRef], list[str]]:
    """Lists the scenes of a data set.

    Args:
        root: folder, zip file or URL of the data set.
        subset: folder below `root` that has the scenes' folders.
        categories: category -> [start, stop) in its list; None: all scenes.
        format: key of `formats()`; None: by content.
        convention: of the scenes' matrices; None: as the format has it.

    Returns:
        (name of the data set, scenes in the order of the lists, sentences about names that cannot be scenes).

    Raises:
        ValueError: `root` has no scenes, or is damaged, or a category is unknown.
    """
    root = in_archive(root)
    folder = join(root, subset) if subset else root
    lists, places = igae_data.read_lists(root), dict[str, tuple[str, str]]()
    if lists is None:
        chosen = formats() if format is None else {format: formats()[format]}
        dataset, known, places = _search(root, folder, chosen)
    else:
        dataset, known = lists.dataset, lists.categories
        _check_subset(root, subset, known)
    # The most specific category of a scene is the shortest list that has it.
    category = {name: key for key in sorted(known, key=lambda key: -len(known[key])) for name in known[key]}
    refs: dict[str, SceneRef] = {}
    bad: dict[str, None] = {}
    ranges = {key: (0, len(known[key])) for key in known} if categories is None else categories
    for key, (start, stop) in ranges.items():
        if key not in known:
            raise unknown_category(key, known)
        seen: set[str] = set()
        for name in known[key][start:stop]:
            path, reader = places.get(name, (name, format or "igae-data"))
            if problem := name_problem(name):
                bad[f"scene {name!r}: {problem}"] = None
            elif name in seen:
                bad[f"scene {name!r}: it is listed twice under {key!r} in {igae_data.MAP}"] = None
            else:
                where = join(folder, path) if path else folder
                refs.setdefault(name, SceneRef(name, category[name], where, reader, convention))
            seen.add(name)
    return dataset, list(refs.values()), list(bad)


def _check_subset(root: str, subset: str | None, known: Mapping[str, Sequence[str]]) -> None:
    """Say which folders have the scenes of the lists, where the one that is meant is none or has none of the first."""
    fs, path = file_system(root)
    some = [name for names in known.values() for name in names[:2] if not name_problem(name)]

    def has(folder: str) -> bool:
        return any(fs.isdir(join(folder, name)) for name in some)

    if not (fs.isdir(join(path, subset)) if subset else has(path)):
        folders = [entry["name"] for entry in fs.ls(path, detail=True)[:100] if entry["type"] == "directory"]
        if found := sorted(base_name(folder) for folder in folders if has(folder)):
            where = redact(join(root, subset) if subset else root)
            raise ValueError(f"{where} has none of the scenes, which are in --subset {' or '.join(found)}")


def _search(
    root: str, folder: str, formats: Mapping[str, SourceFormat]
) -> tuple[str, Mapping[str, Sequence[str]], dict[str, tuple[str, str]]]:
    """Name of the data set, names of the scenes of each category, and path below `folder` and format of each name."""
    found = _walk(folder, formats)
    if not found:
        raise ValueError(
            f"no scenes in {redact(folder)}: no folder in it has the files of {', '.join(formats)}; photos need "
            "cameras first, of COLMAP or nerfstudio (docs/own-data.md)"
        )
    dataset = base_name(root)
    names = _names_of(found, dataset)
    known = {dataset: list(names)}
    for name, path in names.items():
        above, _, below = path.partition("/")
        if below:
            known.setdefault(above, []).append(name)
    return dataset, known, {name: (path, found[path]) for name, path in names.items()}


def _walk(folder: str, formats: Mapping[str, SourceFormat]) -> dict[str, str]:
    """The scenes at or below a folder: path relative to it -> format. Nothing below a scene is looked at."""
    fs, root = file_system(folder)
    if not fs.isdir(root):
        raise ValueError(f"there is no folder {redact(folder)}")
    found: dict[str, str] = {}
    todo: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while todo:
        path, above = todo.pop()
        entries = {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"]
            for entry in fs.ls(file_system(join(folder, path))[1] if path else root, detail=True)
        }
        names = frozenset(entries)
        format = next((key for key, format in formats.items() if format.is_scene(names, above)), None)
        if format is not None:
            found[path] = format
        elif path.count("/") < DEPTH - 1:
            below = {f"{path}/{name}" if path else name: type for name, type in entries.items() if type != "file"}
            # A link is neither; one that leads back ends at DEPTH. macOS puts attributes of what it packs into a
            # folder of a zip file that looks like the others.
            todo += [
                (each, names)
                for each, type in below.items()
                if not each.startswith("__MACOSX") and (type == "directory" or fs.isdir(join(root, each)))
            ]
    return dict(sorted(found.items()))


def _names_of(paths: Iterable[str], dataset: str) -> dict[str, str]:
    """Names of scenes -> paths: those of their folders, or, where two would have one name, with the folders above."""
    last = {path: path.rsplit("/", 1)[-1] or dataset for path in paths}
    counts = Counter(last.values())
    return {name if counts[name] == 1 else path.replace("/", "_"): path for path, name in last.items()}


def read_scene(ref: SceneRef) -> Sequence[View]:
    """Reads a scene's views and checks all that can be checked without its images.

    Raises:
        BadInput: what is wrong with it, with its name.
    """
    try:
        return move(formats()[ref.format].read(ref.folder), ref.convention, ref.normalization)
    except BadInput as error:
        raise BadInput(f"scene {ref.name!r}: {error}") from error
