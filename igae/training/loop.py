# SPDX-License-Identifier: Apache-2.0
"""The loop over the steps of a stage: asynchronous outcomes, skipped steps, stop signals, progress."""

import os
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

from igae.checkpoint import Progress
from igae.errors import TrainingError, progress
from igae.ranks import OfAllRanks, rank, use_share
from igae.training.meter import Outcome
from igae.training.stage import Stage

ASYNC_STEPS = 2
"""Steps that are launched on a GPU before it is known how the last one went."""


class StopSignals:
    """In a ``with`` block, SIGTERM (which Slurm and Kubernetes send before they end a job), SIGUSR1 (which launchers
    don't answer by ending their processes) and Ctrl-C are ``received``, and training ends after the step. A second
    Ctrl-C ends it at once."""

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if rank() == 0:  # not print: a handler may come in the middle of one
            os.write(2, f"{self.received.name}: the run ends after this step\n".encode())
        signal.signal(signal.SIGINT, signal.default_int_handler)


class SkippedSteps(OfAllRanks, TrainingError):
    """Steps in a row whose loss or gradient was not finite."""


class Loop:
    """Makes the steps of a stage that are still to do: ``for step in loop`` gives their numbers from 1, each when the
    step has been launched. All ranks make the same steps, and end together where one was asked to stop.

    Attributes:
        stopped: a rank was asked to stop, as far as steps are settled.

    Args:
        progress: is kept up to date.
        label: what the progress bar shows.
        async_steps: steps that may be launched before it is known how the last one went.
    """

    def __init__(self, stage: Stage, progress: Progress, signals: StopSignals, label: str, async_steps: int) -> None:
        self._stage, self._progress, self._signals, self._async_steps = stage, progress, signals, async_steps
        self._label, self.stopped = label, False
        self._open: deque[tuple[int, Outcome]] = deque()

    def __iter__(self) -> Iterator[int]:
        stage, now = self._stage, self._progress
        stage.model.train()
        stage.meter.restart(stage.taken)
        use_share(steps=True)
        bar = progress(self._label, stage.steps, "steps", initial=now.step, leave=True)
        with bar as self._bar:
            for step in range(now.step, stage.steps):
                outcome = stage.step(step, self._signals.received is not None)
                now.step, now.total = step + 1, now.total + 1
                now.consumed = dict(stage.consumed)
                self._open.append((now.total, outcome))
                self.settle(self._async_steps if now.step < stage.steps else 0)
                self._bar.update()
                yield now.step
                if self.stopped:
                    return

    def settle(self, left: int = 0) -> None:
        """Wait until it is known how steps went, all but the newest ``left``."""
        now, train = self._progress, self._stage.recipe.train
        timeout = train.timeout if self._stage.data.world > 1 else None
        while len(self._open) > (0 if self.stopped else left):
            total, outcome = self._open.popleft()
            applied, stop = outcome.read(timeout)
            self.stopped |= stop
            now.skipped += not applied
            now.skipped_in_a_row = 0 if applied else now.skipped_in_a_row + 1
            if now.skipped_in_a_row >= train.max_skipped:
                raise SkippedSteps(
                    f"the loss or a gradient was not finite in {now.skipped_in_a_row} steps in a row, up to step "
                    f"{total}: lower train.{self._stage.name}.learning_rates or use train.precision=fp32; what was "
                    "saved has nothing of these steps"
                )

    def note(self, text: str) -> None:
        """Show a text beside the progress."""
        self._bar.set_postfix_str(text, refresh=False)
