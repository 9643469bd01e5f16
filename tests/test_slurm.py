# SPDX-License-Identifier: Apache-2.0
"""The scripts in launch/slurm, by a real Slurm where there is one."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import slurm_cluster
from slurm_cluster import Cluster

from igae import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
# Two cores are here, and no GPU that PyTorch knows.
SMALL = ["--gpus-per-node=1", "--cpus-per-gpu=1"]
needs_slurm = pytest.mark.skipif(slurm_cluster.problem() is not None, reason=str(slurm_cluster.problem()))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_differ_only_in_what_they_start() -> None:
    """What happens at a signal is the same in all of them."""
    assert [path.name for path in SCRIPTS] == ["array.sbatch", "multi_node.sbatch", "single_node.sbatch"]
    texts = [path.read_text() for path in SCRIPTS]
    for begin, end in (("stopped=\n", "trap stop USR1\n"), ("training=$!\n", 'exit "$code"\n')):
        assert len({text[text.index(begin) : text.index(end)] for text in texts}) == 1
    for text in texts:
        assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(re.findall(r"#SBATCH (\S+)", text))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_mistakes_at_the_top_are_told_in_a_sentence(script: Path, tmp_path: Path) -> None:
    def said(**names: str) -> str:
        env = {**os.environ, **names}
        done = subprocess.run(["bash", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        return done.stderr.splitlines()[-1]

    assert said().startswith(f"error: {tmp_path} is not the root of the repository")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    assert said(VENV="absent").startswith("error: VENV=absent is no virtual environment")
    if script.name != "array.sbatch":
        sentence = said(STRATEGY="fsdp")
        assert sentence.startswith("error: STRATEGY=fsdp: no such file") and "fsdp2.yaml" in sentence


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder as scripts are submitted from, and their names."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("launch", "train.py", "igae", "configs"):
        (folder / name).symlink_to(ROOT / name)
    # Of an environment, the script needs what puts its programs on the path.
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    shards = runs.packed_data(tmp_path)
    recipe = runs.recipe_file(tmp_path, shards)
    return folder, {
        "VENV": str(tmp_path / "venv"),
        "CONFIG": str(recipe),
        "SHARDS": shards,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "FIRST": "127.0.0.1",
    }


@needs_slurm
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_would_take_each_script(slurm: Cluster, checkout: tuple[Path, dict[str, str]], script: Path) -> None:
    said = slurm.call("sbatch", "--test-only", *SMALL, str(script), cwd=checkout[0])
    assert re.search(r"Job \d+ to start at", said), said


@needs_slurm
@pytest.mark.slow
def test_two_machines_save_at_signals_and_go_on(slurm: Cluster, checkout: tuple[Path, dict[str, str]]) -> None:
    """Before the time limit the batch shell gets SIGUSR1: training saves, queues again and goes on. `scancel` sends
    SIGTERM, more than once, to all processes: training saves and is not queued again."""
    folder, names = checkout
    settings = ["train.warmup.epochs=0", "train.joint.epochs=2000", "checkpoint.every=5"]
    script = str(ROOT / "launch" / "slurm" / "multi_node.sbatch")
    number = slurm.call("sbatch", "--parsable", *SMALL, script, *settings, cwd=folder, **names).strip()
    log = folder / f"igae-{number}.log"
    saved = folder.parent / "outputs" / "run" / "checkpoints"

    def wait_for_checkpoint_after(step: int) -> None:
        deadline = time.monotonic() + 120
        while not (found := checkpoint.list_complete(str(saved))) or int(found[-1][-8:]) <= step:
            assert slurm.job(number)["JobState"] != "FAILED" and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    wait_for_checkpoint_after(0)
    slurm.call("scancel", "--signal=USR1", "--batch", number)
    deadline = time.monotonic() + 60
    while "stopped by SIGUSR1" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    step = int(checkpoint.list_complete(str(saved))[-1][-8:])
    wait_for_checkpoint_after(step)
    assert f"resumes from step {step}, {saved}/step-{step:08d}" in log.read_text(), log.read_text()
    slurm.call("scancel", number)
    deadline = time.monotonic() + 60
    while "stopped by SIGTERM" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    job = slurm.wait_for(number, {"CANCELLED"}, 60)
    text = log.read_text()
    assert job["Restarts"] == "1" and text.count("2 ranks, DDP") == 2, text
    assert "\nerror: " not in text and "DataLoader worker" not in text, text
    stopped = max(int(number) for number in re.findall(r"stopped by SIGTERM after step (\d+)", text))
    assert int(checkpoint.list_complete(str(saved))[-1][-8:]) == stopped > step
