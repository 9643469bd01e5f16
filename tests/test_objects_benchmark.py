# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/objects.py does besides training: who is learned from, which runs there are, what is concluded."""

import argparse
import itertools
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import objects
from benchmarks.objects_table import flat_from
from igae import config
from igae.data import Manifest, Scene, Scenes, Shard, Shards
from igae.training import Recipe


@given(st.integers(0, 200), st.none() | st.integers(-1, 200), st.none() | st.integers(0, 200))
def test_each_scene_is_learned_from_or_fitted(scenes: int, learn: int | None, most: int | None) -> None:
    count = scenes if most is None else min(scenes, most)
    try:
        first, second = objects.halves(scenes, learn, most)
    except ValueError as error:
        assert "must be at least 1" in str(error)
        assert count < 2 or (learn is not None and not 1 <= learn <= count - 1)
        return
    assert [*range(*first), *range(*second)] == list(range(count))
    assert min(len(range(*first)), len(range(*second))) >= 1
    assert len(range(*first)) == (learn if learn is not None else count // 2)


@pytest.mark.parametrize(
    ("curve", "flat"),
    [
        ({5: 20.0, 10: 21.0, 20: 21.5, 40: 21.55}, 20),
        ({40: 21.55, 20: 21.45001, 10: 21.0}, 20),
        ({20: 21.44, 40: 21.55}, None),  # 0.11 dB: not yet flat
        ({5: 21.5, 10: 20.0, 20: 21.5, 40: 21.55}, 20),  # by chance as good, and worse again
        ({5: 22.0, 10: 21.9, 20: 21.8}, 5),  # longer fits are worse
        ({40: 21.55}, None),
        ({}, None),
    ],
)
def test_a_curve_is_flat_where_all_that_follows_is(curve: dict[float, float], flat: float | None) -> None:
    assert flat_from(curve) == flat


def manifest_of(views: list[int]) -> Manifest:
    scenes = Scenes.of([Scene(i, f"scene_{i}", "toys", count, 0) for i, count in enumerate(views)])
    shard = Shard("scenes-00000.tar", "scenes", 1, "0" * 64, sum(views), {s.name: s.views for s in scenes})
    return Manifest((16, 16), 0, "toys", Shards.of([shard], scenes), scenes, 0, None)


def arguments_of(folder: Path, *more: str) -> argparse.Namespace:
    given = ["--data", "shards", "--output", str(folder), "--lengths", "20", "10", "--stage1", "seed=3", *more]
    return objects.parse([*given, "--fit", "fit.wave=7", "--", "data.workers=0"])


def recipe_of(job: objects.Job) -> Recipe:
    more = ["autoencoder.path=demo"] if job.config == "fit.yaml" else []  # else it comes with the model
    assert job.command[:3] == ["train.py", "--config", job.config]
    return config.load(Recipe, job.config, [*job.command[3:], *more])


def test_runs_are_recipes_of_disjoint_scenes_and_equal_views(tmp_path: Path) -> None:
    manifest, arguments = manifest_of([4] * 7), arguments_of(tmp_path, "--base-planes", "5", "--micro", "8")
    rows: dict[str, int] = {}
    seen: set[float] = set()
    for variant in objects.VARIANTS:
        jobs = objects.jobs_of(variant, arguments, "shards", manifest)
        recipes = [recipe_of(job) for job in jobs]
        fits, first = (recipes, recipes[0]) if variant == "rgb" else (recipes[1:], recipes[0])
        rows[variant] = math.prod(first.planes.row_shape)
        assert [job.name for job in jobs] == [recipe.experiment for recipe in recipes]
        assert all(recipe.data.workers == 0 and recipe.evaluation.scenes is None for recipe in recipes)
        assert [recipe.data.categories for recipe in fits] == [{"toys": (3, 7)}] * 2
        if variant != "rgb":
            assert first.data.categories == {"toys": (0, 3)} and first.seed == 3
            assert all(fit.fits_in_waves and fit.fit.wave == 7 and fit.seed == 0 for fit in fits)
            assert [fit.model for fit in fits] == [str(Path(first.outputs) / first.experiment)] * 2
        seen |= {round(fit.train.warmup.epochs + fit.train.joint.epochs, 6) for fit in fits}
    assert seen == {16.0, 32.0}
    side = 3 * 48 * 48
    assert rows == {
        "plain": side * 32,
        "macro": side * 8 + 5 + 1,
        "light": 5 + 1,
        "micro": side * 8,
        "rgb": 3 * 64 * 64 * 32,
    }


def finish(runner: objects.Runner, job: objects.Job, model: objects.Job, psnr: float, seconds: float) -> None:
    """Files as a finished run has them; its planes are those of its model."""
    run = runner.done(job).parent
    run.mkdir(parents=True)
    recipe = recipe_of(job).model_copy(update={"planes": recipe_of(model).planes})
    (run / "config.yaml").write_text(config.dump(recipe))
    metrics = {"heldout/rgb_psnr": psnr, "heldout/latent_psnr": 30.0, "heldout/ae_psnr": 35.0}
    (run / "metrics.json").write_text(json.dumps({job.stage: metrics}))
    records: list[dict[str, float | str]] = [{"step": 1, "stage": "fit", "seconds_per_scene": seconds}]
    if job.config == "rgb_triplanes.yaml":  # 10 + 5 steps of 8 views: what 4 scenes take in `seconds` each
        rate = 15 * 8 / (4 * seconds)
        records = [{"step": step, "stage": "warmup", "views_per_second": rate} for step in (10, 15)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runner.done(job).write_text(json.dumps({"command": job.text, "seconds": 60.0}))


def test_the_table_has_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    manifest = manifest_of([4] * 7)
    (shards / "manifest.json").write_bytes(manifest.to_json())
    given = ["--data", str(shards), "--output", str(tmp_path / "out"), "--lengths", "10", "20"]
    arguments = objects.parse(given)
    runner = objects.Runner(arguments.output)
    psnr = {"plain": (24.0, 24.5), "macro": (24.05, 24.1), "rgb": (20.0, 21.0)}
    for variant, (short, long) in psnr.items():
        jobs = objects.jobs_of(variant, arguments, str(shards), manifest)
        for job, value in zip(jobs[-2:], (short, long), strict=True):
            finish(runner, job, jobs[0], value, seconds=2.0)
        if variant != "rgb":
            finish(runner, jobs[0], jobs[0], 25.0, seconds=1.0)
    result = tmp_path / "table.json"
    assert objects.main([*given, "--variants", *psnr, "--json", str(result)]) == 0  # nothing is trained
    text = capsys.readouterr().out
    rows = json.loads(result.read_text())
    assert [(row["variant"], row["epochs"], row["rgb"]) for row in rows] == [
        (variant, epochs, value) for variant in psnr for epochs, value in zip((10, 20), psnr[variant], strict=True)
    ]
    assert all(row["seconds_per_object"] == pytest.approx(2.0) for row in rows)
    assert all(row["views"] == pytest.approx(1.6 * 4 * row["epochs"]) for row in rows)
    assert [row["bytes"] for row in rows] == [884736] * 2 + [4 * (69120 + 17)] * 2 + [4 * 393216] * 2
    assert "macro, 20 epochs: -0.40 dB to plain, which has 3.20x its bytes a scene" in text
    assert "macro: flat within 0.1 dB from 10 epochs on: 2.000 s an object" in text
    assert "rgb: not flat within 0.1 dB at 20 epochs" in text
    # The same name with other settings is not taken for it.
    assert objects.main([*given, "--variants", "plain", "--micro", "4", "--stage1", "seed=1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_wrong_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert objects.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "has neither manifest.json nor one folder" in capsys.readouterr().err


def test_the_configs_learn_what_the_variants_need() -> None:
    """Each variant's planes are allowed, and only those with base planes have some."""
    for variant, micro in itertools.product(objects.VARIANTS, (1, 31)):
        planes = objects.planes_of(variant, 8, 3, micro)
        assert ("base_planes" in planes) == (variant in ("macro", "light"))
        assert yaml.safe_load(json.dumps(planes)) == planes
