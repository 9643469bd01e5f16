# SPDX-License-Identifier: Apache-2.0
"""Each command in the documents is executed here with small data, or by another test, or says why not; each link leads
somewhere, each key of the configuration is one, each example in Python runs."""

import ast
import configparser
import functools
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import documents
import pytest
import ranks
from capture_files import shots, write_colmap
from doc_commands import NAMES, TABLE, CoveredBy, Executed
from documents import DOCUMENTS, ROOT

from igae import config
from igae.errors import all_keys
from igae.training import Recipe
from igae.training.recipe import TrainConfig


@functools.cache
def makefile(target: str) -> list[str]:
    """What make starts, in its order."""
    done = subprocess.run(["make", "-nB", target], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = re.sub(r"\s*\\\n\s*", " ", done.stdout).splitlines()
    return [line.split(".venv/bin/", 1)[1] for line in lines if re.match(r"([A-Z_0-9]+=\S+ )?\.venv/bin/", line)]


@functools.cache
def steps() -> list[tuple[str, str, str]]:
    """(document, command, what it says that the command prints), in the order in which a reader gives them: README.md
    first, page by page; `make` stands before what it starts."""
    found = []
    for path in DOCUMENTS:
        for command, printed in documents.steps(path):
            found.append((str(path.relative_to(ROOT)), command, printed))
            if target := re.fullmatch(r"make (\w+)", command):
                found += [("Makefile", started, "") for started in makefile(target[1])]
    return found


@functools.cache
def commands() -> dict[str, str]:
    """All commands, and the first document that has each."""
    return {command: document for document, command, _ in reversed(steps())}


def entry_of(command: str) -> str | None:
    for pattern in TABLE:
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), command):
            return pattern
    return None


def test_the_table_has_what_the_documents_have() -> None:
    unknown = {command: where for command, where in commands().items() if entry_of(command) is None}
    assert unknown == {}, "say in tests/doc_commands.py how these commands are tried, or why not"
    unused = set(TABLE) - {entry_of(command) for command in commands()}
    assert unused == set(), "no document has these commands of TABLE"


def test_the_tests_that_the_table_names_exist() -> None:
    for how in TABLE.values():
        if isinstance(how, CoveredBy):
            file, _, name = how.by.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, how.by


def test_files_that_commands_name_exist() -> None:
    for command, where in commands().items():
        for word in command.split():
            if re.match(r"(data_tools|launch|benchmarks|tests|configs)/", word) or word == "train.py":
                assert (ROOT / word).is_file(), f"{where}: {command}"
        for name in re.findall(r"(?:--config |CONFIG=)([\w.]+)", command):
            assert (ROOT / "configs" / name).is_file(), f"{where}: {command}"


def test_extras_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for command, where in commands().items():
        for extras in re.findall(r"install .*(?:\.|igae)\[(.+?)\]", command):
            assert set(extras.split(",")) <= set(setup["options.extras_require"]), f"{where}: {command}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    for link in documents.links(path):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in documents.anchors(target), f"{link}: there is no such heading"


SECTIONS = [name for name, f in Recipe.model_fields.items() if hasattr(f.annotation, "model_fields")]
KEYS = {".".join(key) for key in all_keys(Recipe)} | {f"train.{key}" for key in TrainConfig.REMOVED}
KEY = rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys(path: Path) -> None:
    """`a.b.c=value ...` are overrides that the configuration takes, together; `a.b.c` is a key."""
    for text in {*documents.commands(path), *documents.spans(path)}:
        words = [word.strip("\"',") for word in re.findall(r"'[^']*'|\S+", text)]
        named = re.search(r"--config (\w+\.yaml)", text)
        overrides = [word for word in words if re.fullmatch(rf"{KEY}=.+", word)]
        own = [word for word in overrides if ".plugins=" in word]  # docs/extending.md
        if overrides and not own:
            given = ["model=exports/NAME", "autoencoder.path=demo"] if named and named[1] == "fit.yaml" else []
            config.load(Recipe, named[1] if named else "igae.yaml", [*given, *overrides])
        for word in words:  # but not files, and tensors in files
            if re.fullmatch(KEY, word) and not re.search(r"\.(py|json|csv|yaml|html|md|crc32)$", word):
                assert word in KEYS, f"{word} is no key"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path: Path) -> None:
    """`igae.module.name` is there, and so is `folder/file`."""
    for span in documents.spans(path):
        # Groups of entry points are none: tests/test_extending.py has them.
        others = r"\.(yaml|json|safetensors)$|^igae\.(autoencoders|losses|formats|fields)$"
        if re.fullmatch(r"igae(\.\w+)+", span) and not re.search(others, span):
            pkgutil.resolve_name(span)
        elif re.fullmatch(r"(igae|data_tools|benchmarks|launch|tests|configs)/[\w./]+", span):
            assert (ROOT / span).exists(), span


# ---- Execution


