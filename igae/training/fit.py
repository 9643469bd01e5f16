# SPDX-License-Identifier: Apache-2.0
"""Fitting any number of new scenes to a trained model, of which nothing is trained: wave after wave.

A wave is a short training of some scenes by one rank: the warm-up stage, on latents that are encoded once, and the
joint stage, which aligns decoded renders with the views. Waves need nothing of one another: what a scene becomes
depends on the scenes of its wave and the seed, not on the number of ranks, nor on which of them fits it when. Ranks
take waves in turns and don't wait for each other. The scenes of a wave are written when it ends.
"""

import json
import logging
import os
import time
from collections import deque
from pathlib import Path

from igae import checkpoint
from igae.checkpoint import Parts, Progress
from igae.data import Scene
from igae.errors import TrainingError
from igae.evaluation import Evaluator, save_png, spread
from igae.export import load_trained
from igae.ranks import Channel, derive_seed, rank, world_size
from igae.scenes import SceneBank
from igae.training.assembly import build_model
from igae.training.meter import Outcome
from igae.training.parallel.engine import Engine
from igae.training.preflight import check_memory, compare_settings, open_run, public_settings
from igae.training.recipe import Recipe, StageName
from igae.training.shares import Data, scene_bytes, select, waves
from igae.training.stage import Stage
from igae.training.trackers import Tracker
from igae.training.trainer import LAG, SHOWN, STAGES, progress_bar, stop_signals

# Ranks that have no wave left wait for those that have, for days perhaps; one that dies ends the wait at once.
LONGEST_WAIT = 30 * 24 * 3600.0
# What all scenes of a fit have in common.
FIXED = (
    *("seed", "model", "autoencoder", "planes", "render", "fit", "data.categories", "data.background"),
    *("train.warmup", "train.joint", "train.precision", "train.plane_optimizer"),
)
log = logging.getLogger("igae")


