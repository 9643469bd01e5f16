# SPDX-License-Identifier: Apache-2.0
"""Small runs in processes forked from this one, to which something may happen, and whether they end as they should."""

import hashlib
import json
import multiprocessing
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
import ranks
import runs
import safetensors.torch
import torch

from igae.checkpoint import load_checkpoint

TIMEOUT = 20
QUICK = [f"train.{stage}.{setting}" for stage in ("warmup", "joint") for setting in ("epochs=1", "batch_size=16")]
QUICK += ["train.warmup.augment={}", "train.joint.natural_images=0", "checkpoint.every=1", "tracking.every=1"]
QUICK += ["data.workers=0", "evaluation.natural_images=0", "autoencoder.scale=1", f"train.timeout={TIMEOUT}"]
LAST, KILLED = "step-00000002-end", "step-00000003"
"""Of four checkpoints: that which a run that is to be resumed has ended with, and the one that a kill kept it from."""
SAVED = re.compile(r"step-\d{8}(-end)?")
Ended = tuple[list[int | None], str]
"""Exit codes of a run's ranks, and what they printed."""


class Found(NamedTuple):
    """What came of a fault: exit codes of the ranks, what it hit, and what was not as it should be."""

    codes: list[int | None]
    hit: str
    problems: list[str]


@dataclass
class Outcome:
    """What a run has left: digests of its newest checkpoint's tensors, metrics, records, and names of all files."""

    tensors: dict[str, str]
    metrics: dict[str, float]
    records: list[tuple[int, str, list[str]]]
    files: set[str]


def use_forks() -> None:
    """Fork processes from this one, which has the slow imports behind it and must not have started threads."""
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    import s3fs  # noqa: F401

    import igae.cli.train  # noqa: F401
    import igae.training.fit
    import igae.training.trainer
    import igae.viewer.report.page  # noqa: F401

    torch.set_num_threads(1)
    ranks.CONTEXT = multiprocessing.get_context("fork")  # type: ignore[assignment]


def start(function: Callable[..., Any], world: int, log: Path, *arguments: Any) -> Ended:
    """Run a function in each rank."""
    for _ in range(5):
        log.unlink(missing_ok=True)
        codes = ranks.Ranks(function, world, *arguments, log=str(log)).exit_codes(120)
        text = log.read_text(errors="replace") if log.exists() else ""
        if "EADDRINUSE" not in text:  # else somebody has taken the port that was free, and nothing has begun
            break
    return codes, text


def complete(root: str) -> list[str]:
    """Folders with a state.json, oldest first: not as the package lists them."""
    fs, path = fsspec.url_to_fs(root)
    fs.invalidate_cache()
    names = {file.rsplit("/", 2)[1] for file in fs.find(path) if file.endswith("/state.json")}
    return [f"{root}/{name}" for name in sorted(names) if SAVED.fullmatch(name)]


def tensors(folder: str) -> dict[str, str]:
    """Digest of every tensor of a checkpoint."""
    fs, path = fsspec.url_to_fs(folder)
    return {
        f"{folder.rsplit('/', 1)[1]}/{file.rsplit('/', 1)[1]}/{name}": hashlib.sha256(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for file in sorted(fs.find(path))
        if file.endswith(".safetensors")
        for name, tensor in safetensors.torch.load(fs.cat_file(file)).items()
    }


def names(run: Path, root: str) -> Iterator[str]:
    for file in run.rglob("*"):
        yield f"{file.relative_to(run)}"
    if "://" in root:
        fs, path = fsspec.url_to_fs(root)
        for file in fs.find(path):
            yield f"checkpoints{file.removeprefix(path)}"


def look(run: Path, root: str) -> Outcome:
    """At a finished run and the root of its checkpoints. What was set aside does not count."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [(line["step"], line["stage"], sorted(line)) for line in lines]
    return Outcome(
        tensors(complete(root)[-1]),
        runs.figures(run),
        [record for record in records if not any(name.startswith("eval/") for name in record[2])],
        {name for name in names(run, root) if "-damaged" not in name},
    )


def how_it_ended(codes: list[int | None], text: str, killed: bool) -> list[str]:
    """What is wrong with how a run with a fault has ended: it has to go on, or end with a sentence of each rank."""
    problems = []
    if "Traceback" in text:
        problems.append("a traceback")
    allowed = (0, 1, 2, -9) if killed else (0, 1, 2)
    if not all(code in allowed for code in codes):
        problems.append(f"exit codes {codes}")
    failed = sum(code in (1, 2) for code in codes)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if len(errors) != failed:
        problems.append(f"{len(errors)} sentences of {failed} ranks that failed")
    return problems


def newest_loads(root: str, but: set[str]) -> list[str]:
    """Whether the newest complete checkpoint loads, with all rows; `but` some names, of damaged ones."""
    folders = [folder for folder in complete(root) if folder.rsplit("/", 1)[1] not in but]
    try:
        if folders:
            loaded = load_checkpoint(folders[-1])
            loaded.rows(sorted(loaded.ids))
    except ValueError as error:
        return [f"the newest checkpoint does not load: {error}"]
    return []


def compare(run: Path, root: str, expected: Outcome, text: str, ended: bool = True) -> list[str]:
    """How a run that ended well differs from an undisturbed one.

    Args:
        text: what was printed: a checkpoint that could not be removed, or a report that was not written, is told.
        ended: nothing may be left, as the run after a fault has seen to that.
    """
    try:
        found, problems = look(run, root), []
    except (OSError, ValueError, LookupError) as error:
        return [f"it ended well and its results can't be read: {error!r}"]
    if found.tensors != expected.tensors:
        different = [name for name in expected.tensors if found.tensors.get(name) != expected.tensors[name]]
        problems.append(f"{len(different)} other tensors, such as {different[:1]}")
    if found.metrics != pytest.approx(expected.metrics, abs=1e-4):  # as in test_kill.py
        problems.append("other metrics")
    if found.records != expected.records:
        problems.append(f"{len(found.records)} records, not the {len(expected.records)}")
    missing = expected.files - found.files
    if not ended and "the report was not written" in text:
        missing -= {"report.html"}
    problems += [f"missing: {sorted(missing)}"] * bool(missing)
    kept = {name.removesuffix("state.json") for name in found.files if name.endswith("/state.json")}
    told = "can't be removed" in text or "are kept" in text
    left = {
        name
        for name in found.files - expected.files
        if not (told and any(f"{name}/".startswith(folder) for folder in kept))
    }
    return problems + [f"left: {sorted(left)}"] * bool(left and ended)
