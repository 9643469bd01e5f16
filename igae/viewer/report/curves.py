# SPDX-License-Identifier: Apache-2.0
"""Curves of what a run recorded, as coordinates for SVG."""

import math
from dataclasses import dataclass

from igae.viewer.report.run import Record

WIDTH, HEIGHT = 420, 200  # of a chart, in pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 18, 410, 176  # edges of the plot in it
BUCKETS = 250  # of a longer line the least and the greatest of each of so many parts are drawn
WIDE = 20.0  # losses and rates that span a greater ratio have a logarithmic axis
TOGETHER = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
FAMILIES = {"lr": "learning rates", "grad_norm": "gradient norms", "gpu_memory": "GPU memory (GiB)"}
WAITS = {"data_wait": "mean", "data_wait_max": "worst rank"}
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#555555", "#e08a2e", "#7a5cc2")
Point = tuple[float, float]


@dataclass
class Tick:
    place: float
    label: str


@dataclass
class Line:
    label: str
    color: str
    paths: list[str]
    """SVG path data, one for each stage."""
    last: float


@dataclass
class Chart:
    title: str
    lines: list[Line]
    x: list[Tick]
    y: list[Tick]
    stages: list[Tick]
    """Where a stage begins, and its name."""


def charts(records: list[Record]) -> list[Chart]:
    """A chart for each figure, or for those that are compared: PSNRs, learning rates, gradient norms, ..."""
    groups: dict[str, dict[str, dict[str, list[Point]]]] = {}  # chart -> line -> stage -> points
    for record in records:
        for name, value in record.values.items():
            title, label = _group(name)
            lines = groups.setdefault(title, {}).setdefault(label, {})
            lines.setdefault(record.stage, []).append((record.step, value))
    if not groups:
        return []
    first, last = min(record.step for record in records), max(record.step for record in records)
    starts: dict[str, float] = {}
    for record in records:
        starts[record.stage] = min(record.step, starts.get(record.stage, record.step))
    return [_chart(title, groups[title], (first, last), starts) for title in sorted(groups, key=_order)]


def _group(name: str) -> tuple[str, str]:
    """The title of a figure's chart and the label of its line."""
    family, _, rest = name.partition("/")
    if rest and family in FAMILIES:
        return FAMILIES[family], rest
    if name in WAITS:
        return "data wait (share of the time)", WAITS[name]
    kind = name.rpartition("_")[2]
    if name.startswith("eval/") and kind in TOGETHER:
        return TOGETHER[kind], name.removeprefix("eval/").removesuffix(f"_{kind}")
    return name, name


def _order(title: str) -> tuple[int, str]:
    if title in TOGETHER.values():
        return 1, title
    known = [title.endswith("/total"), False, title.startswith("loss/"), *(title == t for t in FAMILIES.values())]
    return known.index(True) if any(known) else len(known), title


def _chart(
    title: str, lines: dict[str, dict[str, list[Point]]], steps: tuple[float, float], starts: dict[str, float]
) -> Chart:
    values = [value for line in lines.values() for points in line.values() for _, value in points]
    positive = [value for value in values if value > 0]
    logarithmic = (
        ("loss/" in title or title.endswith("/total") or title in (FAMILIES["lr"], FAMILIES["grad_norm"]))
        and len(positive) > 0
        and max(positive) / min(positive) > WIDE
    )
    if logarithmic:
        low, high = math.log10(min(positive)), math.log10(max(positive))
    else:
        low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - steps[0]) / (steps[1] - steps[0] or 1)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    drawn = []
    for number, (label, stages) in enumerate(lines.items()):
        paths = []
        for points in stages.values():
            if logarithmic:  # a rate of 0 is not drawn
                points = [(step, math.log10(value)) for step, value in points if value > 0]
            if points:
                places = [f"{x(step):.1f} {y(value):.1f}" for step, value in thin(points)]
                paths.append(f"M{places[0]}h0" + "".join(f"L{place}" for place in places[1:]))
        last = list(stages.values())[-1][-1][1]
        drawn.append(Line(label, COLORS[number % len(COLORS)], paths, last))
    if logarithmic:
        marks = [float(mark) for mark in range(math.ceil(low), math.floor(high) + 1)]
        marks = marks[:: max(1, math.ceil(len(marks) / 5))]
        y_ticks = [Tick(y(mark), f"1e{mark:.0f}") for mark in marks]
    else:
        y_ticks = [Tick(y(mark), f"{mark:.6g}") for mark in round_numbers(low, high)]
    x_ticks = [Tick(x(mark), f"{mark:.6g}") for mark in round_numbers(*steps)]
    begin = [Tick(x(step), stage) for stage, step in starts.items()]
    return Chart(title, drawn, x_ticks, y_ticks, begin)


def thin(points: list[Point]) -> list[Point]:
    """At most ``2 * BUCKETS`` of the points, in their order, with all that stick out: the least and the greatest value
    of each of ``BUCKETS`` runs of points."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept = []
    for i in range(BUCKETS):
        part = range(i * len(points) // BUCKETS, (i + 1) * len(points) // BUCKETS)
        ends = {min(part, key=lambda k: points[k][1]), max(part, key=lambda k: points[k][1])}
        kept += [points[k] for k in sorted(ends)]
    return kept


def round_numbers(low: float, high: float) -> list[float]:
    """Two to six multiples of 1, 2 or 5 times a power of ten in [low, high]; one where low = high."""
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 5, 10):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < 6:
            break
    return [k * step for k in range(first, last + 1)]
