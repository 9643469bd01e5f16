# SPDX-License-Identifier: Apache-2.0
"""Which scenes and which natural images a rank owns: functions of the data and of the number of ranks alone.

Loads are integers, ties are broken by order and random numbers are seeded: all machines come to the same result.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

PARTS = 20
"""A load is balanced if it differs from the mean by at most one part in this many: 5 %."""
ATTEMPTS = 500
"""Most starts of a search."""
STEPS = 200_000
"""Most exchanges of a search, times the things that are shared out: about a second."""
PLACES = 200
"""Cuts near each even one that the search for stretches looks at."""
LINES = 16
"""Most ranks that the table shows one by one."""
Ints = NDArray[np.int64]


def assign_scenes(shards: Ints, scenes: Ints, views: Ints, world: int) -> list[Ints]:
    """Shares the scenes out among the ranks, so that each rank's views differ by at most 5 % from the mean.

    The first of these that reaches the 5 % is taken; where none does, the most even one:

    1. whole shards: each shard is opened by one rank (shards that have a scene in common stay together);
    2. for each rank a stretch of the scenes in the shards' order: at most world - 1 shards are opened by two ranks;
    3. any scenes.

    A scene that alone has more than the mean and 5 % gets a rank to itself; the rest of this is about the other scenes
    and ranks.

    2 is balanced for certain if no scene has more than 5 % of the mean rank's views. 1 and 3 are greedy searches, which
    can miss a balance that exists: of random ones they missed 2 of 100,000 with up to ten things, and none of 12,000
    with up to 384 things for up to 32 ranks.

    Args:
        shards: int64 [n], as `scenes` and `views`: each entry says how many training views (at least 1) of a scene
            (its id) are in a training shard (its place in the manifest); only scenes that are trained.
        world: number of ranks.

    Returns:
        For each rank the ids of its scenes, ascending. Every scene is owned by one rank and every rank owns a scene.

    Raises:
        ValueError: there are fewer scenes than ranks.
    """
    order = np.lexsort((scenes, shards))
    shards, views = shards[order], views[order]
    ids, place = _in_order(scenes[order])
    if world > len(ids):
        raise ValueError(
            f"{len(ids)} scenes with training views can't be shared by {world} processes, each of which needs one: "
            "start fewer processes, or select more scenes"
        )
    loads, things = _sums(place, views, len(ids)), _joined(shards, place)
    total, alone = int(loads.sum()), list[Ints]()
    rest = np.ones(len(ids), bool)
    for scene in np.argsort(-loads, kind="stable")[:world].tolist():
        if loads[scene] <= _bounds(total, world)[1]:
            break
        alone.append(ids[[scene]])
        rest[scene], total, world = False, total - int(loads[scene]), world - 1
    _, things = np.unique(things[rest], return_inverse=True)  # in the order of before, without those that are empty
    ids, loads = ids[rest], loads[rest]
    best, owners = -1, things
    for way in _ways(things, loads, world):
        uneven = _unevenness(_sums(way, loads, world).tolist())
        if best < 0 or uneven < best:
            best, owners = uneven, way
        if uneven * PARTS <= total:
            break
    order = np.lexsort((ids, owners))
    owned = np.split(ids[order], np.searchsorted(owners[order], np.arange(1, world)))
    return sorted(alone + owned, key=lambda part: int(part[0]))


def _ways(things: Ints, loads: Ints, world: int) -> Iterator[Ints]:
    """Owners of scenes with these loads, of which those of one thing stay together."""
    if things.max() >= world - 1:
        yield _search(things, loads, world)
    if (cuts := _stretches(loads, world)) is not None:
        yield np.repeat(np.arange(world), np.diff(cuts))
    yield _search(np.arange(len(loads)), loads, world)


def _in_order(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values in the order in which they come first, and which of them each value is."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    return values[np.sort(first)], np.argsort(np.argsort(first))[number]


def _joined(shards: Ints, place: Ints) -> Ints:
    """For each scene the thing that its shards are, all that have a scene in common directly or through others; things
    are numbered in the order of their first scenes."""
    _, first = np.unique(place, return_index=True)
    _, thing = _in_order(shards)
    root = list(range(int(thing[-1]) + 1))

    def find(one: int) -> int:
        while root[one] != one:
            root[one] = root[root[one]]
            one = root[one]
        return one

    again = np.ones(len(place), bool)
    again[first] = False  # a scene that is in several shards, in all of these but the first
    for one, other in zip(thing[again].tolist(), thing[first[place[again]]].tolist(), strict=True):
        root[find(one)] = find(other)
    roots = thing[first]
    if again.any():
        roots = np.array([find(one) for one in roots.tolist()])
    return _in_order(roots)[1]


def _sums(groups: Ints, values: Ints, count: int) -> Ints:
    """The sum of the values of each group."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, groups, values)
    return sums


