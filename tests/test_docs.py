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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import documents
import pytest
import ranks
from documents import DOCUMENTS, ROOT

from igae import config
from igae.recipe import Recipe

# What makes a training small; nothing is fetched.
SMALL = (
    "autoencoder.path=demo autoencoder.scale=0.5 planes.resolution=8 planes.features=8 "
    "render.coarse_samples=4 render.fine_samples=4 train.joint.weights.photo_lpips=0"
).split()
SHORT = (
    "train.warmup.epochs=1 train.warmup.batch_size=4 train.joint.epochs=1 train.joint.batch_size=4 data.workers=0 "
    "evaluation.views=1 evaluation.photos=2 evaluation.pictures=1 evaluation.orbits=1 "
    "evaluation.orbit_frames=2"
).split()
# What stands in the documents for something of the reader's.
NAMES = {
    "outputs/NAME": "outputs/igae",
    "outputs/RUN": "outputs/igae",
    "hf://user/NAME": "exports/NAME",
    "step-00001000": "step-00000002-end",
    "chair-0017 chair-0018": "mug teddy",
    "data.root=SHARDS": "data.root=data/shards",
    "[--output FILE]": "--output page.html",
    "<dir or s3://...>": "data/packed-again",
    "$(.venv/bin/python -c 'import os; print(os.cpu_count())')": "1",
}


@dataclass
class Executed:
    """Here: with ``NAMES`` for what is the reader's and ``more`` arguments, by the program's own launcher where it
    is ``launched``, else by the script or module that it starts."""

    more: list[str] = field(default_factory=list)
    launched: bool = False
    ranks: int = 1


@dataclass
class CoveredBy:
    """By a test of another file, ``file::name``."""

    by: str


@dataclass
class Left:
    """Not executed."""

    because: str


How = Executed | CoveredBy | Left
INSTALLS = Left("installs into the environment that runs the tests (`test_extras_exist` looks at the names)")
MEASURES = Left("measures on GPUs, for minutes; its figures are in docs/experiments.md")

