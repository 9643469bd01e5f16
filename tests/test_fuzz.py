# SPDX-License-Identifier: Apache-2.0
"""Fuzzers of everything that reads files of others; `IGAE_FUZZ=20000 pytest tests/test_fuzz.py` takes more of them."""

import io
import json
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ball_scenes import WRITERS
from capture_files import shots, write_co3d, write_colmap
from checkpoints import example, read_all, save
from mutations import COUNT, Files, changed, damaged, fuzz, mutated, nested
from runs import KL, RECIPE
from scene_files import open_images, open_views, write_data, write_scene

from igae.config import dump, load
from igae.data import Manifest, PackOptions, orbit, pack
from igae.export import Content, Export, write
from igae.models import IGAE, AutoencoderConfig, Views, load_autoencoder
from igae.rendering import RenderOptions
from igae.scenes import PlanesConfig
from igae.training import Recipe


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("packed")
    raw = write_data(root / "raw", views=(3, 2), images=2)
    options = PackOptions(scenes=str(raw / "scenes"), subset="square16", images=str(raw / "natural_images"))
    pack(str(root / "out"), options)
    return files_of(root / "out")


def read_packed(root: Path, verify: str = "size") -> None:
    manifest = Manifest.load(str(root))
    (root / "again").mkdir()
    (root / "again" / "manifest.json").write_bytes(manifest.to_json())
    assert Manifest.load(str(root / "again")) == manifest
    options: dict[str, Any] = {"batch_size": 2, "workers": 0, "repeat": False, "verify": verify}
    splits = [split for split, kind in (("train", "scenes"), ("heldout", "heldout")) if kind_of(manifest, kind)]
    for split in splits:
        for batch in open_views(str(root), manifest, manifest.select(), split=split, **options):
            assert batch.images.shape[1:] == (3, *manifest.image_size)
            numbers = torch.cat([batch.cam2world.flatten(), batch.intrinsics.flatten()])
            assert numbers.square().isfinite().all() and batch.intrinsics[:, 0, 0].reciprocal().isfinite().all()
    if manifest.images:
        for images in open_images(str(root), manifest, **options):
            assert images.shape[1:] == (3, *manifest.image_size)


def kind_of(manifest: Manifest, kind: str) -> bool:
    return any(shard.kind == kind for shard in manifest.shards)


def test_manifests(packed: Files, tmp_path: Path) -> None:
    def read(root: Path) -> None:
        for name in packed.keys() - {"manifest.json"}:
            (root / name).write_bytes(packed[name])
        read_packed(root)

    assert fuzz("manifest", {"manifest.json": packed["manifest.json"]}, tmp_path, read) > 0.5 * COUNT


def test_manifests_in_columns(packed: Files, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "manifest.json").write_bytes(packed["manifest.json"])
    manifest = Manifest.load(str(tmp_path / "whole"))
    (tmp_path / "whole" / "manifest.json").write_bytes(manifest.save_columns(str(tmp_path / "whole")))

    def finish(files: Files, name: str) -> None:
        try:
            head = json.loads(files["manifest.json"])
            stamp(head, files, "manifest.safetensors", "columns")
            files["manifest.json"] = json.dumps(head).encode()
        except (ValueError, RecursionError):
            return

    def read(root: Path) -> None:
        for name in packed.keys() - {"manifest.json"}:
            (root / name).write_bytes(packed[name])
        read_packed(root)

    whole = files_of(tmp_path / "whole")
    assert fuzz("columns", whole, tmp_path, read, finish, change=change_tensors) > 0.5 * COUNT


