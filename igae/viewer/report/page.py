# SPDX-License-Identifier: Apache-2.0
"""The report's page."""

import base64
import hashlib
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from igae import __version__
from igae.errors import redact
from igae.evaluation import problems
from igae.storage import write_text
from igae.viewer.report import curves, media
from igae.viewer.report.run import MAX_NAMES, LoggedRun, read_run

ROWS = 1000  # of the table of scenes
ENDS = 5  # best and worst scenes
RANKED_BY = ("heldout/rgb_psnr", "train/rgb_psnr", "heldout/latent_psnr", "train/latent_psnr")
SMALL_IS_GOOD = ("lpips", "mse")
SPEEDS = ("views_per_second", "seconds_per_scene", "data_wait")
HERE = Path(__file__).parent
log = logging.getLogger("igae")


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write a run's report, one HTML file that holds its pictures and videos and loads nothing else; return its path.

    Args:
        run: the folder of a run, finished or under way.
        output: the file, written atomically; ``RUN/report.html`` if None.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
        OSError: the file can't be written.
    """
    page = render(read_run(run))
    path = run / "report.html" if output is None else output
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}, make it first")
    write_text(path, page)
    return path


def try_to_write(run: Path) -> None:
    """Write the report at the end of a run; an error is a warning."""
    try:
        log.info("the report of the run is %s", write_report(run))
    except Exception as error:
        log.warning("the report was not written (%s); to try again: python -m igae.report %s", error, run)


def render(run: LoggedRun) -> str:
    """The page's HTML."""
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["number"] = lambda value: "–" if value is None else f"{value:.5g}"
    # Nothing but these two is trusted: they are files of the package.
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return jinja.get_template("page.html").render(
        name=run.folder.resolve().name,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        run=run,
        folder=redact(str(run.folder)),
        problems=found_problems(run),
        metrics=list(dict.fromkeys(name for metrics in run.stage_metrics.values() for name in metrics)),
        charts=curves.charts(run.steps),
        plot=curves,
        table=scene_table(run.evaluation.scenes, run.evaluation.means) if run.evaluation else None,
        pictures=media.pictures(run.folder),
        orbits=media.orbits(run.folder, run.stages),
        throughput=throughput(run),
    )


def found_problems(run: LoggedRun) -> dict[str, str]:
    """What is wrong with the scenes -> where that was measured: in the last evaluation of training, or afterwards."""
    measured = {}
    for logged in run.steps:
        names = [name for name in logged.values if name.startswith("eval/")]
        if names:
            metrics = {name.removeprefix("eval/"): logged.values[name] for name in names}
            measured = {f"{logged.stage}, step {logged.step:.0f}": metrics}
    if run.evaluation:
        measured["evaluation.json"] = run.evaluation.means
    return {problem: where for where, metrics in measured.items() for problem in problems(metrics)}


def scene_table(scenes: dict[str, dict[str, float]], means: dict[str, float]) -> dict[str, Any]:
    """The table of scenes, worst first, and the best and the worst of them; of many scenes, the worst only.

    Scenes are ranked by the PSNR of decoded renders, or by the nearest thing that was measured.
    """
    columns = list(dict.fromkeys([*means, *(name for values in scenes.values() for name in values)]))[:MAX_NAMES]
    psnrs = [name for name in columns if name.endswith("psnr")]
    by = next((name for name in (*RANKED_BY, *psnrs, *columns) if name in columns), "")
    sign = -1 if by.rpartition("_")[2] in SMALL_IS_GOOD else 1
    ranked = sorted((name for name in scenes if by in scenes[name]), key=lambda name: sign * scenes[name][by])
    unranked = [name for name in scenes if by not in scenes[name]]
    ends = min(ENDS, len(ranked) // 2)
    return {
        "columns": columns,
        "means": means,
        "by": by,
        "rows": [(name, scenes[name]) for name in (ranked + unranked)[:ROWS]],
        "count": len(scenes),
        "worst": [(name, scenes[name][by]) for name in ranked[:ends]],
        "best": [(name, scenes[name][by]) for name in ranked[::-1][:ends]],
    }


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
