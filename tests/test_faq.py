# SPDX-License-Identifier: Apache-2.0
"""docs/faq.md quotes what the code says: each quoted message is in the source, and those that are cheap to provoke are
provoked."""

import ast
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import documents
import pytest
import runs
import torch
from documents import ROOT

from igae import config
from igae.checkpoint import list_complete
from igae.cli import train
from igae.data import Manifest, PackOptions, pack
from igae.models import IGAE, LPIPS, AutoencoderConfig, load_autoencoder
from igae.rendering import Cameras, DecodingMLP, RenderOptions, render
from igae.training import Engine, RankData, Recipe, Tracker, TrackingConfig, Trainer

PAGE = ROOT / "docs" / "faq.md"
# What torch and fsspec say.
OTHERS = {"CUDA out of memory", "... cannot be read: Install s3fs to access S3"}
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)


def pattern(quote: str) -> re.Pattern[str]:
    """`...` is any text."""
    return re.compile(".*".join(map(re.escape, re.split(r"\.\.\.+", quote))), re.DOTALL)


def test_the_page_quotes() -> None:
    assert len(QUOTES) > 35 and len(set(QUOTES)) == len(QUOTES) and set(QUOTES) >= OTHERS
    with_quotes = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(with_quotes) == len(QUOTES)  # none is left out for how it is written


