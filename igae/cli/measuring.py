# SPDX-License-Identifier: Apache-2.0
"""What `igae evaluate` does.

On any number of ranks, under plain python, torchrun or accelerate. Each rank measures some of the scenes and some of
the natural images (``evaluation`` of the configuration says how many); the first writes ``evaluation.json``, means and
the metrics of each scene, and ``evaluation.csv``, a scene a row.
"""

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from igae import config
from igae.checkpoint import is_complete
from igae.data import Manifest, Scenes
from igae.errors import did_you_mean, redact
from igae.evaluation import CSV, JSON, METRICS, Evaluator, problems, spread, verdict, write_results
from igae.export import SECTIONS, Trained, data_root, find_model, is_export, load_trained
from igae.models import LPIPS
from igae.ranks import Channel, join, rank, use_share, world_size
from igae.scenes import SceneStore
from igae.training import Engine, Recipe, agree, check_memory, waves

# What a configuration must say beyond data and model, for exports that have none.
NO_RUN = """
experiment: evaluation
data: {}
train: {}
"""
NO_STAGES = dict.fromkeys(("warmup", "joint"), {"epochs": 0, "batch_size": 0, "learning_rates": {}, "weights": {}})
"""Instead of those of the run: their losses need not be installed."""
log = logging.getLogger("igae")


