# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its results: stages one after another, checkpoints, evaluation, progress."""

import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import yaml
from tqdm import tqdm

from igae import checkpoint
from igae.checkpoint import Progress
from igae.errors import LostRank, TrainingError
from igae.evaluation import Evaluator, current_name, save_png
from igae.export import load_trained
from igae.ranks import Channel, rank, world_size
from igae.scenes import SceneBank
from igae.training.assembly import build_model
from igae.training.meter import Outcome
from igae.training.parallel.engine import Engine
from igae.training.preflight import check_memory, open_run, public_settings
from igae.training.recipe import Recipe, StageName
from igae.training.resume import RATES, Restored, find, restore
from igae.training.shares import log_ranks, own_data, scene_bytes
from igae.training.stage import Stage, fit_scale
from igae.training.trackers import Tracker

STAGES: tuple[StageName, ...] = ("warmup", "joint")
# Steps between refreshes of the background while the encoder learns: it moves slowly, and an encode costs time.
BACKGROUND_EVERY = 50
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Steps that the host may be ahead of what it knows of the device's.
LAG = 2
SHOWN = (
    "heldout/rgb_psnr",
    "heldout/baseline_psnr",
    "train/rgb_psnr",
    "heldout/latent_psnr",
    "heldout/ae_psnr",
    "natural/ae_psnr",
)
log = logging.getLogger("igae")


