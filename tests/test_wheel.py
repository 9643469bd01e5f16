# SPDX-License-Identifier: Apache-2.0
"""The wheel, built from the source distribution, does all that a checkout does: installed into an empty environment,
run from an empty folder. An index takes both."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "autoencoder.path=demo autoencoder.scale=0.5 planes.resolution=8 planes.features=8 render.coarse_samples=4 "
    "render.fine_samples=4 train.joint.weights.natural_lpips=0 train.warmup.epochs=1 train.warmup.batch_size=4 "
    "train.joint.epochs=1 train.joint.batch_size=4 data.workers=0 evaluation.views=1 evaluation.natural_images=2 "
    "evaluation.pictures=1 evaluation.orbits=0 data.categories=null"
).split()


def copied(target: Path) -> Path:
    """What igae is built from, in a copy: setuptools leaves files where it builds."""
    kept = ("igae", "configs", "data_tools", "launch", "setup.py", "setup.cfg", "README.md", "LICENSE")
    shutil.copytree(ROOT, target, ignore=lambda path, names: [n for n in names if path == str(ROOT) and n not in kept])
    return target


def installed(folder: Path, *what: str) -> Path:
    """A new environment in ``folder / "venv"`` where pip has installed that."""
    made = folder / "venv"
    venv.create(made, with_pip=False, symlinks=True)
    [packages] = made.glob("lib/python*/site-packages")
    # A plain line: files like the one of an editable install of this checkout are not looked at there.
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python")]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    subprocess.run([*pip, "install", "-q", *options, *what], check=True, cwd=folder)
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with igae's wheel; what igae requires is that of this one (without this checkout)."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copied(folder / "source")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, cwd=folder)
    made = [*folder.glob("igae-*.tar.gz"), *folder.glob("igae-*.whl")]
    assert len(made) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *made], check=True)
    return installed(folder, str(made[1]))


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(environment: Path, folder: Path, *words: str) -> str:
    command = [str(environment / "bin" / "python"), str(environment / "bin" / "igae"), *words]
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_clone_named_igae_is_no_package_to_what_is_beside_it(tmp_path: Path) -> None:
    clone = copied(tmp_path / "igae")
    command = [installed(tmp_path, "-e", str(clone)) / "bin" / "python", "-c", "import igae; print(igae.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == clone / "igae" / "__init__.py"


@pytest.mark.slow
def test_from_demo_to_export(environment: Path, tmp_path: Path) -> None:
    command = [environment / "bin" / "python", "-c", "import igae; print(igae.__file__)"]
    where = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(environment))
    assert "train" in run(environment, tmp_path, "--help")
    few = "--scenes 2 --views 4 --size 16 --natural-images 4 --supersample 1 --workers 1".split()
    run(environment, tmp_path, "demo", "--output", "data/demo", *few)
    folders = "--scenes data/demo/train/objaverse --images data/demo/train/imagenet/square16 --subset square16".split()
    assert "2 scenes" in run(environment, tmp_path, "pack", *folders, "--output", "shards", "--workers", "1")
    settings = ["--config", "igae.yaml", "data.root=shards", *SMALL]
    assert "experiment: igae" in run(environment, tmp_path, "train", *settings, "--print-config")
    assert not (tmp_path / "outputs").exists()
    run(environment, tmp_path, "train", *settings)
    assert (tmp_path / "outputs" / "igae" / "report.html").is_file()
    run(environment, tmp_path, "evaluate", "--checkpoint", "outputs/igae", "data.workers=0")
    assert (tmp_path / "outputs" / "igae" / "evaluation.json").is_file()
    assert "2 scenes" in run(environment, tmp_path, "export", "outputs/igae", "exported")
    assert (tmp_path / "exported" / "igae.json").is_file()


@pytest.mark.parametrize("name", ["fit", "render", "view", "report", "published", "kernels", "reference"])
def test_help(environment: Path, tmp_path: Path, name: str) -> None:
    assert "usage: " in run(environment, tmp_path, name, "--help")
