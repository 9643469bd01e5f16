# SPDX-License-Identifier: Apache-2.0
"""Latents that a stage encodes once: what they and their cameras are, and that nothing but seed, view and variant
decides about them."""

import math
import os
import signal
from pathlib import Path

import pytest
import ranks
import runs
import torch
from scene_files import open_views
from torch import Tensor

from igae import config
from igae.data import Manifest, ViewBatch
from igae.models import Views, augment, coverage_bounds, to_signed
from igae.ranks import derive_seed
from igae.training import Recipe, Trainer

Key = tuple[int, int, int]
"""Scene, view and variant."""
MOST = {"shift": 3, "zoom": 1.3, "rotate": 20}
AUGMENTED = ["train.warmup.augment={shift: 3, zoom: 1.3, rotate: 20, variants: 3}"]


def cached(recipe: str, *overrides: str) -> dict[Key, dict[str, Tensor]]:
    """What this rank encodes for the warm-up, with the state in which the run is."""
    trainer = Trainer(config.load(Recipe, recipe, list(overrides)))
    stage = trainer.open_stage("warmup")
    stage.close()
    cache = stage.cache
    assert cache is not None
    places = [key for batch in views_of(trainer) for key in zip(batch.scene.tolist(), batch.view.tolist(), strict=True)]
    assert cache.scene.tolist() == [scene for scene, _ in places for _ in range(cache.variants)]
    trainer.engine.close()
    return {
        (*place, i): {name: tensors[cache.variants * v + i] for name, tensors in cache.tensors.items()}
        for v, place in enumerate(places)
        for i in range(cache.variants)
    }


def views_of(trainer: Trainer) -> list[ViewBatch]:
    loader = trainer.data.open_views(64, repeat=False)
    batches = list(loader)
    loader.close()
    return batches


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cached")
    return str(runs.recipe_file(folder, runs.packed_data(folder)))


@pytest.fixture(scope="module")
def alone(recipe: str) -> dict[Key, dict[str, Tensor]]:
    found: dict[Key, dict[str, Tensor]] = ranks.run(cached, 1, recipe, *AUGMENTED)[0]
    return found


