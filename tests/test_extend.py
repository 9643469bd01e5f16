# SPDX-License-Identifier: Apache-2.0
"""A finished run that is started again: with more epochs, with other settings, as it was."""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

import train
from igae import checkpoint, config
from igae.cli import fit
from igae.training import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_run_a_process")

SHORT = ["train.joint.epochs=0", "evaluation.every=8", *runs.PLAIN]  # catching planes up elsewhere changes last bits


def run(recipe_file: str, *arguments: str) -> int:
    return train.main(["--config", recipe_file, *SHORT, *arguments])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = Path(checkpoint.list_complete(str(folder / "checkpoints"))[-1])
    files = sorted(newest.glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def rates(folder: Path) -> dict[int, float]:
    """Learning rate of the planes at each step that was recorded."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["lr/planes"] for record in records if "lr/planes" in record}


def test_a_finished_run_is_extended_to_what_a_longer_one_is(
    recipe_file: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    outputs = Path(recipe_file).parent / "outputs"
    assert run(recipe_file, "experiment=short", "train.warmup.epochs=1") == 0
    said = capsys.readouterr().err
    assert re.search(r"^held-out views [\d.]+ dB: [\d.]+ dB (above|below) the mean training image, ", said, re.M)
    short = outputs / "short"
    for command in (f"view {short}", f"evaluate --checkpoint {short}", f"export {short} exports/short"):
        assert re.search(rf"^\w+: +igae {command}$", said, re.M), said
    assert f"{short / 'report.html'}" in said and (short / "report.html").is_file()

    # as it was: nothing to do, and told again where everything is
    assert run(recipe_file, "experiment=short", "train.warmup.epochs=1") == 0
    assert "nothing is left to do" in caplog.text and "resumes from" not in caplog.text
    assert re.search(rf"^evaluate: +igae evaluate --checkpoint {short}$", capsys.readouterr().err, re.M)

    # longer: one sentence with both ways, and nothing has changed
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    assert run(recipe_file, "experiment=short", "train.warmup.epochs=2", "data.workers=0") == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "train.warmup.epochs was 1.0 and is 2.0 now" in refused
    assert "--extend" in refused and "experiment=NAME" in refused
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before

    caplog.clear()
    longer = ["train.warmup.epochs=2", "data.workers=0", "evaluation.natural_images=3"]
    assert run(recipe_file, "experiment=short", *longer, "--extend") == 0
    (changes,) = re.findall("changed since the last start: .*", caplog.text)
    assert set(changes.partition(": ")[2].split("; ")) == {
        "train.warmup.epochs was 1.0 and is 2.0",
        "data.workers was 1 and is 0",
        "evaluation.natural_images was 4 and is 3",
    }
    assert run(recipe_file, "experiment=long", *longer) == 0
    extended, whole = tensors(short), tensors(outputs / "long")
    assert extended.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(extended[name], whole[name])] == []
    results = [json.loads((outputs / name / "metrics.json").read_text())["warmup"] for name in ("short", "long")]
    assert results[0] == results[1] and results[0]["step"] == 16


def test_a_longer_cosine_goes_on_where_it_is_and_a_stop_loses_nothing(recipe_file: str) -> None:
    options = [*SHORT, "train.warmup.schedule=cosine", "tracking.every=1", "checkpoint.every=2", "experiment=cosine"]
    folder = Path(recipe_file).parent / "outputs" / "cosine"
    assert train.main(["--config", recipe_file, *options, "train.warmup.epochs=1"]) == 0
    options.append("train.warmup.epochs=2")
    recipe = config.load(Recipe, recipe_file, options)
    stopped = Trainer(recipe, extend=True)

    def stop(*_: object) -> None:
        if stopped.progress.total == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.model.register_forward_pre_hook(stop)
    stopped.run()
    assert 10 < stopped.progress.total < 16 and json.loads((folder / "metrics.json").read_text())["warmup"]["step"] == 8
    Trainer(recipe).run()  # it is under way: --extend is not needed again
    assert json.loads((folder / "metrics.json").read_text())["warmup"]["step"] == 16
    found = rates(folder)
    assert found.keys() == set(range(1, 17))
    for step, rate in found.items():
        length = 8 if step <= 8 else 16
        assert rate == pytest.approx(0.005 * (1 + math.cos(math.pi * (step - 1) / length)), rel=1e-6), step


def test_fewer_epochs_leave_nothing_to_do_and_fits_are_not_extended(
    recipe_file: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(recipe_file, "train.warmup.epochs=0.5") == 0
    folder = Path(recipe_file).parent / "outputs" / "run"
    measured = json.loads((folder / "metrics.json").read_text())["warmup"]
    stages = {"warmup": measured | {"heldout/ae_psnr": 99.0}, "joint": measured}
    (folder / "metrics.json").write_text(json.dumps(stages))
    assert run(recipe_file, "train.warmup.epochs=0.25", "--extend") == 0
    assert "nothing is left to do" in caplog.text
    assert " dB, 99.0 dB before joint training)" in capsys.readouterr().err
    root = config.load(Recipe, recipe_file).data.root
    arguments = [f"model={folder}", f"data.root={root}", f"outputs={folder.parent}", "data.workers=0"]
    capsys.readouterr()
    assert fit.main(["--extend", *arguments]) == 2
    assert "fitted from their start" in capsys.readouterr().err
