# SPDX-License-Identifier: Apache-2.0
"""A slow renderer: loops over views, pixels, samples and corners in Python floats, one formula after the other.

It shares no code with the package, so that the two can be compared.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COARSE_TAG, FINE_TAG = 0x636F6172, 0x66696E65


def pcg4d(words: Sequence[int]) -> list[int]:
    v = [(a * 1664525 + 1013904223) % 2**32 for a in words]
    for turn in range(2):
        for target, left, right in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
            v[target] = (v[target] + v[left] * v[right]) % 2**32
        if turn == 0:
            v = [a ^ (a // 2**16) for a in v]
    return v


def uniform(seed: int, tag: int, ray: int, sample: int) -> float:
    seed %= 2**64
    word = pcg4d([seed % 2**32, (seed // 2**32) ^ tag, ray % 2**32, sample])[3]
    return (word // 256) / 2**24


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def bilinear(plane: Array, x: float, y: float) -> Array:
    """plane [R, R, C], x along columns and y along rows, both in [-1, 1] from edge to edge."""
    resolution = plane.shape[0]
    column, row = (x + 1) / 2 * resolution - 0.5, (y + 1) / 2 * resolution - 0.5
    total = np.zeros(plane.shape[2])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < resolution and 0 <= j < resolution:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * plane[i, j]
    return total


def field(
    planes: Array, mlp: dict[str, Array], point: Array, box: float, axes: str, reduce: str
) -> tuple[float, Array]:
    """Raw density and color at a point, for planes [3, R, R, C]."""
    x, y, z = 2 * point / box
    third = (y, z) if axes == "orthogonal" else (z, x)
    reads = [bilinear(plane, *uv) for plane, uv in zip(planes, ((x, y), (x, z), third), strict=True)]
    features = reads[0] + reads[1] + reads[2] if reduce == "sum" else reads[0] * reads[1] * reads[2]
    hidden = np.array([softplus(a) for a in mlp["w1"] @ features + mlp["b1"]])
    out = mlp["w2"] @ hidden + mlp["b2"]
    return float(out[0]), 1.002 / (1 + np.exp(-out[1:])) - 0.001


def interval_weights(t: list[float], density: list[float]) -> list[float]:
    weights, passed = [], 1.0
    for k in range(len(t) - 1):
        sigma = softplus((density[k] + density[k + 1]) / 2 - 1)
        alpha = 1 - math.exp(-sigma * (t[k + 1] - t[k]))
        weights.append(alpha * passed)
        passed *= 1 - alpha + 1e-10
    return weights


def importance(t: list[float], weights: list[float], u: Sequence[float]) -> list[float]:
    count = len(weights)
    smooth = []
    for k in range(count):
        left = max(weights[max(k - 1, 0)], weights[k])
        right = max(weights[k], weights[min(k + 1, count - 1)])
        smooth.append((left + right) / 2 + 0.01)
    probability = [a / sum(smooth) for a in smooth]
    drawn = []
    for j, jitter in enumerate(u):
        position, k = (j + jitter) / len(u), 0
        while k < count - 1 and position >= probability[k]:
            position -= probability[k]
            k += 1
        drawn.append(t[k] + position / probability[k] * (t[k + 1] - t[k]))
    return drawn


def box_hit(origin: Array, direction: Array, box: float) -> tuple[float, float]:
    enter, leave = 1e-3 * box, math.inf
    for o, d in zip(origin, direction, strict=True):
        if d == 0:
            if abs(o) >= box / 2:
                leave = -math.inf
        else:
            enter = max(enter, min((-box / 2 - o) / d, (box / 2 - o) / d))
            leave = min(leave, max((-box / 2 - o) / d, (box / 2 - o) / d))
    if enter < leave:
        return enter, leave
    closest = max(float(-origin @ direction), 1e-3 * box)
    return closest, closest


def render(
    planes: Array,
    mlp: dict[str, Array],
    cam2world: Array,
    intrinsics: Array,
    size: tuple[int, int],
    options: dict[str, Any],
    background: Array,
    scene: Sequence[int],
    noise: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:
    """Features [B, h, w, c], depth, opacity and distortion [B, h, w]; arguments are those of igae.rendering.render."""
    height, width = size
    box, coarse = options["box"], options["coarse_samples"]
    side = options.get("rays_per_pixel", 1)
    features = np.zeros((len(cam2world), height, width, background.shape[-1]))
    depths, opacities, distortions = (np.zeros(features.shape[:3]) for _ in range(3))
    for b, i, j, row, column in np.ndindex(*features.shape[:3], side, side):
        ray = (((b * height + i) * width + j) * side + row) * side + column
        u, v = (j + (column + 0.5) / side) / width, (i + (row + 0.5) / side) / height
        direction = np.linalg.inv(intrinsics[b]) @ np.array([u, v, 1.0])
        direction = cam2world[b, :3, :3] @ (direction / direction[2])
        direction /= np.linalg.norm(direction)
        origin = cam2world[b, :3, 3]
        near, far = options["near"], options["far"]
        if near == "auto":
            near, far = box_hit(origin, direction, box)

        t = []
        for k in range(coarse):
            place = (k + noise[0][ray, k]) / (coarse - 1)
            if options["spacing"] == "disparity":
                t.append(1 / (1 / near + min(place, 1.0) * (1 / far - 1 / near)))
            else:
                t.append(near + place * (far - near))

        def sample(
            at: float, o: Array = origin, d: Array = direction, p: Array = planes[scene[b]]
        ) -> tuple[float, float, Array]:
            return (at, *field(p, mlp, o + at * d, box, options["axes"], options["reduce"]))

        samples = [sample(at) for at in t]
        if noise[1].shape[1]:
            weights = interval_weights(t, [s[1] for s in samples])
            samples += [sample(at) for at in importance(t, weights, noise[1][ray])]
        samples.sort(key=lambda s: s[0])
        t = [s[0] for s in samples]
        weights = interval_weights(t, [s[1] for s in samples])
        opacity = sum(weights)
        color = sum(w * (a[2] + c[2]) / 2 for w, a, c in zip(weights, samples, samples[1:], strict=False))
        behind = background if background.ndim == 1 else background[i, j]
        features[b, i, j] += (2 * (color + (1 - opacity) * behind) - 1) / side**2
        opacities[b, i, j] += opacity / side**2
        # Between "nothing" (the end of the ray) and the weighted mean, as the opacity goes from 0 to 1e-6.
        beyond = sum(w * ((a + c) / 2 - t[-1]) for w, a, c in zip(weights, t, t[1:], strict=False))
        depths[b, i, j] += min(max(t[-1] + beyond / max(opacity, 1e-6), t[0]), t[-1]) / side**2
        middles = [(a + c) / 2 for a, c in zip(t, t[1:], strict=False)]
        pairs = list(zip(weights, middles, strict=True))
        distortion = sum(w * v * abs(m - n) for w, m in pairs for v, n in pairs)
        distortion += sum(w * w * (c - a) / 3 for w, a, c in zip(weights, t, t[1:], strict=False))
        distortions[b, i, j] += distortion / box / side**2
    return features, depths, opacities, distortions
