# SPDX-License-Identifier: Apache-2.0
"""What cached latents take and when they warn; the bits themselves are in tests/test_cached_views.py."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageChops
from scene_files import cut_out, write_scene

from igae import config
from igae.data import PackOptions, pack
from igae.models import IGAE
from igae.training import RankData, Recipe, Trainer
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
        assert "pack with masks" in warnings[0] and "inverted" not in warnings[0]  # those that do have none
        caplog.clear()
        encode(made[1], *runs.NOT_AUGMENTED)  # masks take all of them for objects
        assert [r.levelno for r in caplog.records if "something at their border" in r.message] == [logging.WARNING]
        caplog.clear()
        encode(made[1], *runs.PLAIN)  # nothing moves, nothing comes in
        assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("inverted", [False, True])
def test_inverted_masks_are_told(inverted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When they are packed, and before the first step."""
    write_scene(tmp_path / "scenes" / "mug", 12)
    for path in (tmp_path / "scenes" / "mug" / "images").iterdir():
        cut_out(path, alpha=True)
        *colors, alpha = Image.open(path).split()
        Image.merge("RGBA", [*colors, ImageChops.invert(alpha) if inverted else alpha]).save(path)
    with caplog.at_level(logging.INFO, logger="igae"):
        pack(str(tmp_path / "shards"), PackOptions(scenes=str(tmp_path / "scenes")))
    assert "1 scene in the format igae-data; the cameras of 0 moved into the box" in caplog.messages
    assert ("the masks seem to be inverted" in caplog.text) == inverted
    told = told_before_the_first_step(tmp_path, str(tmp_path / "shards"), caplog)
    assert len(told) == inverted
    for line in told:
        assert line.startswith("100 % of the views") and "masks may be inverted (white is the object)" in line
        assert "--fit pad" in line and "pack with masks" not in line


def framed_data(folder: Path, color: tuple[int, ...], kind: str = "PNG", framed: tuple[int, ...] = (0, 1)) -> str:
    """Shards of two scenes of noise; of the ``framed`` ones the outer three pixels are of one color."""
    for scene in (0, 1):
        write_scene(folder / "scenes" / f"scene_{scene}", 8, seed=scene)
        for path in (folder / "scenes" / f"scene_{scene}" / "images").iterdir() if scene in framed else ():
            frame = Image.new("RGBA" if len(color) == 4 else "RGB", (16, 16), color)
            inside = Image.open(path).convert(frame.mode).crop((3, 3, 13, 13))
            frame.paste(inside.resize((1, 1)).resize((10, 10)) if kind == "JPEG" else inside, (3, 3))
            frame.save(path, kind, **({"quality": 95} if kind == "JPEG" else {}))
    pack(str(folder / "shards"), PackOptions(scenes=str(folder / "scenes")))
    return str(folder / "shards")


def told_before_the_first_step(folder: Path, shards: str, caplog: pytest.LogCaptureFixture, *more: str) -> list[str]:
    """Warnings of a run about borders, up to its first step."""
    recipe = config.load(Recipe, runs.recipe_file(folder, shards), ["train.joint.natural_images=0", *more])
    caplog.clear()
    trainer, seen = Trainer(recipe), list[str]()

    def stop(*_: object) -> None:
        seen.extend(r.message for r in caplog.records if r.levelno >= logging.WARNING and "border" in r.message)
        raise KeyboardInterrupt

    trainer.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    return seen


JOINT_ALONE = ["train.warmup.epochs=0"]


@pytest.mark.parametrize("settings", [[], runs.PLAIN, JOINT_ALONE, [*JOINT_ALONE, *runs.PLAIN]], ids=str)
@pytest.mark.parametrize(
    ("color", "kind"),
    [((0, 0, 0), "PNG"), ((0, 0, 0, 255), "PNG"), ((0, 0, 0), "JPEG"), ((51, 102, 250), "PNG")],
    ids=["black", "opaque alpha", "JPEG", "blue"],
)
def test_a_border_of_another_color_than_the_background_is_told(
    color: tuple[int, ...], kind: str, settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With and without augmentation and masks, cached latents or not; the sentence has the setting that helps."""
    shards = framed_data(tmp_path, color, kind)
    [line] = told_before_the_first_step(tmp_path, shards, caplog, *settings)
    assert "100 % of the views have a border of the color" in line and "data.background is [1.0, 1.0, 1.0]" in line
    override = line.split()[-1]
    found = config.load(Recipe, runs.recipe_file(tmp_path, shards), [override]).data.background
    exact = 2 if kind == "JPEG" else 0
    assert max(abs(round(255 * x) - y) for x, y in zip(found, color, strict=False)) <= exact
    if kind == "PNG":
        again = told_before_the_first_step(tmp_path, shards, caplog, *settings, override)
        # Alpha that is opaque everywhere still says that objects fill the views.
        assert [line for line in again if len(color) == 3 or "a border of the color" in line] == []


@pytest.mark.parametrize("settings", [runs.PLAIN, [*JOINT_ALONE, *runs.PLAIN]], ids=["warm-up", "joint"])
@pytest.mark.parametrize(
    ("color", "framed"),
    [((255, 255, 255), (0, 1)), ((254, 255, 255), (0, 1)), ((0, 0, 0, 0), (0, 1)), ((0, 0, 0), ())],
    ids=["white", "nearly white", "transparent", "noise"],
)
def test_other_borders_are_not_told(
    color: tuple[int, ...],
    framed: tuple[int, ...],
    settings: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards = framed_data(tmp_path, color, framed=framed)
    assert told_before_the_first_step(tmp_path, shards, caplog, *settings) == []


def test_the_share_of_the_views_with_such_a_border_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = framed_data(tmp_path, (0, 0, 0), framed=(1,))
    [line] = told_before_the_first_step(tmp_path, shards, caplog, *runs.PLAIN)
    assert line.startswith("50 % of the views have a border of the color [0.0, 0.0, 0.0], ")


def test_latents_without_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 4 * 2**30))
    check_latents(3 * 2**30, device, "warmup", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"need 4.0 GiB and .* has 3.0 GiB free: lower train.warmup.augment.variants"):
        check_latents(2**32, device, "warmup", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lower the number of scenes, or train on more GPUs"):
        check_latents(2**32, device, "joint", 1)  # type: ignore[arg-type]
