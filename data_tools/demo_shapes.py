# SPDX-License-Identifier: Apache-2.0
"""Signed-distance shapes and procedural paints.

Points are float32 arrays [3, n] (x right, y away from a viewer who stands at -y, z up). A `Shape` maps them to signed
distances [n], a `Paint` to colors [3, n] in [0, 1]. Nothing depends on the viewer, so that all views agree.
The distance formulas are those of I. Quilez, https://iquilezles.org/articles/distfunctions (equations only).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = Callable[[Array], Array]
Paint: TypeAlias = Callable[[Array], Array]
Vector: TypeAlias = Sequence[float] | NDArray[np.floating]


def column(values: Vector) -> Array:
    return np.asarray(values, dtype=np.float32).reshape(3, 1)


def length(points: Array) -> Array:
    return np.sqrt(points[0] ** 2 + points[1] ** 2 + points[2] ** 2)


def hypot(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)  # several times as fast as numpy's, which guards against overflow


# Shapes -------------------------------------------------------------------------------------------------------------


def sphere(radius: float) -> Shape:
    return lambda p: length(p) - radius


def ellipsoid(x: float, y: float, z: float) -> Shape:
    radii = column((x, y, z))

    def distance(p: Array) -> Array:  # first-order estimate: exact at the surface only
        scaled = p / radii
        norm = length(scaled)
        return norm * (norm - 1) / np.maximum(length(scaled / radii), 1e-6)

    return distance


def box(x: float, y: float, z: float, rounding: float = 0.0) -> Shape:
    """Box of half sizes x, y, z, with its edges rounded inwards."""
    half = column((x, y, z)) - np.float32(rounding)

    def distance(p: Array) -> Array:
        q = np.abs(p) - half
        return length(np.maximum(q, 0)) + np.minimum(q.max(axis=0), 0) - rounding

    return distance


def torus(radius: float, thickness: float) -> Shape:
    """Ring around the z axis."""
    return lambda p: hypot(hypot(p[0], p[1]) - radius, p[2]) - thickness


def capsule(start: Vector, end: Vector, radius: float) -> Shape:
    a, axis = column(start), column(end) - column(start)
    square = float((axis**2).sum())

    def distance(p: Array) -> Array:
        t = np.clip(((p - a) * axis).sum(axis=0) / square, 0, 1)
        return length(p - a - axis * t) - radius

    return distance


def cone(bottom: float, top: float, half: float, rounding: float = 0.0) -> Shape:
    """Cone along z with the given radii at z = -half and z = half; equal radii make a cylinder."""
    bottom, top, half = bottom - rounding, max(top - rounding, 0.0), half - rounding
    slope = (top - bottom, 2 * half)

    def distance(p: Array) -> Array:
        rho = hypot(p[0], p[1])
        z = p[2]
        cap_rho = np.maximum(rho - np.where(z < 0, np.float32(bottom), np.float32(top)), 0)
        cap_z = np.abs(z) - half
        t = np.clip(((top - rho) * slope[0] + (half - z) * slope[1]) / (slope[0] ** 2 + slope[1] ** 2), 0, 1)
        side_rho, side_z = rho - top + slope[0] * t, z - half + slope[1] * t
        sign = np.where((side_rho < 0) & (cap_z < 0), np.float32(-1), np.float32(1))
        return sign * np.sqrt(np.minimum(cap_rho**2 + cap_z**2, side_rho**2 + side_z**2)) - rounding

    return distance


def turn(points: Array, matrix: NDArray[np.float64]) -> Array:
    """`matrix @ points` without BLAS, whose threads would compete with the worker processes."""
    m = matrix.astype(np.float32)
    return np.stack([m[i, 0] * points[0] + m[i, 1] * points[1] + m[i, 2] * points[2] for i in range(3)])


def rotation(degrees: Vector) -> NDArray[np.float64]:
    """Rotations about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[b, a], step[a, b] = np.sin(angle), -np.sin(angle)
        matrix = step @ matrix
    return matrix


