# SPDX-License-Identifier: Apache-2.0
"""The report's page."""

import base64
import hashlib
import itertools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from igae import __version__
from igae.config import parse, shown
from igae.errors import redact
from igae.evaluation import METRICS, problems, ranked, verdict
from igae.storage import write_text
from igae.viewer.report import curves, media
from igae.viewer.report.run import MAX_NAMES, LoggedRun, read_run

ROWS = 1000  # of the table of scenes
SPEEDS = ("views_per_second", "seconds_per_scene", "data_wait")
SETTINGS = 200  # that differ
HERE = Path(__file__).parent
log = logging.getLogger("igae")


def write_report(runs: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of a run, or of several side by side: one HTML file that holds its pictures and videos and loads
    nothing else; return its path.

    Args:
        runs: folders of runs, finished or under way.
        output: the file, written atomically; if None ``RUN/report.html``, of several ``comparison.html`` beside the
            first.

    Raises:
        ValueError: a folder is no run's, or a file in it is damaged.
        OSError: the file can't be written.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    page = render([read_run(folder) for folder in folders])
    beside = folders[0] / "report.html" if len(folders) == 1 else folders[0].resolve().parent / "comparison.html"
    path = beside if output is None else output
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}, make it first")
    write_text(path, page)
    return path


def try_to_write(run: Path) -> Path | None:
    """Write the report at the end of a run; an error is a warning, and None."""
    try:
        return write_report(run)
    except Exception as error:
        log.warning("the report was not written (%s); to try again: igae report %s", error, run)
        return None


def render(runs: Sequence[LoggedRun]) -> str:
    """The page's HTML."""
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["number"] = lambda value: "–" if value is None else f"{value:.5g}"
    # Nothing but these two is trusted: they are files of the package.
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    names = dict(zip(_distinct(runs), runs, strict=True))
    columns = end_metrics(names)
    metrics = sorted({name for values in columns.values() for name in values}, key=_order_of_metrics)
    found = curves.charts({name: run.steps for name, run in names.items()})
    return jinja.get_template("page.html").render(
        title=", ".join(names),
        runs=names,
        colors=dict(zip(names, itertools.cycle(curves.COLORS), strict=False)) if len(runs) > 1 else {},
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        folders={name: redact(str(run.folder)) for name, run in names.items()},
        verdicts={
            name: verdict(next(reversed(run.measured.values()), {}), run.stage_metrics.get("warmup"))
            for name, run in names.items()
        },
        problems={name: found_problems(run) for name, run in names.items()},
        columns=columns,
        metrics=metrics,
        explain=curves.explain,
        glossary={name: curves.explain(name) for name in [*metrics, *_charted(found)] if curves.explain(name)},
        charts=found,
        plot=curves,
        table=_table(names),
        examples={name: media.examples(run.folder) for name, run in names.items()},
        pictures={name: media.pictures(run.folder) for name, run in names.items()},
        orbits={name: media.orbits(run.folder, run.stages) for name, run in names.items()},
        throughput=[(name, row) for name, run in names.items() for row in throughput(run)],
        settings=different_settings(names),
        other_data=different_data(names),
        environment={name: run.environment for name, run in names.items() if run.environment},
    )