def change_shard(name: str, data: bytes, rng: random.Random) -> bytes:
    """A shard with other headers whose checksums are right, other cameras, or other bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    way = rng.randrange(3)
    if way == 0:
        return damaged(data, rng)
    if way == 1:
        start = rng.choice(members)[0].offset
        field = rng.choice([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
        value = rng.choice(
            [b"", b"/etc/passwd", b"../x/0.png", b"5", b"2", b"x", b"7" * 11, b"\x80" + b"\xff" * 11, b"-1"]
        )
        header = bytearray(data[start : start + 512])
        header[field[0] : sum(field)] = value[: field[1]].ljust(field[1], b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:start] + bytes(header) + data[start + 512 :]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        changes = rng.randrange(len(members))
        for number, (info, body) in enumerate(members):
            body = mutated(info.name, body, rng) if number == changes else body
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def test_shards(packed: Files, tmp_path: Path) -> None:
    shards = {name: content for name, content in packed.items() if name.endswith(".tar")}

    def read(root: Path) -> None:
        (root / "manifest.json").write_bytes(packed["manifest.json"])
        read_packed(root, "off")

    assert fuzz("shard", shards, tmp_path, read, change=change_shard) > 0.2 * COUNT


def change_tensors(name: str, data: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file also the header, as JSON."""
    if not name.endswith(".safetensors") or rng.random() < 0.4:
        return mutated(name, data, rng)
    end = 8 + int.from_bytes(data[:8], "little")
    header = nested(json.dumps(changed(json.loads(data[8:end]), rng))).encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[end:]


def stamp(listed: Any, files: Files, name: str, key: str = "") -> None:
    """What a list of files says of one (below its name, or a key), after it was changed."""
    key = key or name
    if isinstance(listed, dict) and isinstance(listed.get(key), dict) and name in files:
        listed[key] |= {"bytes": len(files[name]), "crc32": zlib.crc32(files[name])}


def test_checkpoints(tmp_path: Path) -> None:
    whole = files_of(save(tmp_path / "run", example(3), 2))

    def finish(files: Files, name: str) -> None:
        try:
            state = json.loads(files["state.json"])
            if name != "state.json":
                stamp(state["files"], files, name)
            state.pop("crc32", None)
            state["crc32"] = zlib.crc32(json.dumps(state, sort_keys=True).encode())
            files["state.json"] = json.dumps(state).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            return  # no state at all

    def read(root: Path) -> None:
        found = read_all(root)
        assert found.ids.tolist() == [2, 4, 9] and found.rows([2])["planes"].shape == (1, 3, 4, 4, 2)

    assert fuzz("checkpoint", whole, tmp_path, read, finish, change=change_tensors) > 0.5 * COUNT


def camera(model: IGAE) -> Views:
    return Views(
        torch.zeros(1, dtype=torch.long),
        orbit(1, 1.3, 0.3),
        torch.tensor([[1.1, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]])[None],
    )


def chosen(file: Path) -> bool:
    """A fifth of the mutations: a model takes ten times as long as all else."""
    return zlib.crc32(file.read_bytes()) % 5 == 0


def check_render(model: IGAE, rows: torch.Tensor) -> None:
    """What is rendered is finite; not where that takes long."""
    options = model.options
    if options.coarse_samples + options.fine_samples <= 64 and options.rays_per_pixel <= 2 and options.patch <= 2:
        with torch.no_grad():
            assert all(found.isfinite().all() for found in model.render(rows, camera(model), None))


