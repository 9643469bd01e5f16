# SPDX-License-Identifier: Apache-2.0
"""A run resumes from whatever a power cut leaves on the disk, and ends with the same bits.

The calls of one whole run are recorded; from them, folders are made as they may be found after a cut
(`recorded_disk.py` says what a disk may do).
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recorded_disk
import runs
from accelerate.state import AcceleratorState
from recorded_disk import Call, Disk

from igae import checkpoint, config
from igae.training import Recipe, Trainer, trainer
from igae.training.run_folder import open_run, read_metrics

pytestmark = pytest.mark.usefixtures("one_run_a_process")
STARTS, FINISHED = 36, 4
QUICK = [*(f"train.{stage}.epochs=1" for stage in ("warmup", "joint")), "checkpoint.every=3", "tracking.every=2"]
QUICK += ["data.workers=0", "evaluation.natural_images=0"]
START = """
import sys
from igae.models import import_diffusers
import_diffusers()
import test_power_cut
test_power_cut.train_and_tell(*sys.argv[1:])
"""


def train_and_tell(told: str, *arguments: str) -> None:
    """Train, and write into a file what has been promised: a save that returned, the metrics of a stage."""
    tell = os.open(told, os.O_WRONLY | os.O_CREAT)

    def telling(function: Callable[..., Any], what: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            os.write(tell, what(result, *args).encode())
            return result

        return call

    saving = trainer.CheckpointWriter
    saving.save = telling(saving.save, lambda folder, *_: Path(folder).name)  # type: ignore[method-assign]
    trainer.write_metrics = telling(trainer.write_metrics, lambda _, folder, stage, found: stage)
    runs.train(*arguments)


def settings(outputs: Path) -> list[str]:
    return [*QUICK, f"outputs={outputs}"]


@dataclass
class Recorded:
    """A run whose outputs are in `disk/outputs` of a folder, and what it did below `disk`."""

    folder: Path
    calls: list[Call]
    """Those that changed something or made sure of it, and those that told of a promise."""

    @property
    def run(self) -> Path:
        return self.folder / "disk/outputs/run"

    def told(self, moment: int) -> list[str]:
        """Checkpoints and stages that were promised when the first calls were made."""
        return [call.texts[0].decode() for call in self.calls[:moment] if call.paths == [str(self.folder / "told")]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    if not recorded_disk.can_record():
        pytest.skip("there is no strace, or it may not trace here")
    folder = tmp_path_factory.mktemp("power")
    (folder / "disk").mkdir()
    recipe, told, log = runs.recipe_file(folder, runs.packed_data(folder)), str(folder / "told"), folder / "strace"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", START, told, str(recipe), *settings(folder / "disk/outputs")]
    done = subprocess.run(
        [*recorded_disk.STRACE, "-o", str(log), *child], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    disk = Disk(folder / "disk")
    return Recorded(
        folder, [call for call in recorded_disk.read_calls(log) if call.paths == [told] or disk.apply(call)]
    )


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_recording_is_all_that_was_done(recorded: Recorded, tmp_path: Path) -> None:
    disk = Disk(recorded.folder / "disk")
    for call in recorded.calls:
        disk.apply(call)
    disk.write(tmp_path / "disk")
    assert contents(tmp_path / "disk") == contents(recorded.folder / "disk")
    saved = [f"step-000000{name}" for name in ("03", "06", "08-end", "11", "14", "16-end")]
    assert recorded.told(len(recorded.calls)) == [*saved[:3], "warmup", *saved[3:], "joint"]


def records(run: Path, step: int, evaluated: Container[str]) -> list[tuple[int, str, list[str]]]:
    """Step, stage and names of the records up to a step; of evaluations, those of some stages."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] <= step]
    return [
        (line["step"], line["stage"], sorted(line))
        for line in kept
        if line["stage"] in evaluated or not any(name.startswith("eval/") for name in line)
    ]


def check_files(recorded: Recorded, run: Path, promised: list[str]) -> None:
    """All that was promised is there, and what counts as there is whole."""
    complete = checkpoint.list_complete(str(run / "checkpoints"))
    for folder in complete:
        loaded = checkpoint.load_checkpoint(folder)
        assert loaded.rows(sorted(loaded.ids))
    saved = [name for name in promised if name.startswith("step-")]
    assert not saved or (complete and Path(complete[-1]).name >= saved[-1]), f"{saved} are lost but for {complete}"
    whole, found = read_metrics(recorded.run), read_metrics(run)
    assert {*promised} - {*saved} <= {*found} and all(found[stage] == whole[stage] for stage in found), found


def start(recorded: Recorded, outputs: Path) -> Trainer:
    """A new start, up to its first step: nothing is in its way, and it resumes from the newest checkpoint."""
    run = outputs / "run"
    complete = checkpoint.list_complete(str(run / "checkpoints"))
    AcceleratorState._reset_state(reset_partial_state=True)
    started = Trainer(config.load(Recipe, recorded.folder / "recipe.yaml", settings(outputs)))
    step = started.progress.total
    assert step == (checkpoint.load_checkpoint(complete[-1]).progress.total if complete else 0)
    with open_run(started.recipe, started.channel), started.tracking(step):
        pass
    assert checkpoint.list_complete(str(run / "checkpoints")) == complete
    assert config.load(Recipe, run / "config.yaml", []) == started.recipe
    found = read_metrics(run)
    assert records(run, step, found) == records(recorded.run, step, found), "records are lost"
    return started


def finish(recorded: Recorded, started: Trainer) -> None:
    """The run to its end, which is that of the recorded one."""
    started.run()
    assert runs.digests(started.folder) == runs.digests(recorded.run)
    assert runs.exported(started.folder) == runs.exported(recorded.run)
    assert runs.figures(started.folder) == pytest.approx(runs.figures(recorded.run), abs=1e-4)  # as in test_kill.py


def test_every_moment(recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files after all calls that name, remove or sync something; a new start after some of those and some writes."""
    rng, calls = random.Random(0), recorded.calls
    names = [moment for moment in range(1, len(calls)) if calls[moment - 1].name not in ("openat", "write")]
    starts = sorted({*rng.sample(names, STARTS // 2), *rng.sample(range(1, len(calls)), STARTS // 2)})
    finished = starts[FINISHED :: STARTS // FINISHED]
    disk, done, problems, resumed = Disk(recorded.folder / "disk"), 0, [], set()
    for moment in sorted({*names, *starts}):
        for call in calls[done:moment]:
            disk.apply(call)
        done, outputs = moment, tmp_path / str(moment) / "outputs"
        disk.write(outputs.parent, random.Random(moment))
        caplog.clear()
        try:
            check_files(recorded, outputs / "run", recorded.told(moment))
            if moment in starts:
                started = start(recorded, outputs)
                resumed.add(started.progress.total)
                if moment in finished:
                    finish(recorded, started)
            assert "damaged" not in caplog.text, caplog.text
        except (AssertionError, ValueError, OSError) as error:
            problems.append(f"after {recorded.told(moment)} and {calls[moment - 1].name}, {moment}: {error}"[:500])
        shutil.rmtree(outputs.parent)
    assert not problems, "\n".join(problems)
    # which of them is a matter of the threads of a run
    assert len(resumed) > 3 and resumed <= {0, 3, 6, 8, 11, 14, 16} and len(finished) >= FINISHED
