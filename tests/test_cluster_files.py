# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile and the guide: what they name is there. Neither Docker nor a cluster is needed."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()


def test_what_the_image_copies_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists() and source not in ignored, source
    assert {".git", ".venv", "data", "outputs"} <= set(ignored)


@pytest.mark.parametrize(("cuda", "extra"), [("130", "cu13"), ("126", "cu12")])
def test_what_the_image_installs(cuda: str, extra: str) -> None:
    """The shell's part of the installation, with echo instead of pip."""
    (block,) = re.findall(r"^RUN (grep .+?[^\\])$", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    block = block.replace("pip install", "echo").replace("/tmp/constraints.txt &&", "/dev/stdout &&", 1)
    done = subprocess.run(
        ["sh", "-ec", block], cwd=ROOT, env={"CUDA": cuda, "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    *pins, torch, cuda_core = done.stdout.decode().splitlines()
    assert done.returncode == 0 and f"torch==2.13.0 --index-url https://download.pytorch.org/whl/cu{cuda}" in torch
    assert cuda_core.endswith(f"cuda-core[{extra}]")
    names = [pin.split("==")[0] for pin in pins]
    assert "diffusers" in names and not {"torch", "cuda-core", "cuda-bindings"} & set(names)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"-e '\.\[(.+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(config["options.extras_require"])


def test_the_guide_names_what_there_is() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"(?:launch|tests|data_tools|docs)/[\w./-]*\w", text))
    assert len(named) > 8 and all((ROOT / name).exists() for name in named), named
    assert all((ROOT / "configs" / name).exists() for name in re.findall(r"(?:--config |CONFIG=)(\S+)", text))
    scripts = {path.name for path in (ROOT / "launch" / "slurm").iterdir()}
    assert scripts == set(re.findall(r"launch/slurm/(\S+\.sbatch)", text))
    assert {path.name for path in (ROOT / "launch" / "accelerate").iterdir()} == set(
        re.findall(r"(\w+\.yaml)`", text)
    ) - {"pytorchjob.yaml"}
