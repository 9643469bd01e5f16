# SPDX-License-Identifier: Apache-2.0
"""Ranks that were not started alike, and environments that no launcher sets: one sentence, within seconds, on all."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ranks
import runs

from igae import config
from igae.checkpoint import CheckpointWriter, Progress, list_complete
from igae.cli import evaluate, fit, train
from igae.data import Manifest, PackOptions, pack
from igae.errors import TrainingError, command
from igae.ranks import Channel, OfAllRanks, RefusedByAll, check_rank_variables, join, rank
from igae.training import Recipe, agree

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10.0

# What rank 1 is started with, and the key that its sentence names.
SETTINGS = [
    ("seed=1", "seed"),
    ("experiment=other", "experiment"),
    ("outputs=elsewhere", "outputs"),
    ("train.precision=bf16", "train.precision"),
    ("train.kernels=torch", "train.kernels"),
    ("train.timeout=30", "train.timeout"),
    ("train.max_skipped=3", "train.max_skipped"),
    ("train.scale_learning_rates=true", "train.scale_learning_rates"),
    ("planes.resolution=16", "planes.resolution"),
    ("planes.features=16", "planes.features"),
    ("planes={resolution: 8, features: 8, base_planes: 2, micro_features: 4, macro_features: 4}", "planes.base_planes"),
    ("render.coarse_samples=5", "render.coarse_samples"),
    ("render.patch=1", "render.patch"),
    ("autoencoder.create.latent_channels=8", "autoencoder.create.latent_channels"),
    ("train.warmup.epochs=5", "train.warmup.epochs"),
    ("train.joint.batch_size=5", "train.joint.batch_size"),
    ("train.joint.natural_images=1", "train.joint.natural_images"),
    ("train.joint.accumulate=2", "train.joint.accumulate"),
    ("train.joint.learning_rates.mlp=0.5", "train.joint.learning_rates.mlp"),
    ("train.joint.weights.rgb=2", "train.joint.weights.rgb"),
    ("data.shuffle=17", "data.shuffle"),
    ("data.background=[0, 0, 0]", "data.background"),
    ("data.categories={toys: [0, 3]}", "data.categories"),
    ("checkpoint.every=5", "checkpoint.every"),
    ("checkpoint.background=true", "checkpoint.background"),
    ("evaluation.every=7", "evaluation.every"),
]
DATA = ["other data", "another order of shards", "another seed of the order", "moved scene"]
ALIKE = ["data.workers=0", "data.cache=copies", "data.root=the same elsewhere"]
"""What may differ between machines."""


def refusals(file: str, differing: Sequence[tuple[str, dict[str, str]]]) -> list[tuple[str, float]]:
    """What this rank is told, and after how many seconds, where rank 1 has one override or variable more."""
    join(30.0)
    channel, found = Channel(30.0), []
    for override, variables in differing:
        mine = [override] if rank() == 1 and override else []
        recipe = config.load(Recipe, file, mine)
        text, began = "", time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items() if rank() == 1 else ():
                if name == "version":
                    patch.setattr("igae.training.preflight.__version__", value)
                else:
                    patch.setenv(name, value)
            resume = variables.get("resume", "auto") if rank() == 1 else "auto"
            try:
                agree(recipe, channel, resume=resume)
            except ValueError as error:
                text = str(error)
        found.append((text, time.monotonic() - began))
    return found


def other_data(folder: Path, shards: str) -> dict[str, str]:
    """Shards that are not those of a run, by what is different in them."""
    made = {name: folder / name.replace(" ", "-") for name in (*DATA, "the same elsewhere")}
    options = PackOptions(scenes=str(Path(shards).parent / "source" / "scenes"), subset="square16", seed=1)
    pack(str(made["another seed of the order"]), options)
    pack(str(made["other data"]), PackOptions(**{**vars(options), "seed": 0, "categories": {"cars": (0, 2)}}))
    for name in (DATA[1], DATA[3], "the same elsewhere"):
        shutil.copytree(shards, made[name])
    for name in (DATA[1], DATA[3]):
        path = made[name] / "manifest.json"
        manifest = json.loads(path.read_text())
        if name == "moved scene":
            manifest["scenes"][0]["normalization"] = [0.0, 0.0, 0.5, 1.0]
        else:
            manifest["shards"].reverse()
        path.write_text(json.dumps(manifest))
        Manifest.load(str(path.parent))  # nothing but the comparison could refuse it
    return {name: str(path) for name, path in made.items()}


def test_rank_1_is_started_differently(tmp_path: Path, shards: str) -> None:
    file, others = str(runs.recipe_file(tmp_path, shards)), other_data(tmp_path, shards)
    cases: list[tuple[str, dict[str, str], str]] = [(override, {}, key) for override, key in SETTINGS]
    cases += [(f"data.root={others[name]}", {}, "the digest of the manifest of data.root") for name in DATA]
    cases += [("", {"version": "0.0.1"}, "the version of igae"), ("", {"resume": "never"}, "--resume")]
    cases += [("", {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP")]
    cases += [(f"data.root={tmp_path}/nowhere", {}, "no manifest.json in")]
    alike = [(other.replace("the same elsewhere", others["the same elsewhere"]), {}, "") for other in ALIKE]
    assert len(cases) >= 30
    told = ranks.run(refusals, 2, file, [(override, variables) for override, variables, _ in cases + alike])
    for (override, variables, key), (first, seconds), (second, more) in zip(cases + alike, *told, strict=True):
        where = f"{override} {variables}: {first!r}, {second!r}"
        assert first.removeprefix("rank 1: ") == second and "\n" not in first and seconds < SECONDS > more, where
        assert first.startswith(key) or key.startswith("no ") and key in first, where
        if override and key and not {*"{[/"} & {*override}:
            assert override.partition("=")[2] in first.partition(" on rank 0 and ")[2], where  # as well as rank 0's
        assert bool(first) == bool(key), where
    assert others["moved scene"] in told[0][len(SETTINGS) + 3][0] and shards in told[0][len(SETTINGS) + 3][0]


def started(commands: Sequence[Sequence[str]], name: str) -> None:
    """One command or another on each rank."""
    command = {"train": train.main, "fit": fit.main, "evaluate": evaluate.main}[name]
    code = command(list(commands[rank()]))
    sys.stderr.flush()
    os._exit(code)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_commands_are_refused_together(name: str, tmp_path: Path, shards: str) -> None:
    """On the other rank a command finds no data, or evaluates something else."""
    file = str(runs.recipe_file(tmp_path, shards))
    commands = {
        "train": [["--config", file], ["--config", file, f"data.root={tmp_path}/nowhere"]],
        "evaluate": [["--checkpoint", f"{tmp_path}/outputs/{run}"] for run in ("run", "other")],
    }[name]
    sentence = {"train": "no manifest.json in", "evaluate": "--checkpoint is "}[name]
    ranks.run(int, 1)  # the server's imports don't count
    began = time.monotonic()
    codes = ranks.Ranks(started, 2, commands, name, log=f"{tmp_path}/log").exit_codes(60)
    assert codes == [2, 2] and time.monotonic() - began < SECONDS
    text = Path(f"{tmp_path}/log").read_text()
    assert text.count("error: ") == text.count(sentence) == 1, text
    assert not (tmp_path / "outputs").exists()


class EndedTogether(OfAllRanks, TrainingError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "by_all"),
    [
        (RefusedByAll("no room"), 2, True),
        (ValueError("no room"), 2, False),
        (EndedTogether("no room"), 1, True),
        (TrainingError("no room"), 1, False),
    ],
)
def test_what_all_ranks_raise_is_told_by_the_first(
    error: Exception, code: int, by_all: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def body(_: list[str] | None) -> None:
        raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (0, 1):
        monkeypatch.setenv("RANK", str(number))
        assert body([]) == code
        assert capsys.readouterr().err == ("" if by_all and number else "error: no room\n")


def save_wrong(root: str, kind: str) -> str:
    """What this rank is told of a checkpoint in which two ranks own a scene, or rows have two shapes."""
    import torch

    join(30.0)
    writer = CheckpointWriter(root, 2, Channel(30.0))
    ids = torch.arange(2) + (0 if kind == "twice" else 2 * rank())
    rows = torch.zeros(2, 4 + (kind == "shapes" and rank()))
    try:
        writer.save(Progress("joint", 1, 1), "", {}, {}, {"ids": ids, "planes": rows})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "reason"), [("twice", "scene 0 is in it twice"), ("shapes", "tensors are not those")])
def test_a_checkpoint_of_ranks_that_disagree_is_never_complete(tmp_path: Path, kind: str, reason: str) -> None:
    told = ranks.run(save_wrong, 2, str(tmp_path), kind)
    assert told[0] == told[1] and reason in told[0] and list_complete(str(tmp_path)) == []


RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
FSDP = {**RANK, **MASTER, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# A broken environment, and the variable that the sentence names.
BROKEN: list[tuple[dict[str, str], str]] = [
    ({"RANK": "1"}, "RANK=1"),
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, "RANK=2"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
    ({"RANK": "\u00b2", "WORLD_SIZE": "3"}, "RANK=\u00b2"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE="),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
    (RANK, "MASTER_ADDR"),
    ({**RANK, "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
    ({**RANK, "MASTER_ADDR": "", "MASTER_PORT": "29512"}, "MASTER_ADDR"),
    ({**RANK, **MASTER, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ({**RANK, **MASTER, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ({**RANK, **MASTER, "LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
    ({**RANK, **MASTER, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ({**RANK, **MASTER, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_SIZE=4"),
    ({"OMPI_COMM_WORLD_SIZE": "some"}, "OMPI_COMM_WORLD_SIZE=some"),
    ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2"),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "SLURM_STEP_NUM_TASKS=4"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION=fp16"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true"),
    ({"ACCELERATE_USE_DEEPSPEED": "1"}, "ACCELERATE_USE_DEEPSPEED=1"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "ACCELERATE_USE_FSDP=true"),
    ({**FSDP, "FSDP_VERSION": "1"}, "FSDP_VERSION=1"),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true"),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP_ACTIVATION_CHECKPOINTING=true"),
    ({**FSDP, "ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
    ({**RANK, **MASTER, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "OFFLOAD_PARAM_DEVICE=cpu"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true"),
]
# Plain python: in a shell of salloc, as one task of srun, in a pod with one GPU, beside a service called `master`.
# Then accelerate launch of one process, of FSDP, and under srun and mpirun, which start a launcher a machine.
SOUND = [
    {},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    {"PMI_SIZE": "1", "PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", **MASTER},
    {"MASTER_PORT": "tcp://10.0.0.1:80"},
    {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"},
    {**FSDP, "FSDP_OFFLOAD_PARAMS": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    {**RANK, **MASTER, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "2"},
]
PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "MV2_", "SLURM_")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without anything that a launcher sets."""
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("variables", "named"), BROKEN, ids=str)
def test_broken_environments(
    variables: dict[str, str],
    named: str,
    bare: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare.chdir(tmp_path)
    for name, value in variables.items():
        bare.setenv(name, value)
    began = time.monotonic()
    codes = [train.main(["--config", "igae.yaml", "data.root=x"]), fit.main(["model=x"])]
    codes.append(evaluate.main(["--checkpoint", "x"]))
    lines = capsys.readouterr().err.splitlines()
    assert codes == [2] * 3 and len(lines) == 3 and len(set(lines)) == 1, lines
    assert lines[0].startswith("error: ") and named in lines[0], lines
    assert time.monotonic() - began < SECONDS and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variables", SOUND, ids=str)
def test_sound_environments(variables: dict[str, str], bare: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    check_rank_variables()


@pytest.mark.parametrize(
    ("command", "variables", "named"),
    [
        (["igae.cli.main", "evaluate", "--checkpoint", "x"], {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        (["igae.cli.main", "train", "--config", "igae.yaml", "data.root=x"], {"LOCAL_RANK": "0"}, "RANK"),
    ],
)
def test_broken_environments_of_processes(
    command: list[str], variables: dict[str, str], named: str, bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began = time.monotonic()
    given = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, env=given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert time.monotonic() - began < SECONDS and list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def silent_listener() -> Iterator[int]:
    """A port on which something takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def meet(addresses: Sequence[tuple[int, str, int]]) -> list[tuple[str, float]]:
    """What a rank of two is told that finds no other, and after how many seconds."""
    found = []
    for number, address, port in addresses:
        os.environ.update({**RANK, "RANK": str(number), "MASTER_ADDR": address, "MASTER_PORT": str(port)})
        began, text = time.monotonic(), ""
        try:
            join(2.0)
        except ValueError as error:
            text = str(error)
        found.append((text, time.monotonic() - began))
    return found


def test_ranks_that_do_not_meet() -> None:
    """Something silent has the port, or nothing, on either rank, or there is no such machine."""
    with silent_listener() as port:
        places = [(1, "127.0.0.1", port), (0, "127.0.0.1", port), (1, "127.0.0.1", ranks.free_port())]
        places += [(0, "127.0.0.1", ranks.free_port()), (1, "no.such.machine.invalid", 29512)]
        (told,) = ranks.run(meet, 1, places)
    for (_, address, at), (text, seconds) in zip(places, told, strict=True):
        assert f"can't meet the other ranks at {address}:{at}" in text and "\n" not in text, text
        assert "MASTER_PORT" in text and seconds < 4.0, (text, seconds)
    assert "EADDRINUSE" in told[1][0] and told[1][1] < 1.0
