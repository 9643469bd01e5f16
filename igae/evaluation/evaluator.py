# SPDX-License-Identifier: Apache-2.0
"""Measures and pictures of a model: deterministic, on views that are chosen once, whatever the number of ranks."""

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from igae.data import DataConfig, Manifest, Scene, ViewBatch, image_loader, orbit_like, view_loader
from igae.evaluation import pictures
from igae.evaluation.config import EvaluationConfig
from igae.models import IGAE, LPIPS, Views, psnr, to_signed
from igae.ranks import Channel, rank, world_size
from igae.scenes import SceneStore, part

CHUNK = 32
SPLITS: tuple[Literal["heldout", "train"], ...] = ("heldout", "train")
WAYS = ("encoded", "rendered")  # of latents
MEASURES = ("psnr", "ssim", "lpips")
KINDS = ("latent_psnr", *(f"{of}_{how}" for of in ("rgb", "ae", "rgb_ae") for how in MEASURES), "baseline_psnr")
FIGURES = [f"{split}/{kind}" for split in (*SPLITS, "natural", "orbit") for kind in KINDS]
"""All figures that there can be, in the order in which ranks add them up."""


class Evaluator:
    """Chosen views and natural images, and what is measured and drawn of them.

    The choice depends on the data alone. Each rank has the chosen scenes that it owns and its part of the images,
    perhaps none: when it is made it reads their held-out views, one pass of their training views and the images,
    and holds what it needs of them in memory. All ranks call the methods, in the same order.

    Args:
        root: folder or URL of the packed data.
        scenes: the scenes of the run, on all ranks the same.
        owned: ids of the scenes whose planes this rank has.
        background: color in [0, 1] behind the views.
        workers: decoding processes.
        verify: what of a shard is compared with the manifest.
        cache: folder of copies of shards.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        root: str,
        manifest: Manifest,
        scenes: list[Scene],
        owned: Set[int],
        background: tuple[float, float, float],
        workers: int,
        device: torch.device,
        channel: Channel,
        verify: Literal["off", "size", "sha256"] = "size",
        cache: str | None = None,
    ) -> None:
        self.config, self.device, self.channel = config, device, channel
        self.scenes = scenes if config.scenes is None else spread(scenes, config.scenes)
        own = [scene for scene in self.scenes if scene.id in owned]
        self.owned = {scene.id for scene in own}
        self.image_size = manifest.image_size
        self.splits: dict[str, ViewBatch] = {}
        means: dict[int, tuple[Tensor, int]] = {}
        data = DataConfig(root=root, background=background, workers=workers, shuffle=0, verify=verify, cache=cache)
        for split in SPLITS:
            if not any(_count(scene, split) for scene in own):
                continue
            chosen: dict[int, list[ViewBatch]] = {scene.id: [] for scene in own}
            loader = view_loader(data, manifest, own, batch_size=CHUNK, split=split, repeat=False)
            for batch in loader:
                for i, scene in enumerate(batch.scene.tolist()):
                    if split == "train":
                        total, seen = means.get(scene, (torch.zeros(()), 0))
                        means[scene] = (total + batch.images[i].float(), seen + 1)
                    if len(chosen[scene]) < config.views:
                        chosen[scene].append(_take(batch, slice(i, i + 1)))
            loader.close()
            self.splits[split] = _join([view for scene in own for view in chosen[scene.id]])
        self.mean_views = {scene: total / seen / 127.5 - 1.0 for scene, (total, seen) in means.items()}
        self.natural_images: Tensor | None = None
        self.natural_count = min(config.natural_images, manifest.images)
        self.part = part(self.natural_count, rank(), world_size())
        if self.part:
            here = data.model_copy(update={"workers": 0})
            natural_images = image_loader(here, manifest, batch_size=len(self.part), repeat=False, part=self.part)
            self.natural_images = next(natural_images)
            natural_images.close()

    def measure(self, model: IGAE, store: SceneStore) -> dict[str, float]:
        """The means of :meth:`table`, without LPIPS and orbits."""
        return self.table(model, store)[0]

    @torch.no_grad()
    def table(
        self, model: IGAE, store: SceneStore, perceptual: LPIPS | None = None, orbits: bool = False
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """PSNR (dB), SSIM and, where its network is given, LPIPS, on every rank: means over all images, and over those
        of each scene by its name.

        ``latent``: rendered against encoded normalized latents; ``rgb``: decoded renders against views; ``ae``:
        autoencoded views against views; ``rgb_ae``: decoded renders against autoencoded views; ``natural/ae``;
        ``constant``: the mean training view of the scene, the best prediction that does not know the camera, against
        held-out views; ``orbit/latent``: latents rendered around the object, decoded and encoded again, against
        themselves: whether the autoencoder keeps what one scene explains.

        Args:
            model: with all its weights, on every rank.
            store: planes of the scenes that this rank owns.
            perceptual: on all ranks or on none.
        """
        rows = {scene.id: row for row, scene in enumerate(self.scenes)}
        natural_images = len(rows)  # the last row
        totals = torch.zeros(2, len(rows) + 1, len(FIGURES), dtype=torch.float64)  # sums, numbers of images

        def note(row: int, name: str, values: Tensor) -> None:
            totals[0, row, FIGURES.index(name)] += values.double().cpu().sum()
            totals[1, row, FIGURES.index(name)] += len(values)

        def compare(row: int, name: str, image: Tensor, target: Tensor) -> None:
            note(row, f"{name}_psnr", psnr(image, target))
            note(row, f"{name}_ssim", _ssim(image, target))
            if perceptual is not None:
                note(row, f"{name}_lpips", perceptual.distances(image, target))

        for split, views in self.splits.items():
            for chunk in _chunks(views):
                scene = int(chunk.scene[0])
                row, truth = rows[scene], to_signed(chunk.images.to(self.device))
                latents, rendered, _, _ = self._latents(model, store, chunk, truth)
                note(row, f"{split}/latent_psnr", psnr(rendered, model.autoencoder.normalize(latents)))
                decoded = _decode(model, model.autoencoder.denormalize(rendered))
                compare(row, f"{split}/rgb", decoded, truth)
                if not model.autoencoder.is_identity:
                    again = _decode(model, latents)
                    compare(row, f"{split}/ae", again, truth)
                    compare(row, f"{split}/rgb_ae", decoded, again)
                if split == "heldout":
                    mean = self.mean_views[scene].expand(truth.shape).to(self.device)
                    note(row, "heldout/baseline_psnr", psnr(mean, truth))
        if orbits and not model.autoencoder.is_identity:
            for scene in sorted(self.owned):
                for rendered in torch.split(_render(model, store, *self._orbit(scene), self.device)[0], CHUNK):
                    image = _decode(model, model.autoencoder.denormalize(rendered))
                    again = model.autoencoder.normalize(model.autoencoder.posterior(image).mean)
                    note(rows[scene], "orbit/latent_psnr", psnr(again, rendered))
        if self.natural_images is not None and not model.autoencoder.is_identity:
            for images in torch.split(self.natural_images, 1):  # as in _chunks
                truth = to_signed(images.to(self.device))
                compare(natural_images, "natural/ae", _decode(model, model.autoencoder.posterior(truth).mean), truth)
        sums, counts = self.channel.sum(totals)

        def means(total: Tensor, count: Tensor) -> dict[str, float]:
            return {name: float(total[i] / count[i]) for i, name in enumerate(FIGURES) if count[i]}

        of_scenes = {scene.name: means(sums[row], counts[row]) for row, scene in enumerate(self.scenes)}
        return means(sums.sum(0), counts.sum(0)), of_scenes

    def _orbit(self, scene: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cameras around an owned scene, like those of its views: its id [n], cam2world [n, 4, 4], intrinsics."""
        every = _join(list(self.splits.values()))
        own = (every.scene == scene).nonzero()[:, 0]
        cam2world = orbit_like(every.cam2world[own], self.config.orbit_frames)
        ids = torch.full((len(cam2world),), scene)
        return ids, cam2world, every.intrinsics[own[:1]].expand(len(cam2world), 3, 3)

    def _latents(
        self, model: IGAE, store: SceneStore, chunk: ViewBatch, truth: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoded latents, rendered normalized latents, depth, opacity."""
        latents = model.autoencoder.posterior(truth).mean
        rendered, depth, opacity = _render(model, store, chunk.scene, chunk.cam2world, chunk.intrinsics, self.device)
        return latents, rendered, depth, opacity

    @torch.no_grad()
    def grids(self, model: IGAE, store: SceneStore) -> dict[str, pictures.Picture]:
        """Pictures by name, uint8 [H, W, 3], of held-out views (training views where there are none), a scene a row.

        ``views``: truth, autoencoder, decoded render, latents encoded and rendered (their first three channels as
        colors), depth. Without scenes: natural images, autoencoded. ``latents``, where there is an autoencoder: each
        channel, encoded and rendered side by side.

        Returns:
            The pictures on the first rank, nothing on the others and where there is nothing to show.
        """
        split = SPLITS[0] if any(scene.heldout for scene in self.scenes) else SPLITS[1]
        shown = spread([scene for scene in self.scenes if _count(scene, split)], self.config.pictures)
        if not shown:
            grid = self._natural_grid(model)
            return {} if grid is None else {"views": grid}
        # Each rank fills in its scenes. They are drawn together, because they share the ranges of their colors. One at
        # a time, because the last bits of a result can depend on what else is in its batch.
        cells = torch.zeros(len(shown), 3, *self.image_size, 3, dtype=torch.uint8)
        latents = torch.zeros(2, len(shown), *model.latent_shape)
        depths = torch.zeros(2, len(shown), *model.latent_shape[1:])
        for i, scene in enumerate(shown):
            if scene.id not in self.owned:
                continue
            views = self.splits[split]
            view = _take(views, (views.scene == scene.id).nonzero()[0])
            truth = to_signed(view.images.to(self.device))
            encoded, rendered, depth, opacity = self._latents(model, store, view, truth)
            decoded = _decode(model, model.autoencoder.denormalize(rendered))
            for j, image in enumerate((truth, _decode(model, encoded), decoded)):
                cells[i, j] = torch.from_numpy(pictures.to_uint8(image[0]))
            latents[:, i] = torch.cat([model.autoencoder.normalize(encoded), rendered]).cpu()
            depths[:, i] = torch.cat([depth, opacity]).cpu()
        cells, latents, depths = (self.channel.sum(filled) for filled in (cells, latents, depths))
        if rank() != 0:
            return {}
        both = pictures.latent_to_rgb(latents.flatten(0, 1), self.image_size)
        near = pictures.depth_to_rgb(depths[0], depths[1], self.image_size)
        rows = [[*cells[i].numpy(), both[i], both[len(shown) + i], near[i]] for i in range(len(shown))]
        names = ["truth", "autoencoder", "decoded render", "latents: encoded", "latents: rendered", "depth"]
        grids = {"views": pictures.grid(rows, names)}
        if not model.autoencoder.is_identity:
            gray = pictures.channels_to_gray(latents.flatten(0, 1), self.image_size)
            channels = range(len(gray[0]))
            pairs = [[gray[k, c] for c in channels for k in (i, len(shown) + i)] for i in range(len(shown))]
            grids["latents"] = pictures.grid(pairs, [f"{c + 1} {way}" for c in channels for way in WAYS])
        return grids

    def _natural_grid(self, model: IGAE) -> pictures.Picture | None:
        count = min(self.config.pictures, self.natural_count)
        if not count:
            return None
        cells = torch.zeros(count, 2, *self.image_size, 3, dtype=torch.uint8)
        for i, place in enumerate(self.part):
            if place < count and self.natural_images is not None:
                truth = to_signed(self.natural_images[i : i + 1].to(self.device))
                for j, image in enumerate((truth, _decode(model, model.autoencoder.posterior(truth).mean))):
                    cells[place, j] = torch.from_numpy(pictures.to_uint8(image[0]))
        cells = self.channel.sum(cells)
        return pictures.grid([list(row.numpy()) for row in cells], ["truth", "autoencoder"]) if rank() == 0 else None

    @torch.no_grad()
    def orbits(self, model: IGAE, store: SceneStore, folder: Path) -> dict[str, Path]:
        """An mp4 for some scenes: decoded render, rendered latents and depth side by side around the object. Each rank
        writes those of its scenes.

        Returns:
            Scene's name -> file, of all ranks, on the first rank; nothing on the others.
        """
        chosen = spread(self.scenes, self.config.orbits)
        written = {}
        for scene in chosen:
            if scene.id not in self.owned:
                continue
            frames = []
            rendered, depth, opacity = _render(model, store, *self._orbit(scene.id), self.device)
            latents = pictures.latent_to_rgb(rendered, self.image_size)
            depths = pictures.depth_to_rgb(depth, opacity, self.image_size)
            for i, piece in enumerate(torch.split(rendered, CHUNK)):
                for j, image in enumerate(_decode(model, model.autoencoder.denormalize(piece))):
                    k = i * CHUNK + j
                    frames.append(np.concatenate([pictures.to_uint8(image), latents[k], depths[k]], axis=1))
            written[scene.name] = folder / f"{scene.name}.mp4"
            pictures.write_video(written[scene.name], np.stack(frames))
        everywhere = {name: path for of_rank in self.channel.gather(written) for name, path in of_rank.items()}
        return {scene.name: everywhere[scene.name] for scene in chosen} if rank() == 0 else {}


def _render(
    model: IGAE, store: SceneStore, scene: Tensor, cam2world: Tensor, intrinsics: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for start in range(0, len(scene), CHUNK):
        chunk = slice(start, start + CHUNK)
        rows, index = store.locate(scene[chunk])
        views = Views(index.to(device), cam2world[chunk].to(device), intrinsics[chunk].to(device))
        parts.append(model.render(store.rows[rows.to(device)], views, None))
    latents, depth, opacity = zip(*parts, strict=True)
    return torch.cat(latents), torch.cat(depth), torch.cat(opacity)


def _decode(model: IGAE, latents: Tensor) -> Tensor:
    return model.autoencoder.decode(latents).clamp(-1.0, 1.0)


def _ssim(prediction: Tensor, target: Tensor) -> Tensor:
    value = structural_similarity_index_measure(prediction, target, data_range=2.0, reduction="none")
    assert isinstance(value, Tensor)
    return value


def _take(batch: ViewBatch, which: slice | Tensor) -> ViewBatch:
    return ViewBatch(
        batch.images[which], batch.scene[which], batch.view[which], batch.cam2world[which], batch.intrinsics[which]
    )


def _join(batches: list[ViewBatch]) -> ViewBatch:
    names = ("images", "scene", "view", "cam2world", "intrinsics")
    return ViewBatch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


def _count(scene: Scene, split: Literal["heldout", "train"]) -> int:
    return scene.heldout if split == "heldout" else scene.views


def _chunks(views: ViewBatch) -> Iterator[ViewBatch]:
    """Views of one scene at a time: the last bits of a result can depend on what else is in its batch, and which scenes
    a rank has depends on the number of ranks."""
    for scene in views.scene.unique():
        for which in torch.split((views.scene == scene).nonzero()[:, 0], CHUNK):
            yield _take(views, which)


def spread(scenes: list[Scene], count: int) -> list[Scene]:
    """``count`` scenes (or all, where there are fewer), spread evenly."""
    count = min(count, len(scenes))
    return [scenes[i * len(scenes) // count] for i in range(count)]