class Trainer:
    """Everything of one run. Making it reads the data's manifest, loads the autoencoder and the newest checkpoint. All
    ranks make one and call the same methods.

    Args:
        resume: ``auto`` goes on from the newest complete checkpoint of the run, if there is one; ``never`` refuses a
            folder that has one; anything else is the path or URL of a checkpoint to start from.

    Raises:
        ValueError: the configuration, the data or the checkpoint don't fit together.
    """

    def __init__(self, recipe: Recipe, resume: str = "auto") -> None:
        self.recipe = recipe
        self.folder = Path(recipe.outputs) / recipe.experiment
        self.checkpoints = recipe.checkpoint.root or str(self.folder / "checkpoints")
        self.data = own_data(recipe)
        self.engine = Engine(recipe.train.timeout, recipe.train.async_steps, recipe.train.precision == "bf16")
        # Both here: a rank that dies while others connect to it is noticed late, so that is over before anything else.
        self.channel, self._saving = Channel(recipe.train.timeout), Channel(recipe.train.timeout)
        device, owned = self.engine.device, self.data.owned
        if rank() == 0:
            log_ranks(recipe, self.data, self.engine.strategy)
        found = find(self.checkpoints, resume, self.channel)
        self.model = build_model(recipe, self.data.manifest.image_size, device)
        if self.engine.replicated:
            self.model.speed_up(compile=recipe.train.compile, channels_last=recipe.train.channels_last)
        check_memory(len(owned) * scene_bytes(recipe), device)
        self.bank = SceneBank(recipe.planes, [scene.id for scene in owned], recipe.seed, device)
        digest = self.data.digest
        self.progress = Progress(STAGES[0], 0, 0, data=digest, world=world_size())
        self._restored: Restored | None = None
        if found is not None:
            self.progress, self._restored = restore(found, recipe, self.data, self.model, self.bank, digest)
        elif recipe.model is not None:
            load_trained(recipe.model).load_into(self.model)
        else:
            if not self.model.autoencoder.scale_is_fitted:
                fit_scale(recipe, self.model, self.data, device, self.channel)
            self.model.refresh_background()
        self._stop_signal: int | None = None
        self._stopped = False

    def run(self, only: StageName | None = None) -> dict[str, float]:
        """Run the stages that are still to do, or one of them.

        Returns:
            The last evaluation's figures (empty if nothing was to do). A run that SIGTERM ended returns early, after
            its checkpoint.
        """
        lock = open_run(self.recipe, self.folder, self.channel, self.engine.device)
        self.tracker = Tracker(self.folder, self.recipe.tracking, self.progress.total, enabled=rank() == 0)
        self.tracker.config(yaml.safe_load(public_settings(self.recipe)))
        settings = self.recipe.checkpoint
        self.writer = checkpoint.Writer(self.checkpoints, settings.keep, self._saving, settings.background)
        figures: dict[str, float] = {}
        try:
            with stop_signals(self._stop):
                if self.progress.finished and self.progress.stage not in self._metrics():
                    figures = self._conclude(self.progress.stage)  # a kill came between checkpoint and results
                for name in self._stages_to_do(only):
                    figures = self._run_stage(name)
                    if self._stopped:
                        break
                self.writer.close()
        except TrainingError:  # on all ranks alike: what is being saved in the background still can be
            with suppress(ValueError, LostRank):
                self.writer.close()
            raise
        finally:
            self.tracker.close()
            if lock is not None:
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
        progress = self.progress
        if progress.stage != name or progress.finished:
            new = Progress(name, 0, progress.total, skipped=progress.skipped, data=progress.data, world=world_size())
            progress = self.progress = new
            self._restored = None
        log.info("%s: reading data", name)
        stage = Stage(name, self.recipe, self.engine, self.model, self.bank, self.data, progress.consumed)
        progress.steps_per_epoch = stage.steps_per_epoch
        if self._restored is not None:
            self.engine.load_optimizer_state(self._restored.optimizer)
            stage.plane_adam.load_state(self._restored.planes)
            self._restored = None  # as large as the planes and their moments
        try:
            self._loop(stage)
            if self._stopped:
                self._save(stage)
                log.warning(
                    "stopped by %s after step %d; the checkpoint is written, the same command goes on from it",
                    signal.Signals(self._stop_signal).name if self._stop_signal is not None else "another rank",
                    progress.total,
                )
                return {}
            progress.finished = True
            stage.plane_adam.catch_up()
            with self.engine.weights():
                self.model.refresh_background()
            self._save(stage)
            self.engine.finish()
        finally:
            stage.close()
        return self._conclude(name)

    def _conclude(self, stage: str) -> dict[str, float]:
        """Results of a finished stage: autoencoder in diffusers' format, evaluation, and last of all metrics.json."""
        if stage == "joint" and rank() == 0:
            self.model.autoencoder.save(self.folder / "autoencoder")
        figures = self._evaluate(stage, last=True)
        self.writer.wait()  # results are of a checkpoint that is there
        if rank() == 0:
            stages = self._read_metrics()
            stages[stage] = {"step": self.progress.total, "skipped": self.progress.skipped, **figures}
            path = self.folder / "metrics.json"
            staging = path.with_suffix(".json.part")
            staging.write_text(json.dumps(stages, indent=1) + "\n")
            os.replace(staging, path)
        return figures

    def _metrics(self) -> dict[str, dict[str, float]]:
        """What metrics.json holds as the first rank sees it: the figures at the end of each stage."""
        return self.channel.gather(self._read_metrics() if rank() == 0 else {})[0]

    def _read_metrics(self) -> dict[str, dict[str, float]]:
        path = self.folder / "metrics.json"
        stages = json.loads(path.read_text()) if path.is_file() else {}
        return {stage: {current_name(n): v for n, v in metrics.items()} for stage, metrics in stages.items()}

    def _loop(self, stage: Stage) -> None:
        recipe, progress = self.recipe, self.progress
        refresh = stage.config.learning_rates.encoder > 0
        lag = LAG if self.engine.asynchronous else 0
        open_steps: deque[tuple[int, Outcome]] = deque()
        with progress_bar(stage.name, progress.step, stage.steps) as bar:
            self.model.train()
            stage.meter.restart(stage.taken)
            for step in range(progress.step, stage.steps):
                asked = self._stop_signal is not None
                outcome = stage.step(step, asked, refresh and step % BACKGROUND_EVERY == 0)
                progress.step, progress.total = step + 1, progress.total + 1
                progress.consumed = dict(stage.consumed)
                open_steps.append((progress.total, outcome))
                due = [progress.step % n == 0 for n in (recipe.tracking.every, recipe.checkpoint.every)]
                evaluates = recipe.evaluation.every > 0 and progress.step % recipe.evaluation.every == 0
                settle_all = any(due) or evaluates or progress.step == stage.steps
                while len(open_steps) > (0 if settle_all or self._stopped else lag):
                    self._settle(stage, *open_steps.popleft())
                if due[0] or progress.step == stage.steps:
                    bar.set_postfix_str(self._record(stage), refresh=False)
                bar.update()
                if self._stopped or progress.step == stage.steps:
                    return
                # Before the checkpoint: evaluation catches the planes up, and a resumed run must find them so.
                if evaluates:
                    stage.plane_adam.catch_up()
                    self._evaluate(stage.name, last=False)
                # While steps are skipped, what makes them fail may be in the weights: keep the checkpoints from before.
                if due[1] and not progress.skipped_in_a_row:
                    self._save(stage)

    def _settle(self, stage: Stage, total: int, outcome: Outcome) -> None:
        """Take note of how a step went; the same on all ranks."""
        applied, stop = outcome.read(self.recipe.train.timeout if world_size() > 1 else None)
        self._stopped |= stop
        progress = self.progress
        progress.skipped += not applied
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row >= self.recipe.train.max_skipped:
            raise TrainingError(
                f"the loss or a gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to step "
                f"{total}: lower train.{stage.name}.learning_rates or use train.precision=fp32; the last good "
                f"checkpoint is in {self.checkpoints}"
            )

    def _record(self, stage: Stage) -> str:
        """Write down figures of the steps since the last record; returns a note for the progress bar."""
        figures = stage.meter.read(stage.taken, self.channel)
        figures |= {f"lr/{key}": value for key, value in stage.learning_rates(self.progress.step - 1).items()}
        self.tracker.scalars(self.progress.total, stage.name, figures | {"skipped": self.progress.skipped})
        return f"loss {figures['loss/total']:.4f}, {figures['views_per_second']:.0f} views/s"

    def _evaluator(self) -> Evaluator:
        if not hasattr(self, "_kept_evaluator"):
            owned = frozenset(self.bank.scene_ids.tolist())
            self._kept_evaluator = Evaluator(
                self.recipe.evaluation,
                self.recipe.data,
                self.data.manifest,
                self.data.scenes,
                owned,
                self.engine.device,
                self.channel,
            )
        return self._kept_evaluator

    def _evaluate(self, stage: str, last: bool) -> dict[str, float]:
        step, evaluator = self.progress.total, self._evaluator()
        with self.engine.weights():
            self.model.eval()
            figures = evaluator.measure(self.model, self.bank)
            self.tracker.scalars(step, stage, {f"eval/{name}": value for name, value in figures.items()})
            if evaluator.config.pictures and (self.data.scenes or self.data.manifest.images):
                grids = evaluator.grids(self.model, self.bank)
                for name, grid in grids.items():
                    save_png(self.folder / "pictures" / f"{stage}-{name}-{step:08d}.png", grid)
                self.tracker.images(step, grids)
            if last and evaluator.config.orbits:
                videos = evaluator.orbits(self.model, self.bank, self.folder / "orbits" / stage)
                self.tracker.video(step, {f"orbit/{name}": path for name, path in videos.items()})
            self.model.train()
        shown = [f"{key} {figures[key]:.2f}" for key in SHOWN if key in figures]
        log.info("%s, step %d: %s", stage, step, ", ".join(shown))
        return figures

    def _save(self, stage: Stage) -> None:
        planes = stage.plane_adam.state()
        # Rates of the steps so far: of the whole run, not of a scene.
        moments = self.engine.optimizer_state() | {RATES: planes.pop("learning_rates")}
        scenes = {"ids": self.bank.scene_ids, "planes": self.bank.planes, **planes}
        with self.engine.weights():
            self.writer.save(self.progress, public_settings(self.recipe), self.model.state_dict(), moments, scenes)

    def _stop(self, number: int) -> None:
        self._stop_signal = number


@contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM (what Slurm and Kubernetes send before they end a job), SIGUSR1 (which launchers don't answer by ending
    their processes) and Ctrl-C call ``stop``, which lets the step end; a second Ctrl-C ends at once."""

    def handle(number: int, _: FrameType | None) -> None:
        stop(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(name: str, start: int, total: int) -> "tqdm[None]":
    """A bar on a terminal, a line now and then in a log file. The time left is of the mean speed so far, evaluations
    and checkpoints included."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        disable=rank() > 0,
        desc=name,
        unit="step",
        smoothing=0,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 10.0,
        bar_format=None
        if terminal
        else "{desc}: step {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}\n",
    )