# From a command (`*` stands for anything) to how it is tried; the first that fits counts. Executed in this order.
TABLE: dict[str, How] = {
    # -- demo data and the quickstart, as `make -n quickstart` says
    "make quickstart": Left("makes an environment, and trains for minutes; what it starts is below"),
    "PIP_EXTRA_INDEX_URL=* make quickstart": Left("as make quickstart"),
    "python data_tools/make_demo.py --output data/demo": Executed(
        "--scenes 2 --views 4 --size 16 --photos 4 --supersample 1 --workers 1".split()
    ),
    "python data_tools/make_demo.py --output data/demo --size 128": CoveredBy("test_demo.py::test_layout_and_counts"),
    "python data_tools/pack_shards.py --scenes data/demo/* --output data/demo-shards": Executed(["--workers=1"]),
    "accelerate launch --config_file launch/accelerate/one_process.yaml * train.py --config quickstart.yaml": Executed(
        [*SHORT, "train.joint.epochs=0"]
    ),
    # -- packing, training
    "python data_tools/pack_shards.py --scenes $DATA_DIR/* --output data/shards": Executed(["--workers=1"]),
    "python data_tools/pack_shards.py --scenes $DATA_DIR/* --output <dir or s3://...>": Executed(["--workers=1"]),
    "python data_tools/pack_shards.py --verify data/shards": Executed(),
    "python data_tools/render_objects.py *": CoveredBy("test_render_objects.py::test_two_commands_lead_to_training"),
    "python data_tools/pack_shards.py --scenes data/objects *": CoveredBy(
        "test_render_objects.py::test_two_commands_lead_to_training"
    ),
    "accelerate launch train.py --config igae.yaml data.root=data/shards": Executed([*SMALL, *SHORT], launched=True),
    "python -m igae.evaluate --checkpoint outputs/NAME": Executed(["data.workers=0"]),
    "python -m igae.evaluate --checkpoint outputs/NAME evaluation.scenes=null": Executed(["data.workers=0"]),
    "python -m igae.evaluate --checkpoint outputs/NAME/checkpoints/*": Executed(["data.workers=0"]),
    "accelerate launch * -m igae.evaluate --checkpoint outputs/NAME": Executed(["data.workers=0"], ranks=2),
    "python -m igae.report outputs/NAME": Executed(),
    "python -m igae.report outputs/NAME [--output FILE]": Executed(),
    "python -m igae.export outputs/NAME exports/NAME": Executed(),
    "python -m igae.export outputs/NAME exports/NAME data.root=SHARDS autoencoder.path=FOLDER": CoveredBy(
        "test_export_runs.py::test_what_moved_is_found_where_it_is_said_to_be"
    ),
    "python -m igae.export outputs/NAME s3://*": CoveredBy("test_export.py::test_an_object_store"),
    "python -m igae.export outputs/NAME hf://*": CoveredBy("test_export_hub.py::test_a_hub_repository"),
    "python -m igae.evaluate --checkpoint hf://*": Executed(["data.workers=0"]),
    "python -m igae.published *": CoveredBy("test_published.py::test_renders_as_the_published_code"),
    "accelerate launch train.py --config igae.yaml autoencoder.path=exports/NAME data.root=SHARDS": Executed(
        [*SMALL[1:], *SHORT, "experiment=again", "train.joint.epochs=0"]
    ),
    "accelerate launch train.py --config fit.yaml model=outputs/igae data.root=data/new-shards": Executed(
        [*SHORT, "experiment=new", "data.root=data/shards"]
    ),
    "accelerate launch train.py --config fit.yaml model=outputs/RUN data.root=SHARDS": Executed(
        [*SHORT, "experiment=fit-of-a-run"]
    ),
    "accelerate launch train.py --config fit.yaml model=exports/NAME data.root=SHARDS": Executed(
        [*SHORT, "experiment=fit-of-an-export"]
    ),
    "python -m igae.reference": Executed(),
    # -- docs/extending.md
    "python train.py --config igae.yaml experiment=patches *": CoveredBy("test_extending.py::test_an_autoencoder"),
    "python -m igae.export outputs/patches exports/patches": CoveredBy("test_extending.py::test_an_autoencoder"),
    "python -m igae.evaluate --checkpoint exports/patches *": CoveredBy("test_extending.py::test_an_autoencoder"),
    "python train.py --config igae.yaml experiment=solid *": CoveredBy("test_extending.py::test_a_loss"),
    "python train.py --config igae.yaml experiment=deep": CoveredBy("test_extending.py::test_a_network_and_rows"),
    "python train.py --config igae.yaml experiment=lines *": CoveredBy("test_extending.py::test_a_network_and_rows"),
    "accelerate launch * experiment=half": CoveredBy("test_extending.py::test_a_strategy"),
    "python data_tools/pack_arrays.py *": CoveredBy("test_extending.py::test_a_data_source"),
    "python train.py --config igae.yaml experiment=arrays *": CoveredBy("test_extending.py::test_a_data_source"),
    "python -m igae.rendering.build *": CoveredBy("test_cuda_build.py::test_processes_share_the_cache"),
    # -- many GPUs, many machines
    "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 train.py *": CoveredBy(
        "test_launch.py::test_each_file_starts_its_strategy"
    ),
    "accelerate launch --config_file launch/accelerate/ddp.yaml --num_machines 2 *": CoveredBy(
        "test_hosts.py::test_a_host_is_cut_off_and_comes_back"
    ),
    "torchrun --nnodes 1:2 *": CoveredBy("test_launch.py::test_torchrun_goes_on_with_fewer_ranks"),
    "sbatch launch/slurm/single_node.sbatch": CoveredBy("test_slurm.py::test_slurm_would_take_each_script"),
    "STRATEGY=* sbatch * launch/slurm/multi_node.sbatch *": CoveredBy(
        "test_slurm.py::test_two_machines_save_at_signals_and_go_on"
    ),
    "CONFIG=* sbatch --array=* launch/slurm/array.sbatch": CoveredBy(
        "test_slurm.py::test_slurm_would_take_each_script"
    ),
    "scancel *": CoveredBy("test_slurm.py::test_two_machines_save_at_signals_and_go_on"),
    "docker build *": Left("needs Docker and a network; tests/test_cluster_files.py reads the Dockerfile"),
    "kubectl apply *": Left("needs a cluster; tests/test_hosts.py starts what the manifest says"),
    "python train.py": CoveredBy("test_training.py::test_a_signal_saves_and_exits_with_0"),
    # -- the environment
    "pip install *": INSTALLS,
    "python -m pip install *": INSTALLS,
    "apt-get install *": Left("installs system packages, as root; .ci/run does"),
    "hf auth login": Left("asks for an account"),
    "wandb login": Left("asks for an account"),
    "accelerate config": Left("asks questions; igae needs none of its files"),
    "accelerate launch --cpu": Left("what not to do"),
    "make test": Left("runs these tests"),
    ".ci/run": Left("runs these tests"),
    "python -m pytest -q": Left("runs these tests"),
    "pytest -m gpu": Left("needs a GPU"),
    "ruff *": Left("make test starts it"),
    "mypy igae": Left("make test starts it"),
    # -- what docs/experiments.md measured
    "DEV=*": Left("names settings (`test_keys` looks at them)"),
    "python train.py --config * $DEV": MEASURES,
    "python data_tools/pack_shards.py --scenes DEV/*": MEASURES,
    "accelerate launch train.py --config autoencoder.yaml": MEASURES,
    "python benchmarks/*": MEASURES,
}


def makefile() -> set[str]:
    """What make starts."""
    done = subprocess.run(["make", "-nB", "quickstart", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = re.sub(r"\s*\\\n\s*", " ", done.stdout).splitlines()
    return {line.removeprefix(".venv/bin/") for line in lines if line.startswith(".venv/bin/")}


@functools.cache
def commands() -> dict[str, str]:
    """All commands, and a document that has each."""
    found = {command: "Makefile" for command in makefile()}
    for path in DOCUMENTS:
        found |= {command: str(path.relative_to(ROOT)) for command in documents.commands(path)}
    return found


def entry_of(command: str) -> str | None:
    for pattern in TABLE:
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), command):
            return pattern
    return None