def messages() -> set[str]:
    """All texts of the source; what is put into them is a zero character."""
    found = set()
    for path in [ROOT / "train.py", *(ROOT / "igae").rglob("*.py"), *(ROOT / "data_tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[sd]", "\0", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.add("".join(map(str, parts)))
    return found


def test_other_quoted_messages_are_in_the_source() -> None:
    found = messages()
    for quote in set(QUOTES) - OTHERS - set(PROVOKED):
        constant = [part for part in re.split(r"\.\.\.+", quote) if len(part) > 8]
        assert constant, f"{quote}: too little of it is constant"
        inside = [text for text in found if pattern(quote.strip(". ")).search(text)]
        assert inside, f"no text of the source is like: {quote}"


Call = Callable[[Path, str, pytest.MonkeyPatch], object]


def load(folder: Path, shards: str, *overrides: str) -> Recipe:
    return config.load(Recipe, runs.recipe_file(folder, shards), overrides)


def other_world(monkeypatch: pytest.MonkeyPatch, world: int, **names: str) -> None:
    for name, value in {"WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0", **names}.items():
        monkeypatch.setenv(name, value)


def resumed(folder: Path, shards: str, *changed: str, resume: str = "auto") -> Trainer:
    """A run that has a checkpoint, started again with other settings."""
    short = ["train.warmup.epochs=0.25", "train.joint.epochs=0", "evaluation.views=1"]
    Trainer(load(folder, shards, *short)).run()
    assert list_complete(str(folder / "outputs" / "run" / "checkpoints"))
    return Trainer(load(folder, shards, *short, *changed), resume)


def twice(folder: Path, shards: str) -> None:
    trainer = Trainer(load(folder, shards))
    (folder / "outputs" / "run").mkdir(parents=True)
    if (child := os.fork()) == 0:  # a lock is a process's
        from igae.training import lock_run

        held = lock_run(folder / "outputs" / "run")
        (folder / "locked").touch()
        while (folder / "locked").exists():
            time.sleep(0.01)
        held.close()
        os._exit(0)
    while not (folder / "locked").exists():
        time.sleep(0.01)
    try:
        trainer.run()
    finally:
        (folder / "locked").unlink()
        os.waitpid(child, 0)


def without_images(folder: Path, *_: object) -> None:
    source = folder / "source"
    runs.write_data(source, views=(3,))
    (source / "scenes" / "square16" / "scene_0" / "images" / "001.png").unlink()
    pack(str(folder / "bad"), PackOptions(scenes=str(source / "scenes"), subset="square16"))


def scenes_alone(folder: Path, *_: object) -> None:
    source = runs.write_data(folder / "source", views=(3,))
    pack(str(folder / "alone"), PackOptions(scenes=str(source / "scenes"), subset="square16"))
    Trainer(load(folder, str(folder / "alone"), "train.warmup.epochs=0")).run()


def one_natural_image(folder: Path, _: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = runs.write_data(folder / "source", views=(3, 3), images=1)
    pack(
        str(folder / "few"),
        PackOptions(scenes=str(source / "scenes"), subset="square16", images=str(source / "natural_images")),
    )
    other_world(monkeypatch, 2)
    RankData.split(load(folder, str(folder / "few")))


def no_network(_: Path, __: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    LPIPS()


def on_cpu(*_: object) -> None:
    eye = torch.eye(4)[None]
    mlp, options = DecodingMLP(8, 4), RenderOptions()
    planes = torch.zeros(1, 3, 4, 4, 8)
    cameras = Cameras(eye, eye[:, :3, :3], (2, 2))
    render(planes, mlp, cameras, options, background=torch.ones(4), backend="cuda")


def truncated(folder: Path, *_: object) -> None:
    shards = runs.packed_data(folder)
    shard = next((folder / "shards").glob("scenes-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    Trainer(load(folder, shards)).run()


def odd_size(folder: Path, shards: str, _: object) -> None:
    IGAE.from_recipe(load(folder, shards), (15, 15))


PROVOKED: dict[str, Call] = {
    "unknown key ...; did you mean ...": lambda f, s, m: load(f, s, "train.joint.batchsize=3"),
    "...: no such configuration, neither as a path nor in ...": lambda f, s, m: config.load(Recipe, "igea.yaml"),
    "no model is given: say which run, checkpoint or export the scenes are fitted to, ...": lambda f, s, m: (
        m.delenv("IGAE_MODEL", raising=False),
        train.run(train.parser(default="fit.yaml").parse_intermixed_args([])),
    ),
    "another process is training in ...: end it, or use a new experiment=NAME": lambda f, s, m: twice(f, s),
    "... was ... in ... and is ... now, which can't change within a run": lambda f, s, m: resumed(
        f, s, "planes.init_std=0.2"
    ),
    "... already has checkpoints: choose another name with experiment=NAME, or remove the folder": lambda f, s, m: (
        resumed(f, s, resume="never")
    ),
    "no ... in ...: pack the data first with data_tools/pack_shards.py": lambda f, s, m: Manifest.load(str(f)),
    "nothing was packed because of ... bad input(s), first: ...": without_images,
    "the autoencoder needs sides that are multiples of ... and the images have ...": odd_size,
    "unknown category ...": lambda f, s, m: RankData.split(load(f, s, "data.categories={objaverse: [0, 500]}")),
    "train.....natural_images is ... but ... holds none: pack some": scenes_alone,
    "... natural images can't be shared by ... processes, each of which needs one": one_natural_image,
    "shard ... in ... has ... bytes, the manifest says ...": truncated,
    "autoencoder.path: ... is no folder, and no hub repository that can be reached and read, with a diffusers "
    "autoencoder ...; without network: a folder, or autoencoder.path=demo": lambda f, s, m: load_autoencoder(
        AutoencoderConfig(path="/nowhere/vae")
    ),
    "the LPIPS loss needs VGG16's weights and ... can't be fetched": no_network,
    "train.lpips_weights: ...": lambda f, s, m: LPIPS(f / "vgg16.pth"),
    "tracking.trackers: ... is not installed": lambda f, s, m: (
        m.setitem(sys.modules, "wandb", None),
        Tracker(f, TrackingConfig(trackers=["wandb"])),
    ),
    "this machine has ... GPUs, and more processes than that were launched on it": lambda f, s, m: (
        other_world(m, 2, RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
        m.setattr(torch.cuda, "is_available", lambda: True),
        m.setattr(torch.cuda, "device_count", lambda: 1),
        Engine(),
    ),
    "... scenes with training views can't be shared by ... processes": lambda f, s, m: (
        other_world(m, 9),
        RankData.split(load(f, s)),
    ),
    "... of the launch is not supported: ...": lambda f, s, m: (
        m.setenv("ACCELERATE_MIXED_PRECISION", "bf16"),
        Engine(),
    ),
    "... is in the environment and ... is not: unset ...": lambda f, s, m: (
        m.setenv("RANK", "0"),
        Engine(),
    ),
    "backend is cuda, but ...": on_cpu,
    "optimizer of the planes: ...": lambda f, s, m: Trainer(load(f, s, "train.kernels=cuda", "evaluation.views=1")).run(
        "warmup"
    ),
    "has no state.json: give the folder of a complete checkpoint": lambda f, s, m: Trainer(load(f, s), str(f)),
}


@pytest.mark.usefixtures("one_run_a_process")
@pytest.mark.parametrize("quote", PROVOKED)
def test_provoked(quote: str, tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quote in QUOTES
    with pytest.raises(ValueError, match=pattern(quote)) as caught:
        PROVOKED[quote](tmp_path, shards, monkeypatch)
    assert "\n" not in str(caught.value)


def test_settings_that_the_page_names() -> None:
    """Launch files, programs' options and environment variables are those of the source."""
    text = PAGE.read_text()
    for name in re.findall(r"`(?:launch/accelerate/)?(\w+\.yaml)`", text):
        assert list(ROOT.glob(f"launch/accelerate/{name}")) or (ROOT / "configs" / name).is_file(), name
    for name in ("IGAE_MODEL", "IGAE_SHARDS"):
        assert name in text and name in (ROOT / "configs" / "fit.yaml").read_text()
    published = "'data.categories={objaverse: [0, 500]}'"
    assert published in text and published in (ROOT / "configs" / "igae.yaml").read_text()
    assert documents.commands(PAGE)
