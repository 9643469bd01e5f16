# SPDX-License-Identifier: Apache-2.0
"""Runs, checkpoints and exports of somebody who means harm, through the commands: nobody is asked, nothing outside of
their folders is read, no secret is printed, and each is refused in one sentence, with little time and memory."""

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from test_data_security import peak_memory
from view_models import CPU, Made, make

from igae.cli import evaluate, export, fit, report
from igae.data import Manifest
from igae.errors import command
from igae.viewer import Followed

pytestmark = pytest.mark.usefixtures("one_run_a_process")

CANARY = "canary4711"
ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BOMB = f"a0: &a0 [x, x, x, x, x, x, x, x, x]\n{ALIASES}"


class Listener(ThreadingHTTPServer):
    """Notes who asks."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "CANARY"):
        monkeypatch.setenv(name, CANARY)
    with Listener() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("hostile"))


@dataclass
class Hostile:
    """Copies of a run and an export that may be changed, and what is outside of them."""

    run: Path
    export: Path
    outside: Path
    url: str

    @property
    def checkpoint(self) -> Path:
        return max((self.run / "checkpoints").iterdir())


@pytest.fixture
def hostile(made: Made, tmp_path: Path, listener: Listener) -> Hostile:
    run, export = shutil.copytree(made.run, tmp_path / "run"), shutil.copytree(made.export, tmp_path / "export")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text(f"{CANARY}: [{CANARY}\n")
    return Hostile(Path(run), Path(export), tmp_path / "outside", listener.url)


@command
def view(argv: list[str] | None) -> None:
    assert argv is not None
    Followed(argv[0], argv[1:], CPU)


def call(name: str, model: Path, data: str, out: Path) -> int:
    """A command on a model, with nothing but the model and, where it can't do without, data of one's own."""
    if name == "export":
        return export.main([str(model), str(out / "target")])
    if name == "view":
        return view([str(model)])
    if name == "evaluate":
        own = [f"data.root={data}"] if model.name == "export" else []
        return evaluate.main(["--checkpoint", str(model), "--output", str(out / "results"), *own])
    places = [f"data.root={data}", f"outputs={out}", "experiment=fit", "train.warmup.natural_images=0"]
    few = ["train.warmup.epochs=1", "train.joint.epochs=0", "data.workers=0", "render.fine_samples=2"]
    return fit.main([f"model={model}", *places, *few])


# ---- How files are changed so that their checksums agree


def in_run(hostile: Hostile, text: str) -> None:
    (hostile.run / "config.yaml").write_text(text)


def in_checkpoint(hostile: Hostile, text: str) -> None:
    folder = hostile.checkpoint
    state = json.loads((folder / "state.json").read_text())
    del state["crc32"]
    state["files"]["config.yaml"] |= {"bytes": len(text), "crc32": zlib.crc32(text.encode())}
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    (folder / "state.json").write_text(json.dumps({**state, "crc32": crc}))
    (folder / "config.yaml").write_text(text)


def in_export(hostile: Hostile, name: str, data: bytes) -> None:
    (hostile.export / name).write_bytes(data)
    stamp = {"bytes": len(data), "crc32": zlib.crc32(data)}
    index = json.loads((hostile.export / "igae.json").read_text())
    index["files"][name] = stamp
    (hostile.export / "igae.json").write_text(json.dumps(index))


def merged(tree: Any, change: Mapping[str, Any]) -> Any:
    new = dict(tree)
    for key, value in change.items():
        new[key] = merged(new[key], value) if isinstance(value, dict) and isinstance(new.get(key), dict) else value
    return new


def settings(**change: Any) -> Callable[[Hostile], None]:
    """Other settings in the run's and the checkpoint's configuration; URL in a text is the listener's."""

    def apply(hostile: Hostile) -> None:
        tree = yaml.safe_load((hostile.checkpoint / "config.yaml").read_text())
        text = yaml.safe_dump(merged(tree, change)).replace("URL", hostile.url)
        in_checkpoint(hostile, text)
        in_run(hostile, text)

    return apply


def index(**change: Any) -> Callable[[Hostile], None]:
    def apply(hostile: Hostile) -> None:
        path = hostile.export / "igae.json"
        path.write_text(json.dumps(merged(json.loads(path.read_text()), change)))

    return apply


