# SPDX-License-Identifier: Apache-2.0
"""What a run's folder holds, read for its report. Nothing of it is trusted: other people's runs are looked at too."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igae.errors import redact
from igae.evaluation import current_name

Values = dict[str, float]
SPAN = ("step", "time")  # numbers of a record that are not measured


@dataclass
class Record:
    """A line of metrics.jsonl: ``time`` in seconds since 1970, ``values`` without those that are not finite."""

    step: float
    stage: str
    time: float
    values: Values


@dataclass
class Run:
    folder: Path
    records: list[Record]
    figures: dict[str, Values]
    """Of metrics.json: those at the end of each stage."""
    means: Values = field(default_factory=dict)
    """Of evaluation.json: over all its scenes."""
    scenes: dict[str, Values] | None = None
    """Of evaluation.json, by scene; None where there is no such file."""
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys([record.stage for record in self.records] + list(self.figures)))


def read_run(folder: Path) -> Run:
    """Read what there is; a run that is under way has less.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
    """
    names = ("metrics.jsonl", "config.yaml")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} is not the folder of a run, it has neither {' nor '.join(names)}: give outputs/NAME"
        )
    run = Run(folder, _records(folder / "metrics.jsonl"), {})
    path = folder / "metrics.json"
    run.figures = {stage: _values(figures, path) for stage, figures in (_json(path) or {}).items()}
    path = folder / "evaluation.json"
    evaluation = _json(path)
    if evaluation is not None:
        run.means = _values(evaluation.get("means"), path)
        scenes = evaluation.get("scenes")
        if not isinstance(scenes, dict):
            raise _damaged(path)
        run.scenes = {name: _values(scenes[name], path) for name in scenes}
    config = folder / "config.yaml"
    if config.is_file():
        run.config = redact(config.read_text(encoding="utf-8", errors="replace"))
    environment = _json(folder / "environment.json") or {}
    run.environment = {str(name): str(value) for name, value in environment.items()}
    return run


def _records(path: Path) -> list[Record]:
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            found = json.loads(line)
            step, stage, time = float(found["step"]), str(found["stage"]), float(found["time"])
        except (ValueError, KeyError, TypeError, RecursionError):  # the run is being written, or was killed then
            continue
        if math.isfinite(step) and math.isfinite(time):
            records.append(Record(step, stage, time, _numbers({k: v for k, v in found.items() if k not in SPAN})))
    return records


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(data, dict):
        raise _damaged(path)
    return data


def _values(data: Any, path: Path) -> Values:
    if not isinstance(data, dict):
        raise _damaged(path)
    return _numbers(data)


def _numbers(data: dict[str, Any]) -> Values:
    """The finite numbers."""
    numbers = {k: v for k, v in data.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {current_name(k): float(v) for k, v in numbers.items() if abs(v) < 1e300}


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged, it is not what igae writes: make it again, or remove it")
