# SPDX-License-Identifier: Apache-2.0
"""Adding up what is measured, over views, scenes and ranks."""

import torch
from torch import Tensor

from igae.data import Scenes
from igae.evaluation.metrics import METRICS, psnr, ssim
from igae.evaluation.results import Means
from igae.models import LPIPS
from igae.ranks import Channel


class Totals:
    """Sums and numbers of a rank's measurements: by scene, and in the last row those of natural images."""

    def __init__(self, scenes: Scenes, perceptual: LPIPS | None) -> None:
        self._scenes, self._perceptual, self._names = scenes, perceptual, list(METRICS)
        self._rows: dict[int | None, int] = {scene.id: row for row, scene in enumerate(scenes)}
        self._rows[None] = len(scenes)
        self._totals = torch.zeros(2, len(self._rows), len(METRICS), dtype=torch.float64)

    def compare(self, scene: int | None, comparison: str, images: Tensor, targets: Tensor) -> None:
        """Add a comparison of images (or latents) of one scene, by all of its measures."""
        measures = {"psnr": psnr, "ssim": ssim}
        if self._perceptual is not None:
            measures["lpips"] = self._perceptual.distances
        for measure, function in measures.items():
            if (name := f"{comparison}_{measure}") in METRICS:
                self.add(scene, name, function(images, targets))

    def add(self, scene: int | None, name: str, values: Tensor) -> None:
        """Add values [n] of a metric."""
        place = self._rows[scene], self._names.index(name)
        self._totals[0][place] += values.double().cpu().sum()
        self._totals[1][place] += len(values)

    def means(self, channel: Channel) -> tuple[Means, dict[str, Means]]:
        """Over the images of all ranks, and over those of each scene by its name. Collective."""
        sums, counts = channel.sum(self._totals)

        def means(total: Tensor, count: Tensor) -> Means:
            found = {name: float(total[i] / count[i]) for i, name in enumerate(self._names) if count[i]}
            if {"train/rgb_psnr", "heldout/rgb_psnr"} <= found.keys():
                found["gap/rgb_psnr"] = found["train/rgb_psnr"] - found["heldout/rgb_psnr"]
            return found

        of_scenes = {scene.name: means(sums[row], counts[row]) for row, scene in enumerate(self._scenes)}
        return means(sums.sum(0), counts.sum(0)), of_scenes
