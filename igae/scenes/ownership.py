# SPDX-License-Identifier: Apache-2.0
"""Which scenes and which natural images a rank owns: functions of the data and of the number of ranks alone.

Balance is counted in integers and ties are broken by order, so all machines come to the same result.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from random import Random

PARTS = 20
"""A rank's views may differ from the mean of all ranks by one part in this many: 5 %."""
WORK = 1_000_000
"""Steps after which a search takes the best that it has seen: about half a second."""
ATTEMPTS = 50
"""Starts of a search."""
SMALL = 10
"""Most things for which a search tries all ways: at most 115,975, the ways to group ten things."""
PARCELS = 48
"""Most different weights of a bin that exchanges look at."""
LINES = 16
"""Most ranks that the table shows one by one."""

Bins = list[list[int]]
Parcel = tuple[int, list[int]]


def assign(shards: Sequence[Mapping[int, int]], world: int) -> list[list[int]]:
    """Shares the scenes out among the ranks, so that each rank's views differ by at most 5 % from the mean.

    The first of these that reaches the 5 % is taken; where none does, the most even one:

    1. whole shards: each shard is opened by one rank (shards that have a scene in common stay together);
    2. for each rank a stretch of the scenes in the shards' order: at most world - 1 shards are opened by two ranks;
    3. any scenes.

    A scene that alone has more than the mean and 5 % gets a rank to itself; the rest of this is about the other scenes
    and ranks.

    1 and 3 are searches with a limit of work: they find nearly every balance, but can miss one. Certain is this: the
    5 % are reached if no scene has more than 5 % of the mean rank's views, or if there are at most ten scenes and it is
    possible at all; and whole shards are kept if there are at most ten and it is possible at all.

    Args:
        shards: for each training shard, in the manifest's order: scene id -> its training views there, at least 1;
            only scenes that are trained.
        world: number of ranks.

    Returns:
        For each rank its scene ids, sorted. Every scene is owned by one rank and every rank owns a scene.

    Raises:
        ValueError: there are fewer scenes than ranks.
    """
    views: dict[int, int] = {}
    home: dict[int, int] = {}  # scene -> first shard that has it
    earlier = list(range(len(shards)))  # shard -> an earlier one with which it shares scenes, or itself
    for index, shard in enumerate(shards):
        for scene in sorted(shard):
            assert shard[scene] > 0, f"scene {scene}, shard {index}"
            views[scene] = views.get(scene, 0) + shard[scene]
            first, last = sorted((_first(earlier, home.setdefault(scene, index)), _first(earlier, index)))
            earlier[last] = first
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
    groups: dict[int, list[int]] = {}
    for scene in views:
        groups.setdefault(_first(earlier, home[scene]), []).append(scene)

    def ways() -> Iterator[list[list[int]]]:
        if len(groups) >= world:
            whole = list(groups.values())
            weights = [sum(views[scene] for scene in group) for group in whole]
            yield [[scene for i in places for scene in whole[i]] for places in _search(weights, world)]
        scenes, weights = list(views), list(views.values())
        yield [[scenes[i] for i in places] for places in _stretches(weights, world)]
        yield [[scenes[i] for i in places] for places in _search(weights, world)]

    tried = []
    for owned in ways():
        loads = [sum(views[scene] for scene in scenes) for scenes in owned]
        tried.append((_unevenness(loads), owned))
        if _balanced(loads):
            break
    _, owned = min(tried, key=lambda way: way[0])
    return sorted(sorted(scenes) for scenes in alone + owned)


