# SPDX-License-Identifier: Apache-2.0
"""The viewer's page in a real browser, driven by mouse and keyboard as a user would."""

import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import browser
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from view_models import CPU, Made, open_as_run, write_many

from igae.export import load_trained
from igae.viewer import DataView, Followed, Panel, Session, Viewer, arrange

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

Pixels = NDArray[np.int16]
WIDTH, HEIGHT = 570, 600  # of the picture; the controls have the rest of the window
MANY = 10_000


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    folder = tmp_path_factory.mktemp("browser")
    with browser.page(folder / "profile", webgl=True, size=(WIDTH + 330, HEIGHT)) as page:
        (folder / "saved").mkdir()
        page.download_to(folder / "saved")
        yield page


def only_session(viewer: Viewer) -> Session:
    wait(lambda: viewer.sessions)
    (session,) = viewer.sessions.values()
    return session


def wait(condition: Callable[[], object], seconds: float = 30) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)
    return found


def pixels(page: browser.Page) -> Pixels:
    """What is seen left of the controls and below notifications that come and go."""
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(np.int16)
    return picture[:, :WIDTH]


def differ(a: Pixels, b: Pixels) -> bool:
    """Whether a user would call them different: JPEG and rounding change less (measured: nothing at all)."""
    return bool((np.abs(a - b).max(-1) > 24).mean() > 0.02)


def changed(page: browser.Page, before: Pixels) -> Pixels:
    """Waits for another picture than the one before, and for it to stay."""
    wait(lambda: differ(pixels(page), before))
    return settled(page)


def settled(page: browser.Page) -> Pixels:
    last = pixels(page)
    for _ in range(40):
        time.sleep(0.4)
        now = pixels(page)
        if not differ(now, last):
            return now
        last = now
    raise AssertionError("the picture does not come to rest")


def choose(page: browser.Page, now: str, then: str) -> None:
    """Choose in a list whose value is `now`."""
    page.run(
        f"[...document.querySelectorAll('input')].find(e => e.value === {json.dumps(now)}"
        " && e.getAttribute('aria-haspopup') === 'listbox').setAttribute('data-list', '')"
    )
    page.click("[data-list]")
    page.run("document.querySelector('[data-list]').removeAttribute('data-list')")
    page.click_text(then)


def close_notes(page: browser.Page) -> None:
    page.run("document.querySelectorAll('.mantine-Notification-closeButton').forEach(e => e.click())")