def of_autoencoder(**change: Any) -> Callable[[Hostile], None]:
    def apply(hostile: Hostile) -> None:
        tree = json.loads((hostile.export / "config.json").read_text())
        in_export(hostile, "config.json", json.dumps({**tree, **change}).encode())

    return apply


def texts(where: Callable[[Hostile, str], None], text: str) -> Callable[[Hostile], None]:
    return lambda hostile: where(hostile, text)


def link(name: Callable[[Hostile], Path]) -> Callable[[Hostile], None]:
    """A link to an equal file outside: all checksums agree."""

    def apply(hostile: Hostile) -> None:
        path = name(hostile)
        shutil.move(path, hostile.outside / path.name)
        path.symlink_to(hostile.outside / path.name)

    return apply


def secret(name: Callable[[Hostile], Path]) -> Callable[[Hostile], None]:
    def apply(hostile: Hostile) -> None:
        name(hostile).unlink()
        name(hostile).symlink_to(hostile.outside / "secret")

    return apply


def pipe(name: Callable[[Hostile], Path]) -> Callable[[Hostile], None]:
    def apply(hostile: Hostile) -> None:
        name(hostile).unlink()
        os.mkfifo(name(hostile))

    return apply


def large(name: Callable[[Hostile], Path], size: int = 300 << 20) -> Callable[[Hostile], None]:
    def apply(hostile: Hostile) -> None:
        with name(hostile).open("wb") as file:
            file.truncate(size)  # a hole: it takes no room

    return apply


def listed_elsewhere(hostile: Hostile) -> None:
    shards = {"metadata": {}, "weight_map": {"x": str(hostile.outside / "secret")}}
    in_export(hostile, "diffusion_pytorch_model.safetensors.index.json", json.dumps(shards).encode())


def data_of_export(hostile: Hostile) -> None:
    text = (hostile.export / "config.yaml").read_text()
    tree = merged(yaml.safe_load(text), {"data": {"root": f"{hostile.url}/${{CANARY}}"}})
    in_export(hostile, "config.yaml", yaml.safe_dump(tree).encode())