def run_in(folder: str, words: list[str], environment: dict[str, str]) -> None:
    """In a process of its own: `python FILE ...`, or `python -m MODULE ...`."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    module, words = words[0] == "-m", words[1:] if words[0] == "-m" else words
    sys.argv = words
    try:
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).parent.resolve()))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)


def python_words(command: str) -> list[str]:
    """What Python is given in the end: a file, or -m and a module, and arguments. Launchers parse their own."""
    words = shlex.split(command)
    if words[0] == "igae":
        return ["-m", "igae.cli.main", *words[1:]]
    if words[0] != "accelerate":
        assert words[0] == "python"
        return words[1:]
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
    return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]


def mine(text: str) -> str:
    for name, here in NAMES.items():
        text = text.replace(name, here)
    return text


def execute(command: str, how: Executed, checkout: Path) -> str:
    """A command with this folder's names; returns what it prints."""
    log = checkout / "log.txt"
    log.write_text("")
    if how.launched:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with log.open("w") as file:
            done = subprocess.run(
                [*shlex.split(command), *how.more], cwd=checkout, env=environment, stdout=file, stderr=file, timeout=120
            )
        codes = [done.returncode]
    else:
        words = [*python_words(command), *how.more]
        codes = ranks.Ranks(run_in, how.ranks, str(checkout), words, {}, log=str(log)).exit_codes(120)
    assert codes == [0] * how.ranks, f"{command}\n{log.read_text()}"
    return log.read_text()


def test_launchers_take_their_arguments() -> None:
    """Also those of launches on several machines, which run elsewhere with other numbers."""
    from torch.distributed.run import get_args_parser

    launches = [
        command for command in commands() if re.match(r"(accelerate launch|torchrun) .*\.(py|evaluate)", command)
    ]
    assert len(launches) > 6
    for command in launches:
        if command.startswith("torchrun"):
            parsed = get_args_parser().parse_args(shlex.split(command)[1:])
            assert parsed.training_script == "train.py", command
        else:
            assert python_words(command)[0] in ("train.py", "-m"), command


@dataclass
class Checkout:
    """A folder as a reader's checkout, in which commands have been executed that can be, in the order of the pages."""

    folder: Path
    printed: dict[str, str] = field(default_factory=dict)
    """By command, with the names of this folder."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("docs") / "checkout")
    made.folder.mkdir()
    for name in ("train.py", "igae", "configs", "data_tools", "launch"):
        (made.folder / name).symlink_to(ROOT / name)
    write_colmap(made.folder / "photos" / "mug", {f"{i:03}.png": shot for i, shot in enumerate(shots())})
    for document, documented, _ in steps():
        command, how = mine(documented), TABLE[entry_of(documented) or ""]
        if isinstance(how, Executed) and command not in made.printed:
            try:
                made.printed[command] = execute(command, how, made.folder)
            except AssertionError as error:
                raise AssertionError(f"{document}, after what stands before it there: {error}") from None
            if "make_demo" in command:
                stand_in(made.folder / "data")
    return made


def stand_in(data: Path) -> None:
    """Demo data of 16 x 16 pixels, under the names of readers' sizes, for what is downloaded and rendered."""
    for link in ("square64", "square128"):
        for kind in ("objaverse", "imagenet"):
            (data / "demo/train" / kind / link).symlink_to("square16")
    (data / "igae-data").symlink_to("demo")
    (data / "objects").symlink_to("demo/train/objaverse")


def test_commands_print_what_the_documents_say(checkout: Checkout) -> None:
    """But for numbers, which are those of larger data there, and `...`. What follows three spaces is a time."""
    checked = 0
    for document, command, printed in steps():
        if mine(command) in checkout.printed:
            for line in printed.splitlines():
                said, found = mine(line.split("   ")[0]), checkout.printed[mine(command)]
                parts = [re.sub(r"\\?\d[\d.\\]*", r"[\\d.]+", re.escape(part)) for part in said.split("...")]
                assert re.search(".*".join(parts), found), f"{document}: {command} does not print {said}"
                checked += 1
    assert checked >= 6


def test_commands_leave_what_the_documents_say(checkout: Checkout) -> None:
    run = checkout.folder / "outputs" / "igae"
    named = "metrics.jsonl metrics.json pictures orbits checkpoints config.yaml autoencoder report.html evaluation.json"
    for name in [*named.split(), "evaluation.csv"]:
        assert (run / name).exists(), name
    assert (checkout.folder / "page.html").stat().st_size > 10_000
    assert (checkout.folder / "results" / "evaluation.json").is_file()
    assert (checkout.folder / "outputs" / "fit-of-an-export" / "metrics.json").is_file()


def test_the_drawn_folder_is_that_of_a_run(checkout: Checkout) -> None:
    """docs/concepts.md draws it."""
    [drawn] = [block.text for block in documents.blocks(ROOT / "docs/concepts.md") if "outputs/NAME/\n" in block.text]
    run = checkout.folder / "outputs" / "igae"
    names = set(re.findall(r"[\w-]+\.(?:yaml|jsonl?|html|safetensors)", drawn)) - {"scenes-00000.safetensors"}
    assert len(names) > 8
    present = {path.name for path in run.rglob("*")}
    assert names <= present and "scenes-00000.safetensors" in present
    kept = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert kept <= set(re.findall(r"[\w.-]+", drawn.replace("evaluation.json  .csv", "evaluation.json evaluation.csv")))


def test_python_blocks_run(checkout: Checkout) -> None:
    for path in DOCUMENTS:
        text = "\n".join(block.text for block in documents.blocks(path) if block.language == "python")
        if path.name == "extending.md" or not text:  # tests/test_extending.py
            continue
        folder = checkout.folder
        (folder / "block.py").write_text(mine(text))
        (code,) = ranks.Ranks(run_in, 1, str(folder), ["block.py"], {}, log=str(folder / "log.txt")).exit_codes(120)
        assert code == 0, f"{path.name}: {(folder / 'log.txt').read_text()}"
