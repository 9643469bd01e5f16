# SPDX-License-Identifier: Apache-2.0
"""Measures and draws a model: deterministic, on views that are chosen once, whatever the number of ranks."""

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from igae.data import DataConfig, Manifest, Scene, Scenes, ViewBatch, image_loader, orbit_like, view_loader
from igae.errors import progress
from igae.evaluation import pictures
from igae.evaluation.config import EvaluationConfig
from igae.evaluation.depth import DepthMaps, depth_errors
from igae.evaluation.metrics import latent_errors, opacity_on, ranked
from igae.evaluation.pictures import Picture
from igae.evaluation.results import Example, Means
from igae.evaluation.totals import Totals
from igae.models import IGAE, LPIPS, Views, coverage_bounds, to_signed
from igae.ranks import Channel, few_threads, rank, world_size
from igae.rendering import Cameras
from igae.scenes import SceneStore, part

CHUNK = 32
Split = Literal["heldout", "train"]
SPLITS: tuple[Split, ...] = ("heldout", "train")
NAMES: dict[Split, str] = {"heldout": "held-out", "train": "training"}
COLUMNS = ["truth", "autoencoder", "decoded render", "latents: encoded", "latents: rendered", "depth"]
_Cell = tuple[list[Picture], Tensor, Tensor]
"""Of a view: truth, autoencoder and decoded render; latents encoded and rendered; depth and opacity."""
T = TypeVar("T")


