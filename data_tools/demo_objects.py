# SPDX-License-Identifier: Apache-2.0
"""The solids of the demo data: six composed by hand, and any number put together at random."""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from demo_shapes import (
    Array,
    Paint,
    Shape,
    Vector,
    around,
    box,
    capsule,
    checkers,
    clouds,
    column,
    cone,
    cut,
    dots,
    ellipsoid,
    inside,
    length,
    mirror,
    pick,
    place,
    plain,
    sphere,
    stripes,
    torus,
    wedges,
)


@dataclass(frozen=True)
class Part:
    shape: Shape
    paint: Paint
    blend: float = 0.0
    """Width of the smooth transition to the parts before this one."""


@dataclass(frozen=True)
class Solid:
    """Parts in coordinates of their own, shown moved by -center and then multiplied by scale."""

    name: str
    parts: tuple[Part, ...]
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def _local(self, points: Array) -> Array:
        return points / np.float32(self.scale) + column(self.center)

    def distance(self, points: Array) -> Array:
        """Signed distance [n] of points [3, n]; never much above the true distance."""
        local = self._local(points)
        total = self.parts[0].shape(local)
        for part in self.parts[1:]:
            other = part.shape(local)
            if part.blend:
                overlap = np.maximum(part.blend - np.abs(total - other), 0)
                total = np.minimum(total, other) - overlap**2 / (4 * part.blend)
            else:
                total = np.minimum(total, other)
        return total * np.float32(self.scale)

    def color(self, points: Array) -> Array:
        """Color [3, n] at surface points [3, n]: that of the nearest part."""
        local = self._local(points)
        nearest = np.argmin(np.stack([part.shape(local) for part in self.parts]), axis=0)
        result = np.empty_like(local)
        for index, part in enumerate(self.parts):
            chosen = nearest == index
            if chosen.any():
                result[:, chosen] = part.paint(local[:, chosen])
        return result


CUBE, BALL = 0.45, 0.52
"""Solids stay inside the cube [-CUBE, CUBE]^3 and the ball of this radius, which every demo camera sees whole."""


def fitted(name: str, parts: Sequence[Part], extent: float = 1.6, cells: int = 72) -> Solid:
    """The largest centered copy of a solid (given within [-extent, extent]^3) that fits the cube and the ball."""
    axis = (np.arange(cells, dtype=np.float32) + 0.5) / cells * 2 * extent - extent
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, -1).astype(np.float32)
    solid = Solid(name, tuple(parts))
    cell = 2 * extent / cells
    # A distance changes by no more than half a cell's diagonal inside the cell: no cell with surface is left out.
    solid_cells = grid[:, solid.distance(grid) < cell * np.sqrt(3) / 2]
    low, high = solid_cells.min(axis=1), solid_cells.max(axis=1)
    center = (low + high) / 2
    scale = min(CUBE / float((high - low).max() / 2), BALL / float(length(solid_cells - column(center)).max()))
    return Solid(name, solid.parts, (float(center[0]), float(center[1]), float(center[2])), scale)


def mug() -> list[Part]:
    cream, red, yellow, teal = plain("ffe9b8"), plain("e02b3c"), plain("ffc21a"), plain("12939a")
    body = cut(cone(0.52, 0.56, 0.62, 0.05), place(cone(0.45, 0.47, 0.6), (0, 0, 0.12)))
    heart = mirror(place(ellipsoid(0.13, 1.0, 0.24), (0.09, -1, 0.0), (0, 35, 0)), "x")
    outside = stripes((0, 0, 1), 0.12, yellow, red)
    outside = pick(lambda p: np.abs(p[2]) < 0.36, inside(heart, red, teal), outside)
    sun = place(sphere(0.27), (0, 0.56, 0.0))
    outside = inside(sun, yellow, outside)
    hollow = place(cone(0.49, 0.505, 0.6), (0, 0, 0.1))
    handle = place(cut(torus(0.33, 0.085), place(box(0.5, 1, 1), (-0.52, 0, 0))), (0.5, 0, 0.02), (90, 0, 0))
    return [
        Part(body, inside(hollow, cream, outside)),
        Part(place(cone(0.47, 0.47, 0.03), (0, 0, 0.36)), clouds(3, 0.3, plain("6b3414"), plain("a8632c"))),
        Part(handle, yellow, 0.05),
    ]


