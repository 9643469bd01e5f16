# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves in the folder of a run."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from igae.data import Scenes
from igae.evaluation.metrics import CSV, EXAMPLES, JSON, METRICS
from igae.evaluation.pictures import Picture, save_png
from igae.storage import write_text

Means = dict[str, float]


@dataclass
class Example:
    """A view of a scene side by side: truth, autoencoder, decoded render, latents encoded and rendered, depth, uint8
    [H, 6 W, 3]; ``labels`` say which, and what its depth goes from and to."""

    name: str
    picture: Picture
    labels: dict[str, str]


def write_results(
    folder: Path, scenes: Scenes, means: Means, of_scenes: dict[str, Means], examples: list[Example]
) -> None:
    """Write ``evaluation.json``, ``evaluation.csv`` and ``examples/*.png``, in the place of former ones."""
    write_text(folder / JSON, json.dumps({"means": means, "scenes": of_scenes}, indent=1) + "\n")
    columns = [name for name in METRICS if any(name in metrics for metrics in of_scenes.values())]
    text = io.StringIO()
    table = csv.DictWriter(text, ["scene", "category", *columns], lineterminator="\n")
    table.writeheader()
    table.writerows({"scene": scene.name, "category": scene.category, **of_scenes[scene.name]} for scene in scenes)
    write_text(folder / CSV, text.getvalue())
    for old in (folder / EXAMPLES).glob("*.png"):
        old.unlink()
    for example in examples:
        save_png(folder / EXAMPLES / f"{example.name}.png", example.picture, example.labels)
