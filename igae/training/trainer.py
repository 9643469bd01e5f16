# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its results: stages one after another, checkpoints, evaluation."""

import logging
from contextlib import closing, suppress

from igae.checkpoint import LEARNING_RATES, CheckpointWriter, Progress
from igae.errors import LostRank, TrainingError
from igae.ranks import Channel, RefusedByAll, join, rank, world_size
from igae.scenes import SceneStore
from igae.training.box import check_box
from igae.training.job import Job
from igae.training.loop import Loop
from igae.training.memory import choose_storage
from igae.training.parallel.engine import Engine
from igae.training.preflight import agree, scene_bytes, split
from igae.training.recipe import STAGES, Recipe, StageName
from igae.training.resume import find, initialize, restore
from igae.training.run_folder import open_run, read_metrics, write_metrics
from igae.training.stage import Stage, StageState

log = logging.getLogger("igae")


class Trainer(Job):
    """Everything of one run. Making it reads the data's manifest, loads the autoencoder and the newest checkpoint. All
    ranks make one and call the same methods.

    Args:
        resume: ``auto`` resumes from the newest checkpoint of the run that is whole, if there is one; ``strict``
            refuses a newest one that is damaged; ``never`` refuses a folder that has one; anything else is the path or
            URL of a checkpoint to start from.
        extend: continue a finished stage to the number of epochs that the recipe has now.

    Raises:
        ValueError: the configuration, the data or the checkpoint don't fit together.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto", extend: bool = False) -> None:
        train, settings = recipe.train, recipe.checkpoint
        join(train.timeout)
        channel = Channel(train.timeout)
        manifest = agree(recipe, channel, resume=resume, extend=extend)
        # Here: a rank that dies while others connect to it is noticed late, so that is over before anything else.
        saving = Channel(train.timeout)
        data = channel.together(lambda: split(recipe, manifest))
        engine = Engine(train.timeout, train.async_steps)
        if rank() == 0:
            data.log_parts(engine.strategy, scene_bytes(recipe.planes))
        found = find(recipe.checkpoint_root, resume, channel)
        super().__init__(recipe, data, engine, channel)
        owned = data.owned.ids.tolist()
        instead = "train fewer scenes (data.categories), or on more GPUs"
        storage = choose_storage(recipe, len(owned), engine.device, channel, instead)
        self.store = SceneStore(recipe.planes, owned, None if found else recipe.seed, engine.device, storage)
        self.progress = Progress(STAGES[0], 0, 0, data=data.manifest.digest, world=world_size())
        self._state, damaged, began_in = StageState(), list[str](), None
        if found:
            state = restore(found, recipe, data, self.model, self.store, channel, extend)
            self.progress, self._state, damaged, began_in = state
        else:
            initialize(self.model, recipe, data, channel)
        self.set_precision(began_in)
        background = settings.background and storage.tier == "device"
        if settings.background and not background:
            log.info("checkpoints are written while training waits: a copy of the planes would double their memory")
        self.writer = CheckpointWriter(recipe.checkpoint_root, settings.keep, saving, background, damaged)

    def run(self, only: StageName | None = None) -> dict[str, float]:
        """Run the stages that are still to do, or one of them.

        Returns:
            The last evaluation's metrics (empty if nothing was to do). A run that a signal ended returns early, after
            its checkpoint.
        """
        self.channel.agree({"--stage": only})
        progress, metrics = self.progress, dict[str, float]()
        todo = self._stages_to_do(only)  # before the run's settings are written: it may refuse
        with open_run(self.recipe, self.channel), self.tracking(progress.total), self.signals:
            try:
                self.channel.on_first_rank(self.writer.clean)
                there = self.channel.on_first_rank(lambda: read_metrics(self.folder))
                results = there.get(progress.stage)
                if progress.finished and (results is None or results.get("step", progress.total) != progress.total):
                    metrics = self._conclude(progress.stage)  # a kill came between checkpoint and results
                for name in todo:
                    metrics = self._run_stage(name)
                    if not self.progress.finished:
                        break
                self.writer.close()
            except TrainingError:  # on all ranks alike: what is being saved in the background still can be
                with suppress(ValueError, LostRank):
                    self.writer.close()
                raise
        return metrics

    def _stages_to_do(self, only: StageName | None) -> list[StageName]:
        progress, wanted = self.progress, self.recipe.train.stages
        done = STAGES[: STAGES.index(progress.stage) + progress.finished]
        todo = [name for name in wanted if name not in done]
        if only is not None:
            if only not in wanted:
                raise RefusedByAll(f"--stage {only}: train.{only}.epochs is 0 in this configuration")
            if only in todo[1:]:
                raise RefusedByAll(
                    f"--stage {only}: {self.folder} has no finished warm-up: run --stage warmup first, or leave it out"
                )
            todo = [name for name in todo if name == only]
        if not todo:
            log.info("nothing is left to do in %s, all stages are finished", self.folder)
        if any(self.recipe.train.stages[name].batch_size for name in todo):
            self.channel.on_first_rank(lambda: check_box(self.recipe.render.box, self.data))
        return todo

    def _run_stage(self, name: StageName) -> dict[str, float]:
        before = self.progress
        if before.stage != name or before.finished:
            self.progress = Progress(
                name, 0, before.total, skipped=before.skipped, data=before.data, world=world_size()
            )
            self._state = StageState()
        log.info("%s: reading data", name)
        with closing(self.open_stage(name)) as stage:
            self.progress.steps_per_epoch = stage.steps_per_epoch
            if self.train(stage):
                self._save()
                signal = self.signals.received
                log.warning(
                    "stopped by %s after step %d; the checkpoint is written, the same command resumes from it",
                    signal.name if signal is not None else "another rank",
                    self.progress.total,
                )
                return {}
            self.progress.finished = True
            self.store.catch_up()
            with self.engine.weights():
                self.model.refresh_background()
            self._save()
            self.engine.finish()
        return self._conclude(name)

    def open_stage(self, name: StageName) -> Stage:
        """A stage with its data and optimizers, at its start or where the run resumes."""
        state, self._state = self._state, StageState()  # as large as the shared parameters' moments
        return Stage(name, self.recipe, self.engine, self.model, self.store, self.data, state)

    def train(self, stage: Stage) -> bool:
        """Make the steps of a stage that are still to do; returns whether it was stopped before its end. Collective."""
        recipe, progress = self.recipe, self.progress
        loop = Loop(stage, progress, self.signals, stage.name, self.async_steps)
        for step in loop:
            ends = step == stage.steps
            evaluates = recipe.evaluation.every > 0 and step % recipe.evaluation.every == 0
            saves = step % recipe.checkpoint.every == 0
            records = ends or step % recipe.tracking.every == 0
            if evaluates or saves or records:
                loop.settle()
            if records:
                loop.note(self._record(stage))
            if ends or loop.stopped:
                continue
            if evaluates:  # before the checkpoint: deferred updates are applied here, and a resumed run must be equal
                self.store.catch_up()
                self.evaluate(self.store, stage.name, progress.total, last=False)
            # While steps are skipped, what makes them fail may be in the weights: keep the checkpoints from before.
            if saves and not progress.skipped_in_a_row:
                self._save()
        return loop.stopped

    def _record(self, stage: Stage) -> str:
        """Record metrics of the steps since the last record; returns a note for the progress bar."""
        metrics = stage.meter.read(stage.taken, self.channel)
        metrics |= {f"lr/{part}": rate for part, rate in stage.learning_rates(self.progress.step - 1).items()}
        self.tracker.scalars(self.progress.total, stage.name, metrics | {"skipped": self.progress.skipped})
        speed = metrics["views_per_second"]
        return f"loss {metrics['loss/total']:.4f}, {speed:.{int(speed < 10)}f} views/s"

    def _conclude(self, stage: str) -> dict[str, float]:
        """Results of a finished stage: autoencoder in diffusers' format, evaluation, and last of all metrics.json."""
        if stage == "joint" and rank() == 0:
            self.model.autoencoder.save(self.folder / "autoencoder")
        metrics = self.evaluate(self.store, stage, self.progress.total, last=True)
        self.writer.wait()  # results are of a checkpoint that is there
        if rank() == 0:
            counts = {"step": self.progress.total, "skipped": self.progress.skipped}
            write_metrics(self.folder, stage, {**counts, **metrics})
        return metrics

    def _save(self) -> None:
        self.tracker.sync()  # of these steps, a run that resumes here makes no records
        scenes = self.store.state_dict()
        # Learning rates of the steps so far: of the whole run, not of a scene.
        moments = self.engine.optimizer_state() | {LEARNING_RATES: scenes.pop("learning_rates")}
        with self.engine.weights():
            self.writer.save(self.progress, self.settings(), self.model.state_dict(), moments, scenes)
