# SPDX-License-Identifier: Apache-2.0
"""Paths that users have: links, brackets, `~`, and names that are not UTF-8."""

import os
from pathlib import Path

import pytest
from scene_files import picture, write_data, write_scene
from test_pack import members, sources, tool

from igae.config import Section
from igae.data import DataConfig, PackOptions, Refused, pack, verify_packed
from igae.errors import Parser, local_path


def photographs(root: Path, number: int, seed: int = 0) -> None:
    root.mkdir(parents=True)
    for index in range(number):
        (root / f"{index}.png").write_bytes(picture(seed + index))


def test_links_are_followed_and_loops_end(tmp_path):
    photographs(tmp_path / "photos/n1", 2)
    photographs(tmp_path / "disk/n2/deep", 3, seed=10)
    (tmp_path / "photos/n2").symlink_to(tmp_path / "disk/n2")
    (tmp_path / "photos/n3").symlink_to("n2")
    (tmp_path / "disk/n2/up").symlink_to("..")
    (tmp_path / "photos/n1/home").symlink_to(tmp_path / "photos")
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(images=str(tmp_path / "photos")))
    assert left_out == [] and manifest.images == 2 + 3 + 3  # both links that a user made lead to pictures


def test_views_behind_links(tmp_path):
    write_scene(tmp_path / "disk/scene")
    (tmp_path / "scenes/a").mkdir(parents=True)
    (tmp_path / "scenes/b").symlink_to(tmp_path / "disk/scene")
    for name in ("transforms_opencv.json", "images"):
        (tmp_path / "scenes/a" / name).symlink_to(tmp_path / "disk/scene" / name)
    manifest, _ = pack(str(tmp_path / "out"), PackOptions(scenes=str(tmp_path / "scenes")))
    assert [scene.name for scene in manifest.scenes] == ["a", "b"] and manifest.scenes[0].views == 11


def test_a_link_to_nowhere_is_named(tmp_path):
    photographs(tmp_path / "photos/n1", 2)
    (tmp_path / "photos/n2").symlink_to(tmp_path / "gone")
    options = {"images": str(tmp_path / "photos")}
    with pytest.raises(Refused) as refused:
        pack(str(tmp_path / "out"), PackOptions(**options))
    (problem,) = refused.value.problems
    assert problem == f"{tmp_path}/photos/n2 is a link to {tmp_path}/gone, which can't be followed: mend or remove it"
    manifest, left_out = pack(str(tmp_path / "out"), PackOptions(**options, skip_bad=True))
    assert manifest.images == 2 and left_out == [problem]


@pytest.mark.parametrize("name", [b"objects [v2]", b"a b#c?d%20*", b"caf\xe9"])
def test_odd_names(name, tmp_path):
    """Of the input, the output and files in them: packed and read back; a bad file of such a name is told."""
    root = tmp_path / os.fsdecode(name)
    data = write_data(root / "in", images=2)
    (data / "natural_images" / os.fsdecode(name + b".png")).write_bytes(picture(1))
    (data / "natural_images" / os.fsdecode(b"bad" + name + b".png")).write_bytes(b"")
    options = [text for key, value in sources(data).items() for text in (f"--{key}", value)]
    for more in ([], ["--overwrite"]):
        done = tool(*options, "--output", root / "out", "--workers", 1, "--skip-bad", *more)
        assert done.returncode == 0 and "left out 1:" in done.stderr, done.stderr
    assert "4 scenes" in done.stdout and "3 natural images" in done.stdout
    assert tool("--verify", root / "out").returncode == 0
    assert len(members(root / "out", "images-*")) == 3


def test_home_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~").mkdir()
    monkeypatch.chdir(tmp_path)

    class Settings(Section):
        outputs: str

    for given, meant in {
        "~/x": tmp_path / "home/x",
        "./~/x": tmp_path / "~/x",
        "x/~/y": Path("x/~/y"),
        "s3://bucket/~/x": Path("s3://bucket/~/x"),
    }.items():
        assert Path(Settings(outputs=given).outputs) == meant
        parser = Parser()
        parser.add_argument("--output", type=local_path if "://" not in given else Path)
        parser.add_argument("overrides", nargs="*")
        found = parser.parse_intermixed_args([f"--output={given}", f"data.root={given}", given])
        assert [found.output, *map(Path, found.overrides)] == [meant, Path(f"data.root={meant}"), meant]
    assert DataConfig(root="~/x", cache="~/y").cache == str(tmp_path / "home/y")
    write_scene(tmp_path / "home/scenes/a")
    done = tool("--scenes=~/scenes", "--output=~/out", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert verify_packed(str(tmp_path / "home/out")) == [] and os.listdir(tmp_path / "~") == []