def evaluate(
    where: str,
    names: Sequence[str] = (),
    overrides: Sequence[str] = (),
    output: str | None = None,
    lpips: type[LPIPS] = LPIPS,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure a model and write the files. All ranks call it.

    Args:
        where: path or URL of a checkpoint, a run's folder (its newest checkpoint is taken) or an export.
        names: of the scenes; those that ``evaluation.scenes`` chooses if left out.
        overrides: ``key=value`` over the configuration that was saved with the model.
        output: folder of the files; that of the run if left out.
        lpips: the network of LPIPS.

    Returns:
        Means over all images, and the metrics of each scene (see :meth:`Evaluator.table`), on every rank.

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    join()
    use_share()
    channel = Channel()
    channel.agree({"--checkpoint": where, "--scenes": [*names], "--output": output})
    found = channel.on_first_rank(lambda: find_model(where))  # the newest checkpoint may be another one a moment later
    folder = _output(where, found, output)
    trained, recipe = channel.together(lambda: _load(found, overrides))
    manifest = agree(recipe, channel, lambda: trained.manifest or Manifest.load(data_root(recipe.data, recipe.origins)))
    scenes = _choose(trained, recipe, manifest, names)
    model = trained.model_for(manifest.image_size, recipe.data.background)
    model.options, model.renderer = recipe.render, recipe.train.kernels
    engine, channel = Engine(recipe.train.timeout, alone=True), Channel(recipe.train.timeout)
    channel.on_first_rank(lambda: _make_writable(folder))
    groups = waves(manifest, scenes, math.ceil(len(scenes) / world_size())) if scenes else []
    own = groups[rank()] if rank() < len(groups) else scenes[:0]
    store = _read_rows(trained, recipe, own, engine.device)
    ids = frozenset(own.ids.tolist())
    settings = recipe.evaluation.model_copy(update={"scenes": None})
    evaluator = Evaluator(settings, recipe.data, manifest, scenes, ids, engine.device, channel)
    perceptual = _perceptual(lpips, recipe.train.lpips_weights, manifest.image_size, channel)
    perceptual = perceptual.to(engine.device) if perceptual else None
    means, of_scenes = evaluator.table(model.to(engine.device), store, perceptual, orbits=True)
    examples = evaluator.examples(model, store, of_scenes)
    if rank() == 0:
        write_results(folder, scenes, means, of_scenes, examples)
        log.info("%d scenes: %s, %s", len(scenes), folder / JSON, folder / CSV)
        _tell(means)
    engine.close()
    return means, of_scenes


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"{folder} can't be made or written ({error.strerror})"
        raise ValueError(f"{why}: say where the results go, --output FOLDER") from None


def _tell(means: dict[str, float]) -> None:
    width = max(map(len, means), default=0)
    log.info("%s", "\n".join(f"{name:{width}} {value:9.4f}  {METRICS[name]}" for name, value in means.items()))
    log.info("%s", verdict(means))
    for problem in problems(means):
        log.warning("%s", problem)


def _load(where: str, overrides: Sequence[str]) -> tuple[Trained, Recipe]:
    """A model with the settings of its evaluation."""
    of_model = [override for override in overrides if override.partition("=")[0].split(".")[0] in SECTIONS]
    if not is_export(where):
        trained = load_trained(where, of_model)
    elif any(override.startswith("autoencoder") for override in of_model):
        raise ValueError(f"autoencoder is that of {redact(where)}: leave it out")
    else:
        trained = load_trained(where)

    def complete(data: dict[str, Any]) -> None:
        data.pop("autoencoder", None)  # where the run had it from
        if not any(override.startswith("data.cache=") for override in overrides):
            (data.get("data") or {}).pop("cache", None)  # a folder to write to, perhaps of another machine
        if isinstance(data.get("train"), dict):  # else validation says what is wrong
            data["train"] |= NO_STAGES
        trained.complete(data)

    return trained, config.load(Recipe, redact(where), overrides, complete=complete, saved=trained.config or NO_RUN)


def _choose(trained: Trained, recipe: Recipe, manifest: Manifest, names: Sequence[str]) -> Scenes:
    """The scenes to evaluate: those that are named, or those that the configuration chooses."""
    root, settings = redact(recipe.data.root), recipe.evaluation
    candidates, has = manifest.select(recipe.data.categories, recipe.origins), frozenset(trained.names)
    known = {name: place for place, name in enumerate(candidates.names) if name in has}
    if candidates and not known:
        raise ValueError(
            f"{redact(trained.where)} has none of the {len(candidates)} scenes at {root}: say where its own are, "
            "data.root=..."
        )
    if unknown := [name for name in names if name not in known]:
        hint = f"{did_you_mean(unknown[0], known, 0.0)} There are {_few(list(known))}" if known else "; they have none"
        raise ValueError(f"--scenes: model and data have no scene {_few(unknown)}{hint}")
    wanted = frozenset(names)
    scenes = candidates.take([known[name] for name in known if name in wanted])
    scenes = scenes or spread(candidates.take([*known.values()]), settings.scenes)
    if not scenes and not min(settings.natural_images, manifest.images):
        raise ValueError(
            f"{root} has neither scenes nor natural images to evaluate on: set evaluation.natural_images above 0, or "
            "data.root to other shards"
        )
    return scenes


def _read_rows(trained: Trained, recipe: Recipe, own: Scenes, device: torch.device) -> SceneStore:
    needed = 4 * math.prod(recipe.planes.row_shape) * len(own)
    check_memory(needed, device, "evaluate fewer scenes (evaluation.scenes)")
    store = SceneStore(recipe.planes, own.ids.tolist(), None, device)
    if own:
        store.load_state_dict({"planes": trained.rows(own.names)})
    return store


def _perceptual(lpips: type[LPIPS], weights: str | None, image_size: tuple[int, int], channel: Channel) -> LPIPS | None:
    """LPIPS where all ranks can have it. Nothing is fetched. Collective."""
    if min(image_size) < LPIPS.SMALLEST:
        log.info("LPIPS is left out: it needs images of %d pixels or more", LPIPS.SMALLEST)
        return None
    if not all(channel.gather(lpips.is_there(weights))):
        log.info(
            "LPIPS is left out: VGG16's weights are not in %s; train.lpips_weights=FILE says where they are",
            weights or "torch's hub cache",
        )
        return None
    return lpips(weights)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _output(where: str, model: str, output: str | None) -> Path:
    """Where the files go: what is said, or the folder of the run that a checkpoint is in."""
    if output is not None:
        if "://" in output:
            raise ValueError(f"--output {redact(output)}: give a folder of this machine")
        return Path(output)
    if "://" not in where and not is_export(model):
        for folder in (Path(where), *Path(model).parents[:2]):
            if (folder / "config.yaml").is_file() and not is_complete(str(folder)):
                return folder
    raise ValueError(f"{redact(where)} is in no run's folder: say where the results go, --output FOLDER")
