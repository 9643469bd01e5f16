# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its results: stages one after another, checkpoints, evaluation, progress."""

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from igae import checkpoint, config
from igae.autoencoder import load_autoencoder
from igae.checkpoint import Checkpoint, Progress
from igae.data.manifest import Manifest
from igae.distributed import derive_seed
from igae.engine import Engine
from igae.evaluation import pictures
from igae.evaluation.evaluator import Evaluator
from igae.guards import check_changes, check_memory, lock_run
from igae.losses import LPIPS
from igae.model import IGAE
from igae.recipe import Recipe, StageName
from igae.scenes import SceneBank
from igae.stage import Stage, fit_scale
from igae.tracking import Tracker

STAGES: tuple[StageName, ...] = ("warmup", "joint")
log = logging.getLogger("igae")


class TrainingError(RuntimeError):
    """Training can't go on; the text says why and what to do."""


class Trainer:
    """Everything of one run. Making it reads the data's manifest, loads the autoencoder and the newest checkpoint.

    Args:
        resume: ``auto`` goes on from the newest complete checkpoint of the run, if there is one; ``never`` refuses a
            folder that has one; anything else is the path of a checkpoint to start from.

    Raises:
        ValueError: the configuration, the data or the checkpoint don't fit together.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto") -> None:
        self.recipe = recipe
        self.folder = Path(recipe.outputs) / recipe.experiment
        self.manifest = Manifest.load(recipe.data.root)
        self.scenes = self.manifest.select(recipe.data.categories)
        if self.manifest.scenes and not self.scenes:
            raise ValueError(
                f"data.categories selects none of the {len(self.manifest.scenes)} scenes at {recipe.data.root}"
            )
        self.engine = Engine(recipe.train.precision)
        found = self._find(resume)
        needs_lpips = any(s.epochs and s.weights.photo_lpips for s in (recipe.train.warmup, recipe.train.joint))
        perceptual = LPIPS(recipe.train.lpips_weights) if needs_lpips else None
        device = self.engine.device
        self.model = IGAE(
            load_autoencoder(recipe.autoencoder, derive_seed(recipe.seed, "autoencoder")),
            torch.Generator().manual_seed(derive_seed(recipe.seed, "mlp")),
            recipe.planes.features,
            recipe.render,
            self.manifest.image_size,
            recipe.data.background,
            perceptual.to(device) if perceptual is not None else None,
        ).to(device)
        needed = 4 * len(self.scenes) * 3 * recipe.planes.resolution**2 * recipe.planes.features * 3
        check_memory(needed, device)
        self.bank = SceneBank(recipe.planes, [scene.id for scene in self.scenes], recipe.seed, device)
        digest = hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()
        self.progress = Progress(STAGES[0], 0, 0, data=digest)
        self._restored: Checkpoint | None = None
        if found is not None:
            self._restore(found)
        elif not self.model.autoencoder.scale_is_fitted:
            fit_scale(recipe, self.model.autoencoder, self.manifest, self.scenes, device)
        if found is None:
            self.model.refresh_background()
        self._stop_signal: int | None = None

    def _find(self, resume: str) -> Path | None:
        complete = checkpoint.list_complete(self.folder / "checkpoints")
        if resume not in ("auto", "never"):
            path = Path(resume)
            if not complete or complete[-1].resolve() == path.resolve():
                return path
            if path.resolve().parent == complete[-1].resolve().parent:
                raise ValueError(
                    f"--resume {path}: {self.folder} has gone on to {complete[-1].name}: branch off into another run, "
                    "experiment=NAME, or remove the later checkpoints"
                )
            log.info("%s was begun from %s and has checkpoints of its own", self.folder, path)
        if complete and resume == "never":
            raise ValueError(
                f"{self.folder} already has checkpoints: choose another name with experiment=NAME, or remove the folder"
            )
        return complete[-1] if complete else None

    def _restore(self, folder: Path) -> None:
        loaded = checkpoint.load(folder)
        if loaded.progress.data != self.progress.data:
            raise ValueError(
                f"{folder} was trained on other shards than those at {self.recipe.data.root}: use a new experiment=NAME"
            )
        check_changes(folder, loaded, self.recipe)
        ids, planes = loaded.scenes["ids"], loaded.scenes["planes"]
        if not torch.equal(ids, self.bank.scene_ids) or planes.shape != self.bank.planes.shape:
            raise ValueError(
                f"{folder} has planes {list(planes.shape)} and this configuration has {list(self.bank.planes.shape)} "
                "(or other scenes): data.categories and planes can't change within a run; use a new experiment=NAME"
            )
        try:
            self.model.load_state_dict(loaded.shared)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"{folder} has weights of another autoencoder or MLP than this configuration ({reason}): "
                "use a new experiment=NAME"
            ) from error
        self.bank.planes.copy_(planes)
        self.progress, self._restored = loaded.progress, loaded
        log.info("going on from %s", folder)

    def run(self, only: StageName | None = None) -> dict[str, float]:
        """Run the stages that are still to do, or one of them.

        Returns:
            The last evaluation's figures (empty if nothing was to do). A run that SIGTERM ended returns early, after
            its checkpoint.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run(self.folder)
        (self.folder / "config.yaml").write_text(config.dump(self.recipe))
        self.tracker = Tracker(self.folder, self.recipe.tracking, self.progress.total, enabled=self.engine.is_main)
        self.tracker.config(self.recipe.model_dump(mode="json"))
        figures: dict[str, float] = {}
        try:
            with self._signals():
                if self.progress.finished and self.progress.stage not in self._metrics():
                    figures = self._conclude(self.progress.stage)  # a kill came between checkpoint and results
                for name in self._stages_to_do(only):
                    figures = self._run_stage(name)
                    if self._stop_signal is not None:
                        break
        finally:
            self.tracker.close()
            lock.close()
        return figures

    def _stages_to_do(self, only: StageName | None) -> list[StageName]:
        progress = self.progress
        done = STAGES.index(progress.stage) + (1 if progress.finished else 0)
        wanted = [
            s for s in STAGES if (self.recipe.train.warmup if s == "warmup" else self.recipe.train.joint).epochs > 0
        ]
        if only is None:
            todo = [s for s in wanted if STAGES.index(s) >= done]
        elif only not in wanted:
            raise ValueError(f"--stage {only}: train.{only}.epochs is 0 in this configuration")
        elif STAGES.index(only) < done:
            todo = []
        elif any(done <= STAGES.index(s) < STAGES.index(only) for s in wanted):
            raise ValueError(
                f"--stage {only}: {self.folder} has no finished warm-up: run --stage warmup first, or leave it out"
            )
        else:
            todo = [only]
        if not todo:
            log.info("nothing is left to do in %s", self.folder)
        return todo

    def _run_stage(self, name: StageName) -> dict[str, float]:
        recipe, progress = self.recipe, self.progress
        if progress.stage != name or progress.finished:
            progress = self.progress = Progress(name, 0, progress.total, skipped=progress.skipped, data=progress.data)
            self._restored = None
        log.info("%s: reading data", name)
        stage = Stage(name, recipe, self.engine, self.model, self.bank, self.manifest, self.scenes, progress.streams)
        if self._restored is not None:
            self.engine.load_optimizer_state(self._restored.optimizer)
            stage.plane_adam.load_state({k: v for k, v in self._restored.scenes.items() if k not in ("ids", "planes")})
            self._restored = None  # as large as the planes and their moments
        evaluator = self._evaluator()
        try:
            self._loop(stage, evaluator)
            if self._stop_signal is not None:
                self._save(stage)
                log.warning(
                    "stopped by %s after step %d; the checkpoint is written, the same command goes on from it",
                    signal.Signals(self._stop_signal).name,
                    progress.total,
                )
                return {}
            progress.finished = True
            stage.plane_adam.catch_up()
            self.model.refresh_background()
            self._save(stage)
        finally:
            stage.close()
        return self._conclude(name)

    def _conclude(self, stage: str) -> dict[str, float]:
        """Results of a finished stage: autoencoder in diffusers' format, evaluation, and last of all metrics.json."""
        if stage == "joint":
            self.model.autoencoder.save(self.folder / "autoencoder")
        figures = self._evaluate(self._evaluator(), stage, last=True)
        stages = self._metrics()
        stages[stage] = {"step": self.progress.total, "skipped": self.progress.skipped, **figures}
        path = self.folder / "metrics.json"
        staging = path.with_suffix(".json.part")
        staging.write_text(json.dumps(stages, indent=1) + "\n")
        os.replace(staging, path)
        return figures

    def _metrics(self) -> dict[str, dict[str, float]]:
        """What metrics.json holds: the figures at the end of each stage."""
        path = self.folder / "metrics.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def _loop(self, stage: Stage, evaluator: Evaluator) -> None:
        recipe, progress = self.recipe, self.progress
        every, refresh = recipe.tracking.every, stage.config.learning_rates.encoder > 0
        views_a_step = stage.config.batch_size or stage.config.photos
        with _progress_bar(stage.name, progress.step, stage.steps) as bar:
            self.model.train()
            start, first, stage.data_wait = time.perf_counter(), progress.step, 0.0
            for step in range(progress.step, stage.steps):
                if refresh and step % BACKGROUND_EVERY == 0:
                    self.model.refresh_background()
                losses, finite = stage.step(step)
                progress.step, progress.total = step + 1, progress.total + 1
                progress.streams = stage.stream_states
                progress.skipped += not finite
                progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
                if progress.skipped_in_a_row >= recipe.train.max_skipped:
                    raise TrainingError(
                        f"the loss or a gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to "
                        f"step {progress.total}: lower train.{stage.name}.learning_rates or use train.precision=fp32; "
                        f"the last good checkpoint is in {self.folder / 'checkpoints'}"
                    )
                if progress.step % every == 0 or progress.step == stage.steps:
                    seconds = time.perf_counter() - start
                    rate = (progress.step - first) * views_a_step / seconds
                    values = {f"loss/{key}": float(value) for key, value in losses.items()}
                    values |= {f"lr/{key}": value for key, value in stage.learning_rates(step).items()}
                    values |= {
                        "views_per_second": rate,
                        "data_wait": stage.data_wait / seconds,
                        "skipped": progress.skipped,
                    }
                    self.tracker.scalars(progress.total, stage.name, values)
                    bar.set_postfix_str(f"loss {values['loss/total']:.4f}, {rate:.0f} views/s", refresh=False)
                    start, first, stage.data_wait = time.perf_counter(), progress.step, 0.0
                bar.update()
                if self._stop_signal is not None:
                    return
                # While steps are skipped, what makes them fail may be in the weights: keep the checkpoints from before.
                due = progress.step % recipe.checkpoint.every == 0 and progress.step < stage.steps
                if due and not progress.skipped_in_a_row:
                    self._save(stage)
                if (
                    recipe.evaluation.every
                    and progress.step % recipe.evaluation.every == 0
                    and progress.step < stage.steps
                ):
                    stage.plane_adam.catch_up()
                    self._evaluate(evaluator, stage.name, last=False)

    def _evaluator(self) -> Evaluator:
        if not hasattr(self, "_kept_evaluator"):
            data = self.recipe.data
            self._kept_evaluator = Evaluator(
                self.recipe.evaluation,
                data.root,
                self.manifest,
                self.scenes,
                data.background,
                data.workers,
                self.engine.device,
            )
        return self._kept_evaluator

    def _evaluate(self, evaluator: Evaluator, stage: str, last: bool) -> dict[str, float]:
        step = self.progress.total
        self.model.eval()
        figures = evaluator.measure(self.model, self.bank)
        self.tracker.scalars(step, stage, {f"eval/{name}": value for name, value in figures.items()})
        if evaluator.config.pictures and (evaluator.splits or evaluator.photos is not None):
            grid = evaluator.grid(self.model, self.bank)
            pictures.save_png(self.folder / "pictures" / f"{stage}-{step:08d}.png", grid)
            self.tracker.images(step, {"views": grid})
        if last and evaluator.config.orbits:
            videos = evaluator.orbits(self.model, self.bank, self.folder / "orbits" / stage)
            self.tracker.video(step, {f"orbit/{name}": path for name, path in videos.items()})
        self.model.train()
        shown = (
            "heldout/rgb_psnr",
            "heldout/constant_psnr",
            "train/rgb_psnr",
            "heldout/latent_psnr",
            "heldout/ae_psnr",
            "photos/ae_psnr",
        )
        log.info("%s, step %d: %s", stage, step, ", ".join(f"{k} {figures[k]:.2f}" for k in shown if k in figures))
        return figures

    def _save(self, stage: Stage) -> None:
        scenes = {"ids": self.bank.scene_ids, "planes": self.bank.planes, **stage.plane_adam.state()}
        state = Checkpoint(
            self.progress, self.model.state_dict(), self.engine.optimizer_state(), scenes, config.dump(self.recipe)
        )
        checkpoint.save(self.folder / "checkpoints", state, self.recipe.checkpoint.keep)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM (what Slurm and Kubernetes send before they end a job) and Ctrl-C let the step end and save; a second
        Ctrl-C ends at once."""

        def stop(number: int, _: FrameType | None) -> None:
            self._stop_signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# Steps between refreshes of the background while the encoder learns: it moves slowly, and an encode costs time.
BACKGROUND_EVERY = 50


def _progress_bar(name: str, start: int, total: int) -> "tqdm[None]":
    """A bar on a terminal, a line now and then in a log file. The time left is of the mean speed so far, evaluations
    and checkpoints included."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=name,
        unit="step",
        smoothing=0,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 10.0,
        bar_format=None
        if terminal
        else "{desc}: step {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}\n",
    )
