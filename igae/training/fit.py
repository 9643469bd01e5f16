# SPDX-License-Identifier: Apache-2.0
"""Fitting any number of new scenes to a trained model, of which nothing is trained: wave after wave.

A wave is a short training of some scenes by one rank: the warm-up stage, on latents that are encoded once, and the
joint stage, which aligns decoded renders with the views. Waves need nothing of one another: what a scene becomes
depends on the scenes of its wave and the seed, not on the number of ranks, nor on which of them fits it when. Ranks
take waves in turns and don't wait for each other. The scenes of a wave are written when it ends.
"""

import logging
import threading
import time
from contextlib import closing

from igae.checkpoint import Progress, WaveCheckpoint, folder_of, is_complete, load_checkpoint
from igae.data import Manifest, Scenes
from igae.errors import counted
from igae.evaluation import spread
from igae.ranks import Channel, RefusedByAll, derive_seed, join, rank, world_size
from igae.scenes import SceneStore
from igae.training.box import check_box
from igae.training.job import Job
from igae.training.loop import Loop
from igae.training.memory import choose_storage
from igae.training.parallel.engine import Engine
from igae.training.precision import capability_of, choose_precision
from igae.training.preflight import agree
from igae.training.rank_data import RankData, select, waves
from igae.training.recipe import Precision, Recipe, StageName, TrainConfig
from igae.training.resume import compare_settings, initialize, precision_of
from igae.training.run_folder import open_run, public_settings, read_metrics, write_metrics
from igae.training.stage import Stage, StageState

# What all scenes of a fit have in common.
FIXED = [
    *("seed", "model", "autoencoder", "planes", "render", "fit", "data.categories", "data.background"),
    *("train.warmup", "train.joint", "train.precision", "train.plane_optimizer"),
]
MOST_VIEWS = 5
"""Views of a scene in a step, on average: more cost more and hardly say more, and an epoch would have fewer steps."""
log = logging.getLogger("igae")


class _Others(threading.Thread):
    """Asks all ranks, again and again, for how their waves went: ranks wait for each other, for days perhaps, but for
    none that is stopped or gone."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(name="igae-others", daemon=True)
        self._channel, self._done = channel, threading.Event()
        self._outcomes: list[bool | None] = [None]
        self._own: bool | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            while None in self._outcomes:
                self._done.wait(1.0)
                self._outcomes = self._channel.gather(self._own)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what the silence of another rank has led to."""
        if self._error is not None:
            raise self._error

    def wait(self, own: bool) -> list[bool | None]:
        """What each rank has given here, when all have."""
        self._own = own
        self._done.set()
        self.join()
        self.check()
        return self._outcomes