def test_exports(tmp_path: Path) -> None:
    planes = PlanesConfig(resolution=4, features=4)
    net = load_autoencoder(AutoencoderConfig(create=KL, scale=0.1))
    model = IGAE(net, planes, RenderOptions(coarse_samples=4, fine_samples=2), (16, 16))
    model.refresh_background()
    rows = torch.randn(3, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    content = Content(model, (1.0, 1.0, 1.0), ["a", "b", "c"], planes, lambda start, stop: rows[start:stop], "Made up.")
    write(content, str(tmp_path / "export"))
    whole = files_of(tmp_path / "export")
    del whole["README.md"]

    def finish(files: Files, name: str) -> None:
        if name != "igae.json":
            try:
                index = json.loads(files["igae.json"])
            except ValueError:
                return
            stamp(index.get("files") if isinstance(index, dict) else None, files, name)
            files["igae.json"] = json.dumps(index).encode()

    def read(root: Path) -> None:
        export = Export(str(root))
        found = export.rows(export.names)
        assert found.shape == (len(export.names), *export.planes.row_shape)
        assert export.autoencoder.create and len(export.normalization(export.names[0])) == 4
        if chosen(root / "igae.json"):
            check_render(export.model, found[:1])

    assert fuzz("export", whole, tmp_path, read, finish, change=change_tensors) > 0.2 * COUNT


def blender(root: Path) -> None:
    content = write_scene(root / "s", 3, opengl=True)
    (root / "s" / "transforms.json").rename(root / "s" / "transforms_train.json")
    (root / "s" / "transforms_test.json").write_text(json.dumps({**content, "frames": content["frames"][2:]}))
    (root / "s" / "transforms_train.json").write_text(json.dumps({**content, "frames": content["frames"][:2]}))


def nerfstudio(root: Path) -> None:
    content = write_scene(root / "s", 3, opengl=True)
    extra = {"fl_x": 16.0, "fl_y": 16.0, "cx": 8.0, "cy": 8.0, "w": 16, "h": 16, "k1": 0.0, "camera_model": "OPENCV"}
    names = [frame["file_path"] for frame in content["frames"]]
    lists = {"train_filenames": names[1:], "val_filenames": names[:1]}
    del content["camera_angle_x"]
    (root / "s" / "transforms.json").write_text(json.dumps({**content, **extra, **lists}))


def trellis(root: Path) -> None:
    content = write_scene(root / "s", 3, opengl=True)
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].removeprefix("images/") + ".png"
        frame["camera_angle_x"] = content["camera_angle_x"]
        (root / "s/images" / frame["file_path"]).rename(root / "s" / frame["file_path"])
    (root / "s" / "mesh.ply").write_bytes(b"")
    box = {"aabb": [[-0.5] * 3, [0.5] * 3], "scale": 1.0, "offset": [0.0, 0.0, 0.0], "frames": content["frames"]}
    (root / "s" / "transforms.json").write_text(json.dumps(box))


SMALL = {"w": 16, "h": 12, "fx": 14.0, "fy": 14.0, "cx": 8.0, "cy": 6.0}
RAW: dict[str, Callable[[Path], Any]] = {
    "igae-data": lambda root: write_data(root, views=(3,)),
    "transforms": nerfstudio,
    "blender": blender,
    "trellis": trellis,
    "colmap text": lambda root: write_colmap(root / "s", {f"{i}.png": s for i, s in enumerate(shots(3, **SMALL))}),
    "colmap": lambda root: write_colmap(root / "s", {f"{i}.png": s for i, s in enumerate(shots(3, **SMALL))}, True),
    "co3d": lambda root: write_co3d(root, **SMALL),
    **{name: lambda root, write=write: write(root, "s", 3) for name, write in WRITERS.items()},
}


@pytest.mark.parametrize("name", RAW)
def test_raw_scenes(name: str, tmp_path: Path) -> None:
    RAW[name](tmp_path / "raw")
    whole = files_of(tmp_path / "raw")
    images = {path for path in whole if path.endswith((".png", ".jpg"))}
    cameras = {path: content for path, content in whole.items() if path not in images}
    cameras[min(images)] = whole[min(images)]

    def read(root: Path) -> None:
        for path in images - cameras.keys():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(whole[path])
        source = root / "scenes" if name == "igae-data" else root
        options: dict[str, Any] = {"subset": "square16"} if name == "igae-data" else {}
        pack(str(root / "packed"), PackOptions(scenes=str(source), **options))
        read_packed(root / "packed", "sha256")

    fuzz(f"raw {name}", cameras, tmp_path, read, count=COUNT // 10)


def test_recipes(tmp_path: Path) -> None:
    text = RECIPE.replace("data: {", "data: {root: shards, ")

    def read(root: Path) -> None:
        recipe = load(Recipe, root / "recipe.yaml", search=[root])
        assert load(Recipe, "saved", saved=dump(recipe)) == recipe
        planes = recipe.planes
        small = max(planes.resolution, planes.features, planes.base_planes) <= 64
        fetches = any(stage.weights.natural_lpips for stage in recipe.train.stages.values())
        if small and not fetches and recipe.autoencoder.create and chosen(root / "recipe.yaml"):
            model = IGAE.from_recipe(recipe, (16, 16))
            check_render(model, torch.zeros(1, *planes.row_shape))

    assert fuzz("recipe", {"recipe.yaml": text.encode()}, tmp_path, read) > 0.2 * COUNT