def test_the_page(viewed: Made, shown: browser.Page, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = open_as_run(viewed, tmp_path)
    viewer = Viewer(Followed(str(run), viewed.overrides, CPU), port=0, poll=0.2)
    try:
        shown.open(viewer.url)
        session = only_session(viewer)
        shown.wait_for("document.body.innerText.includes('Show thumbnails')")
        close_notes(shown)
        shown.wait_for("document.querySelectorAll('.mantine-Notification-closeButton').length === 0")

        # The first camera is that of an orbit like the data's; what is seen is what the renderer makes of it.
        choose(shown, "side by side", "decoded RGB")
        first = settled(shown)
        pose = session.camera().cam2world
        torch.testing.assert_close(pose, viewer.subject.front(session.name)[0], atol=1e-5, rtol=0)
        expected = picture_of(viewed, session)
        assert np.abs(first - expected).mean() < 4  # of 255: JPEG, and the page's enlargement; measured 1

        # Another view; a drag turns the camera around the object, and the picture with it; another scene.
        choose(shown, "decoded RGB", "latents")
        second = changed(shown, first)
        shown.drag([[150.0, 300.0], [180.0, 305.0], [240.0, 310.0], [280.0, 310.0]])
        third = changed(shown, second)
        turned = session.camera().cam2world
        assert not torch.allclose(turned, pose, atol=0.1)
        assert turned[:3, 3].norm() == pytest.approx(float(pose[:3, 3].norm()), rel=1e-3)
        wait(lambda: "dB" in session.choice.value)
        choose(shown, session.choice.value, "scene_3")
        fourth = changed(shown, third)

        # The run removes old checkpoints: a scene that was not read yet is gone, and the page says so.
        (run / "checkpoints" / viewed.older.name / "scenes-00000.safetensors").unlink()
        wait(lambda: session.choice.value.startswith("scene_3 · "))
        choose(shown, session.choice.value, "scene_1")
        shown.wait_for("""document.body.innerText.includes("can't be shown")""")
        close_notes(shown)
        shown.wait_for("document.querySelectorAll('.mantine-Notification-closeButton').length === 0")
        assert not differ(settled(shown), fourth)

        # A newer checkpoint takes its place; camera, view and scene stay.
        shutil.copytree(viewed.newer, run / "checkpoints" / viewed.newer.name)
        changed(shown, fourth)
        assert "step 8" in viewer.subject.title and session.name == "scene_1"
        shown.wait_for("[...document.querySelectorAll('input')].some(e => e.value.endsWith('step 8'))")
        assert torch.equal(session.camera().cam2world, turned)

        # Files.
        saved = tmp_path_factory.getbasetemp() / "saved"
        saved.mkdir()
        shown.download_to(saved)
        shown.click_text("Save picture (PNG)")
        wait(lambda: (saved / "scene_1.png").is_file())
        assert Image.open(saved / "scene_1.png").size == (16, 16)
        shown.click_text("Add this camera")
        wait(lambda: session.count.value == "1")
        shown.click_text("Reset the view")
        front = viewer.subject.front("scene_1")[0]
        wait(lambda: torch.allclose(session.camera().cam2world, front, atol=1e-4))
        shown.click_text("Add this camera")
        wait(lambda: session.count.value == "2")
        shown.click_text("Save path (JSON)")
        wait(lambda: (saved / "scene_1.json").is_file())
        frames = json.loads((saved / "scene_1.json").read_text())["frames"]
        assert frames[0]["transform_matrix"] == turned.tolist() and len(frames) == 2
        shown.click_text("Remove the last")
        wait(lambda: session.count.value == "1")
        shown.choose_file("input[type=file]", saved / "scene_1.json")
        wait(lambda: session.count.value == "2")
        assert torch.equal(session.path[0].cam2world, turned)
        session.seconds.value = 1  # a slider is no easy thing to hit with a mouse
        shown.click_text("Save video (MP4)")
        wait(lambda: (saved / "scene_1.mp4").is_file())
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(saved / "scene_1.mp4"), "-f", "null", "-"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "h264" in told and "256x256" in told and re.findall(r"frame= *(\d+)", told)[-1] == "24"

        # Nothing came from elsewhere, and nothing went wrong.
        assert shown.requests[0] == f"{viewer.url}/"
        foreign = [url for url in shown.requests if not re.match(r"(data|blob|(http|ws)://127\.0\.0\.1)[:/]", url)]
        assert foreign == [] and shown.errors == []
    finally:
        shown.open("about:blank")
        viewer.close()


def picture_of(viewed: Made, session: Session) -> Pixels:
    """What the page should show of scene_0 in the older checkpoint, by the renderer's other way to it."""
    camera = session.camera()
    scene = load_trained(str(viewed.older), viewed.overrides).scene("scene_0")
    image = scene.image(camera.cam2world, camera.intrinsics)[0].numpy()
    window = (session.client.camera.image_height, session.client.camera.image_width)
    sheet = arrange([Panel("decoded RGB", image)], window, 1280).picture
    whole = np.asarray(Image.fromarray(sheet).resize(window[::-1])).astype(np.int16)
    return whole[:HEIGHT, :WIDTH]


def colored(page: browser.Page, color: tuple[int, int, int]) -> int:
    """Pixels that have about a color."""
    return int((np.abs(pixels(page) - np.array(color)).max(-1) < 40).sum())


def test_each_control_changes_the_page(viewed: Made, shown: browser.Page, tmp_path: Path) -> None:
    viewer = Viewer(Followed(str(viewed.newer), viewed.overrides, CPU), port=0)
    try:
        # What a first picture needs is there before the page is: it comes as soon as the page has connected.
        assert list(viewer.subject.scenes) == ["scene_0"]
        took = []
        for _ in range(3):
            shown.open(viewer.url)
            session = only_session(viewer)
            start = time.monotonic()
            wait(lambda session=session: session._cost > 0)
            took.append(time.monotonic() - start)
            if took[-1] < 1:
                break
            shown.open("about:blank")
            wait(lambda: not viewer.sessions)
        assert min(took) < 1  # measured: 0.1 to 0.3 s, on cores that others use as well
        shown.wait_for("document.body.innerText.includes('Show thumbnails')")
        close_notes(shown)
        now = settled(shown)
        handles = session.client.gui._gui_input_handle_from_uuid.values()
        assert len(handles) >= 25 and all(handle.hint for handle in handles)
        shown.hover(shown.place_of("find", "input"))
        shown.wait_for('document.body.innerText.includes("part of the scenes\' names")')

        # Views of one panel; a channel by its number.
        for before, after in (("side by side", "opacity"), ("opacity", "latent channel")):
            choose(shown, before, after)
            now = changed(shown, now)
        wait(lambda: session.channel.visible)
        shown.drag([shown.place_of("channel", "[class*=Slider-trackContainer]", x=0.99)])
        wait(lambda: session.channel.value == 4)
        now = changed(shown, now)
        choose(shown, "latent channel", "all latent channels")
        now = changed(shown, now)
        assert not shown.run("[...document.querySelectorAll('label')].some(e => e.innerText === 'channel')")

        # Over several pictures there is no place for the box: one is shown, with it.
        shown.drag([shown.place_of("box", "input")])
        wait(lambda: session.box.value)
        now = changed(shown, now)
        assert session.view.value == "decoded RGB"
        wait(lambda: colored(shown, (20, 150, 60)) > 300)
        seen_at = colored(shown, (230, 110, 20))
        shown.drag([shown.place_of("cameras", "input[type=checkbox]")])
        wait(lambda: session.cameras.value)
        # From further away, the one camera that was held out is seen from behind, and the others around.
        session.client.camera.position = 2.5 * session.client.camera.position
        wait(lambda: colored(shown, (40, 90, 220)) > 300 and colored(shown, (230, 110, 20)) > seen_at + 30)
        # The box is where the renderer has it: its corners are at green pixels.
        settled(shown)
        picture = pixels(shown)
        for corner in ((-0.5, -0.5, -0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5)):
            x, y = projected(shown, session, corner)
            near = picture[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
            assert (np.abs(near - np.array((20, 150, 60))).max(-1) < 60).any(), corner
        shown.download_to(tmp_path)
        shown.click_text("Save screenshot (PNG)")
        wait(lambda: (tmp_path / "scene_0.png").is_file())
        saved = np.asarray(Image.open(tmp_path / "scene_0.png").convert("RGB")).astype(np.int16)
        assert max(saved.shape) == 2048 and saved.shape[1] / saved.shape[0] == pytest.approx(
            canvas(shown)[0] / canvas(shown)[1], rel=0.01
        )
        assert (np.abs(saved - np.array((20, 150, 60))).max(-1) < 40).sum() > 300

        # A click on a camera compares its view; another split and another number are other views.
        views = session.subject.truth.views("scene_0", "train", viewer._wake.set)  # type: ignore[union-attr]
        assert views is not None and len(views) == 11
        chosen = views[5]
        shown.drag([list(map(float, projected(shown, session, frustum_edge(chosen))))])
        wait(lambda: session.view.value == "compare with the data")
        wait(lambda: session.number.value == session.place + 1 and session.split == "train")
        now = settled(shown)
        shows(shown, views[session.place].image)
        shown.click_text("held-out")
        now = changed(shown, now)
        assert session.split == "heldout" and session.number.value == 1
        heldout = session.subject.truth.views("scene_0", "heldout", viewer._wake.set)  # type: ignore[union-attr]
        assert heldout is not None
        torch.testing.assert_close(session.camera().cam2world, heldout[0].camera.cam2world, atol=1e-4, rtol=0)
        torch.testing.assert_close(session.camera().intrinsics, heldout[0].camera.intrinsics, atol=1e-4, rtol=0)
        shows(shown, heldout[0].image)
        shown.click_text("training")
        now = changed(shown, now)
        assert session.split == "train" and session.place in (0, 10)  # the neighbors on the orbit
        shown.drag([shown.place_of("number", "input")])
        shown.run("document.activeElement.select()")
        shown.type("7")
        shown.press("Enter")
        wait(lambda: session.place == 6)
        now = changed(shown, now)
        shows(shown, views[6].image)

        # The PSNR of each scene that was looked at, in the list and under its thumbnail.
        label = session.subject.label("scene_0")
        wait(lambda: session.choice.value == label)
        shown.click_text("Show thumbnails")
        wait(lambda: len(viewer.subject.psnr) == 4)
        now = changed(shown, now)
        shown.wait_for(f"[...document.querySelectorAll('input')].some(e => e.value === {json.dumps(label)})")
        assert shown.errors == []
    finally:
        shown.open("about:blank")
        viewer.close()


def canvas(page: browser.Page) -> tuple[float, float]:
    """Width and height of the picture on the screen: a page that is slow has fewer pixels."""
    largest = "[...document.querySelectorAll('canvas')].sort((a, b) => b.clientWidth - a.clientWidth)[0]"
    width, height = page.run(f"(e => [e.clientWidth, e.clientHeight])({largest})")
    return width, height


def projected(page: browser.Page, session: Session, point: tuple[float, ...]) -> tuple[int, int]:
    """Where a point is on the screen, in pixels."""
    camera, (width, height) = session.camera(), canvas(page)
    x, y, z = (torch.linalg.inv(camera.cam2world) @ torch.tensor([*point, 1.0], dtype=torch.float64))[:3].tolist()
    focal = float(camera.intrinsics[0, 0]) * min(width, height)  # of a square picture in the middle
    return round(width / 2 + focal * x / z), round(height / 2 + focal * y / z)


def frustum_edge(view: DataView) -> tuple[float, ...]:
    """The middle of an edge of a view's frustum, from its camera to a corner."""
    pose, focal = view.camera.cam2world, view.camera.intrinsics[0, 0]
    corner = torch.tensor([0.5 / focal, 0.5 / focal, 1.0], dtype=torch.float64)
    return tuple((pose[:3, :3] @ corner * 0.02 + pose[:3, 3]).tolist())


def shows(page: browser.Page, image: NDArray[np.uint8]) -> None:
    """The first panel is an image."""
    width, height = map(round, canvas(page))
    sheet = arrange([Panel("", image), *2 * [Panel("", np.zeros_like(image))]], (height, width), 1280)
    left, top, right, bottom = sheet.cells[0]
    cell = (
        slice(round(top * height) + 30, round(bottom * height) - 6),
        slice(round(left * width) + 6, round(right * width) - 6),
    )
    # Measured: 8 to 13, as JPEG; while it moves, it is coarser.
    wait(lambda: np.abs(sheet.picture[cell] - pixels(page)[cell]).mean() < 16)


def test_ten_thousand_scenes(shown: browser.Page, tmp_path: Path) -> None:
    names = write_many(tmp_path / "export", MANY)
    followed = Followed(str(tmp_path / "export"), [], CPU)
    viewer = Viewer(followed, port=0)
    try:
        shown.open(viewer.url)
        session = only_session(viewer)
        shown.wait_for("document.body.innerText.includes('Show thumbnails')")
        close_notes(shown)
        before = settled(shown)
        start = time.monotonic()
        shown.run("[...document.querySelectorAll('input')].find(e => !e.value && e.type === 'text').focus()")
        shown.type("9876")
        wait(lambda: session.listed.value == "1 to 1 of 1")
        shown.click_text("Show thumbnails")
        wait(lambda: set(viewer.subject.thumbnails) == {names[9876]})
        changed(shown, before)
        shown.drag([[WIDTH / 2, HEIGHT / 2]])
        wait(lambda: session.name == names[9876])
        assert time.monotonic() - start < 30
        # Of all others nothing was drawn or read; the next page is drawn as soon as it is looked at.
        session.text.value = ""
        shown.click_text("next")
        wait(lambda: session.listed.value == f"13 to 24 of {MANY}")
        assert len(viewer.subject.thumbnails) == 1 and len(viewer.subject.scenes) == 2
        shown.click_text("Show thumbnails")
        wait(lambda: set(viewer.subject.thumbnails) == {names[9876], *names[12:24]})
        sheet = wait(lambda: session.sheet)
        left, top, right, bottom = sheet.cells[5]  # type: ignore[attr-defined]
        window = session.client.camera.image_width, session.client.camera.image_height
        shown.drag([[window[0] * (left + right) / 2, window[1] * (top + bottom) / 2]])
        wait(lambda: session.name == names[17])
        assert shown.errors == []
    finally:
        shown.open("about:blank")
        viewer.close()
