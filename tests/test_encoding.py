# SPDX-License-Identifier: Apache-2.0
"""What cached latents take and when they warn; the bits themselves are in tests/test_cached_views.py."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch

from igae import config
from igae.models import IGAE
from igae.training import RankData, Recipe
from igae.training.encoding import ViewEncoder, encode_views, log_once
from igae.training.preflight import check_latents

WHITE = torch.full((3,), 255, dtype=torch.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("encoding")
    return folder, str(runs.recipe_file(folder, runs.packed_data(folder)))


def encode(path: str, *overrides: str) -> tuple[Recipe, IGAE, RankData, Any]:
    recipe = config.load(Recipe, path, overrides)
    data = RankData.split(recipe)
    model = IGAE.from_recipe(recipe, data.manifest.image_size)
    return recipe, model, data, encode_views(recipe, "warmup", model, data, WHITE)


@pytest.mark.parametrize("overrides", [[], runs.PLAIN, ["train.warmup.augment.variants=3"]], ids=["all", "plain", "3"])
def test_the_bytes_that_are_said_are_those_that_are_kept(made: tuple[Path, str], overrides: list[str]) -> None:
    recipe, model, data, cache = encode(made[1], *overrides)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in cache.tensors.values())
    views = sum(scene.views for scene in data.owned)
    assert len(cache) == views
    assert ViewEncoder(recipe, "warmup", model, WHITE).bytes_of_a_view * views == kept


def test_objects_at_the_border_are_warned_of(made: tuple[Path, str], caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="igae"):
        encode(made[1])
        [line] = [record.message for record in caplog.records if "cached latents of each" in record.message]
        assert line.startswith("warmup: 34 views, 2 cached latents of each, 0.00 GiB")
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        # Two of the four scenes fill their views.
        assert (
            len(warnings) == 1 and "something at their border" in warnings[0] and "set shift and rotate" in warnings[0]
        )
        caplog.clear()
        encode(made[1], *runs.NOT_AUGMENTED)  # masks take all of them for objects
        assert [r.levelno for r in caplog.records if "something at their border" in r.message] == [logging.WARNING]
        caplog.clear()
        encode(made[1], *runs.PLAIN)  # nothing moves, nothing comes in
        assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_latents_without_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 4 * 2**30))
    check_latents(3 * 2**30, device, "warmup", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"need 4.0 GiB and .* has 3.0 GiB free: lower train.warmup.augment.variants"):
        check_latents(2**32, device, "warmup", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lower the number of scenes, or train on more GPUs"):
        check_latents(2**32, device, "joint", 1)  # type: ignore[arg-type]