IN_RUN = ("export", "view", "evaluate", "fit")
IN_EXPORT = ("view", "evaluate", "fit")
READS_DATA = ("export", "view", "evaluate")
Trick = tuple[Callable[[Hostile], None], tuple[str, ...], str]
RUNS: dict[str, Trick] = {
    "data at a URL": (settings(data={"root": "URL/${AWS_SECRET_ACCESS_KEY}"}), READS_DATA, "add data.root=URL"),
    "data in a chain": (settings(data={"root": "simplecache::URL/x"}), READS_DATA, "add data.root=URL"),
    "checkpoints at a URL": (settings(checkpoint={"root": "URL/${CANARY}"}), IN_RUN, "give it in the place of"),
    "autoencoder at a URL": (settings(autoencoder={"path": "URL/a", "create": None}), IN_RUN, "autoencoder.path"),
    "another class": (
        settings(autoencoder={"create": {"_class_name": "DiffusionPipeline"}}),
        IN_RUN,
        "is none of the image autoencoders",
    ),
    "another field": (settings(render={"field": "os:system"}), IN_RUN, "no installed package has an entry point os:"),
    "a million layers": (
        settings(autoencoder={"create": {"layers_per_block": 10**6}}),
        IN_RUN,
        "of more than 2000 tensors",
    ),
    "wide layers": (
        settings(autoencoder={"create": {"block_out_channels": [32768] * 2}}),
        IN_RUN,
        "weights, more than",
    ),
    "a million samples": (settings(render={"coarse_samples": 10**6}), IN_RUN, "coarse_samples is 1000000"),
    "large base planes": (
        settings(planes={"base_planes": 10**9, "micro_features": 4, "macro_features": 4}),
        IN_RUN,
        "less than or equal to 16384",
    ),
    "base planes that are not there": (
        settings(planes={"base_planes": 10**4, "micro_features": 4, "macro_features": 4}),
        ("export", "view", "evaluate"),
        "its base.planes is not that",
    ),
    "alias bomb": (texts(in_run, BOMB), IN_RUN, "more than 10000 values"),
    "alias bomb inside": (texts(in_checkpoint, BOMB), IN_RUN, "more than 10000 values"),
    "a list in itself": (texts(in_run, "a: &a [*a]"), IN_RUN, "more than 10000 values"),
    "deep nesting": (texts(in_checkpoint, "a: " + "[" * 100_000), IN_RUN, "32 levels"),
    "many merges": (texts(in_run, BOMB.replace("[", "{<<: [").replace("]", "]}")), IN_RUN, "config.yaml"),
    "a number of 100 kB": (texts(in_run, "seed: " + "9" * 100_000), IN_RUN, "too many digits"),
    "a hexadecimal one": (texts(in_run, "seed: 0x" + "f" * 100_000), IN_RUN, "too many digits"),
    "a tag": (texts(in_run, "a: !!python/object/apply:os.system [true]"), IN_RUN, "the tag"),
    "a date that is none": (texts(in_run, "a: !!timestamp x"), IN_RUN, "the tag"),
    "a secret as configuration": (secret(lambda h: h.run / "config.yaml"), IN_RUN, "leads out of its folder"),
    "a pipe as configuration": (pipe(lambda h: h.run / "config.yaml"), IN_RUN, "is no file"),
    "a pipe as state": (pipe(lambda h: h.checkpoint / "state.json"), IN_RUN, "is no file"),
    "large configuration": (large(lambda h: h.run / "config.yaml"), IN_RUN, "more than the"),
    "large state": (large(lambda h: h.checkpoint / "state.json"), IN_RUN, "more than the"),
    "weights elsewhere": (link(lambda h: h.checkpoint / "shared.safetensors"), IN_RUN, "leads out of its folder"),
}
EXPORTS: dict[str, Trick] = {
    "data at a URL": (data_of_export, (), ""),
    "a large index": (large(lambda h: h.export / "igae.json"), IN_EXPORT, "more than the"),
    "a million samples": (index(render={"coarse_samples": 10**6}), IN_EXPORT, "coarse_samples is 1000000"),
    "large images": (index(image_size=[16384, 16384]), IN_EXPORT, "sizes are out of range"),
    "a million layers": (of_autoencoder(layers_per_block=10**6), IN_EXPORT, "of more than"),
    "wide layers": (of_autoencoder(block_out_channels=[32768] * 2), IN_EXPORT, " weights"),
    "another class": (of_autoencoder(_class_name="DiffusionPipeline"), IN_EXPORT, "is none of the image autoencoders"),
    "another field": (index(render={"field": "os:system"}), ("view", "fit"), "no installed package has an entry point"),
    "weights by name": (listed_elsewhere, IN_EXPORT, "none that diffusers writes"),
    "scenes elsewhere": (link(lambda h: h.export / "scenes-00000.safetensors"), ("evaluate",), "leads out"),
    "index elsewhere": (link(lambda h: h.export / "igae.json"), IN_EXPORT, "leads out of its folder"),
    "a pipe as list": (pipe(lambda h: h.export / "scenes.json"), ("view", "evaluate"), "is no file"),
}


def refused(name: str, model: Path, data: str, says: str, tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, began = peak_memory(reset=True), time.process_time()
    assert call(name, model, data, tmp) == 2, name
    assert time.process_time() - began < 5, name  # measured: at most 1.2, for the largest YAML
    assert peak_memory() - before < 150 << 20, name  # measured: at most 70 MB
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]) and says in errors[0] and len(errors[0]) < 1000, err
    assert CANARY not in out + err


