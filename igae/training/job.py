# SPDX-License-Identifier: Apache-2.0
"""What a training run and a fit have in common: folder, engine, model, trackers, evaluation."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager

import yaml

from igae.evaluation import EvaluationConfig, Evaluator, problems, save_png, write_results
from igae.models import IGAE
from igae.ranks import Channel, rank
from igae.scenes import SceneStore
from igae.storage import write_text
from igae.training.loop import ASYNC_STEPS, StopSignals
from igae.training.parallel.engine import Engine
from igae.training.precision import capability_of, choose_precision, compute_in
from igae.training.rank_data import RankData
from igae.training.recipe import Precision, Recipe
from igae.training.run_folder import ENVIRONMENT, environment, public_settings, write_settings
from igae.training.trackers import Tracker

SHOWN = (
    *("heldout/rgb_psnr", "heldout/baseline_psnr", "train/rgb_psnr", "gap/rgb_psnr", "heldout/latent_psnr"),
    *("heldout/latent_error", "heldout/depth_error", "heldout/ae_psnr", "natural/ae_psnr"),
)
log = logging.getLogger("igae")


class Job:
    """Base of `Trainer` and `Fit`; its methods are collective.

    Attributes:
        model: as it starts; what comes after is the job's.
        async_steps: steps that may be launched before it is known how the last one went.
        evaluation: what is evaluated.
        precision: what it computes in, once that is chosen.
    """

    def __init__(self, recipe: Recipe, data: RankData, engine: Engine, channel: Channel) -> None:
        self.recipe, self.folder, self.data, self.engine, self.channel = recipe, recipe.folder, data, engine, channel
        self.async_steps = ASYNC_STEPS if engine.asynchronous else 0
        self.signals = StopSignals()
        self.evaluation: EvaluationConfig = recipe.evaluation
        self._evaluator: Evaluator | None = None
        size = data.manifest.image_size
        self.model = channel.together(lambda: IGAE.from_recipe(recipe, size, engine.device))
        self.precision: Precision

    def set_precision(self, began_in: Precision | None) -> None:
        """Compute as the recipe says, or as suits where it says `auto`.

        Args:
            began_in: the precision of the steps so far.

        Raises:
            ValueError: on all ranks alike, one of them can't compute as the steps so far, or would not as the others.
        """
        train, capability = self.recipe.train, capability_of(self.engine.device)
        self.precision, why = self.channel.together(lambda: choose_precision(train, capability, began_in))
        self.channel.agree({"train.precision": self.precision}, why)
        log.info("%s (%s)", self.precision, why)
        compute_in(self.precision, self.model, self.engine)

    def settings(self) -> str:
        """The configuration as checkpoints have it: what they hold is of one precision."""
        return public_settings(self.recipe.computed_in(self.precision))

    @contextmanager
    def tracking(self, step: int) -> Iterator[None]:
        """Record its settings, what it runs on, and what comes after a step of the whole job."""
        found = {**environment(self.engine.device), "precision": self.precision}

        def write() -> None:
            write_settings(self.recipe)
            write_text(self.folder / ENVIRONMENT, json.dumps(found, indent=1) + "\n")

        self.channel.on_first_rank(write)
        self.tracker = Tracker(self.folder, self.recipe.tracking, step, enabled=rank() == 0)
        with closing(self.tracker):
            self.tracker.config(
                {**yaml.safe_load(public_settings(self.recipe)), "chosen": {"precision": self.precision}}
            )
            yield

    def evaluate(self, store: SceneStore, stage: str, step: int, last: bool) -> dict[str, float]:
        """Measure and draw the model and the scenes of a store, whose views are read the first time.

        Args:
            store: the same at each call.
            stage, step: what of the job this is; names of files begin with it.
            last: of its stage: write the metrics of each scene, examples and, of the last stage, videos too.
        """
        model, data, tracker, config = self.model, self.data, self.tracker, self.evaluation
        if self._evaluator is None:
            owned = frozenset(store.ids.tolist())
            self._evaluator = Evaluator(
                config, data.config, data.manifest, data.scenes, owned, self.engine.device, self.channel
            )
        log.info("%s, step %d: evaluating", stage, step)
        with self.engine.weights():
            model.eval()
            metrics, of_scenes = self._evaluator.table(model, store)
            tracker.scalars(step, stage, {f"eval/{name}": value for name, value in metrics.items()})
            tracker.sync()  # before metrics.json says that this is done
            if config.pictures and (data.scenes or data.manifest.images):
                grids, labels = self._evaluator.grids(model, store), {"caption": self._evaluator.caption}
                for name, grid in grids.items():
                    number = "" if stage == "fit" else f"-{step:08d}"
                    save_png(self.folder / "pictures" / f"{stage}-{name}{number}.png", grid, labels)
                tracker.images(step, grids)
            if last:
                examples = self._evaluator.examples(model, store, of_scenes)
                if rank() == 0:
                    write_results(self.folder, self._evaluator.scenes, metrics, of_scenes, examples)
            if last and config.orbits and stage in ("fit", [*self.recipe.train.stages][-1]):
                videos = self._evaluator.orbits(model, store, self.folder / "orbits" / stage)
                tracker.video(step, {f"orbit/{name}": path for name, path in videos.items()})
            model.train()
        shown = [f"{name} {metrics[name]:.2f}" for name in SHOWN if name in metrics]
        log.info("%s, step %d: %s", stage, step, ", ".join(shown))
        for problem in problems(metrics) if rank() == 0 else []:
            log.warning("%s", problem)
        return metrics
