# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model: ``python -m igae.evaluate --checkpoint CHECKPOINT|RUN|EXPORT [--scenes NAME ...] [key=value ...]``.

On any number of ranks, under plain python, torchrun or accelerate. Each rank measures some of the scenes and some of
the natural images (``evaluation`` of the configuration says how many); the first writes ``evaluation.json``, means and
the metrics of each scene, and ``evaluation.csv``, a scene a row.
"""

import argparse
import csv
import difflib
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igae import checkpoint, config, export
from igae.data import Manifest, Scene
from igae.errors import in_one_sentence, log_to_stderr, redact, say
from igae.evaluation import FIGURES, Evaluator, spread
from igae.export import find_model, load_weights, take_settings
from igae.models import IGAE, LPIPS
from igae.ranks import Channel, rank, world_size
from igae.scenes import SceneStore
from igae.training import Engine, Recipe, check_memory, waves

JSON, CSV = "evaluation.json", "evaluation.csv"
# What a configuration must say beyond data and model, for exports that have none.
NO_RUN = """
experiment: evaluation
data: {}
train:
  warmup: {epochs: 0, batch_size: 0, learning_rates: {}, weights: {}}
  joint: {epochs: 0, batch_size: 0, learning_rates: {}, weights: {}}
"""
log = logging.getLogger("igae")


@dataclass
class Subject:
    """What is evaluated, and on which data."""

    recipe: Recipe
    manifest: Manifest
    scenes: list[Scene]
    """Those of the data that the model has."""
    model: IGAE
    rows: Callable[[list[Scene]], Tensor]
    """Reads the planes of some of them."""


def open_subject(where: str, overrides: Sequence[str] = ()) -> Subject:
    """A model with the data that its configuration names.

    Args:
        where: path or URL of a checkpoint, a run's folder (its newest checkpoint is taken) or an export.
        overrides: ``key=value`` over the configuration that was saved with it.

    Raises:
        ValueError: there is no such model or data, or they don't belong together.
    """
    if not export.is_export(where):
        run = export.open_run(where, overrides)
        rows = run.rows
        return Subject(run.recipe, run.manifest, run.scenes, export.load_run(run), lambda s: rows([x.id for x in s]))
    recipe = _settings_of_export(where, overrides)
    manifest, found = Manifest.load(recipe.data.root), export.Export(where)
    names = frozenset(found.names)
    candidates = manifest.select(recipe.data.categories)
    scenes = [scene for scene in candidates if scene.name in names]
    if candidates and not scenes:
        raise ValueError(
            f"{redact(where)} has none of the {len(candidates)} scenes at "
            f"{redact(recipe.data.root)}: say where its own are, data.root=..."
        )
    model = IGAE.from_recipe(recipe, manifest.image_size, losses=False)
    load_weights(where, model)
    return Subject(recipe, manifest, scenes, model, lambda s: found.rows([x.name for x in s]))


def _settings_of_export(where: str, overrides: Sequence[str]) -> Recipe:
    def complete(data: dict[str, Any]) -> None:
        if any(override.startswith("autoencoder") for override in overrides):
            raise ValueError(f"autoencoder is that of {redact(where)}: leave it out")
        data.pop("autoencoder", None)  # where the run had it from
        data["model"] = where
        take_settings(data)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(export.load_config(where) or NO_RUN)
        return config.load(Recipe, path, overrides, complete=complete)


def evaluate(
    where: str, names: Sequence[str] = (), overrides: Sequence[str] = (), output: str | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure a model and write the files. All ranks call it.

    Args:
        where, overrides: as in :func:`open_subject`.
        names: of the scenes; those that ``evaluation.scenes`` chooses if left out.
        output: folder of the files; that of the run if left out.

    Returns:
        Means over all images, and the figures of each scene (see :meth:`Evaluator.table`), on every rank.

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    found = find_model(where)
    folder = _output(where, found, output)
    subject = open_subject(found, overrides)
    recipe, settings = subject.recipe, subject.recipe.evaluation
    if names:
        scenes = _named(subject, names)
    else:
        scenes = subject.scenes if settings.scenes is None else spread(subject.scenes, settings.scenes)
    if not scenes and not min(settings.natural_images, subject.manifest.images):
        raise ValueError(
            f"{redact(recipe.data.root)} has neither scenes nor natural images to evaluate on: set "
            "evaluation.natural_images above 0, or data.root to other shards"
        )
    engine = Engine(recipe.train.timeout, alone=True)
    channel, problem = Channel(recipe.train.timeout), None
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{folder} can't be made ({error.strerror}): say where the results go, --output FOLDER"
    if problem := channel.gather(problem)[0]:
        raise ValueError(problem)
    means, of_scenes = _measure(subject, scenes, engine.device, channel)
    if rank() == 0:
        _write(folder, means, of_scenes, {scene.name: scene.category for scene in scenes})
        log.info("%s", "\n".join(f"{name:24} {value:9.4f}" for name, value in means.items()))
        log.info("%d scenes: %s, %s", len(scenes), folder / JSON, folder / CSV)
    engine.close()
    return means, of_scenes


def _measure(
    subject: Subject, scenes: list[Scene], device: torch.device, channel: Channel
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    recipe, manifest = subject.recipe, subject.manifest
    groups = waves(manifest, scenes, math.ceil(len(scenes) / world_size())) if scenes else []
    own = groups[rank()] if rank() < len(groups) else []
    needed = 4 * math.prod(recipe.planes.row_shape) * len(own)
    check_memory(needed, device, "evaluate fewer scenes (evaluation.scenes)")
    store = SceneStore(recipe.planes, [scene.id for scene in own], None, device)
    if own:
        store.load_state_dict({"planes": subject.rows(own)})
    evaluator = Evaluator(
        recipe.evaluation.model_copy(update={"scenes": None}),
        recipe.data.root,
        manifest,
        scenes,
        frozenset(store.ids.tolist()),
        recipe.data.background,
        recipe.data.workers,
        device,
        channel,
        recipe.data.verify,
        recipe.data.cache,
    )
    perceptual = _lpips(recipe.train.lpips_weights, manifest.image_size, channel)
    model = subject.model.to(device).eval()
    return evaluator.table(model, store, perceptual.to(device) if perceptual else None, orbits=True)


def _lpips(weights: str | None, image_size: tuple[int, int], channel: Channel) -> LPIPS | None:
    """LPIPS where all ranks can have it. Nothing is fetched. Collective."""
    if min(image_size) < 16:
        log.info("LPIPS is left out: it needs images of 16 pixels or more")
        return None
    if not all(channel.gather(LPIPS.is_there(weights))):
        log.info(
            "LPIPS is left out: VGG16's weights are not in %s; train.lpips_weights=FILE says where they are",
            weights or "torch's hub cache",
        )
        return None
    return LPIPS(weights)


def _named(subject: Subject, names: Sequence[str]) -> list[Scene]:
    known = {scene.name: scene for scene in subject.scenes}
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}? There are {_few(list(known))}" if near else "they have none"
        raise ValueError(f"--scenes: model and data have no scene {_few(unknown)}; {hint}")
    wanted = set(names)
    return [scene for scene in subject.scenes if scene.name in wanted]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _output(where: str, model: str, output: str | None) -> Path:
    """Where the files go: what is said, or the folder of the run that a checkpoint is in."""
    if output is not None:
        if "://" in output:
            raise ValueError(f"--output {redact(output)}: give a folder of this machine")
        return Path(output)
    if "://" not in where and not export.is_export(model):
        for folder in (Path(where), *Path(model).parents[:2]):
            if (folder / "config.yaml").is_file() and not checkpoint.is_complete(str(folder)):
                return folder
    raise ValueError(f"{redact(where)} is in no run's folder: say where the results go, --output FOLDER")


def _write(
    folder: Path, means: dict[str, float], of_scenes: dict[str, dict[str, float]], categories: dict[str, str]
) -> None:
    staging = folder / f"{JSON}.part"
    staging.write_text(json.dumps({"means": means, "scenes": of_scenes}, indent=1) + "\n")
    os.replace(staging, folder / JSON)
    staging = folder / f"{CSV}.part"
    columns = [name for name in FIGURES if any(name in figures for figures in of_scenes.values())]
    with staging.open("w", newline="") as file:
        table = csv.DictWriter(file, ["scene", "category", *columns], lineterminator="\n")
        table.writeheader()
        for name, figures in of_scenes.items():
            table.writerow({"scene": name, "category": categories[name], **figures})
    os.replace(staging, folder / CSV)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 evaluation failed, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m igae.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder or URL of a checkpoint, a run or an export")
    parser.add_argument("--scenes", nargs="+", default=[], metavar="NAME", help="default: as evaluation.scenes says")
    parser.add_argument("--output", metavar="FOLDER", help=f"of {JSON} and {CSV}; default: the run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data.root=SHARDS evaluation.scenes=null"
    )
    arguments = parser.parse_intermixed_args(argv)
    # --scenes takes all that follows it.
    names = [name for name in arguments.scenes if "=" not in name]
    overrides = arguments.overrides + [name for name in arguments.scenes if "=" in name]
    log_to_stderr()
    logging.getLogger("igae").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        evaluate(arguments.checkpoint, names, overrides, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {error}")
        return 2
    except RuntimeError as error:
        if (sentence := in_one_sentence(error)) is None:
            raise
        say(f"error: {sentence}")
        return 1
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        say(traceback.format_exc())
        code = 1
    if code and world_size() > 1:
        sys.stderr.flush()
        os._exit(code)  # exit handlers would wait for ranks that don't answer any more
    sys.exit(code)