def teddy() -> list[Part]:
    fur = clouds(1, 0.22, plain("c46a1d"), plain("a04c12"))
    pale, dark, red = plain("ffd593"), plain("2b1712"), plain("e3203a")
    scarf = stripes((1, 0, 0), 0.13, red, plain("2f6fe0"))
    ears = inside(mirror(place(sphere(0.1), (0.3, -0.13, 0.94)), "x"), pale, fur)
    bow = place(mirror(place(ellipsoid(0.13, 0.05, 0.09), (0.11, 0, 0), (0, -15, 0)), "x"), (0.0, 0.36, 0.16))
    return [
        Part(ellipsoid(0.44, 0.38, 0.46), inside(place(ellipsoid(0.27, 0.3, 0.3), (0, -0.28, -0.04)), pale, fur)),
        Part(place(ellipsoid(0.40, 0.36, 0.36), (0, -0.03, 0.66)), fur, 0.05),
        Part(mirror(place(sphere(0.155), (0.30, 0, 0.94)), "x"), ears, 0.03),
        Part(mirror(capsule((0.36, -0.08, 0.2), (0.58, -0.3, -0.08), 0.13), "x"), fur, 0.05),
        Part(mirror(capsule((0.25, -0.1, -0.36), (0.36, -0.5, -0.4), 0.17), "x"), fur, 0.05),
        Part(mirror(place(ellipsoid(0.12, 0.05, 0.12), (0.375, -0.65, -0.4)), "x"), pale),
        Part(place(ellipsoid(0.19, 0.15, 0.14), (0, -0.34, 0.57)), pale, 0.03),
        Part(place(ellipsoid(0.075, 0.05, 0.055), (0, -0.47, 0.63)), dark),
        Part(mirror(place(sphere(0.055), (0.15, -0.345, 0.76)), "x"), dark),
        Part(place(torus(0.30, 0.085), (0, -0.02, 0.36)), scarf),
        Part(bow, red),
        Part(place(sphere(0.14), (0, 0.40, -0.28)), pale, 0.04),
    ]


def chair() -> list[Part]:
    wood = stripes((0.15, 0.1, 1.0), 0.11, plain("159b7c"), plain("0d7f8c"))
    feet = place(box(1, 1, 0.2), (0, 0, -0.82))
    legs = mirror(capsule((0.44, 0.44, 0.0), (0.52, 0.5, -0.8), 0.075), "xy")
    slats = mirror(place(box(0.075, 0.04, 0.33, 0.03), (0.2, 0.5, 0.52)), "x")
    ball = stripes((0.3, 0.2, 0.9), 0.09, plain("ffd028"), plain("e8303d"))
    return [
        Part(box(0.56, 0.56, 0.07, 0.05), wood),
        Part(legs, inside(feet, plain("f4702a"), wood)),
        Part(place(box(0.46, 0.46, 0.09, 0.08), (0, -0.06, 0.13)), checkers(0.2, plain("f02d7d"), plain("ffd23c"))),
        Part(mirror(capsule((0.48, 0.5, 0.0), (0.48, 0.5, 0.98), 0.07), "x"), plain("f4702a")),
        Part(place(box(0.5, 0.06, 0.12, 0.05), (0, 0.5, 0.88)), wedges(6, plain("3a53d6"), plain("58b9f2"), (0, 0.9))),
        Part(slats, plain("8e3fc4")),
        Part(place(box(0.07, 0.04, 0.33, 0.03), (0, 0.5, 0.52)), plain("ffb11f")),
        Part(place(sphere(0.17), (-0.18, -0.14, 0.38)), ball),
    ]