def place(shape: Shape, at: Vector, degrees: Vector | None = None) -> Shape:
    offset = column(at)
    if degrees is None:
        return lambda p: shape(p - offset)
    inverse = rotation(degrees).T
    return lambda p: shape(turn(p - offset, inverse))


def cut(shape: Shape, *removed: Shape) -> Shape:
    return lambda p: np.maximum.reduce([shape(p), *(-other(p) for other in removed)])


def mirror(shape: Shape, axes: str) -> Shape:
    """The shape and its mirror images across the planes at 0 of the named axes; give the shape on the positive side."""
    flipped = ["xyz".index(axis) for axis in axes]

    def distance(p: Array) -> Array:
        q = p.copy()
        q[flipped] = np.abs(q[flipped])
        return shape(q)

    return distance


def around(shape: Shape, count: int) -> Shape:
    """`count` copies around the z axis of a shape which stands on the x axis."""
    sector = 2 * np.pi / count

    def distance(p: Array) -> Array:
        angle = np.arctan2(p[1], p[0])
        angle -= sector * np.round(angle / sector)
        rho = hypot(p[0], p[1])
        return shape(np.stack([rho * np.cos(angle), rho * np.sin(angle), p[2]]))

    return distance


# Paints -------------------------------------------------------------------------------------------------------------


def color(code: str) -> Array:
    return column([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def plain(code: str) -> Paint:
    return lambda p: np.broadcast_to(color(code), p.shape)


def pick(mask: Callable[[Array], NDArray[np.bool_]], yes: Paint, no: Paint) -> Paint:
    return lambda p: np.where(mask(p), yes(p), no(p))


def inside(shape: Shape, yes: Paint, no: Paint) -> Paint:
    return pick(lambda p: shape(p) < 0, yes, no)


def stripes(axis: Vector, width: float, yes: Paint, no: Paint) -> Paint:
    direction = column(axis)
    return pick(lambda p: np.floor((p * direction).sum(axis=0) / width) % 2 == 0, yes, no)


def checkers(width: float, yes: Paint, no: Paint) -> Paint:
    # The offset keeps faces at round coordinates off the borders of the cells.
    return pick(lambda p: np.floor(p / width + np.float32(0.437)).sum(axis=0) % 2 == 0, yes, no)


def wedges(count: int, yes: Paint, no: Paint, center: Vector = (0, 0, 0)) -> Paint:
    """Sectors around the vertical axis through `center`."""
    x, y = center[0], center[1]
    return pick(lambda p: np.floor(np.arctan2(p[1] - y, p[0] - x) * (count / np.pi)) % 2 == 0, yes, no)


def clouds(seed: int, size: float, yes: Paint, no: Paint) -> Paint:
    """Smooth noise of about the given feature size, as a blend of two paints."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(5, 3))
    directions *= np.pi / size * rng.uniform(0.7, 1.4, (5, 1)) / np.linalg.norm(directions, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, 5)

    def blend(p: Array) -> Array:
        waves = [
            np.sin(np.float32(d[0]) * p[0] + np.float32(d[1]) * p[1] + np.float32(d[2]) * p[2] + np.float32(phase))
            for d, phase in zip(directions, phases, strict=True)
        ]
        mix = np.clip(0.5 + 0.9 * sum(waves[1:], waves[0]), 0, 1)
        return yes(p) * mix + no(p) * (1 - mix)

    return blend


def dots(centers: NDArray[np.float64], radius: float, yes: Paint, no: Paint) -> Paint:
    def near(p: Array) -> NDArray[np.bool_]:
        mask = np.zeros(p.shape[1], dtype=bool)
        for center in centers:
            mask |= ((p - column(center)) ** 2).sum(axis=0) < radius**2
        return mask

    return pick(near, yes, no)