class Fit:
    """A run that fits the scenes of ``recipe.data`` to ``recipe.model``. All ranks make one and call :meth:`run`.

    Args:
        resume: ``auto`` leaves out the waves that are there; ``never`` refuses a folder that has some.

    Raises:
        ValueError: configuration, data and model don't fit together.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto") -> None:
        assert recipe.fits_in_waves and recipe.model is not None
        if resume not in ("auto", "never"):
            raise ValueError(f"--resume {resume}: scenes are fitted from their start, leave --resume out")
        self.recipe, self.resume = recipe, resume
        self.stages: list[StageName] = [name for name in STAGES if getattr(recipe.train, name).epochs > 0]
        if not self.stages:
            raise ValueError("train.warmup.epochs and train.joint.epochs are both 0: there is nothing to do")
        for name in self.stages:
            if getattr(recipe.train, name).natural_images:
                raise ValueError(
                    f"train.{name}.natural_images: nothing that natural images teach is trained, set it to 0"
                )
        self.folder = Path(recipe.outputs) / recipe.experiment
        self.manifest, self.scenes = select(recipe)
        if not self.scenes:
            raise ValueError(f"{recipe.data.root} holds no scenes: pack some with --scenes")
        self.waves = waves(self.manifest, self.scenes, recipe.fit.wave)
        if world_size() > len(self.waves):
            raise ValueError(
                f"{world_size()} ranks have only {len(self.waves)} waves of up to {recipe.fit.wave} scenes to fit: set "
                f"fit.wave={max(1, len(self.scenes) // world_size())}, or start fewer ranks"
            )
        self.engine = Engine(recipe.train.timeout, recipe.train.async_steps, alone=True)
        self.channel = Channel(LONGEST_WAIT)
        device = self.engine.device
        check_memory(len(self.waves[0]) * scene_bytes(recipe), device, "lower fit.wave")
        self.model = build_model(recipe, self.manifest.image_size, device)
        load_trained(recipe.model).load_into(self.model)
        self.model.speed_up(compile=recipe.train.compile, channels_last=recipe.train.channels_last)
        self.parts = Parts(checkpoint.folder_of(recipe.checkpoint.root or str(self.folder / "checkpoints"), 0, True))
        self.digest = self._data(self.scenes).digest
        self._stop_signal: int | None = None

    def run(self, only: StageName | None = None) -> dict[str, float]:
        """Fit the scenes that are not there yet, and evaluate some.

        Returns:
            Means over the evaluated scenes (empty where nothing was to do, or a SIGTERM came before the end: the same
            command goes on from the waves that are finished).
        """
        if only is not None:
            raise ValueError(f"--stage {only}: a wave has both stages, leave --stage out (epochs=0 leaves a stage out)")
        lock = open_run(self.recipe, self.folder, self.channel, self.engine.device)
        try:
            begun = self.channel.gather(self._begin() if rank() == 0 else "")[0]
            if isinstance(begun, str):
                raise ValueError(begun)
            finished, is_complete, is_done = begun
            if is_done:
                log.info("nothing is left to do in %s", self.folder)
                return {}
            before = max(finished, default=-1) + 1
            self.tracker = Tracker(self.folder, self.recipe.tracking, before, enabled=rank() == 0)
            try:
                if not is_complete and not self._fit_all(finished):
                    return {}
                return self._evaluate()
            finally:
                self.tracker.close()
        finally:
            if lock is not None:
                lock.close()

    def _begin(self) -> tuple[set[int], bool, bool] | str:
        """Which waves are finished, whether the checkpoint and the results are there; or a sentence, what is wrong."""
        try:
            settings, data = self.parts.begin(public_settings(self.recipe), self.digest)
            compare_settings(self.parts.folder, settings, self.recipe, list(FIXED))
            if data != self.digest:
                raise ValueError(
                    f"{self.parts.folder} has scenes of other shards than those at {self.recipe.data.root}: use a new "
                    "experiment=NAME"
                )
            finished, is_complete = set(self.parts.finished()), self.parts.complete
            if self.resume == "never" and (finished or is_complete):
                raise ValueError(
                    f"{self.parts.folder} already has scenes: choose another name with experiment=NAME, or remove it"
                )
        except ValueError as error:
            return str(error)
        return finished, is_complete, is_complete and (self.folder / "metrics.json").exists()

    def _data(self, scenes: list[Scene]) -> Data:
        """Scenes that this rank alone trains."""
        return Data(self.manifest, scenes, [scenes], 0, 1)

    def _fit_all(self, finished: set[int]) -> bool:
        """Whether all waves are fitted; the checkpoint is complete then."""
        mine = [i for i in range(rank(), len(self.waves), world_size()) if i not in finished]
        log.info("%d scenes in %d waves, %d finished", len(self.scenes), len(self.waves), len(finished))
        self.model.train()
        with stop_signals(self._stop):
            for index in mine:
                if not self._fit_wave(index):
                    break
        if any(self.channel.gather(self._stop_signal is not None)):
            log.warning("stopped; finished waves are written, the same command goes on from them")
            return False
        problem = None
        if rank() == 0:
            progress = Progress(self.stages[-1], 0, 0, finished=True, data=self.digest)
            try:
                self.parts.close(progress, public_settings(self.recipe), self.model.state_dict())
            except ValueError as error:
                problem = str(error)
        if problem := self.channel.gather(problem)[0]:
            raise ValueError(problem)
        return True

    def _fit_wave(self, index: int) -> bool:
        """Fit and write the scenes of a wave; False where it was stopped before."""
        scenes, recipe, start = self.waves[index], self.recipe, time.perf_counter()
        # The start of a scene is its own; what views are drawn when is the wave's.
        bank = SceneBank(recipe.planes, [scene.id for scene in scenes], recipe.seed, self.engine.device)
        recipe = recipe.model_copy(update={"seed": derive_seed(recipe.seed, "wave", index)})
        figures: dict[str, float] = {}
        for name in self.stages:
            stage = Stage(name, recipe, self.engine, self.model, bank, self._data(scenes), {})
            try:
                outcome = self._train(stage, f"wave {index + 1} of {len(self.waves)}, {name}")
                if outcome is None:
                    return False
                stage.plane_adam.catch_up()
            finally:
                stage.close()
            figures |= {f"{name}/{key}": float(loss) for key, loss in outcome.losses.items()}
        self.parts.write(index, {"ids": bank.scene_ids, "planes": bank.planes})
        seconds = (time.perf_counter() - start) / len(scenes)
        self.tracker.scalars(index + 1, "fit", {**figures, "seconds_per_scene": seconds})
        last = figures[f"{self.stages[-1]}/total"]
        log.info("wave %d of %d: loss %.4f, %.2f s a scene", index + 1, len(self.waves), last, seconds)
        return True

    def _train(self, stage: Stage, name: str) -> Outcome | None:
        """All steps of a stage; returns the last one, or None where it was stopped before."""
        lag = LAG if self.engine.asynchronous else 0
        open_steps: deque[Outcome] = deque()
        skipped = 0
        with progress_bar(name, 0, stage.steps) as bar:
            for step in range(stage.steps):
                outcome = stage.step(step)
                open_steps.append(outcome)
                while len(open_steps) > (lag if step + 1 < stage.steps else 0):
                    applied, _ = open_steps.popleft().read()
                    skipped = 0 if applied else skipped + 1
                if skipped >= self.recipe.train.max_skipped:
                    raise TrainingError(
                        f"the loss or a gradient was not finite in {skipped} steps in a row of {name}: lower "
                        f"train.{stage.name}.learning_rates.planes or use train.precision=fp32"
                    )
                bar.update()
                if self._stop_signal is not None:
                    return None
        return outcome

    def _evaluate(self) -> dict[str, float]:
        """Figures of the scenes that evaluation chooses, as they were written; each rank has some of them."""
        recipe, config = self.recipe, self.recipe.evaluation.model_copy(update={"natural_images": 0})
        ids = [scene.id for scene in spread(self.scenes, config.scenes)[rank() :: world_size()]]
        bank = SceneBank(recipe.planes, ids, recipe.seed, self.engine.device)
        bank.planes.copy_(checkpoint.load(self.parts.folder, moments=False).rows(ids)["planes"])
        device = self.engine.device
        evaluator = Evaluator(config, recipe.data, self.manifest, self.scenes, frozenset(ids), device, self.channel)
        self.model.eval()
        figures = evaluator.measure(self.model, bank)
        step = len(self.waves)
        grids = evaluator.grids(self.model, bank) if config.pictures else {}
        for name, grid in grids.items():
            save_png(self.folder / "pictures" / f"fit-{name}.png", grid)
        self.tracker.images(step, grids)
        if config.orbits:
            videos = evaluator.orbits(self.model, bank, self.folder / "orbits" / "fit")
            self.tracker.video(step, {f"orbit/{name}": path for name, path in videos.items()})
        if rank() == 0:
            self.tracker.scalars(step, "fit", {f"eval/{name}": value for name, value in figures.items()})
            staging = self.folder / "metrics.json.part"
            staging.write_text(json.dumps({"fit": {"scenes": len(self.scenes), **figures}}, indent=1) + "\n")
            os.replace(staging, self.folder / "metrics.json")
        shown = [f"{key} {figures[key]:.2f}" for key in SHOWN if key in figures]
        log.info("fit, %d scenes: %s", len(self.scenes), ", ".join(shown))
        return figures

    def _stop(self, number: int) -> None:
        self._stop_signal = number
