# SPDX-License-Identifier: Apache-2.0
"""The report's page."""

import base64
import hashlib
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from igae import __version__
from igae.errors import redact
from igae.viewer.report import curves, media
from igae.viewer.report.run import Run, Values, read_run

ROWS = 1000  # of the table of scenes
ENDS = 5  # best and worst scenes
RANKED_BY = ("heldout/rgb_psnr", "train/rgb_psnr", "heldout/latent_psnr", "train/latent_psnr")
SMALL_IS_GOOD = ("lpips", "mse")
SPEEDS = ("views_per_second", "seconds_per_scene", "data_wait")
HERE = Path(__file__).parent
log = logging.getLogger("igae")


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write a run's report: one HTML file that holds its pictures and videos and asks for nothing else.

    Args:
        run: the folder of a run, finished or under way.
        output: the file; ``RUN/report.html`` if None. It is there whole or not at all.

    Returns:
        The file's path.

    Raises:
        ValueError: the folder is no run's, or a file in it is damaged.
        OSError: the file can't be written.
    """
    page = render(read_run(run))
    path = run / "report.html" if output is None else output
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}, make it first")
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(page, encoding="utf-8")
    os.replace(staging, path)
    return path


def try_to_write(run: Path) -> None:
    """The report at the end of a run, which does not fail for it."""
    try:
        write_report(run)
    except Exception as error:
        log.warning("the report was not written (%s); to try again: python -m igae.report %s", error, run)


def render(run: Run) -> str:
    """The page's HTML."""
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["number"] = lambda value: "–" if value is None else f"{value:.5g}"
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures, pictures_left_out = media.pictures(run.folder)
    orbits, orbits_left_out = media.orbits(run.folder, run.stages)
    return jinja.get_template("page.html").render(
        name=run.folder.resolve().name,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        # Nothing but these two is trusted: they are files of the package.
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=digest,
        run=run,
        folder=redact(str(run.folder)),
        figures=list(dict.fromkeys(name for values in run.figures.values() for name in values)),
        charts=curves.charts(run.records),
        plot=curves,
        table=scene_table(run.scenes, run.means) if run.scenes is not None else None,
        pictures=pictures,
        pictures_left_out=pictures_left_out,
        orbits=orbits,
        orbits_left_out=orbits_left_out,
        throughput=throughput(run),
    )


def scene_table(scenes: dict[str, Values], means: Values) -> dict[str, Any]:
    """Rows for the table of scenes, worst first, and the best and the worst of them. Of many scenes the table has the
    worst only. What they are ranked by is the PSNR of decoded renders, or what there is in its place."""
    columns = list(dict.fromkeys([*means, *(name for values in scenes.values() for name in values)]))
    by = next((name for name in RANKED_BY if name in columns), None)
    by = by or next((name for name in columns if name.endswith("psnr")), columns[0] if columns else "")
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


def throughput(run: Run) -> list[dict[str, Any]]:
    """For each stage: the steps and minutes between its first and its last record (with interruptions), and medians of
    the speeds that were recorded."""
    rows = []
    for stage in dict.fromkeys(record.stage for record in run.records):
        records = [record for record in run.records if record.stage == stage]
        row: dict[str, Any] = {
            "stage": stage,
            "steps": f"{records[0].step:.0f} to {records[-1].step:.0f}",
            "minutes": (records[-1].time - records[0].time) / 60,
        }
        for name in SPEEDS:
            values = [record.values[name] for record in records if name in record.values]
            row[name] = statistics.median(values) if values else None
        rows.append(row)
    return rows
