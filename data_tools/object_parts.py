# SPDX-License-Identifier: Apache-2.0
"""What the readers of mesh files make and the renderer draws: parts, which are triangles of one material."""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from object_files import BadMesh
from PIL import Image, UnidentifiedImageError

Floats = NDArray[np.float32]
REPEAT, MIRROR, CLAMP = 10497, 33648, 33071
"""What a texture shows beyond its edges; the numbers of OpenGL and glTF."""


@dataclass(frozen=True)
class Sampler:
    """How a texture is read: beyond its edges (along u, along v), and whether its texels are seen as squares."""

    wrap: tuple[int, int] = (REPEAT, REPEAT)
    nearest: bool = False


@dataclass(frozen=True)
class Material:
    """Colors are linear, images are encoded as sRGB.

    Attributes:
        base: RGBA factor of the base color.
        base_image, emission_image: textures, or None for white ones.
        base_sampler, emission_sampler: how they are read.
        emission: RGB light that the surface sends by itself.
        cutoff: smallest alpha that is drawn; 0 draws all of an opaque surface, None blends.
        unlit: shown in its base color, without light.
    """

    base: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    base_image: Image.Image | None = None
    emission: tuple[float, ...] = (0.0, 0.0, 0.0)
    emission_image: Image.Image | None = None
    cutoff: float | None = 0.0
    unlit: bool = False
    base_sampler: Sampler = Sampler()
    emission_sampler: Sampler = Sampler()


@dataclass(frozen=True)
class Part:
    """Triangles of one material.

    Attributes:
        positions: [vertices, 3] in the world.
        triangles: [triangles, 3] vertices.
        normals: [vertices, 3] unit length; None: the triangles are flat.
        uv: [vertices, 2] of the base color's texture, (0, 0) is its lower left corner.
        colors: [vertices, 4] linear RGBA.
        emission_uv: [vertices, 2] of the emission's texture; None: the same as `uv`.
    """

    positions: NDArray[np.float64]
    triangles: NDArray[np.uint32]
    normals: Floats | None
    uv: Floats
    colors: Floats
    material: Material
    emission_uv: Floats | None = None


def to_linear(color: Any) -> NDArray[np.float64]:
    """The inverse of sRGB's transfer function (IEC 61966-2-1), for values in [0, 1]."""
    color = np.asarray(color, dtype=np.float64)
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def transformed(part: Part, matrix: NDArray[np.float64]) -> Part:
    """The part moved by one [4, 4] matrix, or by [vertices, 4, 4], one for each vertex."""
    turn = matrix[..., :3, :3]
    normals = None
    if part.normals is not None:
        # The cofactors are the inverse transposed, up to a factor, and exist for flattening matrices too.
        x, y, z = turn[..., 0, :], turn[..., 1, :], turn[..., 2, :]
        cofactors = np.stack([np.cross(y, z), np.cross(z, x), np.cross(x, y)], axis=-2)
        normals = np.einsum("...ij,...j->...i", cofactors, part.normals)
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        normals = (normals / np.where(length > 0, length, 1)).astype(np.float32)
    positions = np.einsum("...ij,...j->...i", turn, part.positions) + matrix[..., :3, 3]
    return replace(part, positions=positions, normals=normals)


def decoded(content: bytes, name: str) -> Image.Image:
    """A texture as RGBA with 8 bits; `name` says which one it is where it can't be decoded.

    Raises:
        BadMesh: it is damaged, no picture, or has values that are no colors.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.mode.startswith("I;16"):
            # Pillow's conversion would cut everything above 255 off.
            gray = np.asarray(image).astype(np.float64)
            alpha = np.where(gray == image.info.get("transparency", -1), 0, 255)
            shown = np.stack([np.round(gray / 257)] * 3 + [alpha], axis=-1)
            return Image.fromarray(shown.astype(np.uint8), "RGBA")
        if image.mode not in ("I", "F"):
            return image.convert("RGBA")
    except UnidentifiedImageError as error:
        raise BadMesh(f"its texture {name} can't be read (it is no picture): save it again as PNG or JPEG") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise BadMesh(f"its texture {name} can't be read ({error}): save it again as PNG or JPEG") from error
    raise BadMesh(f"its texture {name} has values of 32 bits: save it with 8 or 16 bits")
