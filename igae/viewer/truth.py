# SPDX-License-Identifier: Apache-2.0
"""The views that scenes were trained on, and those that were held out: images and cameras of the data."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from igae.data import DataConfig, Manifest, view_loader
from igae.evaluation import Picture
from igae.viewer.cameras import Camera

Split = Literal["heldout", "train"]
SPLITS: tuple[Split, ...] = ("heldout", "train")
CHUNK = 16
FEW = 3
"""Cameras below which those of the training views are needed too: one alone does not tell which way is up."""
PATIENCE = 10.0
"""Seconds in which a scene's cameras have to be there."""
log = logging.getLogger("igae")


@dataclass(frozen=True)
class DataView:
    """A view of the data: its place among its scene's of a split, image [H, W, 3] over the background, and camera."""

    place: int
    image: Picture
    camera: Camera


def nearest(views: list[DataView], camera: Camera) -> DataView:
    """The view of some, one at least, whose camera looks most as another does: by direction first, then by place."""
    poses = torch.stack([view.camera.cam2world for view in views])
    turned = 1 - poses[:, :3, 2] @ camera.cam2world[:3, 2]
    away = (poses[:, :3, 3] - camera.cam2world[:3, 3]).norm(dim=1) / (1 + camera.cam2world[:3, 3].norm())
    return views[int((turned + 0.1 * away).argmin())]


class Truth:
    """Reads the views of scenes in a thread: those of a scene take as long as its shard.

    Args:
        kept: splits of scenes whose views stay in memory.
    """

    def __init__(self, config: DataConfig, manifest: Manifest, kept: int = 8) -> None:
        # Workers and a cache are for trainings; in order, a shard is read once.
        self._config = config.model_copy(update={"workers": 0, "shuffle": 0, "cache": None})
        self._manifest, self._kept = manifest, kept
        self._ids = {name: place for place, name in enumerate(manifest.scenes.names)}
        self._found: OrderedDict[tuple[str, Split], Future[list[DataView]]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "igae-views")

    def is_of(self, manifest: Manifest) -> bool:
        """Whether these are the views of a manifest."""
        return self._manifest.fingerprint == manifest.fingerprint

    def views(self, scene: str, split: Split, then: Callable[[], None]) -> list[DataView] | None:
        """Views of a scene; none if the data don't have it, or no such views. None: they are still to be read, and
        ``then`` is called when they are there. What can't be read is logged."""
        found = self._ask(scene, split, then)
        return found.result() if found.done() else None

    def cameras(self, scene: str) -> Tensor:
        """cam2world [N, 4, 4] of a scene's held-out views, and of the training views where the former are few. They are
        waited for; none (N = 0) where there are none in time."""
        found = list[Tensor]()
        for split in SPLITS:
            if len(found) < FEW:
                asked = self._ask(scene, split, lambda: None)
                wait([asked], PATIENCE)
                views = asked.result() if asked.done() and not asked.cancelled() else []
                found += [view.camera.cam2world for view in views]
        return torch.stack(found) if found else torch.empty(0, 4, 4)

    def _ask(self, scene: str, split: Split, then: Callable[[], None]) -> Future[list[DataView]]:
        key = (scene, split)
        if key not in self._found:
            self._found[key] = self._reader.submit(self._read, scene, split)
            self._found[key].add_done_callback(lambda _: then())
            if len(self._found) > self._kept:
                self._found.popitem(last=False)[1].cancel()
        self._found.move_to_end(key)
        return self._found[key]

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, name: str, split: Split) -> list[DataView]:
        scene = self._manifest.scenes[self._ids[name]] if name in self._ids else None
        if scene is None or not (scene.heldout if split == "heldout" else scene.views):
            return []
        try:
            loader = view_loader(self._config, self._manifest, [scene], batch_size=CHUNK, split=split, repeat=False)
            views = [
                (int(batch.view[i]), batch.images[i].permute(1, 2, 0).numpy(), batch.cam2world[i], batch.intrinsics[i])
                for batch in loader
                for i in range(len(batch.view))
            ]
        except (ValueError, OSError) as error:
            log.warning("the %s views of %s can't be shown: %s", split, name, error)
            return []
        views.sort(key=lambda view: view[0])  # as the source has them, along a path perhaps
        return [
            DataView(place, image, Camera(pose.double(), lens.double()))
            for place, (_, image, pose, lens) in enumerate(views)
        ]
