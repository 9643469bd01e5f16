# SPDX-License-Identifier: Apache-2.0
"""The command `igae`, and what a mistake costs: a second, before anything slow is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from igae.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1.0  # of one core, measured 0.2


def cost(*words: str, folder: Path) -> tuple[int, str, float]:
    """Exit code, stderr and CPU seconds of a command; wall time would be that of a busy machine."""
    process = subprocess.Popen([sys.executable, *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.rot=x"], "error: command line: unknown key data.rot; did you mean data.root?\n"),
        (
            ["data.root=nowhere"],
            "error: no manifest.json in nowhere of FOLDER: pack the data first with data_tools/pack_shards.py\n",
        ),
        (["data.root=nowhere", "train.joint.batch_size=many"], "got 'many' (a string), expected an integer\n"),
        (["model=nowhere", "data.rot=x"], "unknown key data.rot; did you mean data.root?\n"),
    ],
)
def test_mistakes_are_told_within_a_second(tmp_path: Path, arguments: list[str], message: str) -> None:
    for script in ([str(ROOT / "train.py")], ["-m", "igae.cli.main", "train"]):
        code, text, seconds = cost(
            *script, "--config", str(ROOT / "configs" / "igae.yaml"), *arguments, folder=tmp_path
        )
        assert code == 2 and text.replace(str(tmp_path), "FOLDER").endswith(message) and text.count("\n") == 1
        assert seconds < SECONDS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["evaluate", "export", "view"])
def test_missing_arguments_are_told_within_a_second(tmp_path: Path, name: str) -> None:
    code, text, seconds = cost("-m", "igae.cli.main", name, folder=tmp_path)
    assert (
        code == 2
        and ("the following arguments are required" in text or "which model? igae evaluate RUN" in text)
        and seconds < SECONDS
    )


def test_paths_that_the_system_refuses_are_told_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, deep, data = tmp_path / "file", tmp_path / "file/run", tmp_path / "data"
    file.touch()
    data.mkdir()
    (data / "manifest.json").touch()
    said = {
        f"train --config own_data_small.yaml data.root={data} outputs={file}": f"because {file} is a file",
        f"pack --images {data} --output {deep}": f"because {file} is a file",
        f"pack --images {tmp_path}/none --output {tmp_path}/out": f"there is no folder {tmp_path}/none",
        f"demo --output {deep}": "can't be used (Not a directory): mend it, or choose another path",
    }
    for line, words in said.items():
        assert main(line.split()) == 2
        told = capsys.readouterr().err
        assert words in told.splitlines()[-1] and "Errno" not in told, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for others than root
    assert main(["pack", "--images", str(data), "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} may not be: allow it, or choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is in the environment and WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK= in the environment is no number"),
    ],
)
def test_variables_that_a_launcher_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, text, seconds = cost(str(ROOT / "train.py"), "--config", "igae.yaml", "data.root=x", folder=tmp_path)
    assert code == 2 and message in text and text.count("\n") == 1 and seconds < SECONDS


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "igae.yaml", "--stage", "https://user:hunter2@host/x"],
        ["demo", "--output", "s3://key:hunter2@bucket/x"],
        ["demo", "--output", "x", "--scenes", "https://user:hunter2@host/x"],
        ["render", "--views", "https://user:hunter2@host/x", "x", "--output", "y"],
        ["kernels", "--arch", "https://user:hunter2@host/x"],
        ["report", "s3://key:hunter2@bucket/x"],
        ["pack", "--workers", "https://user:hunter2@host/x"],
    ],
)
def test_arguments_are_told_without_credentials(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    assert code == 2 and "hunter2" not in said.out + said.err and "***" in said.err
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_recipe_is_printed_and_nothing_else_happens(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "train.py"), "--config", "igae.yaml", "--print-config", "planes.features=8"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    recipe = yaml.safe_load(done.stdout)
    assert recipe["planes"]["features"] == 8 and recipe["train"]["joint"]["natural_images"] == 3
    assert list(tmp_path.iterdir()) == [] and done.stderr == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(path.name in text for path in (ROOT / "configs").glob("*.yaml"))
    assert "\n  planes.resolution = 64\n" in text and "\n  data.root = (required)\n" in text
    assert "docs/configuration.md" in text


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: there is no command trian; did you mean train?; igae --help lists them\n"


def test_a_fit_has_a_recipe_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IGAE_MODEL", raising=False)
    assert main(["fit", "data.root=nowhere"]) == 2


def test_old_keys_are_accepted_with_their_new_names(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: igae.yaml\ntrain: {joint: {photos: 5}, run_ahead: false, plane_optimizer: exact}\n")
    for overrides, expected in (([], 5), (["train.joint.photos=7"], 7), (["train.joint.natural_images=8"], 8)):
        script = [sys.executable, str(ROOT / "train.py"), "--config", str(own), "--print-config", *overrides]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
        train = yaml.safe_load(done.stdout)["train"]
        assert train["joint"]["natural_images"] == expected and train["async_steps"] is False
        assert "plane_optimizer" not in train
        assert done.stderr.count("the key plane_optimizer is always exact now: remove it") == 1
        assert "the key photos is called natural_images now" in done.stderr


def test_what_is_slow_to_import_is_left_out() -> None:
    code = (
        "from igae.models import import_diffusers; import_diffusers()\n"
        "from diffusers import AutoencoderKL; from igae.training import Fit, Trainer\n"
        "import sys\n"
        "assert AutoencoderKL.__name__ and not {'scipy', 'transformers', 'torchmetrics'} & set(sys.modules)\n"
        "import transformers, scipy.stats"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
