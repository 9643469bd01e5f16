# SPDX-License-Identifier: Apache-2.0
"""Exports that can't be written or read: one sentence each, and nothing half done stays."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import create_autoencoder

from igae.checkpoint import DamagedCheckpoint
from igae.cli.export import main
from igae.export import Content, Export, load_model, read_run, write
from igae.models import IGAE
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.storage import LIMITS, StoreError

PLANES = PlanesConfig(resolution=4, features=4)


def content(scenes: int = 3) -> Content:
    autoencoder = create_autoencoder("AutoencoderKL", scale=0.1)
    model = IGAE(autoencoder, PLANES, RenderOptions(), (16, 16))
    model.refresh_background()
    planes = torch.randn(scenes, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    names = [f"chair-{i}" for i in range(scenes)]
    return Content(model, (1.0, 1.0, 1.0), names, PLANES, lambda start, stop: planes[start:stop], "Made up.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "export"
    write(content(), str(folder))
    return folder


@pytest.fixture
def export(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "export"))


def sentence(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert type(caught.value) in (ValueError, StoreError, DamagedCheckpoint) and "\n" not in str(caught.value)
    return str(caught.value)


def use_all(folder: Path) -> None:
    export = Export(str(folder))
    load_model(str(folder))
    export.rows(export.names)


def test_every_flipped_byte_of_every_file_is_noticed_or_harmless(export: Path) -> None:
    """In the files that are under a checksum; the README and config.yaml are for people."""
    use_all(export)
    for path in sorted(export.iterdir()):
        if path.name in ("README.md", "igae.json"):
            continue
        data = path.read_bytes()
        for place in {0, 9, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            text = sentence(lambda: use_all(export))
            assert path.name in text
        path.write_bytes(data[:-1])
        assert path.name in sentence(lambda: use_all(export))
        path.unlink()
        assert path.name in sentence(lambda: use_all(export))
        path.write_bytes(data)
    use_all(export)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "its format is 2, and this version reads 1"),
        ({"planes": {"features": "many"}}, "is damaged: planes.features"),
        ({"planes": {"resolution": 4, "features": 5}}, "its mlp.w1 is not that of the planes in igae.json"),
        (
            {"planes": {"resolution": 5, "features": 4}},
            "scenes-00000.safetensors is damaged: it does not hold the planes",
        ),
        ({"planes": {"resolution": 1 << 20, "features": 4}}, "planes.resolution: Input should be less than or equal"),
        ({"image_size": [16, 1 << 40]}, "sizes are out of range"),
        ({"render": {"near": 1, "far": 0}}, "is damaged: render"),
        ({"render": {"nearest": 1}}, "is damaged: render"),
        ({"scenes": 4}, "scenes.json is damaged: it does not list 4 scenes"),
        ({"autoencoder": None}, "the autoencoder's files do not fit its class"),
        ({"files": {}}, "the files that it lists are not those of an export"),
    ],
)
def test_a_wrong_index(export: Path, change: dict[str, object], says: str) -> None:
    tree = json.loads((export / "igae.json").read_text())
    (export / "igae.json").write_text(json.dumps({**tree, **change}))
    assert says in sentence(lambda: use_all(export))


def test_no_name_in_the_index_leaves_the_folder(export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    tree = json.loads((export / "igae.json").read_text())
    for name in ("../secret", str(tmp_path / "secret"), ".hidden", "a\nb"):
        files = {**tree["files"], name: {"bytes": 1, "crc32": 0}}
        (export / "igae.json").write_text(json.dumps({**tree, "files": files}))
        assert "not those of an export" in sentence(lambda: Export(str(export)))


def test_weights_that_would_be_unpickled(export: Path) -> None:
    tree = json.loads((export / "igae.json").read_text())
    files = {name: file for name, file in tree["files"].items() if not name.startswith("diffusion")}
    (export / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    files["diffusion_pytorch_model.bin"] = {"bytes": 23, "crc32": 0}
    (export / "igae.json").write_text(json.dumps({**tree, "files": files}))
    assert "none that diffusers writes" in sentence(lambda: load_model(str(export)))


def test_a_scene_that_is_not_there(export: Path) -> None:
    text = sentence(lambda: Export(str(export)).scene("chair_1"))
    assert text.endswith("has no scene chair_1; did you mean chair-1?")


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    says = "has no igae.json: give the folder of a complete export"
    assert sentence(lambda: Export(str(tmp_path))) == f"{tmp_path} {says}"
    assert says in sentence(lambda: load_model("memory://nowhere"))
    assert sentence(lambda: Export("s4://bucket/x")).startswith("s4://bucket/x/igae.json cannot be read")


def test_targets_that_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        assert sentence(lambda at=target: write(content(1), str(at))).endswith(  # type: ignore[misc]
            "is not empty: remove what is there, or choose another folder"
        )
    assert (tmp_path / "file").read_text() == "mine"
    assert main(["no run, which would be read next", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not empty")
    assert "can't be written" in sentence(lambda: write(content(1), str(tmp_path / "file/below")))
    assert "names no model repository" in sentence(lambda: write(content(1), "hf://datasets/a/b"))
    assert "names no model repository" in sentence(lambda: write(content(1), "hf://alone"))


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    target = tmp_path / "new"
    if there:
        target.mkdir()
    replace = os.replace

    def full(source: Path, path: Path) -> None:
        if path.name == "igae.json":
            raise OSError(28, "No space left on device")
        replace(source, path)

    monkeypatch.setattr(os, "replace", full)
    text = sentence(lambda: write(content(), str(target)))
    assert text.startswith(f"{target} can't be written: {target}/igae.json can't be written: No space left on device (")
    assert target.exists() == there and (not there or not list(target.iterdir()))
    monkeypatch.undo()
    write(content(), str(target))
    use_all(target)


def test_runs_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tmp_path}/nothing is neither a checkpoint nor the folder of a run")
        and error.count("\n") == 1
    )
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)  # a killed save
    assert "is neither a checkpoint nor the folder of a run" in sentence(lambda: read_run(str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_credentials_stay_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "attempts", 1)
    text = sentence(lambda: Export("https://me:hunter2@localhost:1/x?X-Amz-Signature=hunter3"))
    assert "hunter" not in text
