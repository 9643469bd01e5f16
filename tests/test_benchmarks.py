# SPDX-License-Identifier: Apache-2.0
"""The command that runs all benchmarks: what it runs, what it skips, and what it says of those that fail."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.all as every

ROOT = Path(__file__).resolve().parent.parent


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "all.json").read_text()))


def test_a_benchmark_runs_and_those_without_what_they_need_are_skipped(tmp_path: Path) -> None:
    names = ["row_adam", *([] if torch.cuda.is_available() else ["joint_step", "scaling_joint"])]
    command = [sys.executable, "benchmarks/all.py", "--output", str(tmp_path), "--only", *names]
    command += ["--more=--scenes 8 16 --rows 4 --repeats 3 --warmup 1 --resolution 4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["cores"] >= 1
    assert list(found["benchmarks"]) == names
    adam = found["benchmarks"]["row_adam"]
    assert adam["status"] == "done" and [row["scenes"] for row in adam["numbers"]["rows"]] == [8, 16]
    page = (tmp_path / "all.md").read_text()
    assert "## row_adam" in page and "median of 3" in page
    for name in names[1:]:
        assert found["benchmarks"][name]["status"] == "skipped" and "GPU" in found["benchmarks"][name]["reason"]
        assert f"{name} ... skipped (needs" in done.stdout and f"## {name}" in page


@pytest.mark.parametrize(
    ("code", "limit", "reason"),
    [
        ("import sys; print('half a table'); sys.exit('no memory')", 60, "exit code 1: no memory"),
        ("print('nothing else')", 60, "it wrote no numbers"),
        ("import subprocess, sys, time; subprocess.Popen(['sleep', '97531']); time.sleep(60)", 1, "longer than 1 s"),
    ],
)
def test_failures_are_told(
    code: str, limit: float, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "broken.py").write_text(code)
    monkeypatch.setattr(every, "ROOT", tmp_path)
    monkeypatch.setattr(every, "BENCHMARKS", {"broken": every.Benchmark("broken.py")})
    assert every.main(["--output", str(tmp_path / "out"), "--limit", str(limit)]) == 1
    row = read(tmp_path / "out")["benchmarks"]["broken"]
    assert row["status"] == "failed" and reason in row["reason"] and reason in capsys.readouterr().out
    deadline = time.monotonic() + 5  # a signal to a group ends its processes one after another
    while any(b"97531" in command for command in commands()):
        assert time.monotonic() < deadline, "what it started has ended, too"


def commands() -> Iterator[bytes]:
    """Of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield path.read_bytes()


def test_all_are_there() -> None:
    for name, benchmark in every.BENCHMARKS.items():
        file = ROOT / "benchmarks" / benchmark.command.split()[0]
        text = file.read_text()
        assert "--json" in text or "joint_step import main" in text, name
