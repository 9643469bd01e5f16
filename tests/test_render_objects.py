# SPDX-License-Identifier: Apache-2.0
"""Rendered meshes against a ray tracer, from files to packed shards, and what happens to broken files."""

import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import mesh_files
import numpy as np
import object_store
import pytest
import ranks
import runs
from PIL import Image

from igae.data import Manifest, ShardReader

pytest.importorskip("trimesh", reason="pip install -e '.[objects]'")
pytest.importorskip("moderngl", reason="pip install -e '.[objects]'")
for library in ("EGL", "GL"):
    if ctypes.util.find_library(library) is None:
        pytest.skip(f"lib{library} is not installed: apt-get install libegl1 libgl1", allow_module_level=True)

TOOLS = Path(__file__).resolve().parent.parent / "data_tools"
sys.path.insert(0, str(TOOLS))

import object_files  # noqa: E402
import object_meshes  # noqa: E402
import object_renderer  # noqa: E402

SIZE, VIEWS = 64, 6
OPTIONS = ["--views", str(VIEWS), "--size", str(SIZE), "--supersample", "1", "--seed", "5"]
LIGHT = (object_renderer.AMBIENT, object_renderer.LIGHTS)


def tool(*arguments: object, script: str = "render_objects.py", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | variables)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[mesh_files.Surface]]]:
    root = tmp_path_factory.mktemp("meshes")
    for folder in ("000-001", "000-002", "sofa/models", "bad"):
        (root / folder).mkdir(parents=True)
    surfaces = {
        "tower": mesh_files.write_glb(root / "000-001" / "tower.glb"),
        "crate": mesh_files.write_gltf(root / "000-002" / "crate.gltf"),
        "sofa": mesh_files.write_obj(root / "sofa" / "models" / "sofa.obj"),
    }
    tower = (root / "000-001" / "tower.glb").read_bytes()
    (root / "bad" / "half.glb").write_bytes(tower[: len(tower) // 2])
    (root / "bad" / "nothing.obj").write_text("# nothing\n")
    (root / "bad" / "lost.obj").write_text("mtllib lost.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    return root, surfaces


@pytest.fixture(scope="module")
def rendered(meshes, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("rendered") / "objects"
    done = tool(meshes[0], "--output", output, "--workers", 2, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return output, done


def scene(output: Path, name: str) -> dict:
    return json.loads((output / f"square{SIZE}" / name / "transforms_opencv.json").read_text())


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_is_said(rendered):
    output, done = rendered
    assert "3 objects; now rendered: 3 with 18 views" in done.stdout and "damaged: 3" in done.stdout
    lines = [line for line in done.stderr.splitlines() if ", elapsed " not in line]  # told where it takes long
    for name, reason in [
        ("half.glb", "bytes of"),
        ("nothing.obj", "no triangles"),
        ("lost.obj", "'lost.mtl', which it refers to, is missing"),
    ]:
        assert any(f"bad/{name}: " in line and reason in line for line in lines), lines
    assert lines[-1] == "damaged, and left out: 3 of 6" and len(lines) == 4
    names = sorted(["crate", "sofa", "tower"])
    assert json.loads((output / "dataset_map.json").read_text()) == {"objaverse": names}
    assert sorted(path.name for path in (output / f"square{SIZE}").iterdir()) == sorted([*names, "render.json"])


@pytest.mark.parametrize("name", ["tower", "crate", "sofa"])
def test_objects_are_upright_centered_and_as_large_as_fits(rendered, meshes, name):
    matrix = np.array(scene(rendered[0], name)["mesh_to_world"])
    corners = np.concatenate([surface.corners().reshape(-1, 3) for surface in meshes[1][name]])
    world = corners @ matrix[:3, :3].T + matrix[:3, 3]
    assert np.abs(world.max(axis=0) + world.min(axis=0)).max() < 1e-6
    cube, ball = np.abs(world).max() / 0.45, np.linalg.norm(world, axis=1).max() / 0.52
    assert max(cube, ball) == pytest.approx(1, abs=1e-6)
    scale = matrix[2, 1]
    assert scale > 0 and matrix[:3, :3] == pytest.approx(scale * np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]))


@pytest.mark.parametrize("name", ["tower", "crate", "sofa"])
def test_pictures_are_what_rays_find(rendered, meshes, name):
    """Silhouettes, nearest faces, node transforms, textures, vertex colors and light, in all views."""
    data = scene(rendered[0], name)
    assert len(data["frames"]) == VIEWS
    compared = 0
    for frame in data["frames"]:
        with Image.open(rendered[0] / f"square{SIZE}" / name / frame["file_path"]) as image:
            assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
            picture = np.asarray(image) / 255
        expected, hit, sure = mesh_files.trace(meshes[1][name], np.array(data["mesh_to_world"]), frame, *LIGHT)
        assert 0.04 < hit.mean() < 0.7 and not (hit[[0, -1]].any() or hit[:, [0, -1]].any())
        assert (picture[~hit & sure] == 1).all() and (~hit & sure).sum() > 1000
        # Rounding of the picture: 0.002; measured: 0.0026, where a mip level blends two texels of one color.
        assert np.abs(picture - expected)[hit & sure].max() < 0.006
        compared += int((hit & sure).sum())
    assert compared > 1000  # measured: 1,490 of the crate, whose textured faces have wide borders; more of the others


def test_cameras_look_at_the_origin_from_everywhere(rendered):
    poses = {}
    for name in ("tower", "crate", "sofa"):
        frames = scene(rendered[0], name)["frames"]
        poses[name] = np.array([frame["transform_matrix"] for frame in frames])
        turn, position = poses[name][:, :3, :3], poses[name][:, :3, 3]
        assert np.abs(turn.transpose(0, 2, 1) @ turn - np.eye(3)).max() < 1e-8
        assert np.linalg.det(turn) == pytest.approx(1)
        assert np.abs(position + 1.3 * turn[:, :, 2]).max() < 1e-8  # z is forward, and ends in the origin
        assert (turn[:, 2, 1] < 0).all() and np.abs(turn[:, 2, 0]).max() < 1e-8  # y is down, x level
        assert np.abs(position.mean(axis=0)).max() < 0.4  # measured: 0.24
    assert np.abs(poses["tower"] - poses["crate"]).max() > 0.1  # not the same ones for all objects


def test_two_commands_lead_to_training(rendered, tmp_path):
    output, shards = rendered[0], tmp_path / "shards"
    arguments = ("--scenes", output, "--subset", f"square{SIZE}", "--output", shards, "--workers", 1)
    done = tool(*arguments, script="pack_shards.py")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(str(shards))
    assert manifest.image_size == (SIZE, SIZE) and manifest.dataset == "objaverse"
    assert {(s.name, s.category, s.views, s.heldout) for s in manifest.scenes} == {
        (name, "objaverse", VIEWS - 1, 1) for name in ("tower", "crate", "sofa")
    }
    assert manifest.select({"objaverse": (0, 2)}) == manifest.scenes[:2]
    assert manifest.cameras.min_distance == pytest.approx(1.3) == manifest.cameras.max_distance
    assert manifest.cameras.mean_focal == pytest.approx(1.09375)
    seen = 0
    for shard in manifest.shards:
        for record in ShardReader(str(shards)).read(shard):
            name, view = record.key.split("/")
            frame = scene(output, name)["frames"][int(view)]
            assert record.image == (output / f"square{SIZE}" / name / frame["file_path"]).read_bytes()
            assert json.loads(record.camera)["cam2world"] == frame["transform_matrix"]
            seen += 1
    assert seen == 3 * VIEWS
    recipe, log = str(runs.recipe_file(tmp_path, str(shards))), tmp_path / "log"
    short = ["train.warmup.epochs=0.5", "train.joint.epochs=0", "evaluation.natural_images=0"]
    assert ranks.Ranks(runs.train, 1, recipe, *short, log=str(log)).exit_codes() == [0], log.read_text()
    assert "3 scenes" in log.read_text()


def test_a_run_that_was_killed_continues(rendered, meshes, tmp_path):
    """Finished objects are not touched, half-written ones are made again, and all is as if nothing had happened."""
    output = tmp_path / "objects"
    command = [sys.executable, TOOLS / "render_objects.py", meshes[0], "--output", output, "--workers", "1", *OPTIONS]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(list(map(str, command)), start_new_session=True, **quiet)
    deadline = time.monotonic() + 60
    while not (finished := list(output.glob("*/*/transforms_opencv.json"))):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    first = finished[0]
    kept = first.stat().st_mtime_ns
    other = next(name for name in ("crate", "sofa", "tower") if name != first.parent.name)
    half = output / f"square{SIZE}" / other
    shutil.rmtree(half, ignore_errors=True)
    (half / "images").mkdir(parents=True)
    (half / "images" / "000.png").write_bytes(b"\x89PNG")
    (half / "transforms_opencv.json").write_text('{"camera_model": "OPENCV", "mesh": "')
    done = tool(*command[2:])
    assert done.returncode == 0 and "finished before: " in done.stdout
    assert first.stat().st_mtime_ns == kept
    assert contents(output) == contents(rendered[0])  # with one process as with two
    done = tool(meshes[0] / "000-00*" / "*.gl*", "--output", output, *OPTIONS)
    assert "now rendered: 0 with 0 views" in done.stdout and "finished before: 2, damaged: 0" in done.stdout
    assert contents(output) == contents(rendered[0])


def test_what_was_changed_is_rendered_again(meshes, tmp_path):
    """A mesh, its material, its texture and its buffer, each in place and with its old time; then the renderer."""
    root, output = tmp_path / "meshes [new]", tmp_path / "objects [v2]"
    for folder in ("000-001", "000-002", "sofa"):
        shutil.copytree(meshes[0] / folder, root / folder)
    tools = shutil.copytree(TOOLS, tmp_path / "data_tools", ignore=shutil.ignore_patterns("__pycache__"))
    arguments = (root, "--output", output, "--workers", 1, *OPTIONS)

    def render() -> str:
        done = tool(*arguments, script=str(tools / "render_objects.py"))
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "now rendered: 3 with" in render() and "now rendered: 0 with" in render()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for file in files:
        before, ends = file.stat(), {".glb": b"\0", ".png": b"\0"}
        file.write_bytes(file.read_bytes() + ends.get(file.suffix, b"\n"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert "now rendered: 1 with" in render(), file
    assert {file.suffix for file in files} >= {".glb", ".gltf", ".bin", ".obj", ".mtl", ".png"}
    source = tools / "object_renderer.py"
    source.write_text(source.read_text().replace("AMBIENT = 0.32", "AMBIENT = 0.42"))
    assert "now rendered: 3 with" in render() and "finished before: 3" in render()
    (root / "000-001" / "tower.glb").write_bytes(b"glTF")
    assert "2 objects; now rendered: 0 with" in render()  # what was a tower is none, and is not listed as one
    assert json.loads((output / "dataset_map.json").read_text()) == {"objaverse": ["crate", "sofa"]}


def test_meshes_behind_links_and_home(meshes, tmp_path):
    (tmp_path / "glbs").mkdir()
    (tmp_path / "glbs" / "000-001").symlink_to(meshes[0] / "000-001")
    (tmp_path / "glbs" / "loop").symlink_to("..")
    done = tool(f"{tmp_path}/glbs", "--output=~/made", "--workers", 1, *OPTIONS, HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and "1 objects; now rendered: 1" in done.stdout, done.stderr
    assert (tmp_path / "home" / "made" / "dataset_map.json").exists()


def test_refusals_are_one_sentence(rendered, meshes, tmp_path):
    output, root = rendered[0], meshes[0]
    before, new = contents(output), ("--output", tmp_path / "x")
    (tmp_path / "moderngl.py").write_text("raise ModuleNotFoundError('no moderngl')")
    (tmp_path / "000-001").mkdir()
    shutil.copy(root / "000-001" / "tower.glb", tmp_path / "000-001" / "tower.glb")
    for arguments, variables, sentence in [
        ((root, "--output", output, *OPTIONS[:-1], "6"), {}, "choose another --output, or remove that folder"),
        ((tmp_path / "none", *new), {}, "there is no .glb, .gltf or .obj file in"),
        ((root, *new), {"GLCONTEXT_LINUX_LIBEGL": "libnone.so"}, "apt-get install libegl1 libgl1"),
        ((root, *new), {"PYTHONPATH": f"{tmp_path}{os.pathsep}{TOOLS.parent}"}, "pip install -e '.[objects]'"),
        ((root / "bad", *new), {}, "nothing was rendered"),
    ]:
        done = tool(*arguments, **variables)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and sentence in last, done.stderr
        assert "Traceback" not in done.stderr
    # Another mesh of the same name is not taken for the finished one.
    done = tool(tmp_path / "000-001", "--output", output, *OPTIONS)
    assert done.returncode == 0 and "damaged: 1" in done.stdout and "has views of" in done.stderr
    assert contents(output) == before


def test_from_and_to_an_object_store(rendered, meshes):
    """The same bytes as between folders."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with object_store.moto() as port:
        options = object_store.options(port)
        s3 = fsspec.filesystem("s3", **options)
        s3.mkdir("bucket")
        s3.put(str(meshes[0] / "000-002") + "/", "bucket/meshes/", recursive=True)
        variables = {f"FSSPEC_S3_{key.upper()}": options[key] for key in ("endpoint_url", "key", "secret")}
        arguments = ("s3://bucket/meshes", "--output", "s3://bucket/objects", "--workers", 1, *OPTIONS)
        done = tool(*arguments, **variables, AWS_DEFAULT_REGION="us-east-1")
        assert done.returncode == 0 and "now rendered: 1 with 6 views" in done.stdout, done.stderr
        root = f"bucket/objects/square{SIZE}/crate"
        written = json.loads(s3.cat(f"{root}/transforms_opencv.json"))
        assert written.pop("mesh") == "s3://bucket/meshes/crate.gltf"
        assert written.items() <= scene(rendered[0], "crate").items()
        for frame in written["frames"]:
            picture = rendered[0] / f"square{SIZE}" / "crate" / frame["file_path"]
            assert s3.cat(f"{root}/{frame['file_path']}") == picture.read_bytes()


def test_folders_with_the_characters_of_globs(meshes, tmp_path):
    """Brackets of a folder are its name, in what is read and in what is written; those of a glob choose."""
    folder = tmp_path / "chairs [v2]" / "a*b"
    folder.mkdir(parents=True)
    for name in ("1.glb", "2.glb", "x?#%20[1].glb"):
        shutil.copy(meshes[0] / "000-001" / "tower.glb", folder / name)
    for given, names in [
        (folder, ["1", "2", "x?#%20[1]"]),
        (folder / "x?#%20[1].glb", ["x?#%20[1]"]),
        (folder / "[2-9].glb", ["2"]),
        (tmp_path / "chairs [v2]" / "*" / "?.glb", ["1", "2"]),
        (tmp_path / "c*" / "**" / "1.glb", ["1"]),
    ]:
        assert [mesh.name for mesh in object_files.find_meshes([str(given)])] == names
    output = tmp_path / "objects [v2]"
    done = tool(folder / "?.glb", "--output", output, "--workers", 1, "--views", 1, "--size", 16)
    assert done.returncode == 0 and "2 objects; now rendered: 2" in done.stdout, done.stderr
    assert json.loads((output / "dataset_map.json").read_text()) == {"objaverse": ["1", "2"]}


def test_links_are_followed_and_loops_cut(meshes, tmp_path):
    """Linked folders and files are found once each, and a link that leads nowhere is named."""
    disk, root = tmp_path / "disk" / "000-001", tmp_path / "glbs"
    for folder in (disk / "below", root / "000-000"):
        folder.mkdir(parents=True)
    tower = meshes[0] / "000-001" / "tower.glb"
    shutil.copy(tower, disk / "below" / "far.glb")
    shutil.copy(tower, root / "000-000" / "near.glb")
    (root / "000-001").symlink_to(disk)
    (root / "000-002").symlink_to(disk)  # the same folder again
    (disk / "loop").symlink_to(root)
    (root / "file.glb").symlink_to(tower)
    (root / "000-000" / "lost.glb").symlink_to(tmp_path / "nothing.glb")
    (root / "000-000" / "self.glb").symlink_to("self.glb")
    for given, names in [
        (root, ["near", "far", "file"]),  # what leads nowhere is said
        (root / "*" / "*" / "*.glb", ["far"]),
        (root / "**" / "f*.glb", ["far", "file"]),
    ]:
        found = object_files.find_meshes([str(given)])
        assert sorted(mesh.name for mesh in found) == sorted(names)
    [lost] = object_files.find_meshes([str(root / "000-000" / "l*.glb")])
    with pytest.raises(object_files.BadMesh, match="it can't be opened .*No such file.*: check that it exists"):
        object_meshes.load(lost)


def test_urls_and_names(meshes, tmp_path):
    root = meshes[0]
    archive = shutil.make_archive(str(tmp_path / "meshes"), "zip", root)
    twice = (str(root / "sofa"), str(root / "sofa/models"))
    found = object_files.find_meshes([f"zip://000-00*/*::file://{archive}", *twice])
    assert [mesh.name for mesh in found] == ["tower", "crate", "sofa"]
    assert found[2].source == str(root / "sofa" / "models" / "sofa.obj")
    for mesh in found[:2]:
        parts, matrix = object_meshes.load(mesh)
        assert len(parts) == len(meshes[1][mesh.name]) and matrix.shape == (4, 4)
    for chair in ("1/models", "2/models"):
        (tmp_path / "chairs" / chair).mkdir(parents=True)
        (tmp_path / "chairs" / chair / "model.obj").write_text("v 0 0 0\n")
    chairs = object_files.find_meshes([str(tmp_path / "chairs")])
    assert [mesh.name for mesh in chairs] == ["1_models_model", "2_models_model"]
    with pytest.raises(ValueError, match="would both be the scene 'model'"):
        object_files.find_meshes([str(tmp_path / "chairs" / n / "models" / "model.obj") for n in "12"])
