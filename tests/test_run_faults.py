# SPDX-License-Identifier: Apache-2.0
"""Whole runs to which something happens: each ends soon, with an error that says what, and nothing is lost."""

import os
import signal
import time
from pathlib import Path

import pytest
import ranks
import runs

from igae import checkpoint
from igae import errors as errors_of_igae
from igae.data import Manifest, ShardReader

TIMEOUT = 10
LONG = ["train.warmup.epochs=0", "train.joint.epochs=2000", "checkpoint.every=5", f"train.timeout={TIMEOUT}"]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(runs.recipe_file(tmp_path, runs.packed_data(tmp_path)))


def complete(recipe: str) -> list[str]:
    return checkpoint.list_complete(str(Path(recipe).parent / "outputs" / "run" / "checkpoints"))


def begin(recipe: str, world: int, *arguments: str) -> ranks.Ranks:
    """A run that has made a checkpoint and goes on."""
    run = ranks.Ranks(runs.train, world, recipe, *LONG, *arguments, log=f"{recipe}.log")
    deadline = time.monotonic() + 120
    while not complete(recipe):
        assert time.monotonic() < deadline and all(p.is_alive() for p in run.processes), Path(
            f"{recipe}.log"
        ).read_text()
        time.sleep(0.05)
    return run


def errors(recipe: str) -> list[str]:
    return [line for line in Path(f"{recipe}.log").read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs(recipe: str, victim: int) -> None:
    """The others give up after train.timeout."""
    run = begin(recipe, 2)
    os.kill(run.processes[victim].pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    other = run.processes[1 - victim]
    other.join(TIMEOUT + 30)
    waited = time.monotonic() - began
    run.processes[victim].kill()
    assert other.exitcode == 1 and waited < TIMEOUT + 10, (other.exitcode, waited)
    assert f"error: rank {1 - victim} has lost another rank" in errors(recipe)[-1]


def test_a_worker_is_killed(recipe: str) -> None:
    """As by a kernel that is out of memory."""
    run = begin(recipe, 1, "data.workers=1")
    pid = run.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert run.exit_codes(60) == [1]
    assert errors(recipe)[-1].startswith("error: a process that decodes images has ended (")
    assert errors(recipe)[-1].endswith("ask for more or set data.workers lower")


def test_a_worker_is_stopped(tmp_path: Path) -> None:
    """Of the second of two ranks, and of a run of one rank at the same time: all ranks end, with the cause."""
    files = []
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        files.append(str(runs.recipe_file(tmp_path / str(world), runs.packed_data(tmp_path / str(world)))))
    started = [begin(file, world, "data.workers=1") for file, world in zip(files, (1, 2), strict=True)]
    workers = []
    for run in started:
        pid = run.processes[-1].pid
        workers += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert len(workers) >= 2
    began = time.monotonic()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    assert [run.exit_codes(TIMEOUT + 40) for run in started] == [[1], [1, 1]]
    assert time.monotonic() - began < TIMEOUT + 15
    for file in files:
        told = [line for line in errors(file) if line.startswith("error: a process that decodes images has ended (")]
        # Where torch's handler of SIGCHLD is faster, in its words.
        reasons = (f"killed, it had not decoded a batch in {TIMEOUT} s", "is killed by signal: Killed")
        assert len(told) == 1 and any(reason in told[0] for reason in reasons), errors(file)
    states = [
        path.read_text().rpartition(")")[2].split()[0] for w in workers if (path := Path(f"/proc/{w}/stat")).exists()
    ]
    assert set(states) <= {"Z"}, states  # nothing that is stopped is left: it would hold its rank's connections


def test_a_dead_rank_and_a_restart_with_fewer(recipe: str) -> None:
    run = begin(recipe, 2, "train.timeout=600")
    run.processes[1].kill()
    began = time.monotonic()
    assert run.exit_codes(60) == [1, -9]
    assert time.monotonic() - began < 30  # measured: 0.4. Its connections are closed: nobody waits for the timeout
    assert "rank 0 has lost another rank" in errors(recipe)[-1] and "newest checkpoint" in errors(recipe)[-1]
    newest = complete(recipe)[-1]
    steps = int(newest[-8:])
    # One rank makes twice as many steps in an epoch: it goes on at the same epoch, for two more of them.
    epochs = f"train.joint.epochs={steps // 4 + 2}"
    assert ranks.Ranks(runs.train, 1, recipe, *LONG, epochs, log=f"{recipe}.log").exit_codes(120) == [0]
    log = Path(f"{recipe}.log").read_text()
    assert f"resumes from step {steps}, {newest}" in log and "2 ranks trained before this restart, and 1 do now" in log


def test_a_rank_that_ends_while_others_meet_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's words where the first rank could not listen at its port."""
    monkeypatch.setattr(errors_of_igae, "world_size", lambda: 2)
    gone = RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?")
    assert "has lost another rank" in (errors_of_igae.in_one_sentence(gone) or "")
    assert errors_of_igae.in_one_sentence(RuntimeError("a mistake")) is None


def test_all_ranks_refuse_what_is_impossible(recipe: str) -> None:
    ranks.run(int, 1)  # the server's imports don't count
    began = time.monotonic()
    codes = ranks.Ranks(runs.train, 5, recipe, log=f"{recipe}.log").exit_codes(60)
    assert time.monotonic() - began < 20
    assert codes == [2] * 5
    sentence = (
        "error: 4 scenes with training views can't be shared by 5 processes, each of which needs one: start fewer"
    )
    assert [line.startswith(sentence) for line in errors(recipe)] == [True]  # the first rank's
    assert not Path(recipe).with_name("outputs").exists()


def test_a_damaged_shard(recipe: str) -> None:
    """The rank that reads it names it and the byte; the others end too."""
    root = str(Path(recipe).parent / "shards")
    shard = next(shard for shard in Manifest.load(root).shards if shard.kind == "scenes")
    offset = list(ShardReader(root).read(shard))[7].image_offset
    raw = bytearray((Path(root) / shard.name).read_bytes())
    raw[offset + 5] ^= 1  # in the name, under the header's checksum
    (Path(root) / shard.name).write_bytes(raw)
    codes = ranks.Ranks(runs.train, 2, recipe, f"train.timeout={TIMEOUT}", log=f"{recipe}.log").exit_codes(60)
    assert all(codes) and 2 in codes, codes
    named = [line for line in errors(recipe) if f"shard {shard.name} in {root} is damaged at byte {offset}: " in line]
    assert named, errors(recipe)


def test_the_disk_is_full(recipe: str, small_disk: Path) -> None:
    """Room for some checkpoints but not for all: the run ends, and the newest complete one loads."""
    arguments = [f"checkpoint.root={small_disk}", "checkpoint.keep=50", *LONG]
    codes = ranks.Ranks(runs.train, 2, recipe, *arguments, log=f"{recipe}.log").exit_codes(120)
    assert codes == [2, 2]
    assert all("can't be written: rank" in line and "No space left on device" in line for line in errors(recipe))
    kept = checkpoint.list_complete(str(small_disk))
    assert kept and len(list(small_disk.glob("*-*"))) == len(kept)  # nothing half written is left
    assert checkpoint.load_checkpoint(kept[-1]).progress.total == 5 * len(kept)


def test_credentials_are_in_nothing_that_a_run_leaves(recipe: str) -> None:
    secret = "sWordFish1"
    # A setting that nothing reads here, so that the run works.
    arguments = [f"tracking.entity=https://me:{secret}@host", "tracking.trackers=[tensorboard]"]
    short = ["train.warmup.epochs=1", "train.joint.epochs=0"]
    for _ in range(2):  # the second compares its settings with the first one's
        run = ranks.Ranks(runs.train, 1, recipe, *arguments, *short, log=f"{recipe}.log")
        assert run.exit_codes(120) == [0]
    wrong = ranks.Ranks(
        runs.train, 1, recipe, f"data.root=s3://key:{secret}@nowhere/x?token={secret}", log=f"{recipe}.log"
    )
    assert wrong.exit_codes(120) == [2]
    files = [path for path in Path(recipe).with_name("outputs").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in [*files, Path(f"{recipe}.log")]:
        assert secret.encode() not in path.read_bytes(), path
    assert "https://***@host" in (Path(recipe).parent / "outputs" / "run" / "config.yaml").read_text()
