# SPDX-License-Identifier: Apache-2.0
"""Renders of TRELLIS's toolkit: `renders/<sha256>/transforms.json` (and `renders_cond`) with images `000.png`, ...

The toolkit writes `aabb` (the box of side 1 around the origin, which the object fills), `scale`, `offset` and `frames`
with `camera_angle_x` each; matrices have OpenGL's axes. Names tell its folders from others: images and file lie side
by side, and there is `mesh.ply` (`renders`), or the folder's neighbors are named by hashes (`renders_cond`). One folder
of `renders_cond` given alone is read as `transforms`, with the same cameras; `--normalize none` leaves them in place.
"""

import re
from collections.abc import Set

from igae.data.sources.frames import Files, read_json, read_views
from igae.data.sources.scene import BadInput, View

FILE = "transforms.json"
BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
SHA256 = re.compile("[0-9a-f]{64}")
UNIT_BOX = True


def is_scene(names: Set[str], above: Set[str]) -> bool:
    """A folder as the toolkit leaves it."""
    return {FILE, "000.png"} <= names and ("mesh.ply" in names or any(SHA256.fullmatch(name) for name in above))


def read(folder: str) -> list[View]:
    """The frames, if the file is one of the toolkit's."""
    content = read_json(folder, FILE)
    views = read_views(content, FILE, Files(folder))
    missing = [key for key in ("aabb", "scale", "offset") if key not in content]
    if not all("camera_angle_x" in frame for frame in content["frames"]):
        missing.append("camera_angle_x in each frame")
    if missing or content["aabb"] != BOX:
        what = f"has no {missing[0]}" if missing else f"has another aabb than {BOX}"
        raise BadInput(f"{FILE} is not as TRELLIS writes it, it {what}: pack with --format transforms")
    return views
