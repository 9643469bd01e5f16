# SPDX-License-Identifier: Apache-2.0
"""Ownership scene by scene and slowly, as the first versions had it: running jobs rely on it not to change."""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from random import Random

import numpy as np

from igae.scenes import assign_scenes as assign_columns

PARTS, ATTEMPTS, STEPS, PLACES = 20, 500, 200_000, 200


def assign(shards: Sequence[Mapping[int, int]], world: int) -> list[list[int]]:
    """What igae itself says, of the same arguments."""
    entries = [(place, scene, views) for place, shard in enumerate(shards) for scene, views in shard.items()]
    columns = np.array(entries, np.int64).reshape(-1, 3).T
    return [part.tolist() for part in assign_columns(*columns, world)]


def assign_scenes(shards: Sequence[Mapping[int, int]], world: int) -> list[list[int]]:
    """As `igae.scenes.assign_scenes`, of scene id -> views for each shard."""
    views: dict[int, int] = {}
    groups: dict[int, list[int]] = {}  # scene -> the scenes of its shards
    for shard in shards:
        together: list[int] = []
        for scene in sorted(shard):
            views[scene] = views.get(scene, 0) + shard[scene]
            if (group := groups.get(scene, [scene])) is not together:
                together += group
                groups.update(dict.fromkeys(group, together))
    if world > len(views):
        raise ValueError(
            f"{len(views)} scenes with training views can't be shared by {world} processes, each of which needs one: "
            "start fewer processes, or select more scenes"
        )
    total, alone = sum(views.values()), []
    for scene in heapq.nlargest(world, views, key=views.__getitem__):
        if views[scene] <= _bounds(total, world)[1]:
            break
        alone.append([scene])
        total, world = total - views.pop(scene), world - 1
    whole = [[scene for scene in group if scene in views] for group in {id(g): g for g in groups.values()}.values()]
    tried = []
    for owned in _ways([scenes for scenes in whole if scenes], views, world):
        uneven = _unevenness([sum(views[scene] for scene in scenes) for scenes in owned])
        tried.append((uneven, owned))
        if uneven * PARTS <= total:
            break
    _, owned = min(tried, key=lambda way: way[0])
    return sorted(sorted(scenes) for scenes in alone + owned)


def _ways(whole: list[list[int]], views: Mapping[int, int], world: int) -> Iterator[list[list[int]]]:
    if len(whole) >= world:
        yield _search(whole, views, world)
    if stretches := _stretches(views, world):
        yield stretches
    yield _search([[scene] for scene in views], views, world)


def _unevenness(loads: Sequence[int]) -> int:
    """The largest distance of a load from the mean, times the number of loads."""
    total = sum(loads)
    return max(abs(load * len(loads) - total) for load in loads)


def _bounds(total: int, world: int) -> tuple[int, int]:
    """The smallest and the largest balanced load."""
    return -((1 - PARTS) * total // (PARTS * world)), (PARTS + 1) * total // (PARTS * world)


def _stretches(views: Mapping[int, int], world: int) -> list[list[int]] | None:
    """Cuts the row of scenes into balanced stretches, each cut as near to an even one as that allows; None if there are
    none within PLACES scenes of even cuts."""
    scenes, ends = list(views), list(accumulate(views.values(), initial=0))
    total = ends[-1]
    low, high = _bounds(total, world)
    reached = [[0]]  # for k balanced stretches: the places where the last of them can end
    for k in range(1, world):
        even, before, places = bisect_left(ends, k * total // world), reached[-1], []
        for place in range(max(even - PLACES, k), min(even + PLACES, len(scenes))):
            i = bisect_left(before, ends[place] - high, key=ends.__getitem__)
            if i < len(before) and ends[before[i]] <= ends[place] - low:
                places.append(place)
        reached.append(places)
    cuts = [len(scenes)]
    for k in range(world - 1, -1, -1):
        places = [place for place in reached[k] if low <= ends[cuts[0]] - ends[place] <= high]
        if not places:
            return None
        cuts.insert(0, min(places, key=lambda place: abs(ends[place] * world - k * total)))
    return [scenes[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _search(things: Sequence[list[int]], views: Mapping[int, int], world: int) -> list[list[int]]:
    """Joins lists of scenes to ``world`` lists of even load: the heaviest first into the lightest load, then exchanges.
    If that is not balanced, the same in other orders."""
    weights = [sum(views[scene] for scene in thing) for thing in things]
    keys: Sequence[float] = weights
    found, random, steps = [], Random(0), iter(range(1 + STEPS // len(things)))
    for _ in zip(range(ATTEMPTS), steps, strict=False):
        bins: list[list[int]] = [[] for _ in range(world)]
        heap = [(0, k) for k in range(world)]
        for i in sorted(range(len(things)), key=lambda i: (-keys[i], i)):
            load, k = heap[0]
            bins[k].append(i)
            heapq.heapreplace(heap, (load + weights[i], k))
        found.append((_exchange(weights, bins, steps), bins))
        if found[-1][0] * PARTS <= sum(weights):
            break
        keys = [weight * (0.5 + random.random()) for weight in weights]
    _, bins = min(found, key=lambda one: one[0])
    return [[scene for i in places for scene in things[i]] for places in bins]


def _exchange(weights: Sequence[int], bins: list[list[int]], steps: Iterator[int]) -> int:
    """Makes bins more even, in place, until they are balanced, nothing helps, or there are no more steps: in a step one
    thing of the bin farthest from the mean and one of another change places, or one moves. Returns the unevenness."""
    loads = [sum(weights[i] for i in places) for places in bins]
    mean = sum(loads) / len(loads)
    while (uneven := _unevenness(loads)) * PARTS > sum(loads) and next(steps, None) is not None:
        far = max(range(len(bins)), key=lambda k: abs(loads[k] - mean))
        best = (0, 0, 0, -1, -1)
        for other in range(len(bins)):
            heavy, light = (far, other) if loads[far] > loads[other] else (other, far)
            gap = loads[heavy] - loads[light]
            back = sorted({0: -1, **{weights[i]: i for i in bins[light]}}.items())
            for weight, go in {weights[i]: i for i in bins[heavy]}.items():
                at = bisect_left(back, 2 * weight - gap, key=lambda one: 2 * one[0])
                for less, come in back[max(at - 1, 0) : at + 1]:
                    moved = weight - less  # the first entry below is half the decrease of the sum of squared loads
                    best = max(best, (moved * (gap - moved), heavy, light, go, come))
        gain, heavy, light, go, come = best
        if gain <= 0:
            break
        for index, source, target in ((go, heavy, light), (come, light, heavy)):
            if index >= 0:
                bins[source].remove(index)
                bins[target].append(index)
                loads[source] -= weights[index]
                loads[target] += weights[index]
    return uneven