def test_the_table_has_what_the_documents_have() -> None:
    unknown = {command: where for command, where in commands().items() if entry_of(command) is None}
    assert unknown == {}, "say in TABLE how these commands are tried, or why not"
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
            made = word in ("data_tools/pack_arrays.py",)  # by the reader of docs/extending.md
            if (re.match(r"(data_tools|launch|benchmarks|tests|configs)/", word) or word == "train.py") and not made:
                assert (ROOT / word).is_file(), f"{where}: {command}"
        for name in re.findall(r"(?:--config |CONFIG=)([\w.]+)", command):
            assert (ROOT / "configs" / name).is_file(), f"{where}: {command}"


def test_extras_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for command, where in commands().items():
        for extras in re.findall(r"install .*(?:\.|igae)\[(.+?)\]", command):
            assert set(extras.split(",")) <= set(setup["options.extras_require"]), f"{where}: {command}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    for link in documents.links(path):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in documents.anchors(target), f"{link}: there is no such heading"


SECTIONS = [name for name, f in Recipe.model_fields.items() if hasattr(f.annotation, "model_fields")]
KEYS = {".".join(key) for key in config._keys(Recipe, ())}
KEY = rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_keys(path: Path) -> None:
    """`a.b.c=value ...` are overrides that the configuration takes, together; `a.b.c` is a key."""
    for text in {*documents.commands(path), *documents.spans(path)}:
        words = [word.strip("\"',") for word in re.findall(r"'[^']*'|\S+", text)]
        named = re.search(r"--config (\w+\.yaml)", text)
        overrides = [word for word in words if re.fullmatch(rf"{KEY}=.+", word)]
        own = [word for word in overrides if word == "train.joint.weights.half_transparent=0.01"]  # docs/extending.md
        if overrides and not own:
            given = ["model=exports/NAME", "autoencoder.path=demo"] if named and named[1] == "fit.yaml" else []
            config.load(Recipe, named[1] if named else "igae.yaml", [*given, *overrides])
        for word in words:  # but not files, and tensors in files
            if re.fullmatch(KEY, word) and not re.search(r"\.(py|json|csv|yaml|html|md|crc32)$", word):
                assert word in KEYS, f"{word} is no key"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names(path: Path) -> None:
    """`igae.module.name` is there, and so is `folder/file`."""
    for span in documents.spans(path):
        if re.fullmatch(r"igae(\.\w+)+", span) and not re.search(r"\.(yaml|json|safetensors)$", span):
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
    if words[0] != "accelerate":
        assert words[0] == "python"
        return words[1:]
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
    return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]


def execute(command: str, how: Executed, checkout: Path) -> None:
    for name, mine in NAMES.items():
        command = command.replace(name, mine)
    command = command.replace("$DATA_DIR", "data/demo")
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a reader's checkout, in which all commands have been executed that can be."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    folder.mkdir()
    for name in ("train.py", "igae", "configs", "data_tools", "launch"):
        (folder / name).symlink_to(ROOT / name)
    by_entry: dict[str | None, list[str]] = {}
    for command in sorted(commands()):
        by_entry.setdefault(entry_of(command), []).append(command)
    for pattern, how in TABLE.items():
        for command in by_entry[pattern] if isinstance(how, Executed) else []:
            execute(command, how, folder)
            if "make_demo" in command:  # of 16 x 16 pixels, under the names of the sizes that readers have
                for link in ("square64", "square128"):
                    for data in ("objaverse", "imagenet"):
                        (folder / "data/demo/train" / data / link).symlink_to("square16")
    yield folder


def test_commands_leave_what_the_documents_say(checkout: Path) -> None:
    run = checkout / "outputs" / "igae"
    named = "metrics.jsonl metrics.json pictures orbits checkpoints config.yaml autoencoder report.html evaluation.json"
    for name in [*named.split(), "evaluation.csv"]:
        assert (run / name).exists(), name
    assert (checkout / "page.html").stat().st_size > 10_000
    assert (checkout / "results" / "evaluation.json").is_file()
    assert (checkout / "outputs" / "fit-of-an-export" / "metrics.json").is_file()


def test_python_blocks_run(checkout: Path) -> None:
    for path in DOCUMENTS:
        text = "\n".join(block.text for block in documents.blocks(path) if block.language == "python")
        if path.name == "extending.md" or not text:  # tests/test_extending.py
            continue
        for name, mine in NAMES.items():
            text = text.replace(name, mine)
        (checkout / "block.py").write_text(text)
        (code,) = ranks.Ranks(run_in, 1, str(checkout), ["block.py"], {}, log=str(checkout / "log.txt")).exit_codes(120)
        assert code == 0, f"{path.name}: {(checkout / 'log.txt').read_text()}"
