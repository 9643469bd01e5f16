# SPDX-License-Identifier: Apache-2.0
"""Input formats: raw data as users have it.

A new format is a module of this folder with `find` and `read` (see `scene.SourceFormat`) and a line in `FORMATS`.
"""

from collections.abc import Mapping

from igae.data.manifest import name_problem, unknown_category
from igae.data.sources import igae_data, transforms
from igae.data.sources.scene import BadInput, RawScene, SceneRef, SourceFormat
from igae.errors import redact
from igae.storage import join

FORMATS: dict[str, SourceFormat] = {"igae-data": igae_data, "transforms": transforms}
"""The first that finds scenes reads them."""


def find_scenes(
    root: str, subset: str | None = None, categories: Mapping[str, tuple[int, int]] | None = None
) -> tuple[str, list[SceneRef], list[str]]:
    """Lists the scenes of a data set.

    Args:
        root: folder or URL of the data set.
        subset: folder below `root` that has the scenes' folders.
        categories: category -> [start, stop) in its list; None: all scenes.

    Returns:
        (name of the data set, scenes in the order of the lists, sentences about names that cannot be scenes).

    Raises:
        ValueError: `root` has no scenes, or is damaged, or a category is unknown.
    """
    folder = join(root, subset) if subset else root
    found = ((name, format.find(root, folder)) for name, format in FORMATS.items())
    name_of_format, scenes = next(((name, scenes) for name, scenes in found if scenes), ("", None))
    if scenes is None:
        hidden = redact(folder)
        raise ValueError(f"no scenes in {hidden}: no folder in it has a transforms_opencv.json or transforms.json")
    lists = scenes.categories
    # The most specific category of a scene is the shortest list that has it.
    category = {name: key for key in sorted(lists, key=lambda key: -len(lists[key])) for name in lists[key]}
    refs: dict[str, SceneRef] = {}
    bad: dict[str, None] = {}
    ranges = {key: (0, len(lists[key])) for key in lists} if categories is None else categories
    for key, (start, stop) in ranges.items():
        if key not in lists:
            raise unknown_category(key, lists)
        seen: set[str] = set()
        for name in lists[key][start:stop]:
            if problem := name_problem(name):
                bad[f"scene {name!r}: {problem}"] = None
            elif name in seen:
                bad[f"scene {name!r}: it is listed twice under {key!r} in {igae_data.MAP}"] = None
            else:
                refs.setdefault(name, SceneRef(name, category[name], join(folder, name), name_of_format))
            seen.add(name)
    return scenes.dataset, list(refs.values()), list(bad)


def read_scene(ref: SceneRef) -> RawScene:
    """Reads a scene's cameras and checks all that can be checked without its images.

    Raises:
        BadInput: what is wrong with it, with its name.
    """
    try:
        return RawScene(ref, FORMATS[ref.format].read(ref.folder))
    except BadInput as error:
        raise BadInput(f"scene {ref.name!r}: {error}") from error