@pytest.mark.parametrize("trick", RUNS)
def test_a_run(
    trick: str, hostile: Hostile, made: Made, listener: Listener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, commands, says = RUNS[trick]
    change(hostile)
    for name in commands:
        refused(name, hostile.run, made.overrides[0].partition("=")[2], says, tmp_path, capsys)
    assert listener.asked == [] and not (tmp_path / "target").exists()


@pytest.mark.parametrize("trick", EXPORTS)
def test_an_export(
    trick: str, hostile: Hostile, made: Made, listener: Listener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, commands, says = EXPORTS[trick]
    change(hostile)
    data = made.overrides[0].partition("=")[2]
    for name in commands:
        refused(name, hostile.export, data, says, tmp_path, capsys)
    if trick == "data at a URL":
        assert evaluate.main(["--checkpoint", str(hostile.export), "--output", str(tmp_path)]) == 2
        assert "add data.root=URL" in (error := capsys.readouterr().err) and CANARY not in error
        assert view([str(hostile.export)]) == 0
    assert listener.asked == []


# ---- Reports


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """The folder of a run that has some records, and its secret neighbor."""
    (tmp_path / "secret").write_text(CANARY)
    (tmp_path / "run/pictures").mkdir(parents=True)
    (tmp_path / "run/orbits/joint").mkdir(parents=True)
    records = [{"step": step, "stage": "joint", "time": step, "joint/total": 1 / step} for step in range(1, 9)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run/config.yaml").write_text("experiment: run\n")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "metrics.json", "evaluation.json", "environment.json"]
)
def test_a_report_has_files_of_the_run_alone(logged: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for make_it in (lambda path: path.symlink_to("../secret"), os.mkfifo):
        (logged / name).unlink(missing_ok=True)
        make_it(logged / name)
        assert report.main([str(logged)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {logged / name} is ") and err.count("\n") == 1 and CANARY not in out + err


def test_media_of_a_report_are_files_of_the_run(logged: Path, listener: Listener) -> None:
    picture = logged.parent / "picture.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture)
    shutil.copy(picture, logged / "pictures/good-1.png")
    (logged / "pictures/linked-2.png").symlink_to(picture)
    os.mkfifo(logged / "pictures/pipe-3.png")
    os.mkfifo(logged / "orbits/joint/pipe.mp4")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{listener.url}/{CANARY}.ts\n#EXT-X-ENDLIST\n"
    (logged / "orbits/joint/playlist.mp4").write_text(playlist)
    (logged / "orbits/joint/linked.mp4").symlink_to(picture)
    began = time.monotonic()
    assert report.main([str(logged)]) == 0
    assert time.monotonic() - began < 20  # a pipe would be waited for
    page = (logged / "report.html").read_text()
    assert "good-1" in page and not any(name in page for name in ("linked-2", "pipe", "linked.mp4", "playlist"))
    assert listener.asked == []


def test_a_report_of_large_records_is_bounded(logged: Path) -> None:
    with (logged / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "stage": "joint", "time": 9} | {f"x{i}": i for i in range(100_000)}) + "\n")
        for i in range(3000):
            values = {f"lr/{i}-{k}": 1.0 for k in range(30)}
            file.write(json.dumps({"step": 10 + i, "stage": f"stage {i}", "time": i, **values}) + "\n")
            file.write(json.dumps({"step": 10 + i, "stage": "joint", "time": i, **values}) + "\n")
    with (logged / "metrics.json").open("w") as file:
        json.dump({"joint": {f"name {i}": i for i in range(30_000)}}, file)
    before, began = peak_memory(reset=True), time.process_time()
    assert report.main([str(logged)]) == 0
    assert time.process_time() - began < 10 and peak_memory() - before < 150 << 20
    assert (logged / "report.html").stat().st_size < 1 << 20
    large(lambda _: logged / "metrics.jsonl")(None)  # type: ignore[arg-type]
    assert report.main([str(logged)]) == 0 and peak_memory() - before < 200 << 20


@pytest.mark.parametrize("filling", ["[],", "{},", "0,", "[0],"])
def test_json_is_bounded_by_what_it_becomes(tmp_path: Path, filling: str) -> None:
    """A parser takes up to 800 bytes for three. Measured without the limit: 0.2 to 3 GB, a minute."""
    (tmp_path / "manifest.json").write_text('{"format": 1, "x": [' + filling * 4_000_000 + "0]}")
    before, began = peak_memory(reset=True), time.process_time()
    with pytest.raises(ValueError, match="manifest.json is damaged: it has .* lists and maps and .* values, more than"):
        Manifest.load(str(tmp_path))
    assert time.process_time() - began < 2 and peak_memory() - before < 100 << 20  # measured: 0.1 s, 36 MB
