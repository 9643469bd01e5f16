# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: what may import what, license, sizes, requirements."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import igae

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "igae"

# Floors: a room imports rooms of the floors above it, through their faces alone.
FLOORS = (
    ("config", "ranks", "errors"),
    ("storage", "kernels"),
    ("rendering", "data", "scenes"),
    ("models", "checkpoint"),
    ("evaluation",),
    ("export",),
    ("training", "viewer"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = FLOORS[0]
# `python -m igae.NAME` of version 0.1: each hands on to a command.
FRONTS = {"export/__main__.py"}

# Of Python in igae/: only a feature may raise it. 10,500 would be right.
MOST_LINES = 21_383
# Longer than 60 lines or with more than 8 parameters, and why.
EXCEPTIONS: dict[str, str] = {"rendering/api.py:render": "what is rendered, and how: nothing would share an object"}

SOURCES = sorted(
    path for pattern in ("*.py", "Makefile", "setup.cfg", "*.toml", ".ci/run") for path in ROOT.glob(pattern)
) + sorted(
    path
    for folder in ("igae", "data_tools", "tests", "benchmarks", "launch", "website")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".h", ".sh", ".sbatch")
)
CORE = ("torch", "accelerate", "diffusers", "webdataset", "numpy", "PIL")
OPTIONAL = ("wandb", "deepspeed", "tensorboard", "torch.utils.tensorboard", "cuda", "s3fs", "skimage", "viser", "cv2")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports from igae, each as (module that is imported from, name); imports inside functions too."""
    package = ("igae", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "igae")
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names if module.split(".")[0] == "igae")


def wrong_import(room: str, module: str, name: str) -> bool:
    """Whether a room must not import a name from a module of igae: the room is not on a floor above, or the name is not
    taken from the other room's face."""
    parts = [*module.split("."), name][1:]
    other = parts[0]
    if other == room or other == "__version__":
        return False
    if other not in FLOOR_OF or FLOOR_OF[other] >= FLOOR_OF[room]:
        return not (room in MODULES and other in MODULES)
    inside = module.split(".")[2:] if other not in MODULES else []
    return bool(inside) or (other not in MODULES and name != "" and name not in face(other))


def face(room: str) -> set[str]:
    """Names that others may import from a room."""
    tree = ast.parse((PACKAGE / room / "__init__.pyi").read_text())
    return {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_check_of_imports_finds_wrong_ones() -> None:
    for module, name, wrong in [
        ("igae.training", "Trainer", True),  # of a lower floor
        ("igae", "training", True),
        ("igae.scenes", "SceneStore", True),  # of the same floor
        ("igae.unheard", "x", True),
        ("igae.storage.reading", "File", True),  # past the face
        ("igae.storage", "_private", True),
        ("igae.storage.reading", "", True),
        ("igae.storage", "join", False),
        ("igae.data.manifest", "Manifest", False),  # inside of the room
        ("igae.config", "Section", False),
    ]:
        assert wrong_import("data", module, name) == wrong, (module, name)


def test_imports_go_down_through_faces() -> None:
    wrong, seen = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        room = parts[0].removesuffix(".py")
        if parts == ("__init__.py",):
            assert not list(imports(path))
            continue
        assert room in FLOOR_OF, f"give igae/{room} a floor"
        seen.add(room)
        if "/".join(parts) not in FRONTS:
            wrong += [f"{path.relative_to(ROOT)}: {m}:{n}" for m, n in imports(path) if wrong_import(room, m, n)]
    assert wrong == []
    assert seen == set(FLOOR_OF)


def test_there_are_no_circles_inside_of_rooms() -> None:
    for room in set(FLOOR_OF) - set(MODULES):
        files = {
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in (PACKAGE / room).rglob("*.py")
        }
        needs = {
            name: {
                other
                for module, imported in imports(path)
                for other in (f"{module}.{imported}".removeprefix("igae."), module.removeprefix("igae."))
                if other in files and other != name
            }
            for name, path in files.items()
        }
        while free := [name for name, others in needs.items() if not others & set(needs)]:
            for name in free:
                del needs[name]
        assert needs == {}, f"these files of {room} import one another"


def test_rooms() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(folders) <= 12 and len(modules) <= 3 and len(FLOORS) <= 8
    assert folders | modules == set(FLOOR_OF)
    for room in folders - {"cli"}:
        submodules = {path.stem for path in (PACKAGE / room).iterdir()}
        assert not face(room) & submodules, "a name of a face must not be that of a file"


def functions() -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters of all functions."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
                yield f"{path.relative_to(PACKAGE)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1, count


def test_sizes() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert lines <= MOST_LINES, f"{lines} lines"
    large = {name for name, length, parameters in functions() if length > 60 or parameters > 8}
    assert large == set(EXCEPTIONS) and len(EXCEPTIONS) <= 5


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
    assert all(
        re.fullmatch(r'#.*|[a-z0-9-]+==[\w.]+(; python_(full_)?version (<|>=) "3\.11(\.5)?")?', line) for line in lines
    )
    assert required - {"igae"} <= requirement_names("\n".join(lines))
    assert "torch==2.13.0" in lines


def test_constraints_fit_the_python_of_debian() -> None:
    """pip looks for a way out of a pin that a Python can't have for half an hour."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {Requirement(line).name: line for line in lines if "==" in line and "<" not in line}
    pinned = [dist for dist in metadata.distributions() if f"=={dist.version}" in pins.get(dist.name.lower(), "")]
    found = [(dist.name.lower(), dist.metadata.get("Requires-Python") or "") for dist in pinned]
    newer = {name for name, versions in found if not SpecifierSet(versions).contains("3.11.2")}
    assert {name for name in newer if 'python_full_version >= "3.11.5"' not in pins[name]} == set()


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
        if path.name != "__main__.py"
    )
    code = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\nimport {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_commit_and_pull_request_is_checked_as_make_does() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    linters = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy) .+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == linters and len(linters) == 3
    [job] = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    for path in (ROOT / ".github/ISSUE_TEMPLATE").iterdir():
        assert {"name", "description", "body"} <= set(yaml.safe_load(path.read_text())), path
