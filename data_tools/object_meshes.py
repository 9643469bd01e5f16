# SPDX-License-Identifier: Apache-2.0
"""Reads meshes (glTF 2.0 and OBJ) into parts that can be drawn: triangles in the scene's world, with the colors that
the file means. What would change shape or color and is not understood is refused by name."""

import fsspec
import numpy as np
from demo_objects import BALL, CUBE
from numpy.typing import NDArray
from object_files import BadMesh, Mesh, Neighbours
from object_gltf import read_gltf
from object_obj import read_obj
from object_parts import Material, Part, to_linear, transformed

__all__ = ["Material", "Part", "load", "to_linear"]
Y_UP_TO_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def load(mesh: Mesh, fs: fsspec.AbstractFileSystem | None = None) -> tuple[list[Part], NDArray[np.float64]]:
    """Reads a mesh and moves it to where the cameras look.

    Args:
        fs: what its files are read from; that of `mesh.given` if left out.

    Returns:
        (parts, [4, 4] that takes the file's coordinates to the world): y up becomes z up, the center of the bounding
        box becomes the origin, and the object is as large as it can be in the cube of half the side CUBE and in the
        ball of radius BALL, which all cameras see whole.

    Raises:
        BadMesh: the file or one that it refers to is missing or damaged, nothing in it is a surface, something in it
            is not understood, ...
    """
    fs = fs or fsspec.core.url_to_fs(mesh.given)[0]
    try:
        data = fs.cat_file(mesh.path)
    except OSError as error:  # a link that leads nowhere, a file that others may not read
        reason = error.strerror or error
        raise BadMesh(f"it can't be opened ({reason}): check that it exists and may be read") from error
    try:
        read = read_obj if mesh.path.lower().endswith(".obj") else read_gltf
        parts = read(Neighbours(fs, mesh.path), data)
    except (BadMesh, MemoryError):
        raise
    except Exception as error:  # whatever damaged files make numpy and json raise
        text = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}{': ' + text if text else ''}"
        raise BadMesh(f"it can't be read ({what}): download or export it again") from error
    if not parts:
        raise BadMesh("there are no triangles in it: export surfaces, as lines and points are not drawn")
    for part in parts:
        if part.triangles.max() >= len(part.positions):
            raise BadMesh(
                f"a triangle has vertex {part.triangles.max()}, but there are {len(part.positions)}: export it again"
            )
    used = np.concatenate([part.positions[np.unique(part.triangles)] for part in parts])
    if not np.isfinite(used).all():
        raise BadMesh("it has vertices with NaN or infinite coordinates: remove them")
    center = (used.max(axis=0) + used.min(axis=0)) / 2
    half = np.abs(used - center).max()
    if not half > 0:
        raise BadMesh("all its vertices are one point: export it again")
    scale = min(CUBE / half, BALL / np.linalg.norm(used - center, axis=1).max())
    to_world = Y_UP_TO_Z_UP @ np.diag([scale, scale, scale, 1.0])
    to_world[:3, 3] = -to_world[:3, :3] @ center
    return [transformed(part, to_world) for part in parts], to_world