def rocket() -> list[Part]:
    red, blue, yellow, pale = plain("e5263a"), plain("2458d8"), plain("ffc61f"), plain("bfe0f2")
    hull = cut(place(ellipsoid(0.40, 0.40, 1.05), (0, 0, 0)), place(box(1, 1, 0.5), (0, 0, -1.2)))
    band = pick(lambda p: p[2] < -0.42, wedges(6, blue, yellow), pale)
    skin = pick(lambda p: p[2] > 0.46, red, pick(lambda p: np.abs(p[2] - 0.40) < 0.06, blue, band))
    fin = cut(place(box(0.3, 0.05, 0.42, 0.03), (0.42, 0, -0.55), (0, -28, 0)), place(box(1, 1, 0.5), (0, 0, -1.42)))
    fin_paint = pick(lambda p: p[0] > 0.12, red, pick(lambda p: p[1] > 0, plain("12a05c"), plain("f0781e")))
    window = place(torus(0.155, 0.05), (0, -0.365, 0.12), (90, 0, 0))
    flame = clouds(5, 0.2, plain("ff5a12"), yellow)
    return [
        Part(hull, skin),
        Part(around(fin, 3), fin_paint),
        Part(window, plain("f0781e")),
        Part(place(ellipsoid(0.15, 0.06, 0.15), (0, -0.365, 0.12)), plain("1a3f9e")),
        Part(place(box(0.1, 0.05, 0.2, 0.03), (0, 0.385, 0.06)), plain("12a05c")),
        Part(place(cone(0.27, 0.2, 0.09, 0.03), (0, 0, -0.74)), plain("46506b")),
        Part(place(cone(0.03, 0.2, 0.2, 0.02), (0, 0, -0.98)), flame),
        Part(place(sphere(0.075), (0, 0, 1.05)), yellow),
    ]


def mushroom() -> list[Part]:
    red, cream, pale = plain("e11f2e"), plain("fff0cf"), plain("f6cf8e")
    turns = np.arange(14) * np.pi * (3 - np.sqrt(5))
    heights = np.linspace(0.02, 0.98, 14)
    ring = np.sqrt(1 - heights**2)
    spots = np.stack([ring * np.cos(turns), ring * np.sin(turns), heights], axis=1) * (0.75, 0.75, 0.55)

    def toadstool(skin: Paint, size: float, at: Vector, gills: Paint) -> list[Part]:
        def local(paint: Paint) -> Paint:
            return lambda p: paint((p - column(at)) / np.float32(size))

        def scaled(shape: Shape) -> Shape:
            return place(lambda p: shape(p / np.float32(size)) * np.float32(size), at)

        hollow, lower_half = place(ellipsoid(0.7, 0.7, 0.2), (0, 0, -0.1)), place(box(1, 1, 0.4), (0, 0, -0.5))
        cap = cut(ellipsoid(0.75, 0.75, 0.55), hollow, lower_half)
        top = dots(spots, 0.15, cream, skin)
        under = pick(lambda p: (p[2] < 0.09) & (p[0] ** 2 + p[1] ** 2 < 0.46), gills, top)
        stem = stripes((0, 0, 1), 0.14, plain("f3c98a"), cream)
        return [
            Part(scaled(place(cone(0.27, 0.17, 0.42, 0.05), (0, 0, -0.36))), local(stem)),
            Part(scaled(cap), local(under), 0.04),
        ]

    stone = clouds(2, 0.1, plain("2f7de0"), plain("5fc4f0"))
    grass = clouds(8, 0.16, plain("3fa31c"), plain("8fd02c"))
    return [
        *toadstool(red, 1.0, (0, 0, 0.1), wedges(16, pale, plain("d98c4a"))),
        *toadstool(plain("7a35c8"), 0.5, (0.44, -0.42, -0.28), wedges(8, pale, plain("d98c4a"))),
        Part(place(ellipsoid(0.78, 0.74, 0.16), (0.06, -0.08, -0.72)), grass, 0.08),
        Part(place(ellipsoid(0.17, 0.14, 0.14), (-0.38, -0.36, -0.52)), stone),
        Part(place(sphere(0.12), (-0.30, 0.46, -0.50)), plain("ff8a1c")),
    ]


