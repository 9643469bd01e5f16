# SPDX-License-Identifier: Apache-2.0
"""A run's folder, read for its report. Nothing in it is trusted: it may be the run of somebody else."""

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from igae.errors import redact
from igae.evaluation import current_name as renamed

T = TypeVar("T")
current_name = functools.cache(renamed)  # asked for the same few names again and again


def finite(data: Any) -> Any:
    """The finite numbers of a map, under today's names; what is no map comes back as it is."""
    if not isinstance(data, dict):
        return data
    numbers = {k: v for k, v in data.items() if isinstance(v, int | float) and not isinstance(v, bool)}
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


@dataclass
class LoggedRun:
    folder: Path
    steps: list[LoggedStep] = field(default_factory=list)
    stage_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of metrics.json: at the end of each stage."""
    evaluation: SceneMetrics | None = None
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys([logged.stage for logged in self.steps] + list(self.stage_metrics)))


def read_run(folder: Path) -> LoggedRun:
    """Read what there is; a run that is under way has less.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
    """
    config = folder / "config.yaml"
    if not config.is_file() and not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is not the folder of a run, it has neither metrics.jsonl nor config.yaml: give outputs/NAME"
        )
    run = LoggedRun(folder, _read_steps(folder / "metrics.jsonl"))
    run.stage_metrics = _read(folder / "metrics.json", dict[str, Metrics]) or {}
    run.evaluation = _read(folder / "evaluation.json", SceneMetrics)
    if config.is_file():
        run.config = redact(config.read_text(encoding="utf-8", errors="replace"))
    environment = _read(folder / "environment.json", dict[str, Any]) or {}
    run.environment = {name: str(value) for name, value in environment.items()}
    return run


def _read_steps(path: Path) -> list[LoggedStep]:
    steps = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            found = dict(json.loads(line))
            step, stage, time = float(found.pop("step")), str(found.pop("stage")), float(found.pop("time"))
        except (ValueError, KeyError, TypeError, RecursionError):  # the run is being written, or was killed then
            continue
        if math.isfinite(step) and math.isfinite(time):
            steps.append(LoggedStep(step, stage, time, finite(found)))
    return steps


def _read(path: Path, kind: type[T]) -> T | None:
    """A JSON file of a kind; None if there is no such file."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError:
        raise ValueError(f"{path} is damaged, it is not what igae writes: make it again, or remove it") from None
