# SPDX-License-Identifier: Apache-2.0
"""Some of the faults of system_faults.py, which has many more."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# One for each that is done to a call, in a new and in a resumed run; a store that is busy, and a kill after a request.
FAULTS = ["3", "4", "5", "13", "18", "s1", "s10"]
SCRIPT = Path(__file__).with_name("system_faults.py")


@pytest.mark.xdist_group("ranks")
def test_runs_with_faults_end_as_others_do() -> None:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    done = subprocess.run([sys.executable, SCRIPT, "--only", *FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" good ") == len(FAULTS) and f"{len(FAULTS)} faults, 0 of them bad" in done.stdout
