# SPDX-License-Identifier: Apache-2.0
"""A run's folder, read for its report. Nothing in it is trusted: it may be the run of somebody else."""

import functools
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from igae.errors import redact
from igae.evaluation import current_name as renamed
from igae.storage import MAX_SMALL, own_file, parse_json, read_own

MAX_RECORDS, MAX_EVALUATION, MAX_NAMES, MAX_STAGES = 32 << 20, 256 << 20, 200, 20
"""Bytes of metrics.jsonl that are shown and of evaluation.json, metrics of a record (igae's has 40), stages."""
T = TypeVar("T")
current_name = functools.cache(renamed)  # asked for the same few names again and again


def finite(data: Any) -> Any:
    """The finite numbers of a map, under today's names; what is no map comes back as it is."""
    if not isinstance(data, dict):
        return data
    few = itertools.islice(data.items(), MAX_NAMES)
    numbers = {k: v for k, v in few if isinstance(v, int | float) and not isinstance(v, bool)}
    return {current_name(k): float(v) for k, v in numbers.items() if abs(v) < 1e300}


Metrics = Annotated[dict[str, float], BeforeValidator(finite)]


@dataclass
class LoggedStep:
    """A line of metrics.jsonl: ``time`` in seconds since 1970, ``values`` without those that are not finite."""

    step: float
    stage: str
    time: float
    values: dict[str, float]


class SceneMetrics(BaseModel):
    """Of evaluation.json: means over all scenes, and by scene."""

    means: Metrics
    scenes: dict[str, Metrics]


class Changes(BaseModel):
    recipe: str = ""
    changes: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]] = {}


@dataclass
class LoggedRun:
    folder: Path
    steps: list[LoggedStep] = field(default_factory=list)
    stage_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of metrics.json: at the end of each stage."""
    evaluation: SceneMetrics | None = None
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Of changes.json: the recipe, and settings that differ from it, with both values."""
    evaluated: float = 0.0
    """When evaluation.json was written, in seconds since 1970."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def measured(self) -> dict[str, dict[str, float]]:
        """Means of training's last evaluation and of ``evaluation.json``, the newest last, by where they are from."""
        found = list[tuple[float, str, dict[str, float]]]()
        for logged in self.steps:
            if metrics := {k.removeprefix("eval/"): v for k, v in logged.values.items() if k.startswith("eval/")}:
                found = [(logged.time, f"{logged.stage}, step {logged.step:.0f}", metrics)]
        if self.evaluation:
            found.append((self.evaluated, "evaluation.json", self.evaluation.means))
        return {where: metrics for _, where, metrics in sorted(found, key=lambda item: item[0])}

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys([logged.stage for logged in self.steps] + list(self.stage_metrics)))


def read_run(folder: Path) -> LoggedRun:
    """Read what there is; a run that is under way has less.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
    """
    config = read_own(str(folder), "config.yaml")
    if config is None and not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is not the folder of a run, it has neither metrics.jsonl nor config.yaml: give outputs/NAME"
        )
    if (folder / "igae.json").is_file():
        raise ValueError(f"{folder} is an export and has no metrics: give the folder of the run, outputs/NAME")
    run = LoggedRun(folder, _read_steps(folder))
    run.stage_metrics = _read(folder, "metrics.json", dict[str, Metrics]) or {}
    run.evaluation = _read(folder, "evaluation.json", SceneMetrics, MAX_EVALUATION)
    if run.evaluation:
        run.evaluated = (folder / "evaluation.json").stat().st_mtime
    changes = _read(folder, "changes.json", Changes) or Changes()
    run.recipe, run.changes = changes.recipe, changes.changes
    run.config = redact((config or b"").decode(errors="replace"))
    environment = _read(folder, "environment.json", dict[str, Any]) or {}
    run.environment = {name: str(value) for name, value in environment.items()}
    return run


def _read_steps(folder: Path) -> list[LoggedStep]:
    """Of metrics.jsonl, the last records of a long one."""
    path, steps, stages = Path(own_file(str(folder), "metrics.jsonl")), list[LoggedStep](), set[str]()
    for line in _tail(path) if path.is_file() else ():
        try:
            found = dict(parse_json(line))
            step, stage, time = float(found.pop("step")), str(found.pop("stage")), float(found.pop("time"))
        except (ValueError, KeyError, TypeError, OverflowError):  # the run is being written, or was killed then
            continue
        if math.isfinite(step) and math.isfinite(time) and (stage in stages or len(stages) < MAX_STAGES):
            stages.add(stage)
            steps.append(LoggedStep(step, stage, time, finite(found)))
    return steps


def _tail(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - MAX_RECORDS)
        file.seek(start)
        return file.read(MAX_RECORDS).splitlines()[start > 0 :]


def _read(folder: Path, name: str, kind: type[T], most: int = MAX_SMALL) -> T | None:
    """A JSON file of a kind; None if there is no such file."""
    try:
        data = read_own(str(folder), name, most)
        return None if data is None else TypeAdapter(kind).validate_json(data)
    except ValidationError:
        raise ValueError(
            f"{folder / name} is damaged, it is not what igae writes: make it again, or remove it"
        ) from None
