# SPDX-License-Identifier: Apache-2.0
"""One open page: its controls, its camera, and what it is sent."""

import io
import math
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from igae.data import orbit
from igae.errors import redact
from igae.evaluation import Picture, write_video
from igae.viewer.cameras import Camera, between, dump_path, lens_of, orbit_from, parse_path, pose_of, rotation_of
from igae.viewer.drawing import ALL, RGB, VIEWS, Sheet, arrange, draw, is_decoded, panels, side_by_side, views_of
from igae.viewer.guard import Uploads
from igae.viewer.subject import ELEVATION, Subject

if TYPE_CHECKING:
    import viser

FPS = 24
PAGE = 12  # scenes on a page of thumbnails
REST = 0.25  # seconds without a new camera after which it rests
BUDGET = 0.12  # seconds that a picture may take while the camera moves; else fewer pixels are rendered
MOVING, RESTING = (768, 85), (1280, 95)
"""Pixels of a picture's longer side at most, and quality of its JPEG; a PNG takes 15 times as long."""
SECONDS = (1, 30)  # of a video
ANGLES = (5.0, 120.0)  # degrees
UP = {"z": (0, 0, 1), "y": (0, 1, 0), "x": (1, 0, 0), "-z": (0, 0, -1), "-y": (0, -1, 0), "-x": (-1, 0, 0)}
NEXT, PATH = "next", "camera path"
THUMBNAILS, BACK = "Show thumbnails", "Back to the scene"


def scale_for(cost: float) -> float:
    """Scale of the latents' sides while the camera moves, if a whole picture takes ``cost`` seconds."""
    return next((scale for scale in (1.0, 0.5) if cost * scale**2 <= BUDGET), 0.25)


