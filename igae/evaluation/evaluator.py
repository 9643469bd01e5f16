# SPDX-License-Identifier: Apache-2.0
"""Measures and pictures of a model: deterministic, on views that are chosen once."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from igae.cameras import orbit_like
from igae.data.manifest import Manifest, Scene
from igae.data.streams import ViewBatch, image_loader, view_loader
from igae.evaluation import pictures
from igae.evaluation.config import EvaluationConfig
from igae.losses import psnr
from igae.model import IGAE, Views, to_signed
from igae.scenes import SceneBank

CHUNK = 32


class Evaluator:
    """Chosen views, and what is measured and drawn of them.

    It reads the held-out views and one pass of the training views of the chosen scenes when it is made, and holds
    what it needs of them in memory.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        root: str,
        manifest: Manifest,
        scenes: list[Scene],
        background: tuple[float, float, float],
        workers: int,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.scenes = scenes if config.scenes is None else _spread(scenes, config.scenes)
        self.splits: dict[str, ViewBatch] = {}
        means: dict[int, tuple[Tensor, int]] = {}
        splits: tuple[Literal["heldout", "train"], ...] = ("heldout", "train")
        for split in splits:
            if not any(scene.heldout if split == "heldout" else scene.views for scene in self.scenes):
                continue
            chosen: dict[int, list[ViewBatch]] = {scene.id: [] for scene in self.scenes}
            loader = view_loader(
                root,
                manifest,
                self.scenes,
                batch_size=CHUNK,
                split=split,
                shuffle=0,
                repeat=False,
                workers=workers,
                background=background,
            )
            for batch in loader:
                for i, scene in enumerate(batch.scene.tolist()):
                    if split == "train":
                        total, seen = means.get(scene, (torch.zeros(()), 0))
                        means[scene] = (total + batch.images[i].float(), seen + 1)
                    if len(chosen[scene]) < config.views:
                        chosen[scene].append(_take(batch, slice(i, i + 1)))
            loader.close()
            views = [view for scene in self.scenes for view in chosen[scene.id]]
            if views:
                self.splits[split] = _join(views)
        self.mean_views = {scene: total / seen / 127.5 - 1.0 for scene, (total, seen) in means.items()}
        self.photos: Tensor | None = None
        if config.photos and manifest.images:
            photos = image_loader(
                root, manifest, batch_size=min(config.photos, manifest.images), shuffle=0, repeat=False, workers=0
            )
            self.photos = next(photos)
            photos.close()

    @torch.no_grad()
    def measure(self, model: IGAE, bank: SceneBank) -> dict[str, float]:
        """Means over images of PSNR (dB) and SSIM.

        ``latent``: rendered against encoded normalised latents; ``rgb``: decoded renders against views; ``ae``:
        autoencoded views against views; ``photos/ae``; ``constant``: the mean training view of the scene, the
        best prediction that does not know the camera, against held-out views.
        """
        sums: dict[str, list[Tensor]] = {}

        def note(name: str, values: Tensor) -> None:
            sums.setdefault(name, []).append(values.double().cpu())

        for split, views in self.splits.items():
            for chunk in _chunks(views):
                truth = to_signed(chunk.images.to(self.device))
                latents, rendered, _, _ = self._latents(model, bank, chunk, truth)
                note(f"{split}/latent_psnr", psnr(rendered, model.autoencoder.normalise(latents)))
                decoded = _decode(model, model.autoencoder.denormalise(rendered))
                note(f"{split}/rgb_psnr", psnr(decoded, truth))
                note(f"{split}/rgb_ssim", _ssim(decoded, truth))
                if not model.autoencoder.is_identity:
                    again = _decode(model, latents)
                    note(f"{split}/ae_psnr", psnr(again, truth))
                    note(f"{split}/ae_ssim", _ssim(again, truth))
                if split == "heldout":
                    mean = torch.stack([self.mean_views[int(scene)] for scene in chunk.scene])
                    note("heldout/constant_psnr", psnr(mean.to(self.device), truth))
        if self.photos is not None and not model.autoencoder.is_identity:
            for images in torch.split(self.photos, CHUNK):
                truth = to_signed(images.to(self.device))
                again = _decode(model, model.autoencoder.posterior(truth).mean)
                note("photos/ae_psnr", psnr(again, truth))
                note("photos/ae_ssim", _ssim(again, truth))
        return {name: float(torch.cat(values).mean()) for name, values in sums.items()}

    def _latents(
        self, model: IGAE, bank: SceneBank, chunk: ViewBatch, truth: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoded latents, rendered normalised latents, depth, opacity."""
        latents = model.autoencoder.posterior(truth).mean
        rendered, depth, opacity = _render(model, bank, chunk.scene, chunk.cam2world, chunk.intrinsics, self.device)
        return latents, rendered, depth, opacity

    @torch.no_grad()
    def grid(self, model: IGAE, bank: SceneBank) -> pictures.Picture:
        """Picture, uint8 [H, W, 3], of held-out views (training views where there are none), a scene a row: truth,
        autoencoder, decoded render, latents encoded and rendered, depth. Without scenes: photographs, autoencoded."""
        if not self.splits:
            assert self.photos is not None
            truth = to_signed(self.photos[: self.config.pictures].to(self.device))
            again = _decode(model, model.autoencoder.posterior(truth).mean)
            pairs = [[pictures.to_uint8(x), pictures.to_uint8(y)] for x, y in zip(truth, again, strict=True)]
            return pictures.grid(pairs, ["truth", "autoencoder"])
        views = self.splits.get("heldout", self.splits["train"])
        places = {int(scene): i for i, scene in reversed(list(enumerate(views.scene)))}
        shown = _spread([scene for scene in self.scenes if scene.id in places], self.config.pictures)
        chunk = _take(views, torch.tensor([places[scene.id] for scene in shown]))
        truth = to_signed(chunk.images.to(self.device))
        latents, rendered, depth, opacity = self._latents(model, bank, chunk, truth)
        size = (truth.shape[2], truth.shape[3])
        decoded = _decode(model, model.autoencoder.denormalise(rendered))
        again = _decode(model, latents)
        both = pictures.latent_to_rgb(torch.cat([model.autoencoder.normalise(latents), rendered]), size)
        depths = pictures.depth_to_rgb(depth, opacity, size)
        rows = [
            [*(pictures.to_uint8(x[i]) for x in (truth, again, decoded)), both[i], both[len(shown) + i], depths[i]]
            for i in range(len(shown))
        ]
        names = ["truth", "autoencoder", "decoded render", "latents: encoded", "latents: rendered", "depth"]
        return pictures.grid(rows, names)

    @torch.no_grad()
    def orbits(self, model: IGAE, bank: SceneBank, folder: Path) -> dict[str, Path]:
        """An mp4 for some scenes: decoded render, rendered latents and depth side by side around the object."""
        written = {}
        if not self.splits:
            return {}
        every = _join(list(self.splits.values()))
        for scene in _spread(self.scenes, self.config.orbits):
            own = (every.scene == scene.id).nonzero()[:, 0]
            cam2world = orbit_like(every.cam2world[own], self.config.orbit_frames)
            intrinsics = every.intrinsics[own[:1]].expand(len(cam2world), 3, 3)
            frames = []
            ids = torch.full((len(cam2world),), scene.id)
            rendered, depth, opacity = _render(model, bank, ids, cam2world, intrinsics, self.device)
            size = every.images.shape[2], every.images.shape[3]
            latents = pictures.latent_to_rgb(rendered, size)
            depths = pictures.depth_to_rgb(depth, opacity, size)
            for i, part in enumerate(torch.split(rendered, CHUNK)):
                for j, image in enumerate(_decode(model, model.autoencoder.denormalise(part))):
                    k = i * CHUNK + j
                    frames.append(np.concatenate([pictures.to_uint8(image), latents[k], depths[k]], axis=1))
            written[scene.name] = folder / f"{scene.name}.mp4"
            pictures.write_video(written[scene.name], np.stack(frames))
        return written


def _render(
    model: IGAE, bank: SceneBank, scene: Tensor, cam2world: Tensor, intrinsics: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for start in range(0, len(scene), CHUNK):
        chunk = slice(start, start + CHUNK)
        rows, index = bank.rows_of(scene[chunk])
        views = Views(index.to(device), cam2world[chunk].to(device), intrinsics[chunk].to(device))
        parts.append(model.render(bank.planes[rows.to(device)], views, None))
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


def _chunks(views: ViewBatch) -> list[ViewBatch]:
    return [_take(views, slice(i, i + CHUNK)) for i in range(0, len(views.scene), CHUNK)]


def _spread(scenes: list[Scene], count: int) -> list[Scene]:
    """``count`` scenes (or all, where there are fewer), spread evenly."""
    count = min(count, len(scenes))
    return [scenes[i * len(scenes) // count] for i in range(count)]
