# SPDX-License-Identifier: Apache-2.0
"""Curves of what a run logged, as coordinates for SVG."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from igae.evaluation import METRICS
from igae.models import LossWeights
from igae.viewer.report.run import MAX_NAMES, LoggedStep

WIDTH, HEIGHT = 420, 220  # of a chart, in pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 20, 410, 194  # edges of the plot in it
BUCKETS = 250  # of a longer line the least and the greatest of each of so many parts are drawn
WIDE = 20.0  # ratio of the values above which losses, learning rates and norms have a logarithmic axis
COMPARED = {"psnr": "other PSNRs (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
PSNR = "PSNR (dB)"
PSNRS = {
    "eval/heldout/rgb_psnr": "held-out views",
    "eval/train/rgb_psnr": "training views",
    "eval/heldout/ae_psnr": "autoencoder alone",
    "eval/heldout/baseline_psnr": "mean training image",
}
FAMILIES = {"lr": "learning rates", "grad_norm": "gradient norms", "gpu_memory": "GPU memory (GiB)"}
WAITS = {"data_wait": "mean", "data_wait_max": "worst rank"}
MAIN = ("total loss", PSNR, "losses of views", "losses of natural images")
MAIN_OF_SEVERAL = ("loss/total", "eval/heldout/rgb_psnr", "eval/train/rgb_psnr", "eval/heldout/ae_psnr")
"""Charts that are seen without a click."""
EXPLAINED = {
    "loss/total": "weighted sum of the losses",
    "views_per_second": "views of all ranks per second, evaluation and checkpoints included",
    "seconds_per_scene": "seconds that a fit takes for a scene",
    "data_wait": "share of the time in which steps wait for data, mean over the ranks",
    "data_wait_max": "share of the time in which steps of the worst rank wait for data",
    "straggler_factor": "time until a step waits for other ranks: that of the slowest over the mean",
    "slowest_rank": "the rank that the others wait for",
    "skipped": "steps that were left out because a loss or gradient was not finite",
    "step": "steps of the run",
    "scenes": "scenes that were fitted",
    "minutes": "from the first to the last record of the stage, interruptions included",
}
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#555555", "#e08a2e", "#7a5cc2")
Point = tuple[float, float]


class Tick(NamedTuple):
    place: float
    label: str


class Curve(NamedTuple):
    label: str
    name: str
    """Of the metric."""
    color: str
    paths: list[str]
    """SVG path data, one for each stage."""
    last: float


class Chart(NamedTuple):
    title: str
    lines: list[Curve]
    x: list[Tick]
    y: list[Tick]
    stages: list[Tick]
    """Where a stage begins, and its name."""
    is_main: bool


class _Axis(NamedTuple):
    """Values from ``low`` to ``high`` are put from ``start`` to ``end``, in pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low or 1)


def charts(runs: Mapping[str, list[LoggedStep]]) -> list[Chart]:
    """Of one run, a chart for each metric or for those that are compared: PSNRs, learning rates, ... Of several runs, a
    chart for each metric, with a line for each run."""
    groups: dict[str, dict[tuple[str, str], dict[str, list[Point]]]] = {}  # chart -> label, metric -> stage -> points
    starts: dict[str, float] = {}
    alone = len(runs) == 1
    for run, steps in runs.items():
        names: set[str] = set()
        for logged in steps:
            starts[logged.stage] = min(logged.step, starts.get(logged.stage, logged.step))
            for name, value in logged.values.items():
                if name not in names and len(names) == MAX_NAMES or (not alone and name.partition("/")[0] in FAMILIES):
                    continue
                names.add(name)
                title, label = _group(name) if alone else (name, run)
                stages = groups.setdefault(title, {}).setdefault((label, name), {})
                stages.setdefault(logged.stage, []).append((logged.step, value))
    places = [logged.step for steps in runs.values() for logged in steps]
    x = _Axis(min(places, default=0), max(places, default=0), LEFT, RIGHT)
    begin = [Tick(x.at(step), stage) for stage, step in starts.items()] if alone else []
    color = {run: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}
    return [_chart(title, groups[title], x, begin, {} if alone else color) for title in sorted(groups, key=_order)]


