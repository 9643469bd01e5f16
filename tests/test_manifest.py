# SPDX-License-Identifier: Apache-2.0
"""Manifests in both layouts: round trips, selection, hostile columns, a million scenes."""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scene_files import open_views, write_data

from benchmarks import million
from igae.data import (
    CameraSummary,
    Manifest,
    PackOptions,
    Scene,
    Scenes,
    Shard,
    Shards,
    name_problem,
    pack,
    verify_packed,
)
from igae.storage import TensorFile, write_tensors

IN_TMP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Arrays = dict[str, torch.Tensor]


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that could be: scenes in some shards or one, with and without held-out views and normalization."""
    names = draw(st.lists(st.text(min_size=1, max_size=12).filter(lambda name: not name_problem(name)), unique=True))
    source = random.Random(draw(st.integers(0, 2**32)))
    scenes, shards, sums = [], list[Shard](), [dict[str, int](), dict[str, int]()]

    def shard(kind: Any, held: dict[str, int], samples: int) -> None:
        name = f"{kind}-{len(shards):0{source.choice([5, 5, 7, 18])}d}.tar"
        size, sha256 = source.choice([1, 512, 10**15]), source.randbytes(32).hex()
        shards.append(Shard(name, kind, size, sha256, samples, held))

    for _ in range(source.randrange(6)) if names else ():
        for kind, found in zip(("scenes", "heldout"), sums, strict=True):
            held = {name: source.choice([1, 3, 10**5]) for name in source.sample(names, source.randint(1, len(names)))}
            shard(kind, held, sum(held.values()))
            for name, count in held.items():
                found[name] = found.get(name, 0) + count
    for name in names:
        if name not in sums[0]:
            shard("scenes", {name: 2}, 2)
            sums[0][name] = 2
        move = None if source.random() < 0.5 else (source.gauss(), 1e300, -0.0, source.random() + 1e-9)
        category = source.choice(["cars", "", "toys", "ü\n"])
        scenes.append(Scene(len(scenes), name, category, sums[0][name], sums[1].get(name, 0), move))
    for _ in range(source.randrange(3)):
        shard("images", {}, source.randint(1, 100))
    images = sum(shard.samples for shard in shards if shard.kind == "images")
    cameras = CameraSummary(0.1, 1 / 3, 2.0, 1.1) if scenes else None
    every = Scenes.of(scenes)
    return Manifest((3, 16384), -5, "toys", Shards.of(shards, every), every, images, cameras)


def write(manifest: Manifest, folder: Path, columns: bool) -> None:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    (folder / "manifest.json").write_bytes(manifest.save_columns(str(folder)) if columns else manifest.to_json())


@IN_TMP
@given(manifests())
def test_round_trips(tmp_path: Path, manifest: Manifest) -> None:
    for columns in (False, True):
        write(manifest, tmp_path / "data", columns)
        found = Manifest.load(str(tmp_path / "data"))
        assert found == manifest and list(found.scenes) == list(manifest.scenes)
        assert found.to_json() == manifest.to_json()
        assert found.digest == manifest.digest and found.fingerprint == manifest.fingerprint
        assert (tmp_path / "data" / "manifest.safetensors").exists() == columns
        assert json.loads((tmp_path / "data" / "manifest.json").read_text())["format"] == 1 + columns


@given(manifests())
def test_sequences(manifest: Manifest) -> None:
    scenes, shards = list(manifest.scenes), list(manifest.shards)
    assert [scene.id for scene in scenes] == list(range(len(scenes))) == manifest.scenes.ids.tolist()
    for table, rows in ((manifest.scenes, scenes), (manifest.shards, shards)):
        assert [table[i] for i in range(len(rows))] == rows and list(table[1:-1]) == rows[1:-1]
        assert list(table[::-2]) == rows[::-2] and table == rows and rows == table and (table != rows[1:]) == bool(rows)
        if rows:
            assert table[-1] == rows[-1] and rows[0] in table
        with pytest.raises(IndexError):
            table[len(rows)]
    assert manifest.scenes.names == [scene.name for scene in scenes]
    assert manifest.scenes.views.tolist() == [scene.views for scene in scenes]
    assert manifest.scenes.heldout.tolist() == [scene.heldout for scene in scenes]


def slow_select(scenes: list[Scene], dataset: str, categories: Mapping[str, tuple[int, int]]) -> list[Scene]:
    known = {dataset: scenes}
    for scene in scenes:
        if scene.category != dataset:
            known.setdefault(scene.category, []).append(scene)
    chosen = {scene.id for category, (start, stop) in categories.items() for scene in known[category][start:stop]}
    return [scene for scene in scenes if scene.id in chosen]


@given(manifests(), st.data())
def test_select(manifest: Manifest, data: st.DataObject) -> None:
    known = sorted({"toys", *(scene.category for scene in manifest.scenes)})
    span = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: (min(pair), max(pair)))
    categories = data.draw(st.dictionaries(st.sampled_from(known), span))
    assert list(manifest.select(categories)) == slow_select(list(manifest.scenes), "toys", categories)
    assert manifest.select(None) == manifest.scenes
    with pytest.raises(ValueError, match="unknown category 'planes'"):
        manifest.select({"planes": (0, 1)})


@given(manifests())
def test_another_fingerprint_wherever_something_differs(manifest: Manifest) -> None:
    others = [
        dataclasses.replace(manifest, **change)
        for change in ({"seed": 6}, {"image_size": (3, 4)}, {"dataset": "x"}, {"images": 1000}, {"cameras": None})
        if change != {"cameras": manifest.cameras}
    ]
    scenes, shards = list(manifest.scenes), list(manifest.shards)
    for changed in (
        ({"name": "another"}, {"category": "another"}, {"normalization": (0.0, 0.0, 0.0, 7.0)}) if scenes else ()
    ):
        renamed = Scenes.of([dataclasses.replace(scenes[0], **changed), *scenes[1:]])  # type: ignore[arg-type]
        listed = [dataclasses.replace(shard, scenes={}) for shard in shards]
        others.append(dataclasses.replace(manifest, scenes=renamed, shards=Shards.of(listed, renamed)))
    for change in ({"sha256": "0" * 64}, {"bytes": 77}, {"samples": 7777}) if shards else ():
        listed = [dataclasses.replace(shards[0], **change), *shards[1:]]  # type: ignore[arg-type]
        others.append(dataclasses.replace(manifest, shards=Shards.of(listed, manifest.scenes)))
    assert len({other.fingerprint for other in [manifest, *others]}) == 1 + len(others)


# --- Columns of others


SCENES = Scenes.of([Scene(0, "a", "x", 3, 1, (0.0, 0.0, 0.0, 1.0)), Scene(1, "b", "y", 2, 0), Scene(2, "ü", "x", 4, 2)])
GOOD = Manifest(
    (16, 16),
    0,
    "all",
    Shards.of(
        [
            Shard("scenes-00000.tar", "scenes", 512, "1" * 64, 4, {"b": 2, "a": 2}),
            Shard("scenes-00001.tar", "scenes", 512, "2" * 64, 5, {"a": 1, "ü": 4}),
            Shard("heldout-00000.tar", "heldout", 512, "3" * 64, 3, {"a": 1, "ü": 2}),
            Shard("images-00000.tar", "images", 512, "4" * 64, 7, {}),
        ],
        SCENES,
    ),
    SCENES,
    7,
    CameraSummary(1, 1, 1, 1),
)


def rewrite(
    folder: Path, change: Callable[[Arrays], None], change_head: Callable[[Any], None] = lambda _: None
) -> None:
    """GOOD with other columns, whose checksum is right."""
    write(GOOD, folder, True)
    arrays = TensorFile(str(folder / "manifest.safetensors")).tensors()
    change(arrays)
    head = json.loads((folder / "manifest.json").read_text())
    head["columns"] = dataclasses.asdict(write_tensors(str(folder / "manifest.safetensors"), arrays))
    change_head(head)
    (folder / "manifest.json").write_text(json.dumps(head))


def put(name: str, place: int, value: float) -> Callable[[Arrays], None]:
    return lambda arrays: arrays[name].view(-1).__setitem__(place, value)


def replaced(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__(name, how(arrays[name]))


def named(names: bytes) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__setitem__("scene_names", torch.tensor(list(names), dtype=torch.uint8))


def also(*changes: Callable[[Arrays], None]) -> Callable[[Arrays], None]:
    def change_all(arrays: Arrays) -> None:
        for change in changes:
            change(arrays)

    return change_all


COLUMNS = [*GOOD.scenes.columns.arrays(), *GOOD.shards.columns.arrays()]
BAD_NAMES = [b"../x", b"a/b", b"a\\b", b"", b".", b"a\x1b[2J", b"a\rb", b"__x__", b"x" * 129, b"\xff", b"a\xc2\x85b"]
NUMBERS = ["scene_views", "shard_samples", "entry_samples"]


@pytest.mark.parametrize(
    "change",
    [
        *(replaced(name, lambda column: column[:-1]) for name in COLUMNS),
        *(replaced(name, lambda column: torch.cat([column, column[:1]])) for name in COLUMNS),
        *(replaced(name, lambda column: column[None]) for name in COLUMNS),
        *(replaced(name, lambda column: column[:0]) for name in COLUMNS if name != "scene_normalization"),
        *(replaced(name, lambda column: column.to(torch.float32)) for name in COLUMNS),
        *(replaced(name, lambda column: column.to(torch.int16)) for name in COLUMNS),
        *(lambda arrays, name=name: arrays.pop(name) for name in COLUMNS),
        lambda arrays: arrays.update(more=torch.zeros(3)),
        lambda arrays: arrays.update({name: column[:0] for name, column in arrays.items() if name[:6] == "scene_"}),
        lambda arrays: arrays.update({name: column[:0] for name, column in arrays.items() if name[:6] != "scene_"}),
        *(put(name, place, value) for name in NUMBERS for place in (0, -1) for value in (0, -1, 2**31 - 1, -(2**31))),
        *(put("shard_bytes", place, value) for place in (0, -1) for value in (0, -1, -(2**63))),
        *(put(name, place, 2**63 - 1) for name in ("shard_bytes", "shard_number", "shard_end") for place in (0, -1)),
        *(put("scene_heldout", place, value) for place in (0, -1) for value in (-1, 7)),
        put("scene_heldout", 1, -1),
        *(put(name, 0, value) for name in ("entry_scene", "scene_category") for value in (-1, 3, 2**31 - 1)),
        put("entry_scene", 0, 0),  # two entries of a shard are of one scene
        also(put("shard_samples", 0, 5), put("entry_samples", 0, 3)),  # not the scene's views
        also(put("entry_samples", 0, 3), put("entry_samples", 1, 1)),
        put("shard_samples", 3, 8),  # not the natural images
        *(put("shard_kind", place, value) for place in (0, 3) for value in (1, 3, 255)),
        *(put("shard_digits", 0, value) for value in (0, 4, 19, 255)),
        *(put("shard_number", 0, value) for value in (-1, 1, 100_000)),  # the second is the name of another
        *(put("shard_end", place, value) for place, value in ((0, -1), (0, 5), (1, 1), (3, 5), (3, 7))),
        *(put("scene_normalization", place, value) for place in range(4) for value in (math.nan, math.inf, -math.inf)),
        *(put("scene_normalization", 3, value) for value in (0.0, -1.0)),
        put("scene_normalization", 4, 0.0),
        *(named(name + b"\nb\n\xc3\xbc\n") for name in BAD_NAMES),
        *(named(b"b\n\xc3\xbc\n" + name + b"\n") for name in BAD_NAMES),
        *(
            named(names)
            for names in (b"a\nb\na\n", b"a\nb\n\xc3\xbc", b"abc", b"a\nb\n\xc3\n", b"\na\nb\n", b"a\nb\nc\nd\n")
        ),
    ],
)
def test_hostile_columns(tmp_path: Path, change: Callable[[Arrays], None]) -> None:
    rewrite(tmp_path / "data", lambda _: None)
    assert Manifest.load(str(tmp_path / "data")) == GOOD
    rewrite(tmp_path / "data", change)
    with pytest.raises(ValueError, match=f"{tmp_path}/data/manifest.json is damaged") as error:
        Manifest.load(str(tmp_path / "data"))
    assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.update(categories=["x"]),
        lambda head: head.update(categories=["x", "x"]),
        lambda head: head.update(categories=[1, 2]),
        lambda head: head.update(images=8),
        lambda head: head.update(image_size=[0, 1]),
        lambda head: head.update(columns=None),
        lambda head: head.pop("columns"),
        lambda head: head.update(format=1),
        *(lambda head, crc32=crc32: head["columns"].update(crc32=crc32) for crc32 in (0, -1, 10**400, "x", None)),
        *(lambda head, size=size: head["columns"].update(bytes=size) for size in (0, 7, 10**9, 10**400, -1, "x")),
    ],
)
def test_hostile_heads(tmp_path: Path, change: Callable[[Any], None]) -> None:
    rewrite(tmp_path / "data", lambda _: None, change)
    with pytest.raises(ValueError, match=f"{tmp_path}/data/manifest.(json|safetensors) is damaged") as error:
        Manifest.load(str(tmp_path / "data"))
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_damaged_columns(tmp_path: Path) -> None:
    write(GOOD, tmp_path / "data", True)
    file = tmp_path / "data" / "manifest.safetensors"
    whole = file.read_bytes()

    def problem() -> str:
        with pytest.raises(ValueError) as error:
            Manifest.load(str(tmp_path / "data"))
        return str(error.value)

    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert problem().startswith(f"{file} is damaged")
    for other in (whole[:-1], whole + b"\0", b"", whole[:9]):
        file.write_bytes(other)
        assert problem().startswith(f"{file} is damaged: it has {len(other)} bytes and had {len(whole)}")
    file.unlink()
    assert problem() == f"{file} is missing"
    file.write_bytes(whole)
    assert Manifest.load(str(tmp_path / "data")) == GOOD


@pytest.mark.parametrize("column", ["scene_views", "shard_samples", "entry_samples", "shard_bytes"])
def test_numbers_of_any_size_in_json(tmp_path: Path, column: str) -> None:
    """No integer of a file wraps around to a good one in 64 or 32 bits."""
    table, key = column.split("_")
    for wrap in (2**32, 2**64, 10**400)[column == "shard_bytes" :]:
        content = json.loads(GOOD.to_json())
        if table == "entry":
            content["shards"][0]["scenes"]["b"] += wrap
        else:
            content[f"{table}s"][0][key] += wrap
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="manifest.json is damaged") as error:
            Manifest.load(str(tmp_path))
        assert len(str(error.value)) < 600


# --- Packing, reading, sizes


def test_large_data_are_packed_with_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "in", images=3)
    options = PackOptions(scenes=str(data / "scenes"), subset="square16", images=str(data / "natural_images"))
    out, file = str(tmp_path / "out"), tmp_path / "out" / "manifest.safetensors"
    small, _ = pack(out, options)
    assert not file.exists()
    views = [list(open_views(out, small, small.scenes[1:3], batch_size=2, seed=1, repeat=False, workers=0))]
    monkeypatch.setattr("igae.data.manifest.READABLE", len(small.scenes) + len(small.shards) - 1)
    large, _ = pack(out, dataclasses.replace(options, overwrite=True))
    assert file.exists() and large == small == Manifest.load(out) and verify_packed(out) == []
    views.append(list(open_views(out, large, large.scenes[1:3], batch_size=2, seed=1, repeat=False, workers=0)))
    for one, other in zip(*views, strict=True):
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))
    monkeypatch.setattr("igae.data.manifest.READABLE", len(small.scenes) + len(small.shards))
    pack(out, dataclasses.replace(options, overwrite=True))
    assert not file.exists() and Manifest.load(out) == small


def test_columns_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igae.data.manifest.READABLE", 6)
    store = fsspec.filesystem("memory")
    GOOD.save("memory://columns")
    assert sorted(path.rpartition("/")[2] for path in store.ls("/columns", detail=False)) == [
        "manifest.json",
        "manifest.safetensors",
    ]
    assert Manifest.load("memory://columns") == GOOD
    store.rm("/columns/manifest.safetensors")
    with pytest.raises(ValueError, match="^memory://columns/manifest.safetensors is missing$"):
        Manifest.load("memory://columns")
    store.rm("/columns", recursive=True)


@pytest.mark.parametrize("shard_scenes", [100, 1])
def test_the_start_of_a_rank_with_many_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_scenes: int
) -> None:
    """With a fifth of a million. Before there were columns: 3 to 10 s and 0.4 to 1.2 GB of them."""
    million.manifest_of(200_000, shard_scenes, heldout=True, moved=True).save(str(tmp_path))
    for name, value in {"RANK": "63", "WORLD_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    steps = million.measure(str(tmp_path))
    seconds, memory = steps["manifest"][0] + steps["ownership"][0], steps["ownership"][1]
    assert seconds < 1.5 and memory < 120  # measured: 0.16 and 0.24 s, 31 and 59 MB
    assert sum(seconds for seconds, _ in steps.values()) < 3