def part(count: int, rank: int, world: int) -> range:
    """A rank's part of ``count`` things: the parts are disjoint, complete and even within 1; some may be empty."""
    return range(rank * count // world, (rank + 1) * count // world)


def share(count: int, rank: int, world: int) -> range:
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


def table(rows: Sequence[tuple[int, int, int, int]]) -> str:
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


def _first(earlier: list[int], index: int) -> int:
    while earlier[index] != index:
        earlier[index] = earlier[earlier[index]]
        index = earlier[index]
    return index


def _unevenness(loads: Sequence[int]) -> tuple[int, int]:
    """The largest distance of a load from the mean, times the number of loads; where two are equal in this, the sum of
    squares decides."""
    total = sum(loads)
    return max(abs(load * len(loads) - total) for load in loads), sum(load * load for load in loads)


def _balanced(loads: Sequence[int]) -> bool:
    return _unevenness(loads)[0] * PARTS <= sum(loads)


def _bounds(total: int, world: int) -> tuple[int, int]:
    """The smallest and the largest balanced load."""
    return -((1 - PARTS) * total // (PARTS * world)), (PARTS + 1) * total // (PARTS * world)


def _stretches(weights: Sequence[int], world: int) -> list[range]:
    """Cuts a row of weights into stretches, none of them empty: at the places nearest to even ones, or, where a heavy
    weight makes these uneven, at others that make all stretches balanced, if there are any."""
    ends = list(accumulate(weights, initial=0))
    count, total = len(weights), ends[-1]

    def nearest(k: int, places: Sequence[int]) -> int:
        """The one of the sorted places nearest to the even cut after k stretches."""
        i = bisect_left(places, k * total, key=lambda place: ends[place] * world)
        return min(places[max(i - 1, 0) : i + 1], key=lambda place: abs(ends[place] * world - k * total))

    cuts = [0]
    for k in range(1, world):
        cuts.append(nearest(k, range(cuts[-1] + 1, count - world + k + 1)))
    cuts.append(count)
    if not _balanced([ends[b] - ends[a] for a, b in zip(cuts, cuts[1:], strict=False)]):
        cuts = _even_cuts(ends, world, nearest) or cuts
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _even_cuts(ends: Sequence[int], world: int, nearest: Callable[[int, Sequence[int]], int]) -> list[int] | None:
    """Cuts whose stretches are all balanced; None if there are none, or too many places to look at."""
    total = ends[-1]
    low, high = _bounds(total, world)
    reached = [[0]]  # for k stretches, all balanced: the places where the last of them can end
    work = 0
    for k in range(1, world + 1):
        before, i, places = reached[-1], 0, []
        begin = bisect_left(ends, max(ends[before[0]] + low, total - (world - k) * high))
        end = bisect_right(ends, min(ends[before[-1]] + high, total - (world - k) * low))
        for place in range(begin, end):
            while i < len(before) and ends[before[i]] < ends[place] - high:
                i += 1
            if i < len(before) and ends[before[i]] <= ends[place] - low:
                places.append(place)
        work += end - begin
        if not places or work > WORK:
            return None
        reached.append(places)
    cuts = [len(ends) - 1]
    for k in range(world - 1, -1, -1):
        begin = bisect_left(reached[k], ends[cuts[-1]] - high, key=ends.__getitem__)
        end = bisect_right(reached[k], ends[cuts[-1]] - low, key=ends.__getitem__)
        cuts.append(nearest(k, reached[k][begin:end]))
    return cuts[::-1]


def _search(weights: Sequence[int], world: int) -> Bins:
    """Puts weights into bins of even load; a bin is a list of places in ``weights``, and none is empty.

    The heaviest weight first into the lightest bin, then exchanges between bins. If that is not balanced: all ways for
    few weights, other starts for many.
    """
    count = len(weights)
    keys: Sequence[float] = weights
    tried = []
    work, random = WORK, Random(0)
    possible = max(weights) <= _bounds(sum(weights), world)[1]
    for _ in range(ATTEMPTS):
        bins: Bins = [[] for _ in range(world)]
        heap = [(0, index) for index in range(world)]
        for i in sorted(range(count), key=lambda i: (-keys[i], i)):
            load, index = heap[0]
            bins[index].append(i)
            heapq.heapreplace(heap, (load + weights[i], index))
        work -= 2 * count + _exchange(weights, bins, work)
        loads = [sum(weights[i] for i in places) for places in bins]
        if _balanced(loads):
            return bins
        tried.append((_unevenness(loads), bins))
        if work <= 0 or not possible:
            break
        if count <= SMALL:
            return _all_ways(weights, world) or bins
        keys = [weight * (0.5 + random.random()) for weight in weights]
    return min(tried, key=lambda way: way[0])[1]


def _exchange(weights: Sequence[int], bins: Bins, limit: int) -> int:
    """Makes bins more even, in place, until all are balanced or nothing helps: one or two weights of a bin, or none,
    change places with one or two of another, or none. Returns the steps that it took, ``limit`` or little more."""
    total, world, work = sum(weights), len(bins), 0
    loads = [sum(weights[i] for i in places) for places in bins]
    helped, parcels = True, list[list[Parcel]]()
    while helped and work < limit and not _balanced(loads):
        parcels = parcels or [_parcels(weights, places) for places in bins]
        helped = False
        for a in sorted(range(world), key=lambda index: (-abs(loads[index] * world - total), index)):
            most, choice = 0, None
            for b in range(world):
                heavy, light = (a, b) if loads[a] > loads[b] else (b, a)
                gap, back, j = loads[heavy] - loads[light], parcels[light], 0
                if gap < 2:
                    continue
                work += len(parcels[heavy]) + len(back)
                for weight, go in parcels[heavy]:
                    # The best way back leaves the two bins with loads as equal as can be. It grows with the weight.
                    while j + 1 < len(back) and abs(2 * (weight - back[j + 1][0]) - gap) <= abs(
                        2 * (weight - back[j][0]) - gap
                    ):
                        j += 1
                    moved = weight - back[j][0]
                    if moved * (gap - moved) > most:  # half of what the sum of the squared loads loses
                        most, choice = moved * (gap - moved), (heavy, light, moved, go, back[j][1])
            if choice is not None:
                heavy, light, moved, go, come = choice
                bins[heavy] = [i for i in bins[heavy] if i not in go] + come
                bins[light] = [i for i in bins[light] if i not in come] + go
                for index, change in ((heavy, -moved), (light, moved)):
                    loads[index] += change
                    parcels[index] = _parcels(weights, bins[index])
                    work += len(bins[index])
                helped = True
                break
            if work >= limit:
                break
    return work


def _parcels(weights: Sequence[int], places: list[int]) -> list[Parcel]:
    """Weights of none, one or two of a bin's places, ascending, each weight once, and the places."""
    alike: dict[int, list[int]] = {}
    for i in places:
        alike.setdefault(weights[i], []).append(i)
    kinds = sorted(alike)
    kinds = [kinds[k * len(kinds) // PARCELS] for k in range(PARCELS)] if len(kinds) > PARCELS else kinds
    found: dict[int, list[int]] = {0: []}
    for kind in kinds:
        found.setdefault(kind, alike[kind][:1])
    for a, kind in enumerate(kinds):
        if len(alike[kind]) > 1:
            found.setdefault(2 * kind, alike[kind][:2])
        for other in kinds[a + 1 :]:
            found.setdefault(kind + other, [alike[kind][0], alike[other][0]])
    return sorted(found.items())


def _all_ways(weights: Sequence[int], world: int) -> Bins | None:
    """Balanced bins; None if there are none."""
    total, count = sum(weights), len(weights)
    low, high = _bounds(total, world)
    order = sorted(range(count), key=lambda i: (-weights[i], i))
    rest = list(accumulate((weights[i] for i in reversed(order)), initial=0))[::-1]
    loads = [0] * world
    bins: Bins = [[] for _ in range(world)]

    def place(k: int, missing: int) -> bool:  # missing: from the bins that are too light, up to low
        if k == count or missing > rest[k]:
            return not missing
        weight, tried = weights[order[k]], set[int]()
        for index in sorted(range(world), key=loads.__getitem__):
            if loads[index] in tried or loads[index] + weight > high:
                continue
            tried.add(loads[index])
            less = min(weight, max(low - loads[index], 0))
            loads[index] += weight
            bins[index].append(order[k])
            if place(k + 1, missing - less):
                return True
            loads[index] -= weight
            bins[index].pop()
        return False

    return bins if place(0, low * world) else None