@functools.cache
def _group(name: str) -> tuple[str, str]:
    """The title of a metric's chart and the label of its line."""
    family, _, rest = name.partition("/")
    if name == "loss/total" or name in PSNRS:
        return (PSNR, PSNRS[name]) if name in PSNRS else ("total loss", "total")
    if family == "loss":
        return f"losses of {'natural images' if rest.startswith('natural_') else 'views'}", rest
    if rest and family in FAMILIES:
        return FAMILIES[family], rest
    if name in WAITS:
        return "data wait (share of the time)", WAITS[name]
    if rest.startswith("heldout/opacity_"):
        return "opacity, held-out views", rest.removeprefix("heldout/opacity_")
    kind = name.rpartition("_")[2]
    if family == "eval" and kind in COMPARED and not rest.startswith("gap/"):  # it has another range
        return COMPARED[kind], rest.removesuffix(f"_{kind}")
    return name, name


def explain(name: str) -> str:
    """What a metric is; empty for an unknown one."""
    name = name.removeprefix("eval/")
    family, _, rest = name.partition("/")
    if family == "loss" and rest in LossWeights.model_fields:
        return f"{LossWeights.model_fields[rest].description}"
    if rest and family in FAMILIES:
        return f"{FAMILIES[family]}: {rest}"
    return METRICS.get(name) or EXPLAINED.get(name, "")


def _order(title: str) -> tuple[int, str]:
    main = [title == other for other in (*MAIN, *MAIN_OF_SEVERAL)]
    families = [title == family for family in (*COMPARED.values(), *FAMILIES.values())]
    return [*main, title.startswith("eval/"), title.startswith("loss/"), *families, True].index(True), title


def _chart(
    title: str,
    lines: dict[tuple[str, str], dict[str, list[Point]]],
    x: _Axis,
    stages: list[Tick],
    colors: Mapping[str, str],
) -> Chart:
    values = [value for by_stage in lines.values() for points in by_stage.values() for _, value in points]
    positive = [value for value in values if value > 0]
    varies = "loss" in title or title.endswith("/total") or title in (FAMILIES["lr"], FAMILIES["grad_norm"])
    logarithmic = varies and bool(positive) and max(positive) / min(positive) > WIDE
    scaled = math.log10 if logarithmic else float
    low, high = (scaled(edge(positive if logarithmic else values)) for edge in (min, max))
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a constant is in the middle
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    y = _Axis(low, high, BOTTOM, TOP)
    drawn = []
    for ((label, name), by_stage), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        paths = []
        for points in by_stage.values():
            shown = thin([point for point in points if point[1] > 0 or not logarithmic])
            places = [f"{x.at(step):.1f} {y.at(scaled(value)):.1f}" for step, value in shown]
            paths += [f"M{places[0]}h0" + "".join(f"L{place}" for place in places[1:])] if places else []
        drawn.append(Curve(label, name, colors.get(label, color), paths, list(by_stage.values())[-1][-1][1]))
    if logarithmic:
        powers = range(math.ceil(low), math.floor(high) + 1)
        y_ticks = [Tick(y.at(power), f"{10.0**power:g}") for power in powers[:: math.ceil(len(powers) / 5)]]
    else:
        y_ticks = [Tick(y.at(mark), f"{mark:.6g}") for mark in round_numbers(low, high)]
    x_ticks = [Tick(x.at(mark), f"{mark:.6g}") for mark in round_numbers(x.low, x.high)]
    return Chart(title, drawn, x_ticks, y_ticks, stages, title in (*MAIN, *MAIN_OF_SEVERAL))


def thin(points: list[Point]) -> list[Point]:
    """At most ``2 * BUCKETS`` of the points, in their order, with all that stick out: the least and the greatest value
    of each of ``BUCKETS`` runs of points."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept = []
    for i in range(BUCKETS):
        part = range(i * len(points) // BUCKETS, (i + 1) * len(points) // BUCKETS)
        ends = {extreme(part, key=lambda k: points[k][1]) for extreme in (min, max)}
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
