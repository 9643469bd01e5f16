# SPDX-License-Identifier: Apache-2.0
"""The viewer: its cameras in closed form, its pictures against the exports', what it follows, what it refuses."""

import json
import logging
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from view_models import CPU, NAMES, Made, open_as_run

from igae.cli.view import main
from igae.data import orbit
from igae.evaluation import latent_to_rgb
from igae.export import Export
from igae.viewer import (
    ALL,
    CHANNEL,
    CHANNELS,
    DATA,
    DEPTH,
    LATENTS,
    OPACITY,
    RGB,
    VIEWS,
    Camera,
    Followed,
    Panel,
    Sheet,
    angle_of,
    arrange,
    between,
    draw,
    dump_path,
    lens_of,
    open_subject,
    orbit_from,
    panels,
    parse_path,
    pose_of,
    quaternion_of,
    rotation_of,
    side_by_side,
)

ROOT = Path(__file__).resolve().parent.parent
LENS = lens_of(50, (16, 16))
numbers = st.floats(-1, 1, allow_subnormal=False)


def turned(axis: int, angle: float) -> Tensor:
    """The rotation about a coordinate axis."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def camera(rotation: Tensor, *position: float) -> Camera:
    return Camera(pose_of(rotation, torch.tensor(position, dtype=torch.float64)), LENS)


@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(numbers, numbers, numbers))
def test_quaternions_turn_as_hamilton_says(wxyz: tuple[float, ...], vector: tuple[float, ...]) -> None:
    """v -> q v conj(q) / |q|^2, worked out by the product of quaternions."""
    size = sum(x * x for x in wxyz)
    if size < 1e-3:
        return

    def product(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
        (w, x, y, z), (s, i, j, k) = a, b
        return (
            w * s - x * i - y * j - z * k,
            w * i + x * s + y * k - z * j,
            w * j - x * k + y * s + z * i,
            w * k + x * j - y * i + z * s,
        )

    conjugate = (wxyz[0], -wxyz[1], -wxyz[2], -wxyz[3])
    expected = [part / size for part in product(product(wxyz, (0.0, *vector)), conjugate)]
    rotation = rotation_of(torch.tensor(wxyz, dtype=torch.float64))
    found = rotation @ torch.tensor(vector, dtype=torch.float64)
    assert expected[0] == pytest.approx(0, abs=1e-12) and found.tolist() == pytest.approx(expected[1:], abs=1e-12)
    again = rotation_of(quaternion_of(rotation))
    assert (again - rotation).abs().max() < 1e-12  # measured 2e-15


def test_lenses() -> None:
    assert lens_of(90, (10, 20))[0, 0] == pytest.approx(0.25) and lens_of(90, (10, 20))[1, 1] == pytest.approx(0.5)
    for size in ((10, 20), (20, 10)):
        assert lens_of(angle_of(1.1, size), size)[0, 0] == pytest.approx(1.1)


def test_a_path_goes_through_its_cameras() -> None:
    path = [camera(turned(2, a), 1 + a, a * a, 0) for a in (0.0, 0.5, 1.5, 4.0)]
    path[3] = Camera(path[3].cam2world, lens_of(30, (16, 16)))
    found = between(path, 31)
    assert len(found) == 31
    for i, knot in enumerate(path):
        torch.testing.assert_close(found[10 * i].cam2world, knot.cam2world)
        torch.testing.assert_close(found[10 * i].intrinsics, knot.intrinsics)
    for one in found:
        rotation = one.cam2world[:3, :3]
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64))
        assert torch.linalg.det(rotation) == pytest.approx(1)
    # No jump: steps of the smooth way are never much longer than the way from one camera to the next.
    places = torch.stack([one.cam2world[:3, 3] for one in found])
    assert (places[1:] - places[:-1]).norm(dim=-1).max() < 2 * (path[3].cam2world - path[2].cam2world).norm() / 10


def test_between_two_cameras() -> None:
    """Half way there is half the turn, also where the shorter way is over the quaternion's other sign, and half of the
    arc around the origin at the mean distance."""
    for start, end in ((0.2, 1.2), (3.0, 3.0 + 1.0), (-0.5, 0.5)):
        middle = between([camera(turned(1, start), 0, 0, 1), camera(turned(1, end), 3, 0, 0)], 3)[1]
        half = camera(turned(1, (start + end) / 2), math.sqrt(2), 0, math.sqrt(2))
        torch.testing.assert_close(middle.cam2world, half.cam2world)
    alone = camera(turned(0, 1), 1, 2, 3)
    assert all(torch.allclose(one.cam2world, alone.cam2world) for one in between([alone], 4))


def test_an_orbit_starts_where_the_camera_is() -> None:
    for up in ((0.0, 0.0, 1.0), (0.0, -3.0, 0.0), (1.0, 2.0, 3.0)):
        axis, center = torch.tensor(up, dtype=torch.float64), torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
        expected = orbit(12, 1.3, 0.4, up, center).double()
        found = orbit_from(Camera(expected[0], LENS), 12, axis, center)
        # orbit is in float32
        torch.testing.assert_close(torch.stack([one.cam2world for one in found]), expected, atol=1e-6, rtol=0)


def test_a_saved_path_is_read_back() -> None:
    path = between([camera(turned(0, 0.1), 0.1, 1 / 3, 7), Camera(camera(turned(1, 2), 1, 2, 3).cam2world, LENS)], 5)
    data = dump_path(path, (16, 24))
    again = parse_path(data, (16, 24))
    for one, other in zip(path, again, strict=True):
        assert torch.equal(one.cam2world, other.cam2world)
        torch.testing.assert_close(one.intrinsics, other.intrinsics, atol=1e-15, rtol=0)
    # As in the data, with one lens for all.
    frames = [{"transform_matrix": one.cam2world.tolist()} for one in path]
    shared = {"camera_angle_x": math.radians(90), "w": 24, "h": 16, "frames": frames}
    assert parse_path(json.dumps(shared).encode(), (16, 24))[0].intrinsics[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\x00", "no camera path"),
        (b"[]", "no camera path"),
        (b'{"frames": []}', "no camera path"),
        (b"[" * 100_000, "no camera path"),
        (b'{"frames": [{"fl_x": 10}]}', "camera 1 of the path"),
        (b'{"fl_x": 10, "frames": [3]}', "camera 1 of the path"),
        (b'{"fl_x": 10, "frames": [{"transform_matrix": [[1, 2], [3, 4]]}]}', "camera 1 of the path"),
        (b'{"fl_x": 10, "frames": [{"transform_matrix": [["a"]]}]}', "camera 1 of the path"),
        (b'{"fl_x": NaN, "frames": [{"transform_matrix": []}]}', "fl_x is nan"),
    ],
)
def test_a_wrong_path_is_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_path(data, (16, 16))


def test_pictures_are_those_of_the_export(viewed: Made) -> None:
    export = Export(str(viewed.export))
    by_export = open_subject(str(viewed.export), [], CPU)
    by_run = open_subject(str(viewed.newer), viewed.overrides, CPU)
    assert by_run.names == by_export.names == NAMES and by_run.image_size == (16, 16)
    assert by_run.distance == pytest.approx(by_export.distance, rel=1) and "step 8" in by_run.title
    pose = orbit(5, 1.2, 0.3)[2].double()
    for name in ("scene_0", "scene_3"):
        expected = export.scene(name).image(pose, LENS)[0].numpy()
        latents, depth, opacity = export.scene(name).render(pose, LENS)
        for subject in (by_export, by_run):
            scene = subject.scene(name)
            drawn = draw(subject.model, scene, pose, LENS)
            assert drawn.image is not None and np.abs(drawn.image.astype(int) - expected).max() <= 1
            torch.testing.assert_close(drawn.latents, latents[0])
            torch.testing.assert_close(drawn.depth, depth[0])
            torch.testing.assert_close(drawn.opacity, opacity[0])
            # Colors of latents are those of the scene's first view, wherever the camera is.
            first = export.scene(name).render(subject.front(name)[0], lens_of(subject.angle, (16, 16)))[0][0, :3]
            statistics = (first.mean((1, 2)), first.std((1, 2), correction=0))
            colored = latent_to_rgb(latents, (16, 16), statistics)[0]
            (panel,) = panels(LATENTS, drawn, scene, (16, 16))
            assert np.abs(panel.picture.astype(int) - colored).max() <= 1


def test_views_and_fewer_pixels(viewed: Made) -> None:
    subject = open_subject(str(viewed.export), [], CPU)
    scene, (front, _) = subject.scene("scene_1"), subject.front("scene_1")
    whole = draw(subject.model, scene, front, LENS)
    half = draw(subject.model, scene, front, LENS, 0.5)
    assert half.latents.shape == (4, 4, 4) and half.image is not None and half.image.shape == (8, 8, 3)
    # Latent pixels of patches of 2 x 2 rendered ones, in both.
    assert [drawn.depth.shape for drawn in (whole, half)] == [(16, 16), (8, 8)] and subject.model.head is not None
    assert draw(subject.model, scene, front, LENS, 0.01).latents.shape == (4, 4, 4)  # never fewer than 4
    # Opacity of half the pixels is about the mean of the four that each stands for.
    means = torch.nn.functional.avg_pool2d(whole.opacity[None], 2)[0]
    assert (half.opacity - means).abs().mean() < 0.2 * means.mean()
    found = {view: panels(view, whole, scene, (16, 16), 2) for view in VIEWS}
    shapes = {view: {panel.picture.shape for panel in found[view] if panel.picture is not None} for view in VIEWS}
    assert all(of_view == {(16, 16, 3)} for of_view in shapes.values())
    one = (RGB, LATENTS, CHANNEL, DEPTH, OPACITY)
    assert {view: len(found[view]) for view in VIEWS} == {**dict.fromkeys(one, 1), CHANNELS: 4, ALL: 3, DATA: 3}
    # Channels have their numbers, and are gray pictures.
    assert [panel.label for panel in found[CHANNELS]] == list("1234") and found[CHANNEL][0].label == "3"
    for i, panel in enumerate(found[CHANNELS]):
        unit = (whole.latents[i] - scene.mean[i]) / scene.std[i]
        gray = ((0.5 + unit / 4).clamp(0, 1) * 255).round().int().numpy()
        assert np.abs(panel.picture[::2, ::2].astype(int) - gray[:, :, None]).max() <= 1
    assert np.array_equal(found[CHANNEL][0].picture, found[CHANNELS][2].picture)
    opaque = (whole.opacity * 255).round().int().numpy()
    assert np.abs(found[OPACITY][0].picture.astype(int) - opaque[:, :, None]).max() <= 1
    # Saved: three in a row, four in a square in reading order.
    assert side_by_side(found[ALL]).shape == (16, 48, 3)
    grid = side_by_side(found[CHANNELS])
    assert grid.shape == (32, 32, 3) and np.array_equal(grid[16:, :16], found[CHANNELS][2].picture)
    assert subject.model.options == open_subject(str(viewed.newer), viewed.overrides, CPU).model.options


@pytest.mark.parametrize("window", [(900, 900), (300, 1400), (1400, 300), (40, 30), (1, 1)])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_panels_fill_the_window(window: tuple[int, int], count: int) -> None:
    colors = np.arange(count) * 20
    shown = [Panel(str(i), np.full((8, 12, 3), color, np.uint8)) for i, color in enumerate(colors)]
    sheet = arrange(shown, window, 800)
    height, width = sheet.picture.shape[:2]
    assert max(height, width) <= 800 and height / width == pytest.approx(window[0] / window[1], rel=0.1)
    if min(window) < 100:
        return
    for i, (left, top, right, bottom) in enumerate(sheet.cells):
        x, y = (left + right) / 2, top + (bottom - top) * 0.7
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert (sheet.picture[int(y * height), int(x * width)] == colors[i]).all() and sheet.at(x, y) == i
    assert sheet.at(-0.1, 0.5) is None
    # One panel touches two sides of the window.
    if count == 1:
        left, top, right, bottom = sheet.cells[0]
        assert max((right - left) * width / 12, (bottom - top) * height / 8) >= 0.9 * min(width / 12, height / 8)


def test_empty_places_and_long_labels() -> None:
    shown = [Panel("a name that is much too long for its place" * 9, None), Panel("b", None)]
    sheet = arrange(shown, (200, 300), 300)
    assert isinstance(sheet, Sheet) and len(sheet.cells) == 2
    assert (sheet.picture == 238).all(-1).mean() > 0.3


def test_a_run_is_followed(viewed: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_as_run(viewed, tmp_path)
    followed = Followed(str(run), viewed.overrides, CPU)
    assert followed.is_run and "step 4" in followed.subject.title
    before = followed.subject.scene("scene_2").planes
    assert followed.check() is None
    target = run / "checkpoints" / viewed.newer.name
    # Half written: without state.json it is none yet.
    shutil.copytree(viewed.newer, target, ignore=shutil.ignore_patterns("state.json"))
    caplog.clear()
    assert followed.check() is None and not caplog.records
    # Broken: a line, once, and the one before goes on.
    weights = bytearray((viewed.newer / "shared.safetensors").read_bytes())
    weights[-5] ^= 1
    (target / "shared.safetensors").write_bytes(bytes(weights))
    shutil.copy(viewed.newer / "state.json", target)
    with caplog.at_level(logging.WARNING):
        assert followed.check() is None and followed.check() is None
    (record,) = caplog.records
    assert "step 4 stays" in record.getMessage() and "shared.safetensors" in record.getMessage()
    assert torch.equal(followed.subject.scene("scene_2").planes, before)
    # The next one is whole.
    shutil.rmtree(target)
    assert followed.check() is None
    shutil.copytree(viewed.newer, target)
    newer = followed.check()
    assert newer is not None and newer is followed.subject and "step 8" in newer.title
    expected = open_subject(str(viewed.newer), viewed.overrides, CPU).scene("scene_2").planes
    assert torch.equal(newer.scene("scene_2").planes, expected) and not torch.equal(expected, before)
    assert followed.check() is None
    # A checkpoint or an export that is named stays what it is.
    assert not Followed(str(target), viewed.overrides, CPU).is_run and not Followed(str(viewed.export), [], CPU).is_run


def test_few_planes_stay_in_memory(viewed: Made) -> None:
    subject = open_subject(str(viewed.export), [], CPU)
    subject.kept, subject.kept_thumbnails = 2, 3
    first = subject.scene("scene_0")
    assert subject.scene("scene_0") is first
    for name in NAMES:
        subject.make_thumbnail(name)
    assert list(subject.thumbnails) == NAMES[1:] and subject.scene("scene_0") is not first


def test_what_is_refused_is_one_sentence(
    viewed: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def error(*arguments: str) -> str:
        assert main([*arguments]) == 2
        text = capsys.readouterr().err
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in text
        return lines[0]

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        text = error(str(viewed.export), "--port", str(port))
        assert f"127.0.0.1:{port}" in text and "in use" in text and "--port" in text
    assert "--host" in error(str(viewed.export), "--host", "203.0.113.1")  # nobody's address
    assert "--port" in error(str(viewed.export), "--port", "70000")
    assert "neither a checkpoint" in error(str(tmp_path))
    assert "no manifest.json" in error(str(viewed.newer), f"data.root={tmp_path}")
    assert "leave it out" in error(str(viewed.export), "planes.features=8")
    assert "no manifest.json in x" in error(str(viewed.export), "data.root=x")
    monkeypatch.setitem(sys.modules, "viser", None)
    assert "pip install -e '.[viewer]'" in error(str(viewed.export), "--port", "0")


def test_the_command_serves_this_machine_alone_until_it_is_ended(viewed: Made) -> None:
    command = [sys.executable, "-m", "igae.view", str(viewed.export), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A shell starts what runs in its background, these tests perhaps, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("the renderer uses torch: ")  # it draws before a page is open
    line = process.stderr.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+) shows .*/export \(4 scenes\); Ctrl-C ends it\n", line)
    assert found is not None, line
    with urllib.request.urlopen(line.split()[0]) as answer:
        assert b"<html" in answer.read()
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not str(address).startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((str(address), int(found[1])), timeout=5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