class Session:
    """A page that is open in a browser.

    Callbacks of its controls only note what is to be drawn; a thread of the server draws it with :meth:`update`.

    Args:
        wake: called when there is something to draw.

    Attributes:
        name: of the scene that is shown.
        path: cameras of the path.
        sheet: of thumbnails, while they are shown.
    """

    _saving = threading.Lock()
    """Held while a page makes a picture or a video to save: these take the memory of many pictures."""

    def __init__(self, client: "viser.ClientHandle", subject: Subject, wake: Callable[[], None]) -> None:
        self.client, self.subject, self._wake = client, subject, wake
        self.name, self.path = subject.names[0], list[Camera]()
        self.sheet: Sheet | None = None
        self._failed: set[str] = set()
        self._found, self._page = subject.names, 0
        self._dirty, self._coarse, self._moved, self._cost = True, False, 0.0, 0.0
        self._closed = False
        large = ValueError("the file is too large for a camera path")
        client.gui._current_file_upload_states = Uploads(lambda: self.fail(large, "Load path: failed"))
        self._add_controls()
        client.camera.on_update(lambda _: self._touch(moved=True))
        self._list()

    # Drawing

    def show(self, subject: Subject) -> None:
        """Show another model; scene and camera stay what they are."""
        self.subject = subject
        self._failed.clear()
        _set(self.title, subject.title)
        if self.name not in subject.names:
            self._select(subject.names[0])
        self._list()

    def close(self) -> None:
        self._closed = True

    def camera(self) -> Camera:
        """Where the page's camera is now."""
        camera = self.client.camera
        wxyz, position = (torch.tensor(x, dtype=torch.float64) for x in (camera.wxyz, camera.position))
        return Camera(
            pose_of(rotation_of(wxyz), position), lens_of(_between(self.angle.value, *ANGLES), self.subject.image_size)
        )

    def update(self) -> bool:
        """Draw what has to be drawn now, if anything. Returns whether there will be more to draw soon."""
        rests = time.monotonic() - self._moved > REST
        if self._dirty or (self._coarse and rests):
            self._dirty = False
            self._coarse = not rests and self.sheet is None
            if self.sheet is not None:
                self._draw_thumbnails()
            else:
                self._draw(1.0 if rests else scale_for(self._cost), *(RESTING if rests else MOVING))
        elif self.sheet is not None:
            there = self.subject.thumbnails.keys() | self._failed
            missing = next((name for name in self._listed() if name not in there), None)
            if missing is not None:
                self._failed.add(missing)  # which is not tried again
                self.subject.make_thumbnail(missing)
                self._failed.remove(missing)
                self._dirty = True
        return self._dirty or self._coarse

    def fail(self, error: Exception, title: str = "this can't be shown") -> None:
        """Tell the user; the last picture stays."""
        self.client.add_notification(title, redact(str(error)), auto_close_seconds=10, color="red")

    def _draw(self, scale: float, most: int, quality: int) -> None:
        start, view = time.perf_counter(), self.view.value
        pictures = self._panels(self.subject, view, self.camera(), scale)
        self._send(arrange(pictures, VIEWS[view], self._window(), most), quality)
        self._cost = (time.perf_counter() - start) / scale**2

    def _panels(self, subject: Subject, view: str, camera: Camera, scale: float = 1.0) -> list[Picture]:
        scene = subject.scene(self.name)
        drawn = draw(subject.model, scene, camera.cam2world, camera.intrinsics, scale, is_decoded(view))
        return panels(view, drawn, scene, subject.image_size)

    def _draw_thumbnails(self) -> None:
        names = self._listed() or [""]
        self.sheet = arrange([self.subject.thumbnails.get(name) for name in names], names, self._window(), RESTING[0])
        self._send(self.sheet, RESTING[1])

    def _window(self) -> tuple[int, int]:
        return max(1, self.client.camera.image_height), max(1, self.client.camera.image_width)

    def _send(self, sheet: Sheet, quality: int) -> None:
        if not self._closed:
            self.client.scene.set_background_image(sheet.picture, format="jpeg", jpeg_quality=quality)
            self.client.flush()

    def _touch(self, moved: bool = False) -> None:
        if moved:
            self._moved = time.monotonic()
        self._dirty = True
        self._wake()

    # Controls

    def _add_controls(self) -> None:
        gui, subject = self.client.gui, self.subject
        views = views_of(subject.model)
        self.title = gui.add_text("model", subject.title, disabled=True)
        self.view = gui.add_dropdown("view", views, initial_value=ALL if ALL in views else RGB)
        self.view.on_update(lambda _: self._touch())
        with gui.add_folder("scenes"):
            self.choice = gui.add_dropdown("scene", [self.name])
            self.choice.on_update(lambda _: self._select(self.choice.value))
            self.browse = self._button(THUMBNAILS, self._toggle_thumbnails)
            self.text = gui.add_text("find", "", hint="part of the scenes' names")
            self.text.on_update(lambda _: self._list())
            pages = gui.add_button_group("page", ("previous", NEXT))
            pages.on_click(lambda _: self._list(1 if pages.value == NEXT else -1))
            self.place = gui.add_text("shown", "", disabled=True)
        with gui.add_folder("camera"):
            angle, hint = _between(round(2 * subject.angle) / 2, *ANGLES), "vertical angle of view in degrees"
            self.angle = gui.add_slider("angle", *ANGLES, 0.5, angle, hint=hint)
            self.angle.on_update(lambda _: self._zoom())
            self.up = gui.add_dropdown("up", list(UP), initial_value="z", hint="the axis that points upwards")
            self.up.on_update(lambda _: self._reset())
            self._button("Reset the view", self._reset)
        with gui.add_folder("camera path"):
            self.count = gui.add_text("cameras", "0", disabled=True)
            self._button("Add this camera", lambda: self._set_path([*self.path, self.camera()]))
            self._button("Remove the last", lambda: self._set_path(self.path[:-1]))
            self._button("Save path (JSON)", self._save_path)
            upload = gui.add_upload_button("Load path (JSON)", mime_type="application/json")
            upload.on_upload(lambda _: self._try("Load path", lambda: self._load_path(upload.value.content)))
        with gui.add_folder("save"):
            self._button("Save picture (PNG)", lambda: self._save(self._save_picture))
            self.way = gui.add_dropdown("video of", ("orbit", PATH))
            self.seconds = gui.add_slider("seconds", *SECONDS, 1, 5)
            self.video = self._button("Save video (MP4)", lambda: self._save(self._save_video))

    def _button(self, label: str, action: Callable[[], None]) -> "viser.GuiButtonHandle":
        button = self.client.gui.add_button(label)
        button.on_click(lambda _: self._try(label, action))
        return button

    def _try(self, label: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            self.fail(error, f"{label}: failed")

    def _zoom(self) -> None:
        self.client.camera.fov = math.radians(_between(self.angle.value, *ANGLES))
        self._touch()

    def _reset(self) -> None:
        """The camera that a scene is first seen from, for the axis that is up."""
        up, camera = UP[self.up.value], self.client.camera
        position = orbit(1, self.subject.distance, ELEVATION, up)[0, :3, 3].double().numpy()
        with self.client.atomic():
            camera.up_direction = up
            camera.position = position
            camera.look_at = np.zeros(3)
        self._touch()

    # Scenes

    def _listed(self) -> list[str]:
        """Scenes on the page of the list."""
        return self._found[self._page * PAGE : (self._page + 1) * PAGE]

    def _options(self) -> list[str]:
        """Scenes to choose from: the one that is shown, and those on the page of the list."""
        names = self._listed()
        return names if self.name in names else [self.name, *names]

    def _list(self, pages: int = 0) -> None:
        """List the scenes with the text in their names, some pages on."""
        text = self.text.value.strip().lower()
        self._found = [name for name in self.subject.names if text in name.lower()]
        count = len(self._found)
        self._page = min(max(self._page + pages, 0), max(0, (count - 1) // PAGE))
        self.choice.options = self._options()
        first = self._page * PAGE
        shown = f"{first + 1} to {min(first + PAGE, count)} of {count}"
        _set(self.place, shown if count else "no scene has this in its name")
        self._touch()

    def _select(self, name: str) -> None:
        if name not in self.subject.names:
            return  # a page can send anything
        self.name = name
        if name not in self.choice.options:
            self.choice.options = self._options()
        _set(self.choice, name)
        if self.sheet is not None:
            self._toggle_thumbnails()
        self._touch()

    def _toggle_thumbnails(self) -> None:
        scene = self.client.scene
        if self.sheet is not None:
            self.sheet, self.browse.label = None, THUMBNAILS
            scene.remove_click_callback()
        else:
            self.sheet, self.browse.label = Sheet(np.zeros((1, 1, 3), np.uint8), []), BACK
            scene.on_click()(lambda event: self._pick(*event.screen_pos))
        self._touch()

    def _pick(self, x: float, y: float) -> None:
        names = self._listed()
        place = self.sheet.at(x, y) if self.sheet is not None else None
        if place is not None and place < len(names):
            self._select(names[place])

    # Files

    def _set_path(self, path: list[Camera]) -> None:
        self.path = path
        _set(self.count, str(len(path)))

    def _load_path(self, data: bytes) -> None:
        self._set_path(parse_path(data, self.subject.image_size))

    def _save_path(self) -> None:
        if not self.path:
            raise ValueError("there is no path yet: add cameras to it first")
        self._give("json", dump_path(self.path, self.subject.image_size))

    def _save(self, make: Callable[[], None]) -> None:
        if not self._saving.acquire(blocking=False):
            raise ValueError("something is being saved already: try again when it is there")
        try:
            make()
        finally:
            self._saving.release()

    def _save_picture(self) -> None:
        data = io.BytesIO()
        picture = side_by_side(self._panels(self.subject, self.view.value, self.camera()))
        Image.fromarray(picture).save(data, "PNG")
        self._give("png", data.getvalue())

    def _save_video(self) -> None:
        subject, view = self.subject, self.view.value
        cameras = self._cameras_of_video(FPS * int(_between(self.seconds.value, *SECONDS)))
        self.video.disabled = True
        note = self.client.add_notification("video", "", loading=True, with_close_button=False)
        try:
            frames = []
            for i, camera in enumerate(cameras):
                if self._closed:
                    return
                if i % 8 == 0:
                    note.body = f"{i} of {len(cameras)} pictures"
                frames.append(side_by_side(self._panels(subject, view, camera)))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "video.mp4"
                write_video(file, np.stack(frames), FPS)
                self._give("mp4", file.read_bytes())
        finally:
            note.remove()
            self.video.disabled = False

    def _cameras_of_video(self, count: int) -> list[Camera]:
        """Along the path, or once around what the camera looks at."""
        if self.way.value == PATH:
            if not self.path:
                raise ValueError("there is no path yet: add cameras to it first, or choose an orbit")
            return between(self.path, count)
        camera = self.client.camera
        up, center = (torch.tensor(x, dtype=torch.float64) for x in (camera.up_direction, camera.look_at))
        return orbit_from(self.camera(), count, up, center)

    def _give(self, ending: str, data: bytes) -> None:
        name = re.sub(r"[^\w.\-]+", "-", self.name).strip(".-") or "scene"
        self.client.send_file_download(f"{name}.{ending}", data, save_immediately=True)


def _between(value: float, low: float, high: float) -> float:
    return min(max(low, value), high)  # in this order: low, where a page sends what is no number


def _set(control: Any, value: str) -> None:
    control.value = value  # which viser's annotations call read-only