class Evaluator:
    """Chosen views and natural images, and what is measured and drawn of them.

    The choice depends on the data alone. Each rank has the chosen scenes that it owns and its part of the images,
    perhaps none: when it is made it reads their held-out views, one pass of their training views and the images,
    and holds what it needs of them in memory. All ranks call the methods, in the same order.

    Args:
        scenes: the scenes of the run, on all ranks the same.
        owned: ids of the scenes whose planes this rank has.
    """

    draw = staticmethod(pictures.grid)
    """Puts pictures together, on the first rank, while the others go on."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        manifest: Manifest,
        scenes: Scenes,
        owned: Set[int],
        device: torch.device,
        channel: Channel,
    ) -> None:
        self.config, self.device, self.channel = config, device, channel
        self.scenes = spread(scenes, config.scenes)
        own = [scene for scene in self.scenes if scene.id in owned]
        self.owned = {scene.id for scene in own}
        self.image_size = manifest.image_size
        self.mean_views: dict[int, Tensor] = {}
        self.splits: dict[Split, ViewBatch] = {}
        for split in SPLITS:
            if any(_count(scene, split) for scene in own):
                self.splits[split] = self._read_views(data, manifest, own, split)
        self.part = part(min(config.natural_images, manifest.images), rank(), world_size())
        self.natural_images = self._read_natural_images(data, manifest)

    def _read_views(self, data: DataConfig, manifest: Manifest, own: list[Scene], split: Split) -> ViewBatch:
        """The first views of each scene; takes the mean of all training views on the way."""
        chosen: dict[int, list[ViewBatch]] = {scene.id: [] for scene in own}
        sums: dict[int, tuple[Tensor, int]] = {}
        in_order = data.model_copy(update={"shuffle": 0})
        loader = view_loader(in_order, manifest, own, batch_size=CHUNK, split=split, repeat=False)
        loader.timeout = self.channel.timeout
        count = math.ceil(sum(_count(scene, split) for scene in own) / CHUNK)
        for batch in progress(f"reading {NAMES[split]} views", count, f"batches of {CHUNK}", loader):
            for i, scene in enumerate(batch.scene.tolist()):
                if split == "train":
                    total, seen = sums.get(scene, (torch.zeros(()), 0))
                    sums[scene] = (total + batch.images[i].float(), seen + 1)
                if len(chosen[scene]) < self.config.views:
                    chosen[scene].append(_take(batch, slice(i, i + 1)))
        loader.close()
        self.mean_views |= {scene: total / seen / 127.5 - 1.0 for scene, (total, seen) in sums.items()}
        return _join([view for scene in own for view in chosen[scene.id]])

    def _read_natural_images(self, data: DataConfig, manifest: Manifest) -> Tensor | None:
        if not self.part:
            return None
        here = data.model_copy(update={"shuffle": 0, "workers": 0})
        loader = image_loader(here, manifest, batch_size=len(self.part), repeat=False, part=self.part)
        images = next(loader)
        loader.close()
        return images

    def measure(self, model: IGAE, store: SceneStore) -> Means:
        """The means of :meth:`table`, without LPIPS and orbits."""
        return self.table(model, store)[0]

    @few_threads()
    @torch.no_grad()
    def table(
        self, model: IGAE, store: SceneStore, perceptual: LPIPS | None = None, orbits: bool = False
    ) -> tuple[Means, dict[str, Means]]:
        """Those of METRICS that apply, on every rank: means over all images, and those of each scene by its name.

        Args:
            model: with all its weights, on every rank.
            store: planes of the scenes that this rank owns.
            perceptual: the network of LPIPS, on all ranks or on none.
            orbits: measure ``orbit/latent_psnr`` too.
        """
        totals, has_autoencoder = Totals(self.scenes, perceptual), not model.autoencoder.is_identity
        orbits, natural = orbits and has_autoencoder, self.natural_images if has_autoencoder else None
        total = sum(len(views.scene) for views in self.splits.values()) + (0 if natural is None else len(natural))
        total += len(self.owned) * self.config.orbit_frames if orbits else 0
        with progress("measuring", total, "images") as bar:
            at = _Renderer(model, store, self.device, bar)
            for scene in sorted(self.owned):
                heldout, train = (self._measure_views(totals, at, scene, split) for split in SPLITS)
                if heldout and train:
                    totals.add(scene, "heldout/depth_error", depth_errors(heldout, train, model.options.box))
            for scene in sorted(self.owned) if orbits else ():
                for rendered in torch.split(at.render(self._orbit(scene))[0], CHUNK):
                    again = model.autoencoder.normalize(at.encode(at.decode_normalized(rendered)))
                    totals.compare(scene, "orbit/latent", again, rendered)
            for images in () if natural is None else torch.split(natural, 1):  # one at a time: see _measure_views
                truth = to_signed(images.to(self.device))
                totals.compare(None, "natural/ae", at.decode(at.encode(truth)), truth)
                bar.update()
        return totals.means(self.channel)

    def _measure_views(self, totals: Totals, at: "_Renderer", scene: int, split: Split) -> DepthMaps | None:
        """Add what is measured of an owned scene's views; returns their depth, if there are any.

        One scene at a time, because the last bits of a result can depend on what else is in its batch, and which scenes
        a rank has depends on the number of ranks.
        """
        autoencoder, seen = at.model.autoencoder, []
        for chunk in self._chunks(scene, split):
            truth = to_signed(chunk.images.to(self.device))
            latents, (normalized, depth, opacity) = at.encode(truth), at.render(chunk)
            rendered = autoencoder.denormalize(normalized)
            totals.compare(scene, f"{split}/latent", normalized, autoencoder.normalize(latents))
            decoded = at.decode(rendered)
            totals.compare(scene, f"{split}/rgb", decoded, truth)
            if not autoencoder.is_identity:
                again = at.decode(latents)
                totals.compare(scene, f"{split}/ae", again, truth)
                totals.compare(scene, f"{split}/rgb_ae", decoded, again)
            if split == "heldout":
                mean = self.mean_views[scene].expand(truth.shape).to(self.device)
                totals.compare(scene, "heldout/baseline", mean, truth)
                masks, has_alpha = chunk.masks.to(self.device), chunk.has_alpha.to(self.device)
                covered = coverage_bounds(masks, has_alpha, opacity.shape[1:])
                for name, values in opacity_on(opacity, *covered.unbind(1)).items():
                    totals.add(scene, f"heldout/opacity_{name}", values)
            cameras = chunk.cam2world.to(self.device), chunk.intrinsics.to(self.device)
            seen.append((rendered, latents, *cameras, depth, opacity))
        if not seen:
            return None
        rendered, latents, cam2world, intrinsics, depth, opacity = (torch.cat(part) for part in zip(*seen, strict=True))
        totals.add(scene, f"{split}/latent_error", latent_errors(rendered, latents))
        return DepthMaps(Cameras(cam2world, intrinsics, (depth.shape[1], depth.shape[2])), depth, opacity)

    def _chunks(self, scene: int, split: Split) -> Iterator[ViewBatch]:
        """The chosen views of a scene, CHUNK at a time."""
        if (views := self.splits.get(split)) is not None:
            which = (views.scene == scene).nonzero()[:, 0]
            for start in range(0, len(which), CHUNK):
                yield _take(views, which[start : start + CHUNK])

    @property
    def _shown(self) -> tuple[Split, Scenes]:
        """Which views the grids have, and of which scenes."""
        split = SPLITS[0] if self.scenes.heldout.any() else SPLITS[1]
        counts = self.scenes.heldout if split == SPLITS[0] else self.scenes.views
        return split, spread(self.scenes.take(np.flatnonzero(counts)), self.config.pictures)

    @property
    def caption(self) -> str:
        """What the grids show."""
        split, shown = self._shown
        return f"{NAMES[split]} views of {', '.join(shown.names)}" if shown else "natural images"

    @few_threads()
    @torch.no_grad()
    def grids(self, model: IGAE, store: SceneStore) -> dict[str, Picture]:
        """Pictures by name, uint8 [H, W, 3], of held-out views (training views where there are none): a view of each
        scene a row, or several of few scenes.

        ``views``: truth, autoencoder, decoded render, latents encoded and rendered (their first three channels as
        colors), depth. Without scenes: natural images, autoencoded. ``latents``, where there is an autoencoder: each
        channel, encoded and rendered side by side.

        Returns:
            The pictures on the first rank, nothing on the others and where there is nothing to show.
        """
        split, shown = self._shown
        if not shown:
            return self._natural_grid(_Renderer(model, store, self.device, None))
        # Each rank has its scenes. They are drawn together, because they share the ranges of their colors. One at a
        # time, because the last bits of a result can depend on what else is in its batch.
        each = self.config.pictures // len(shown)
        rows_of = [(scene.id, k) for scene in shown for k in range(min(each, self.config.views, _count(scene, split)))]
        cells = self._draw_views(model, store, rows_of, split)
        if rank() != 0:
            return {}
        both = torch.cat([cell[1] for cell in cells])  # encoded and rendered in turns
        depth, opacity = torch.stack([cell[2] for cell in cells], 1)
        colors, near = (
            pictures.latent_to_rgb(both, self.image_size),
            pictures.depth_to_rgb(depth, opacity, self.image_size),
        )
        rows = [[*cell[0], *colors[2 * i : 2 * i + 2], near[i]] for i, cell in enumerate(cells)]
        grids = {"views": self.draw(rows, COLUMNS)}
        if not model.autoencoder.is_identity:
            gray = pictures.channels_to_gray(both, self.image_size)
            channels = range(gray.shape[1])
            pairs = [[gray[2 * i + k, c] for c in channels for k in (0, 1)] for i in range(len(cells))]
            grids["latents"] = self.draw(pairs, [f"{c + 1} {way}" for c in channels for way in ("encoded", "rendered")])
        return grids

    @few_threads()
    @torch.no_grad()
    def examples(self, model: IGAE, store: SceneStore, of_scenes: dict[str, Means]) -> list[Example]:
        """A view of the worst, the median and the best scene, held-out where there are such.

        Args:
            of_scenes: the metrics of each scene, from :meth:`table`.

        Returns:
            Those, or fewer of few scenes, on the first rank; nothing on the others.
        """
        by, names = ranked(of_scenes)
        if not names:
            return []
        split: Split = SPLITS[0] if by.startswith(SPLITS[0]) else SPLITS[1]
        ends = {len(names) // 2: "median", len(names) - 1: "best", 0: "worst" if len(names) > 1 else "only"}
        ids = {scene.name: scene.id for scene in self.scenes}
        places = sorted(ends)
        cells = self._draw_views(model, store, [(ids[names[place]], 0) for place in places], split)
        found = []
        for place, (images, both, (depth, opacity)) in zip(places, cells, strict=True) if rank() == 0 else ():
            row = [*images, *pictures.latent_to_rgb(both, self.image_size)]
            row.append(pictures.depth_to_rgb(depth[None], opacity[None], self.image_size)[0])
            near, far = pictures.depth_range(depth, opacity)
            labels = {"columns": ", ".join(COLUMNS), "scene": names[place], "which": ends[place], "split": NAMES[split]}
            labels |= {"metric": by, "value": f"{of_scenes[names[place]][by]:.4g}", "scenes": str(len(names))}
            labels |= {"near": f"{near:.3f}", "far": f"{far:.3f}", "scale": pictures.depth_scale()}
            found.append(Example(ends[place], np.concatenate(row, 1), labels))
        return found

    def _draw_views(self, model: IGAE, store: SceneStore, rows: list[tuple[int, int]], split: Split) -> list[_Cell]:
        """Views, each by its scene and its number, of all ranks, on every rank."""
        found = {}
        with progress("drawing views", sum(scene in self.owned for scene, _ in rows), "views") as bar:
            at = _Renderer(model, store, self.device, bar)
            for i, (scene, number) in enumerate(rows):
                if scene in self.owned:
                    views = self.splits[split]
                    view = _take(views, (views.scene == scene).nonzero()[number])
                    truth = to_signed(view.images.to(self.device))
                    latents, (rendered, depth, opacity) = at.encode(truth), at.render(view)
                    images = [truth, at.decode(latents), at.decode_normalized(rendered)]
                    both = torch.cat([model.autoencoder.normalize(latents), rendered]).cpu()
                    drawn = [pictures.to_uint8(image[0]) for image in images]
                    found[i] = drawn, both, torch.cat([depth, opacity]).cpu()
        return self._gather(found)

    def _natural_grid(self, at: "_Renderer") -> dict[str, Picture]:
        found = {}
        for i, place in enumerate(self.part):
            if place < self.config.pictures and self.natural_images is not None:
                truth = to_signed(self.natural_images[i : i + 1].to(self.device))
                found[place] = [pictures.to_uint8(image[0]) for image in (truth, at.decode(at.encode(truth)))]
        cells = self._gather(found)
        return {"views": self.draw(cells, COLUMNS[:2])} if cells and rank() == 0 else {}

    @few_threads()
    @torch.no_grad()
    def orbits(self, model: IGAE, store: SceneStore, folder: Path) -> dict[str, Path]:
        """An mp4 for some scenes: decoded render, rendered latents and depth side by side around the object. Each rank
        writes those of its scenes.

        Returns:
            Scene's name -> file, of all ranks, on the first rank; nothing on the others.
        """
        chosen, written = spread(self.scenes, self.config.orbits), {}
        own = [(i, scene) for i, scene in enumerate(chosen) if scene.id in self.owned]
        with progress("rendering orbits", len(own) * self.config.orbit_frames, "frames") as bar:
            at = _Renderer(model, store, self.device, bar)
            for i, scene in own:
                rendered, depth, opacity = at.render(self._orbit(scene.id))
                chunks = torch.split(rendered, CHUNK)
                images = [pictures.to_uint8(image) for chunk in chunks for image in at.decode_normalized(chunk)]
                latents = pictures.latent_to_rgb(rendered, self.image_size)
                depths = pictures.depth_to_rgb(depth, opacity, self.image_size)
                written[i] = folder / f"{scene.name}.mp4"
                pictures.write_video(written[i], np.concatenate([np.stack(images), latents, depths], axis=2))
        paths = self._gather(written)
        return {scene.name: path for scene, path in zip(chosen, paths, strict=True)} if rank() == 0 else {}

    def _orbit(self, scene: int) -> ViewBatch:
        """Cameras around an owned scene that are like those of its views."""
        every = _join(list(self.splits.values()))
        own = _take(every, every.scene == scene)
        cam2world = orbit_like(own.cam2world, self.config.orbit_frames)
        first = _take(own, torch.zeros(len(cam2world), dtype=torch.int64))
        return replace(first, cam2world=cam2world)

    def _gather(self, found: dict[int, T]) -> list[T]:
        """What all ranks have found, in the order of the keys. Collective."""
        every = {key: value for of_rank in self.channel.gather(found) for key, value in of_rank.items()}
        return [every[key] for key in sorted(every)]


@dataclass
class _Renderer:
    """A model with the planes of this rank's scenes. Images are [B, 3, H, W] in [-1, 1]."""

    model: IGAE
    store: SceneStore
    device: torch.device
    bar: "tqdm[Any] | None"
    """Of the views that are rendered."""

    def encode(self, images: Tensor) -> Tensor:
        return self.model.autoencoder.posterior(images).mean

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.autoencoder.decode(latents).clamp(-1.0, 1.0)

    def decode_normalized(self, latents: Tensor) -> Tensor:
        return self.decode(self.model.autoencoder.denormalize(latents))

    def render(self, batch: ViewBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized latents, depth and opacity."""
        parts = []
        for start in range(0, len(batch.scene), CHUNK):
            chunk = slice(start, start + CHUNK)
            scenes, index = batch.scene[chunk].unique(return_inverse=True)
            cameras = (index, batch.cam2world[chunk], batch.intrinsics[chunk])
            views = Views(*(part.to(self.device) for part in cameras))
            parts.append(self.model.render(self.store.read(scenes.tolist(), catch_up=False), views, None))
            if self.bar is not None:
                self.bar.update(len(index))
        latents, depth, opacity = zip(*parts, strict=True)
        return torch.cat(latents), torch.cat(depth), torch.cat(opacity)


def _take(batch: ViewBatch, which: slice | Tensor) -> ViewBatch:
    return ViewBatch(**{name: values[which] for name, values in vars(batch).items()})


def _join(batches: list[ViewBatch]) -> ViewBatch:
    return ViewBatch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in vars(batches[0])})


def _count(scene: Scene, split: Split) -> int:
    return scene.heldout if split == "heldout" else scene.views


def spread(scenes: Scenes, count: int | None) -> Scenes:
    """``count`` scenes, spread evenly; all where there are fewer, or where it is None."""
    count = len(scenes) if count is None else min(count, len(scenes))
    return scenes.take([i * len(scenes) // count for i in range(count)])