def part(count: int, rank: int, world: int) -> range:
    """A rank's part of ``count`` things: the parts are disjoint, complete and even within 1; some may be empty."""
    return range(rank * count // world, (rank + 1) * count // world)


def share_images(count: int, rank: int, world: int) -> range:
    """The part of ``count`` natural images that a rank owns, none of them empty.

    Raises:
        ValueError: there are fewer natural images than ranks.
    """
    if count < world:
        raise ValueError(
            f"{count} natural images can't be shared by {world} processes, each of which needs one: "
            "start fewer processes, or pack more natural images"
        )
    return part(count, rank, world)


def ownership_table(rows: Sequence[tuple[int, int, int, int]]) -> str:
    """What each rank owns, as a text of a few aligned lines; of more than 16 ranks only the extremes and the mean.

    Args:
        rows: rank, scenes, views, bytes.
    """
    mean = sum(views for _, _, views, _ in rows) / len(rows)
    if len(rows) <= LINES:
        shown = [(str(rank), str(scenes), str(views), _size(size)) for rank, scenes, views, size in rows]
    else:
        shown = []
        for name, row in (
            ("fewest", min(rows, key=lambda row: (row[2], row[0]))),
            ("most", max(rows, key=lambda row: (row[2], -row[0]))),
        ):
            shown.append((f"{row[0]} ({name} views)", str(row[1]), str(row[2]), _size(row[3])))
        means = [sum(row[i] for row in rows) / len(rows) for i in range(4)]
        shown.append((f"mean of {len(rows)}", f"{means[1]:.1f}", f"{means[2]:.1f}", _size(means[3])))
    shown.insert(0, ("rank", "scenes", "views", "size"))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in shown]
    worst = max(rows, key=lambda row: (abs(row[2] - mean), -row[0]))
    off = 100 * (worst[2] / mean - 1) if mean else 0.0
    return "\n".join([*lines, f"farthest from the mean: rank {worst[0]}, {off:+.1f} % views"])


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _unevenness(loads: Sequence[int]) -> int:
    """The largest distance of a load from the mean, times the number of loads."""
    total = sum(loads)
    return max(abs(load * len(loads) - total) for load in loads)


def _bounds(total: int, world: int) -> tuple[int, int]:
    """The smallest and the largest balanced load."""
    return -((1 - PARTS) * total // (PARTS * world)), (PARTS + 1) * total // (PARTS * world)


def _stretches(views: Ints, world: int) -> list[int] | None:
    """Where to cut the row of scenes into balanced stretches, each cut as near to an even one as that allows; None if
    there are none within PLACES scenes of even cuts."""
    ends = [0, *np.cumsum(views).tolist()]
    total = ends[-1]
    low, high = _bounds(total, world)
    reached = [[0]]  # for k balanced stretches: the places where the last of them can end
    for k in range(1, world):
        even, before, places = bisect_left(ends, k * total // world), reached[-1], []
        for place in range(max(even - PLACES, k), min(even + PLACES, len(views))):
            i = bisect_left(before, ends[place] - high, key=ends.__getitem__)
            if i < len(before) and ends[before[i]] <= ends[place] - low:
                places.append(place)
        reached.append(places)
    cuts = [len(views)]
    for k in range(world - 1, -1, -1):
        places = [place for place in reached[k] if low <= ends[cuts[0]] - ends[place] <= high]
        if not places:
            return None
        cuts.insert(0, min(places, key=lambda place: abs(ends[place] * world - k * total)))
    return cuts


def _search(things: Ints, views: Ints, world: int) -> Ints:
    """Joins things to ``world`` owners of even load: the heaviest first to the lightest load, then exchanges. If that
    is not balanced, the same in other orders. Returns the owner of each scene."""
    sums = _sums(things, views, int(things.max()) + 1)
    weights, keys, total = sums.tolist(), sums, int(sums.sum())
    found, random, steps = [], Random(0), iter(range(1 + STEPS // len(weights)))
    for _ in zip(range(ATTEMPTS), steps, strict=False):
        order = np.argsort(-keys, kind="stable")
        owners, loads = _greedy(sums[order], world)
        parts = np.split(order[np.argsort(owners, kind="stable")], np.cumsum(np.bincount(owners, minlength=world))[:-1])
        bins = [part.tolist() for part in parts]
        found.append((_exchange(weights, loads, bins, steps), bins))
        if found[-1][0] * PARTS <= total:
            break
        keys = np.array([weight * (0.5 + random.random()) for weight in weights])
    _, bins = min(found, key=lambda one: one[0])
    owners = np.empty(len(weights), np.int64)
    for k, places in enumerate(bins):
        owners[places] = k
    return owners[things]


def _greedy(weights: Ints, world: int) -> tuple[Ints, list[int]]:
    """Gives things away one after another, each to the owner with the lightest load, of equal ones to the first.

    Returns:
        The owner of each thing, and the loads.
    """
    owners, heap = np.empty(len(weights), np.int64), [(0, k) for k in range(world)]
    for i, weight in enumerate(weights.tolist()):
        load, owner = heap[0]
        owners[i] = owner
        heapq.heapreplace(heap, (load + weight, owner))
    return owners, [load for load, _ in sorted(heap, key=lambda one: one[1])]


def _exchange(weights: Sequence[int], loads: list[int], bins: list[list[int]], steps: Iterator[int]) -> int:
    """Makes bins and their loads more even, in place, until they are balanced, nothing helps, or there are no more
    steps: in a step one thing of the bin farthest from the mean and one of another change places, or one moves. Returns
    the unevenness."""
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
