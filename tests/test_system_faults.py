# SPDX-License-Identifier: Apache-2.0
"""Some of the faults of system_faults.py, which has many more."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("system_faults.py")


@pytest.mark.xdist_group("ranks")
def test_runs_with_faults_end_as_others_do() -> None:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    done = subprocess.run([sys.executable, SCRIPT, "--count", "8", "--store", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" good ") == 11 and "11 faults, 0 of them bad" in done.stdout
