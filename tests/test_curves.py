# SPDX-License-Identifier: Apache-2.0
"""Curves of a report."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igae.viewer.report import LoggedStep
from igae.viewer.report.curves import BOTTOM, BUCKETS, LEFT, RIGHT, TOP, charts, round_numbers, thin


def test_curves_have_the_recorded_values() -> None:
    records = [
        LoggedStep(step, "joint", 0.0, {"views_per_second": value}) for step, value in ((0, 10), (50, 30), (100, 20))
    ]
    (chart,) = charts({"run": records})
    points = [tuple(map(float, place.split())) for place in re.findall(r"[\d.]+ [\d.]+", chart.lines[0].paths[0])]
    middle, half = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert points == [(LEFT, BOTTOM), (middle, TOP), (RIGHT, half)]
    assert [tick.label for tick in chart.y] == ["10", "20", "30"] and chart.lines[0].last == 20
    # families share a chart, and speed comes after them
    names = [
        "views_per_second",
        "data_wait_max",
        "data_wait",
        "gpu_memory/reserved",
        "grad_norm/mlp",
        "grad_norm/planes",
    ]
    names += ["lr/mlp", "loss/total", "eval/heldout/rgb_psnr", "loss/rgb"]
    names += ["loss/natural_ae", "eval/train/rgb_psnr", "eval/heldout/rgb_ae_psnr", "eval/heldout/opacity_object"]
    found = charts({"run": [LoggedStep(1, "joint", 0.0, dict.fromkeys(names, 1.0))]})
    assert {chart.title: [line.label for line in chart.lines] for chart in found} == {
        "total loss": ["total"],
        "PSNR (dB)": ["held-out views", "training views"],
        "losses of views": ["rgb"],
        "losses of natural images": ["natural_ae"],
        "other PSNRs (dB)": ["heldout/rgb_ae"],
        "opacity, held-out views": ["object"],
        "learning rates": ["mlp"],
        "gradient norms": ["mlp", "planes"],
        "GPU memory (GiB)": ["reserved"],
        "data wait (share of the time)": ["worst rank", "mean"],
        "views_per_second": ["views_per_second"],
    }
    main = [chart.title for chart in found if chart.is_main]
    assert main == ["total loss", "PSNR (dB)", "losses of views", "losses of natural images"]
    assert [chart.title for chart in found][:4] == main
    # of several runs: a chart for each metric, a line and a color for each run, whether or not it has the metric
    a, b = [LoggedStep(1, "joint", 0.0, {"loss/total": 1.0})], [LoggedStep(9, "joint", 0.0, dict.fromkeys(names, 2.0))]
    found = charts({"a": a, "b": b})
    lines = {chart.title: {line.label: (line.color, line.last) for line in chart.lines} for chart in found}
    assert lines.keys() == {name for name in names if name.partition("/")[0] not in ("lr", "grad_norm", "gpu_memory")}
    assert [value for _, value in lines["loss/total"].values()] == [1.0, 2.0]
    assert lines["loss/rgb"] == {"b": (lines["loss/total"]["b"][0], 2.0)} and not found[0].stages
    # a rate that falls by a decade in each step is a straight line; 0 has no place on a logarithmic axis
    rates = [LoggedStep(step, "joint", 0.0, {"lr/planes": 10.0**-step, "lr/encoder": 0.0}) for step in range(5)]
    planes, encoder = charts({"run": rates})[0].lines
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", planes.paths[0])]
    assert heights == pytest.approx([TOP + (BOTTOM - TOP) * i / 4 for i in range(5)], abs=0.06) and not encoder.paths


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thin_keeps_what_sticks_out(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values * (2 if len(values) > BUCKETS else 1))]
    kept = thin(points)
    assert len(kept) <= 2 * BUCKETS and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert min(v for _, v in kept) == min(values) and max(v for _, v in kept) == max(values)


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_round_numbers(low: float, width: float) -> None:
    marks = round_numbers(low, low + width)
    assert 2 <= len(marks) <= 6
    assert all(low - 1e-6 * width <= mark <= low + 1.000001 * width for mark in marks)
