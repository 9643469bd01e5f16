# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/extending.md, made in a copy of the package: its files, its changes, its commands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import numpy as np
import pytest
import ranks
import runs
import yaml
from documents import ROOT

from igae import checkpoint
from igae.data import Manifest, orbit
from igae.storage import TensorFile

PAGE = ROOT / "docs" / "extending.md"
SMALL = (
    "data.categories=null data.workers=0 planes.resolution=8 planes.features=8 "
    "render.coarse_samples=4 render.fine_samples=4 train.warmup.epochs=1 train.warmup.batch_size=16 "
    "train.joint.epochs=1 train.joint.batch_size=16 train.joint.natural_images=2 train.joint.weights.natural_lpips=0 "
    "tracking.every=1 evaluation.views=1 evaluation.scenes=2 evaluation.natural_images=2 evaluation.pictures=0 "
    "evaluation.orbits=0 evaluation.orbit_frames=2"
).split()
# Starts each of the commands in processes of its own, which have the changed package behind them.
SERVER = """
import json, os, runpy, sys
import torch
import igae.training.fit
from diffusers import AutoencoderKL

torch.set_num_threads(1)
for words, world, port, log in json.loads(sys.argv[1]):
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.argv, code = words, 1
            try:
                if words[0] == "-m":
                    sys.argv = words[1:]
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(words[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stderr.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{words}: {codes}\\n{open(log).read()}")
"""


def apply(diff: str, root: Path) -> None:
    """A change whose hunks have whole lines and no numbers: what is there is there once."""
    for file, change in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff + "\n", flags=re.MULTILINE | re.DOTALL):
        text = (root / file).read_text()
        for hunk in change.split("@@\n"):
            lines = hunk.splitlines()
            before, after = (
                "".join(f"{line[1:]}\n" for line in lines if not line.startswith(other)) for other in ("+", "-")
            )
            assert f"\n{text}".count(f"\n{before}") == 1, (
                f"{PAGE.name}: {file} does not have these lines once:\n{before}"
            )
            text = f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]
        (root / file).write_text(text)


def words_of(command: str, shards: str) -> tuple[list[str], int]:
    """What Python is given, made small, and the number of processes."""
    words = shlex.split(command)
    world = int(words[words.index("--num_processes") + 1]) if words[0] == "accelerate" else 1
    if words[0] == "igae":
        return ["-m", "igae.cli.main", *words[1:]], world
    words = words[words.index("train.py") :] if words[0] == "accelerate" else words[1:]
    if words[0] == "train.py":
        given = [word for word in words if "=" in word]
        more = [*SMALL, f"data.root={shards}", "autoencoder={path: demo, scale: 0.5}"]
        words = [*(word for word in words if word not in given), *more, *given]  # the page's own come last
    return words, world


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy, after all commands of the page."""
    root = tmp_path_factory.mktemp("extending")
    for name in ("igae", "configs", "data_tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", root)
    shards = runs.packed_data(root / "packed")
    (root / "arrays").mkdir()
    for name in ("one", "two"):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        np.savez(root / "arrays" / f"{name}.npz", images=pixels, cam2world=orbit(5, 1.3, 0.3).double(), focal=17.5)
    for block in documents.blocks(PAGE):
        if block.language == "python":
            (root / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text + "\n")
        elif block.language == "diff":
            apply(block.text, root)
    jobs = []
    for block in documents.blocks(PAGE):
        for command in block.text.splitlines() if block.language == "sh" else []:
            words, world = words_of(command, shards)
            jobs.append((words, world, ranks.free_port(), str(root / "log.txt")))
    assert len(jobs) == 9
    done = subprocess.run(
        [sys.executable, "-c", SERVER, json.dumps(jobs)], cwd=root, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


def shared(copy: Path, run: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what the ranks of a run share, in its last checkpoint."""
    folder = checkpoint.list_complete(str(copy / "outputs" / run / "checkpoints"))[-1]
    return {name: entry.shape for name, entry in TensorFile(f"{folder}/shared.safetensors").entries.items()}


def records(copy: Path, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (copy / "outputs" / run / "metrics.jsonl").read_text().splitlines()]


def test_an_autoencoder(copy: Path) -> None:
    saved = json.loads((copy / "outputs" / "patches" / "autoencoder" / "config.json").read_text())
    assert (saved["_class_name"], saved["size"]) == ("Patches", 4)
    assert shared(copy, "patches")["autoencoder.net.encoder.weight"] == (8, 3, 4, 4)
    # Of the export, by classes that only the changed package has.
    means = json.loads((copy / "results" / "evaluation.json").read_text())["means"]
    end = json.loads((copy / "outputs" / "patches" / "metrics.json").read_text())["joint"]
    assert means["heldout/rgb_psnr"] == pytest.approx(end["heldout/rgb_psnr"], abs=1e-4)


def test_a_loss(copy: Path) -> None:
    found = [record for record in records(copy, "solid") if "loss/half_transparent" in record]
    assert len(found) >= 2 and all(0 < record["loss/half_transparent"] <= 1 for record in found)
    weights = yaml.safe_load((copy / "outputs" / "solid" / "config.yaml").read_text())["train"]["joint"]["weights"]
    assert weights["half_transparent"] == 0.01
    assert not any("loss/half_transparent" in record for record in records(copy, "deep"))


def test_a_network_and_rows(copy: Path) -> None:
    assert shared(copy, "deep")["mlp.w3"] == (64, 64)
    folder = checkpoint.list_complete(str(copy / "outputs" / "lines" / "checkpoints"))[-1]
    assert checkpoint.load_checkpoint(folder).rows([0])["planes"].shape == (1, 3, 2, 8, 8)


def test_a_strategy(copy: Path) -> None:
    assert "2 ranks, DDP, gradients sent as float16; 4 scenes" in (copy / "log.txt").read_text()
    assert (copy / "outputs" / "half" / "metrics.json").is_file()


def test_a_data_source(copy: Path) -> None:
    manifest = Manifest.load(str(copy / "data" / "array-shards"))
    assert [(scene.name, scene.views, scene.heldout) for scene in manifest.scenes] == [("one", 4, 1), ("two", 4, 1)]
    assert manifest.cameras is not None and manifest.cameras.mean_focal == pytest.approx(17.5 / 16)
    assert (copy / "outputs" / "arrays" / "metrics.json").is_file()


def test_the_kernels_leave_other_networks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass of what the kernels know, with a forward of its own."""
    import torch

    from igae.kernels import LIBRARIES, Library
    from igae.rendering import DecodingMLP, RenderOptions, cuda

    class Anywhere(Library):
        @staticmethod
        def missing(device: torch.device) -> str | None:
            return None

    class Other(DecodingMLP):
        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            density, color = super().forward(features)
            return density + 1, color

    monkeypatch.setitem(LIBRARIES, "cpu", Anywhere)
    planes = torch.zeros(1, 3, 4, 4, 8)
    assert cuda.unsupported(planes, DecodingMLP(8, 4), RenderOptions()) is None
    assert "64 hidden units" in str(cuda.unsupported(planes, Other(8, 4), RenderOptions()))