class Fit(Job):
    """A run that fits the scenes of ``recipe.data`` to ``recipe.model``. All ranks make one and call :meth:`run`.

    Args:
        resume: ``auto`` leaves out the waves that are there, and fits damaged ones again; ``strict`` refuses these;
            ``never`` refuses a folder that has some.

    Raises:
        ValueError: configuration, data and model don't fit together.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto", extend: bool = False) -> None:
        assert recipe.fits_in_waves
        join(recipe.train.timeout)
        channel = Channel(recipe.train.timeout)
        manifest = agree(recipe, channel, resume=resume, extend=extend)
        scenes, self.waves = channel.together(lambda: _split(recipe, manifest, resume, extend))
        self.resume = resume
        engine = Engine(recipe.train.timeout, recipe.train.async_steps, alone=True)
        self.storage = choose_storage(recipe, max(map(len, self.waves)), engine.device, channel, "lower fit.wave")
        data = RankData.alone(recipe.data, manifest, scenes, recipe.train.timeout)
        super().__init__(recipe, data, engine, channel)
        self._others = _Others(Channel(recipe.train.timeout))
        self.evaluation = recipe.evaluation.model_copy(update={"natural_images": 0})
        initialize(self.model, recipe, self.data, self.channel)
        self.parts = WaveCheckpoint(folder_of(recipe.checkpoint_root, 0, True))

    def run(self, only: StageName | None = None) -> dict[str, float]:
        """Fit the scenes that are not there yet, and evaluate some of all.

        Returns:
            Means over the evaluated scenes (empty where nothing was to do, or a signal came before the end: the same
            command resumes after the waves that are finished).
        """
        self.channel.agree({"--stage": only})
        if only is not None:
            both = "a wave has both stages, leave --stage out (epochs=0 leaves a stage out)"
            raise RefusedByAll(f"--stage {only}: {both}")
        with open_run(self.recipe, self.channel):
            finished, is_complete, is_done, precision = self.channel.on_first_rank(self._begin)
            self.set_precision(precision)
            if is_done:
                log.info("nothing is left to do in %s", self.folder)
                return {}
            with self.tracking(max(finished, default=-1) + 1):
                return self.conclude() if is_complete or self._fit_all(finished) else {}

    def _begin(self) -> tuple[set[int], bool, bool, Precision]:
        """Which waves are finished, whether checkpoint and results are there, and what waves are computed in."""
        folder, train = self.parts.folder, self.recipe.train
        precision, _ = choose_precision(train, capability_of(self.engine.device))
        settings, data = self.parts.begin(
            public_settings(self.recipe.computed_in(precision)), self.data.manifest.digest
        )
        compare_settings(folder, settings, self.recipe, FIXED)
        if data != self.data.manifest.digest:
            raise ValueError(
                f"{folder} has scenes of other shards than those at {self.recipe.data.root}: use a new experiment=NAME"
            )
        check_box(self.recipe.render.box, self.data)
        finished, complete = set(self.parts.finished(mend=self.resume == "auto")), is_complete(folder)
        if self.resume == "never" and (finished or complete):
            raise ValueError(f"{folder} already has scenes: choose another name with experiment=NAME, or remove it")
        done = complete and "fit" in read_metrics(self.folder)
        return finished, complete, done, precision_of(settings, folder)

    def _fit_all(self, finished: set[int]) -> bool:
        """Whether all waves are fitted; the checkpoint is complete then."""
        mine = [i for i in range(rank(), len(self.waves), world_size()) if i not in finished]
        what = f"{counted(len(self.data.scenes), 'scene')} in {counted(len(self.waves), 'wave')}"
        log.info("%s, %d finished", what, len(finished))
        self._others.start()
        with self.signals:
            for index in mine:
                if not self.fit_wave(index):
                    break
        if any(self._others.wait(self.signals.received is not None)):
            log.warning("stopped; finished waves are written, the same command resumes after them")
            return False
        progress = Progress(list(self.recipe.train.stages)[-1], 0, 0, finished=True, data=self.data.manifest.digest)
        settings, shared = self.settings(), self.model.state_dict()
        self.channel.on_first_rank(lambda: self.parts.close(progress, settings, shared))
        return True

    def fit_wave(self, index: int) -> bool:
        """Fit and write the scenes of a wave; False where it was stopped before."""
        scenes, recipe, start = self.waves[index], self.recipe, time.perf_counter()
        # A scene's initial planes depend on the scene alone; the order of its views depends on the wave.
        ids = scenes.ids.tolist()
        store = SceneStore(recipe.planes, ids, recipe.seed, self.engine.device, self.storage)
        seed, train = derive_seed(recipe.seed, "wave", index), _for_scenes(recipe.train, len(scenes))
        recipe = recipe.model_copy(update={"seed": seed, "train": train})
        data = RankData.alone(recipe.data, self.data.manifest, scenes, recipe.train.timeout)
        metrics = dict[str, float]()
        for name in recipe.train.stages:
            with closing(Stage(name, recipe, self.engine, self.model, store, data, StageState())) as stage:
                label = f"wave {index + 1} of {len(self.waves)}, {name}"
                for _ in Loop(stage, Progress(name, 0, 0), self.signals, label, self.async_steps):
                    self._others.check()
                if self.signals.received is not None:
                    return False
                store.catch_up()
            metrics |= {f"{name}/{key}": float(loss) for key, loss in stage.meter.losses.items()}
        self.parts.write(index, {"ids": store.ids, "planes": store.rows})
        seconds = (time.perf_counter() - start) / len(scenes)
        self.tracker.scalars(index + 1, "fit", {**metrics, "seconds_per_scene": seconds})
        total = metrics[f"{name}/total"]
        log.info("wave %d of %d: loss %.4f, %.2f s a scene", index + 1, len(self.waves), total, seconds)
        return True

    def conclude(self) -> dict[str, float]:
        """Evaluate the scenes that are chosen for it, as they were written; each rank has some of them."""
        scenes = self.data.scenes
        ids = spread(scenes, self.evaluation.scenes).ids[rank() :: world_size()].tolist()
        store = SceneStore(self.recipe.planes, ids, None, self.engine.device)
        store.load_state_dict(load_checkpoint(self.parts.folder, moments=False).rows(ids))
        metrics = self.evaluate(store, "fit", len(self.waves), last=True)
        if rank() == 0:
            write_metrics(self.folder, "fit", {"scenes": len(scenes), **metrics})
        return metrics


def _for_scenes(train: TrainConfig, count: int) -> TrainConfig:
    """The settings for a wave of so many scenes: batches that are meant for many are smaller for few."""
    smaller = {
        name: stage.model_copy(update={"batch_size": min(stage.batch_size, MOST_VIEWS * count)})
        for name, stage in (("warmup", train.warmup), ("joint", train.joint))
    }
    return train.model_copy(update=smaller)


def _split(recipe: Recipe, manifest: Manifest, resume: str, extend: bool) -> tuple[Scenes, list[Scenes]]:
    """The scenes that are fitted, and the waves of them. Raises ValueError where that can't be done."""
    if extend:
        raise ValueError("--extend: scenes are fitted from their start, use a new experiment=NAME with more epochs")
    if resume not in ("auto", "strict", "never"):
        raise ValueError(f"--resume {resume}: scenes are fitted from their start, leave --resume out")
    if not recipe.train.stages:
        raise ValueError("train.warmup.epochs and train.joint.epochs are both 0: there is nothing to do")
    for name, stage in recipe.train.stages.items():
        if stage.natural_images:
            raise ValueError(f"train.{name}.natural_images: nothing that natural images teach is trained, set it to 0")
    _, scenes = select(recipe, manifest)
    if not scenes:
        raise ValueError(f"{recipe.data.root} holds no scenes: pack some with --scenes")
    found = waves(manifest, scenes, recipe.fit.wave)
    if world_size() > len(found):
        raise ValueError(
            f"{world_size()} ranks have only {len(found)} waves of up to {recipe.fit.wave} scenes to fit: set "
            f"fit.wave={max(1, len(scenes) // world_size())}, or start fewer ranks"
        )
    return scenes, found
