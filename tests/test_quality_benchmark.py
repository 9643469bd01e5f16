# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/quality.py does besides training: its variants are recipes, and its table has the right means."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from igae import config
from igae.evaluation.metrics import METRICS
from igae.training import Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", list(quality.VARIANTS))
def test_variants_are_recipes_and_differ(name: str) -> None:
    recipe, *settings = quality.VARIANTS[name]
    loaded = config.load(Recipe, str(ROOT / "configs" / recipe), settings)
    others = [config.load(Recipe, str(ROOT / "configs" / r), s) for n, (r, *s) in quality.VARIANTS.items() if n != name]
    assert all(loaded.model_dump() != other.model_dump() for other in others)


def found(values: dict[str, float], natural: float) -> dict[str, Any]:
    scenes = {name: {"heldout/rgb_psnr": value, "heldout/ae_psnr": value + 5} for name, value in values.items()}
    return {"means": {"natural/ae_psnr": natural}, "scenes": scenes, "seconds": 10.0 + natural}


def test_the_last_scenes_are_reported_apart() -> None:
    runs = [found({"a": 20.0, "b": 22.0, "c": 30.0}, 26.0), found({"a": 21.0, "b": 23.0, "c": 32.0}, 27.0)]
    header, _, row = (line.strip("| ").split(" | ") for line in quality.table({"new": runs}, 1).splitlines())
    cells = dict(zip(header, row, strict=True))
    assert cells["variant"] == "new" and cells["seeds"] == "2" and cells["seconds"] == "36"
    assert cells["held-out RGB"] == "21.50" and cells["held-out RGB, scenes apart"] == "31.00"
    assert cells["scene AE"] == "26.50" and cells["scene AE, scenes apart"] == "36.00"
    assert cells["natural AE"] == "26.50"  # not of scenes
    assert cells["SSIM"].strip() == ""
    whole = quality.table({"new": runs}, 0).splitlines()
    assert "apart" not in whole[0] and "| 24.67 |" in whole[2]


def test_columns_are_metrics() -> None:
    assert {*quality.COLUMNS.values(), *quality.APART.values()} <= METRICS.keys()