def duck() -> list[Part]:
    feathers = clouds(11, 0.3, plain("ffd21a"), plain("ffb806"))
    orange, dark = plain("f5651a"), plain("20182a")
    rings = wedges(5, plain("e4263c"), plain("2c8fe8"))
    hat = stripes((0, 0, 1), 0.09, plain("8a3ad0"), plain("2fc48a"))
    wing = mirror(place(ellipsoid(0.09, 0.33, 0.2), (0.45, 0.12, 0.08), (12, 0, 0)), "x")
    return [
        Part(place(ellipsoid(0.46, 0.62, 0.38), (0, 0.08, 0.0)), feathers),
        Part(place(cone(0.2, 0.05, 0.22, 0.04), (0, 0.66, 0.22), (-42, 0, 0)), feathers, 0.2),
        Part(place(sphere(0.34), (0, -0.34, 0.56)), feathers, 0.12),
        Part(place(ellipsoid(0.18, 0.2, 0.06), (0, -0.70, 0.50), (-8, 0, 0)), orange),
        Part(mirror(place(sphere(0.075), (0.16, -0.60, 0.68)), "x"), dark),
        Part(wing, stripes((0, 0.6, 0.8), 0.1, plain("f58a12"), plain("ffe04a"))),
        Part(place(torus(0.62, 0.17), (0, 0.05, -0.2)), rings),
        Part(place(cone(0.15, 0.0, 0.17, 0.02), (0, -0.30, 0.98)), hat),
    ]


COMPOSED: tuple[Callable[[], list[Part]], ...] = (mug, teddy, chair, rocket, mushroom, duck)


def _random_shape(rng: np.random.Generator, size: float) -> Shape:
    a, b, c = (float(v) for v in size * rng.uniform(0.5, 1.0, 3))
    shapes: list[Shape] = [
        ellipsoid(a, b, c),
        box(a, b, c, 0.02),
        box(a, b, c, 0.6 * min(a, b, c)),
        torus(0.8 * a, 0.3 * b),
        capsule((-0.6 * a, 0, 0), (0.6 * a, 0, 0), 0.55 * b),
        cone(a, float(rng.uniform(0.0, 0.5)) * a, c, 0.02),
        cone(0.8 * a, 0.8 * a, c, 0.04),
    ]
    return shapes[rng.integers(len(shapes))]


def _random_paint(rng: np.random.Generator, hue: float, size: float) -> Paint:
    def tone(shift: float) -> Paint:
        rgb = colorsys.hsv_to_rgb((hue + shift) % 1.0, rng.uniform(0.65, 0.95), rng.uniform(0.7, 1.0))
        return plain("".join(f"{round(255 * value):02x}" for value in rgb))

    first, second = tone(0.0), tone(float(rng.uniform(0.12, 0.5)))
    axis = rng.normal(size=3)
    width = size * float(rng.uniform(0.25, 0.4))
    paints: list[Paint] = [
        first,
        stripes(axis / np.linalg.norm(axis), width, first, second),
        checkers(1.3 * width, first, second),
        clouds(int(rng.integers(2**31)), width, first, second),
        wedges(int(rng.integers(3, 7)), first, second),
        dots(rng.uniform(-1, 1, (24, 3)), 0.22, first, second),
    ]
    return paints[rng.integers(len(paints))]


def random_parts(rng: np.random.Generator) -> list[Part]:
    """A body and one to four smaller parts, each stuck on the surface of what is there, often as mirrored pairs."""
    hue = float(rng.uniform())
    parts: list[Part] = []
    for index in range(int(rng.integers(2, 6))):
        size = float(rng.uniform(0.55, 0.8) if index == 0 else rng.uniform(0.28, 0.5))
        at = np.zeros(3)
        if parts:
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            reach = np.linspace(0, 1.2, 121, dtype=np.float32)
            inner = Solid("", tuple(parts)).distance(column(direction) * reach) < 0
            at = direction * (float(reach[inner].max()) if inner.any() else 0.3)
        shape = place(_random_shape(rng, size), at, rng.uniform(-180, 180, 3) * (rng.uniform() < 0.7))
        if parts and rng.uniform() < 0.5:
            shape = mirror(shape, "x") if at[0] > 0 else mirror(place(shape, (-2 * at[0], 0, 0)), "x")
        paint = _random_paint(rng, hue + 0.381966 * index, size)
        parts.append(Part(shape, paint, float(rng.choice([0.0, 0.04, 0.12])) if parts else 0.0))
    return parts


def solid_name(index: int) -> str:
    return COMPOSED[index].__name__ if index < len(COMPOSED) else f"random_{index:04d}"


def make_solid(index: int, seed: int) -> Solid:
    """Solid number `index` of a set; the first six are the same for every seed."""
    if index < len(COMPOSED):
        return fitted(solid_name(index), COMPOSED[index]())
    return fitted(solid_name(index), random_parts(np.random.default_rng((seed, 1, index))), extent=2.2)