def test_ranks_encode_what_one_rank_does(recipe: str, alone: dict[Key, dict[str, Tensor]]) -> None:
    parts = ranks.run(cached, 2, recipe, *AUGMENTED)
    assert parts[0] and parts[1] and not parts[0].keys() & parts[1].keys()
    together = parts[0] | parts[1]
    assert together.keys() == alone.keys() and len(alone) == 34 * 3
    for key, tensors in alone.items():
        assert tensors.keys() == together[key].keys() == {"latents", "cam2world", "intrinsics", "coverage"}
        for name in ("cam2world", "intrinsics", "coverage"):
            assert torch.equal(together[key][name], tensors[name]), (key, name)
        # Other batches may round otherwise. Measured: 0.
        torch.testing.assert_close(together[key]["latents"], tensors["latents"], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_run_a_process")
def test_a_run_that_goes_on_encodes_the_same(recipe: str, alone: dict[Key, dict[str, Tensor]]) -> None:
    trainer = Trainer(config.load(Recipe, recipe, [*AUGMENTED, "experiment=stopped"]))

    def stop(*_: object) -> None:
        if trainer.progress.total == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_pre_hook(stop)
    trainer.run()
    assert 0 < trainer.progress.total < 10 and not trainer.progress.finished
    again = cached(recipe, *AUGMENTED, "experiment=stopped")
    assert again.keys() == alone.keys()
    for key, tensors in alone.items():
        assert all(torch.equal(again[key][name], value) for name, value in tensors.items()), key


@pytest.mark.usefixtures("one_run_a_process")
def test_variants_are_views_moved_with_their_cameras(recipe: str) -> None:
    """How a view was moved is read off its camera, and its latents are those of a view that is moved like this."""
    settings = [*AUGMENTED, "autoencoder.latents=mean"]
    found = cached(recipe, *settings)
    model = Trainer(config.load(Recipe, recipe, settings)).model
    manifest = Manifest.load(str(Path(recipe).parent / "shards"))
    options = {"batch_size": 100, "repeat": False, "workers": 0, "shuffle": 0}
    [batch] = list(open_views(str(Path(recipe).parent / "shards"), manifest, manifest.scenes, **options))
    moves, white = [], torch.full((3,), 255, dtype=torch.uint8)
    for i in range(3):
        keys = [(scene, view, i) for scene, view in zip(batch.scene.tolist(), batch.view.tolist(), strict=True)]
        kept = {name: torch.stack([found[key][name] for key in keys]) for name in found[keys[0]]}
        shift = (kept["intrinsics"] - batch.intrinsics)[:, :2, 2] * 16
        zoom = kept["intrinsics"][:, 0, 0] / batch.intrinsics[:, 0, 0]
        turn = batch.cam2world[:, :3, :3].mT @ kept["cam2world"][:, :3, :3]
        angle = torch.atan2(turn[:, 0, 1], turn[:, 0, 0]) * 180 / math.pi
        assert torch.equal(shift.round().abs(), shift.abs()) and shift.abs().max() == 3
        assert 1.1 < zoom.max() < 1.3 and 1 / 1.3 < zoom.min() < 1 / 1.1 and 10 < angle.abs().max() < 20
        moves.append(torch.cat([shift, zoom[:, None], angle[:, None]], 1))
        # Numbers that move a view like this.
        numbers = torch.stack(
            [shift[:, 0] / 3.5, shift[:, 1] / 3.5, zoom.log() / math.log(MOST["zoom"]), angle / MOST["rotate"]], 1
        )
        given = Views(batch.scene, batch.cam2world, batch.intrinsics, batch.images, masks=batch.masks)
        moved = augment(given, config.load(Recipe, recipe, settings).train.warmup.augment, white, (numbers + 1) / 2)
        torch.testing.assert_close(moved.cam2world, kept["cam2world"], rtol=0, atol=1e-6)
        torch.testing.assert_close(moved.intrinsics, kept["intrinsics"], rtol=0, atol=1e-6)
        assert moved.images is not None and moved.masks is not None
        with torch.no_grad():
            latents = model.autoencoder.posterior(to_signed(moved.images)).mean
        # Measured: 0. Numbers, as read, may make some color round to its other neighbor.
        assert (latents - kept["latents"]).abs().mean() < 1e-4 and latents.std() > 0.1
        bounds = coverage_bounds(moved.masks, batch.has_alpha, (16, 16))
        assert kept["coverage"].dtype == torch.uint8
        assert (bounds - kept["coverage"] / 255).abs().max() < 0.6 / 255  # rounded to the nearest
    # No two variants of a view are alike, and no two views.
    every = torch.cat(moves)
    assert len(torch.unique(every, dim=0)) == len(every) == 34 * 3
    assert torch.corrcoef(torch.stack([move[:, 2] for move in moves])).sub(torch.eye(3)).abs().max() < 0.6
    other = cached(recipe, *settings, "seed=1")
    same = [key for key in found if torch.equal(found[key]["intrinsics"], other[key]["intrinsics"])]
    assert same == []


@pytest.mark.usefixtures("one_run_a_process")
def test_without_augmentation_latents_are_those_of_the_views(recipe: str) -> None:
    """To the last bit as before there was augmentation: the noise of a posterior's sample is that of its view."""
    found = cached(recipe, *runs.PLAIN)
    trainer = Trainer(config.load(Recipe, recipe, runs.PLAIN))
    seen = 0
    for batch in views_of(trainer):
        noise = torch.empty(len(batch.scene), 4, 8, 8)
        for i, (scene, view) in enumerate(zip(batch.scene.tolist(), batch.view.tolist(), strict=True)):
            noise[i].normal_(generator=torch.Generator().manual_seed(derive_seed(0, "encode", scene, view)))
        with torch.no_grad():
            posterior = trainer.model.autoencoder.posterior(to_signed(batch.images))
        latents = posterior.mean + (0.5 * posterior.logvar).exp() * noise  # type: ignore[operator]
        for i, key in enumerate(zip(batch.scene.tolist(), batch.view.tolist(), strict=True)):
            kept = found[(*key, 0)]
            assert kept.keys() == {"latents", "cam2world", "intrinsics"}
            assert torch.equal(kept["latents"], latents[i]) and torch.equal(kept["cam2world"], batch.cam2world[i])
            assert torch.equal(kept["intrinsics"], batch.intrinsics[i])
            seen += 1
    assert seen == len(found) == 34
