# SPDX-License-Identifier: Apache-2.0
"""Models to look at, for tests of the viewer."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import runs
import torch
import viser
from websockets.sync.client import ClientConnection, connect

import train
from igae import checkpoint
from igae.export import Content, read_run, write
from igae.models import IGAE, Autoencoder
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.viewer import Session, Viewer

CPU = torch.device("cpu")
PROTOCOL = [f"viser-v{viser.__version__}"]
NAMES = ["scene_0", "scene_1", "scene_2", "scene_3"]
# Scenes that differ from the start.
SETTINGS = [
    "planes.init_std=2",
    "train.warmup.epochs=1",
    "train.joint.epochs=0",
    "checkpoint.every=4",
    "checkpoint.keep=9",
]


@dataclass
class Made:
    run: Path
    older: Path
    """Its checkpoint in the middle of the stage, after 4 steps."""
    newer: Path
    """Its checkpoint at the end, after 8."""
    export: Path
    """Of the newer one."""
    overrides: list[str]
    source: Path
    """Of its scenes, before they were packed."""


def make(folder: Path) -> Made:
    """A small run of one stage and its export."""
    shards = runs.packed_data(folder)
    assert train.main(["--config", str(runs.recipe_file(folder, shards)), *SETTINGS]) == 0
    run = folder / "outputs/run"
    older, newer = map(Path, checkpoint.list_complete(str(run / "checkpoints")))
    write(read_run(str(newer)), str(folder / "export"))
    return Made(run, older, newer, folder / "export", [f"data.root={shards}"], folder / "source/scenes/square16")


def open_as_run(made: Made, folder: Path) -> Path:
    """A run's folder that has the older checkpoint alone."""
    (folder / "checkpoints").mkdir()
    shutil.copytree(made.older, folder / "checkpoints" / made.older.name)
    return folder


def write_many(url: Path, count: int) -> list[str]:
    """An export of RGB scenes, 16 x 16 pixels; returns their names."""
    planes = PlanesConfig(resolution=4, features=4)
    model = IGAE(Autoencoder(None, 1.0), planes, RenderOptions(), (16, 16))
    model.refresh_background()
    names = [f"object-{i:05d}" for i in range(count)]

    def rows(start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(start)
        return 4 * torch.randn(stop - start, 3, 4, 4, 4, generator=generator)

    write(Content(model, (1.0, 1.0, 1.0), names, planes, rows, "Made up."), str(url))
    return names


def wait(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@contextmanager
def connected(viewer: Viewer) -> Iterator[tuple[ClientConnection, Session]]:
    """A page without a browser, whose camera is where a browser that is late has it."""
    with connect(viewer.url.replace("http", "ws"), subprotocols=PROTOCOL, max_size=None, close_timeout=1) as socket:  # type: ignore[arg-type]
        camera = {"type": "ViewerCameraMessage", "wxyz": [1, 0, 0, 0], "position": [0, 0, -2], "fov": 1.0, "near": 0.1}
        camera |= {"far": 9.0, "image_height": 64, "image_width": 64, "look_at": [0, 0, 0], "up_direction": [0, 0, 1]}
        socket.send(msgspec.msgpack.encode(camera))
        wait(lambda: viewer.sessions)
        yield socket, next(iter(viewer.sessions.values()))
    wait(lambda: not viewer.sessions)