def _distinct(runs: Sequence[LoggedRun]) -> list[str]:
    """Names of the runs; of equal ones, and of a folder given twice, each with its number."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def end_metrics(runs: Mapping[str, LoggedRun]) -> dict[str, dict[str, float]]:
    """Of one run, the metrics at the end of each stage; of several, those of the last stage of each. What a later
    ``igae evaluate`` has measured is one more of one run, and comes first of several."""
    columns = dict[str, dict[str, float]]()
    for name, run in runs.items():
        stages = run.stage_metrics
        last = list(stages.values())[-1] if stages else {}
        evaluation = run.evaluation.means if run.evaluation else {}
        if len(runs) > 1:
            columns[name] = last | evaluation
        else:
            columns |= stages
            if evaluation.items() - last.items():
                columns["evaluation.json"] = evaluation
    return {name: values for name, values in columns.items() if values}


def _order_of_metrics(name: str) -> tuple[int, str]:
    known = list(METRICS)
    return known.index(name) if name in known else len(known), name


def _charted(charts: list[curves.Chart]) -> list[str]:
    return list(dict.fromkeys(line.name.removeprefix("eval/") for chart in charts for line in chart.lines))


def found_problems(run: LoggedRun) -> dict[str, str]:
    """What is wrong with the scenes -> where that was measured: in the last evaluation of training, or afterwards."""
    return {problem: where for where, metrics in run.measured.items() for problem in problems(metrics)}


def _table(runs: Mapping[str, LoggedRun]) -> dict[str, Any] | None:
    """The table of scenes: of one run with all metrics, of several with the one that scenes are ranked by of each."""
    measured = {name: run.evaluation for name, run in runs.items() if run.evaluation}
    if len(runs) == 1:
        return next((scene_table(found.scenes, found.means) for found in measured.values()), None)
    by = next((ranked(found.scenes)[0] for found in measured.values() if found.scenes), "")
    scenes: dict[str, dict[str, float]] = {}
    for run, found in measured.items():
        for scene, values in found.scenes.items():
            scenes.setdefault(scene, {}).update({run: values[by]} if by in values else {})
    means = {run: found.means[by] for run, found in measured.items() if by in found.means}
    return scene_table(scenes, means) | {"by": by} if scenes else None


def scene_table(scenes: dict[str, dict[str, float]], means: dict[str, float]) -> dict[str, Any]:
    """The table of scenes, worst first (see :func:`igae.evaluation.ranked`); of many scenes, the worst only."""
    by, names = ranked(scenes)
    every = [*means, *(name for values in scenes.values() for name in values)]
    columns = list(dict.fromkeys(filter(None, [by, *every])))[:MAX_NAMES]
    rest = [name for name in scenes if by not in scenes[name]]
    rows = [(name, scenes[name]) for name in (names + rest)[:ROWS]]
    return {"columns": columns, "means": means, "by": by, "rows": rows, "count": len(scenes)}


def different_settings(runs: Mapping[str, LoggedRun]) -> dict[str, list[str]]:
    """Of one run, settings that differ from its recipe, with the recipe's value and the run's; of several, those that
    are not the same in all, with the value of each."""
    if len(runs) == 1:
        (run,) = runs.values()
        rows = {key: both for key, both in run.changes.items() if both[0] != both[1]}
    else:
        every = [_flat(run.config) for run in runs.values()]
        keys = list(dict.fromkeys(key for settings in every for key in settings))
        found = {key: [settings.get(key, "–") for settings in every] for key in keys}
        rows = {key: values for key, values in found.items() if len(set(values)) > 1}
    return dict(itertools.islice(rows.items(), SETTINGS))


def different_data(runs: Mapping[str, LoggedRun]) -> dict[str, str]:
    """Of runs whose data, or the scenes that they were evaluated on, are not the same, what those of each are."""
    roots = {name: _flat(run.config).get("data.root", "") for name, run in runs.items()}
    scenes = {name: frozenset(run.evaluation.scenes) if run.evaluation else frozenset() for name, run in runs.items()}
    if all(len(set(found.values()) - {"", frozenset()}) < 2 for found in (roots, scenes)):  # others are unknown
        return {}
    counts = {name: f"{len(found)} evaluated scenes" if found else "" for name, found in scenes.items()}
    return {name: ", ".join(filter(None, (roots[name], counts[name]))) or "unknown" for name in runs}


def _flat(text: str) -> dict[str, str]:
    """Saved settings by dotted keys; none of what is no configuration."""
    found = dict[str, str]()

    def walk(tree: Any, key: str) -> None:
        if isinstance(tree, dict) and tree:
            for name, sub in tree.items():
                walk(sub, f"{key}.{name}".lstrip("."))
        else:
            found[key] = shown(tree)

    with suppress(ValueError):
        walk(parse(text, ""), "")
    return found


def throughput(run: LoggedRun) -> list[dict[str, Any]]:
    """For each stage: the steps and minutes from its first to its last record, interruptions included, and medians of
    the logged speeds."""
    rows = []
    for stage in dict.fromkeys(logged.stage for logged in run.steps):
        steps = [logged for logged in run.steps if logged.stage == stage]
        row: dict[str, Any] = {"stage": stage, "steps": f"{steps[0].step:.0f} to {steps[-1].step:.0f}"}
        row["minutes"] = (steps[-1].time - steps[0].time) / 60
        for name in SPEEDS:
            values = [logged.values[name] for logged in steps if name in logged.values]
            row[name] = statistics.median(values) if values else None
        rows.append(row)
    return rows
