# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: what may import what, license, sizes, requirements."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import igae

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "igae"

# A module imports modules of lower layers, and a package itself.
LAYERS = {
    "config": 0,
    "distributed": 0,
    "secrets": 0,
    "cameras": 1,
    "exchange": 1,
    "losses": 1,
    "ownership": 1,
    "tensorfile": 1,
    "rendering": 1,
    "report": 1,
    "layers": 1,
    "autoencoder": 2,
    "data": 2,
    "scenes": 2,
    "model": 3,
    "tracking": 3,
    "strategies": 3,
    "engine": 4,
    "checkpoint": 4,
    "evaluation": 4,
    "recipe": 5,
    "assembly": 6,
    "reference": 6,
    "captured": 6,
    "guards": 6,
    "records": 6,
    "shares": 6,
    "export": 6,
    "pretrained": 7,
    "resume": 7,
    "published": 7,
    "stage": 7,
    "evaluate": 8,
    "trainer": 8,
    "view": 8,
    "fit": 9,
}
ALONE = {"config", "rendering"}  # import nothing else of igae

SOURCES = sorted(
    path for pattern in ("*.py", "Makefile", "setup.cfg", "*.toml", ".ci/run") for path in ROOT.glob(pattern)
) + sorted(
    path
    for folder in ("igae", "data_tools", "tests", "benchmarks", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".h", ".sh", ".sbatch")
)
CORE = ("torch", "accelerate", "diffusers", "webdataset", "numpy", "PIL")
OPTIONAL = ("wandb", "deepspeed", "tensorboard", "torch.utils.tensorboard", "cuda", "s3fs", "skimage", "viser")


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a module imports; `package` is what its relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(name: str, source: str, package: str) -> list[str]:
    wrong = []
    for imported in imports(ast.parse(source), package):
        parts = imported.split(".")
        if parts[0] == "igae" and parts[1] != name and not (parts[1].startswith("__")):
            lower = parts[1] in LAYERS and LAYERS[parts[1]] < LAYERS[name]
            if not lower or name in ALONE:
                wrong.append(imported)
    return wrong


def test_the_check_of_layers_finds_wrong_imports() -> None:
    for source, wrong in [
        ("import igae.training.trainer", ["igae.training.trainer"]),
        ("def f():\n    from igae import trainer, config", ["igae.training.trainer"]),
        ("from ..trainer import Trainer", ["igae.training.trainer.Trainer"]),
        ("from .. import scenes", ["igae.scenes"]),  # of the same layer
        ("from igae.unheard import x", ["igae.unheard.x"]),
        ("from igae.data import pack\nfrom . import pack\nfrom igae import __version__, cameras\nimport torch", []),
    ]:
        assert wrong_imports("data", source, "igae.data") == wrong
    assert wrong_imports("rendering", "from igae.config import Section", "igae.rendering") == ["igae.config.Section"]


def test_imports_go_downwards() -> None:
    seen = set()
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = module_of(path)
        if name == "__init__":
            assert not list(imports(ast.parse(path.read_text()), "igae"))
            continue
        assert name in LAYERS, f"give igae/{name} a layer"
        seen.add(name)
        package = ".".join(("igae", *path.relative_to(PACKAGE).parts[:-1]))
        wrong += [f"{path.relative_to(ROOT)}: {found}" for found in wrong_imports(name, path.read_text(), package)]
    assert wrong == []
    assert {"config", "rendering", "data"} <= seen


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400, f"{len(lines)} lines: split it"
    assert any("SPDX-License-Identifier: Apache-2.0" in line for line in lines[:2]), "the license line is missing"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirement_names(text: str) -> set[str]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line, maxsplit=1)[0]).lower() for line in lines if line}


def test_version_is_one() -> None:
    assert setup_cfg()["metadata"]["version"] == igae.__version__


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"


def test_no_torchvision() -> None:
    """One that does not match torch's build breaks diffusers and torchmetrics by its presence."""
    parser = setup_cfg()
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    texts.append((ROOT / "constraints.txt").read_text())
    for text in texts:
        assert "torchvision" not in requirement_names(text)
    assert "torch" in requirement_names(texts[0])
    assert find_spec("torchvision") is None, "torchvision is installed: remove it"


def test_constraints_pin_every_requirement() -> None:
    parser = setup_cfg()
    required = requirement_names(parser["options"]["install_requires"])
    for text in parser["options.extras_require"].values():
        required |= requirement_names(text)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r'#.*|[a-z0-9-]+==[\w.]+(; python_version (<|>=) "3\.11")?', line) for line in lines)
    assert required - {"igae"} <= requirement_names("\n".join(lines))
    assert "torch==2.13.0" in lines


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_igae_is_light() -> None:
    assert not loaded_by("import igae") & {*CORE, *OPTIONAL}


def test_no_module_needs_an_optional_package() -> None:
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    )
    code = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\nimport {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
