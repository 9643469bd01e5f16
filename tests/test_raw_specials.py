# SPDX-License-Identifier: Apache-2.0
"""Raw data with pipes, devices and links to them, and with cameras whose numbers float32 has not."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from capture_files import shots, write_co3d, write_colmap
from scene_files import write_data, write_scene

from igae.data import PackOptions, pack


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A pipe that is read is waited for without an end, and a device gives bytes without one."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def put(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        pack(str(source.parent / "out"), PackOptions(scenes=str(source), **options))
    assert "\n" not in str(caught.value) and not list((source.parent / "out").glob("*"))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "file", ["s/images/001.png", "s/transforms.json", "s/sparse/0/images.txt", "apple/frame_annotations.jgz", "images"]
)
def test_pipes_and_devices_are_told(file: str, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    if file == "images":
        write_data(source, views=(1,), images=3)
        put(source / "natural_images/class_1/more.png", kind)
        with pytest.raises(ValueError, match=r"more\.png is a pipe, a socket or a device: remove it"):
            pack(str(tmp_path / "out"), PackOptions(images=str(source / "natural_images")))
        return
    if "sparse" in file:
        write_colmap(source / "s", {f"{i}.png": shot for i, shot in enumerate(shots(3, w=16, h=12))})
    elif "apple" in file:
        write_co3d(source, w=16, h=12)
    else:
        write_scene(source / "s", 3, opengl=True)
    put(source / file, kind)
    text = refusal(source)
    assert Path(file).name.rpartition("/")[2] in text and (
        "missing" in text or "is a pipe" in text or "no sparse" in text
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("camera_angle_x", int("9" * 400), "has to be a finite number up to 1e+09"),
        ("camera_angle_x", 5e-324, "has to be positive, at least 1e-09"),
        ("w", 1e300, "has to be a finite number"),
        ("camera_model", ["OPENCV"], "the camera_model is ['OPENCV']"),
        ("position", 1e39, "has NaN or infinite numbers, or some beyond 1e+09"),
        ("file_path", "x" * 100_000 + "\n", "is no path of an image"),
    ],
)
def test_cameras_out_of_range(key: str, value: Any, words: str, tmp_path: Path) -> None:
    content = write_scene(tmp_path / "in" / "s", 3, opengl=True)
    if key == "position":
        content["frames"][1]["transform_matrix"][0][3] = value
    elif key == "file_path":
        content["frames"][1][key], words = value, "x" * 100
    else:
        content[key] = value
    (tmp_path / "in/s/transforms.json").write_text(json.dumps(content))
    text = refusal(tmp_path / "in", normalize="none")
    assert words in text and len(text) < 1200
