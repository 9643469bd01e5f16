# SPDX-License-Identifier: Apache-2.0
"""What is seen while something takes its time: in a log, on a terminal, and of each command."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from accelerate.state import AcceleratorState

import igae.errors
from igae.cli import evaluate, export, fit, pack, report, train
from igae.errors import EVERY, QUIET, progress
from igae.models import IGAE, Autoencoder

LINE = re.compile(r"(.+): (\S+) of (\S+) (.+), elapsed [\d:]+, ETA [\d:?]+.*")
SILENT = 8
"""Calls of networks, renderer, encoders of pictures that may follow one another without a word."""


def test_a_log_gets_a_line_after_a_while_and_then_one_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now, seen = 1e9, []
    with progress("reading s3://key:hidden@bucket", 1000, "files") as bar:
        bar._time, bar.start_t = lambda: now, now  # a clock of its own
        for step in range(1, 201):
            now = 1e9 + step
            bar.update()
            if text := capsys.readouterr().err:
                seen.append((step, text))
    assert QUIET <= 5 and EVERY == 60
    assert [step for step, _ in seen] == [5, 65, 125, 185]
    assert seen[1][1] == "reading s3://***@bucket: 65 of 1000 files, elapsed 01:05, ETA 15:35\n"
    assert capsys.readouterr().err == ""  # nothing remains to be said
    for _ in progress("short", 3, "files", range(3)):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress("packing", 3, "views", range(3)):
        assert "packing" in terminal.getvalue()  # from the beginning
    assert terminal.getvalue().rpartition("\r")[0].endswith(" ")  # blanks over it


def test_the_first_rank_alone_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(igae.errors, "QUIET", 0)
    monkeypatch.setattr(igae.errors, "EVERY", 0)
    for number in (0, 1):
        monkeypatch.setattr(igae.errors, "rank", lambda number=number: number)
        list(progress("reading", 2, "files", range(2)))
        assert (capsys.readouterr().err != "") == (number == 0)


class Watched(io.StringIO):
    """Stands for stderr; ``timeline`` has what was written, and None for each piece of work."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[str | None] = []

    def write(self, text: str) -> int:
        self.timeline.append(text)
        return len(text)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self.timeline.append(None)
            return function(*arguments, **named)

        return watched

    def labels(self) -> set[str]:
        """What was told since the last call; that no long piece of work was silent is looked at, too."""
        silent = longest = 0
        for text in self.timeline:
            silent = silent + 1 if text is None else 0
            longest = max(longest, silent)
        assert longest <= SILENT, self.timeline
        lines = [line for text in self.timeline if text for line in text.splitlines()]
        self.timeline = []
        AcceleratorState._reset_state(reset_partial_state=True)
        return {re.sub(r" \S*/.*", "", match[1]) for match in map(LINE.fullmatch, lines) if match}


def test_no_command_is_silent_for_long(
    recipe_file: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    monkeypatch.setattr(sys, "stderr", watched)
    monkeypatch.setattr(igae.errors, "QUIET", 0)
    monkeypatch.setattr(igae.errors, "EVERY", 0)
    work: list[tuple[Any, str]] = [(Autoencoder, "posterior"), (Autoencoder, "decode"), (IGAE, "render")]
    for owner, name in [*work, (PIL.Image.Image, "save"), (subprocess, "run")]:
        monkeypatch.setattr(owner, name, watched.watch(getattr(owner, name)))
    monkeypatch.chdir(tmp_path)
    source, shown = Path(shards).parent / "source", "evaluation={views: 2, pictures: 4, orbits: 2, orbit_frames: 3}"
    options = [shown, "train.warmup.epochs=0.5", "train.joint.epochs=0.5"]

    arguments = ["--scenes", f"{source}/scenes", "--subset=square16", "--images", f"{source}/natural_images"]
    assert pack.main([*arguments, "--output=packed", "--workers=1"]) == 0
    assert watched.labels() == {"scanning", "packing"}
    assert pack.main(["--verify=packed", "--workers=1"]) == 0
    assert watched.labels() == {"verifying"}

    assert train.main(["--config", recipe_file, *options]) == 0
    evaluated = {"reading held-out views", "reading training views", "measuring", "drawing views"}
    pictured = {"rendering orbits", "converting examples", "converting to webp", "converting to mp4"}
    trained = {"fitting the scale of latents", "warmup: encoding views", "warmup", "joint", "reading", "writing"}
    assert watched.labels() == evaluated | pictured | trained

    options[-1] = "train.joint.epochs=1"
    assert train.main(["--config", recipe_file, *options, "--extend"]) == 0
    assert watched.labels() == evaluated | pictured | {"reading", "reading planes", "joint", "writing"}

    assert evaluate.main(["--checkpoint", "outputs/run", "evaluation.orbit_frames=3"]) == 0
    assert watched.labels() == evaluated | {"reading"}
    assert export.main(["outputs/run", "exports/run"]) == 0
    assert watched.labels() == {"reading", "writing scenes", "writing"}
    assert report.main(["outputs/run"]) == 0
    assert watched.labels() == {"converting examples", "converting to webp", "converting to mp4"}

    fitted = ["model=outputs/run", f"data.root={shards}", "fit.wave=2", "data.workers=1", shown, *waves(0.5)]
    assert fit.main(fitted) == 0
    assert watched.labels() >= evaluated | pictured | {"wave 1 of 2, warmup", "wave 2 of 2, joint", "writing"}
    assert os.path.exists("outputs/fit/report.html")


def waves(epochs: float) -> list[str]:
    return [f"train.{stage}.{key}" for stage in ("warmup", "joint") for key in (f"epochs={epochs}", "batch_size=4")]
