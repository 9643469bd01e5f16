# SPDX-License-Identifier: Apache-2.0
"""One open page: its controls, its camera, and what it is sent."""

import io
import math
import re
import tempfile
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
from igae.viewer.subject import ELEVATION, Subject

if TYPE_CHECKING:
    import viser

FPS = 24
PAGE = 12
"""Scenes on a page of thumbnails."""
REST = 0.25
"""Seconds without a new camera after which it rests."""
BUDGET = 0.12
"""Seconds that a picture may take while the camera moves; else fewer pixels are rendered."""
MOVING, RESTING = (768, 85), (1280, 95)
"""Pixels of a picture's longer side at most, and quality of its JPEG; a PNG takes 15 times as long."""
MAX_UPLOAD = 16 << 20
UP = {"z": (0, 0, 1), "y": (0, 1, 0), "x": (1, 0, 0), "-z": (0, 0, -1), "-y": (0, -1, 0), "-x": (-1, 0, 0)}
PREVIOUS, NEXT = "previous", "next"
THUMBNAILS, BACK = "Show thumbnails", "Back to the scene"
ORBIT, PATH = "orbit", "camera path"


def scale_for(cost: float) -> float:
    """Of the latents' sides while the camera moves, by the seconds that a picture with all of them takes."""
    return next((scale for scale in (1.0, 0.5) if cost * scale**2 <= BUDGET), 0.25)


class Session:
    """A page that is open in a browser. Callbacks of its controls only note what is to be drawn; a thread of the server
    draws it with :meth:`update`.

    Args:
        wake: called when there is something to draw.
    """

    def __init__(self, client: "viser.ClientHandle", subject: Subject, wake: Callable[[], None]) -> None:
        self.client, self.subject, self._wake = client, subject, wake
        self.name = subject.names[0]
        self._path: list[Camera] = []
        self._sheet: Sheet | None = None  # of thumbnails, while they are shown
        self._failed: set[str] = set()
        self._found, self._page = subject.names, 0
        self._dirty, self._coarse, self._moved, self._cost = True, False, 0.0, 0.0
        self._closed = False
        self._add_controls()
        client.camera.on_update(lambda _: self._touch(moved=True))
        wake()

    # What is drawn.

    def show(self, subject: Subject) -> None:
        """Go on with another model, the scene that is shown and the camera being what they are."""
        self.subject = subject
        self._failed.clear()
        _set(self._title, subject.title)
        if self.name not in subject.names:
            self._select(subject.names[0])
        self._find()

    def close(self) -> None:
        self._closed = True

    def camera(self) -> Camera:
        """Where the page's camera is now."""
        camera = self.client.camera
        wxyz, position = (torch.tensor(x, dtype=torch.float64) for x in (camera.wxyz, camera.position))
        return Camera(pose_of(rotation_of(wxyz), position), lens_of(self._angle.value, self.subject.image_size))

    def update(self) -> bool:
        """Draw what has to be drawn now, if anything. Returns whether there will be more to draw soon."""
        rests = time.monotonic() - self._moved > REST
        if self._dirty or (self._coarse and rests):
            self._dirty = False
            self._coarse = not rests and self._sheet is None
            if self._sheet is not None:
                self._draw_thumbnails()
            else:
                self._draw(1.0 if rests else scale_for(self._cost), RESTING if rests else MOVING)
        elif self._sheet is not None:
            there = self.subject.thumbnails.keys() | self._failed
            missing = [name for name in self._names_of_page() if name not in there]
            if missing:
                self._failed.add(missing[0])  # which is not tried again
                self.subject.make_thumbnail(missing[0])
                self._failed.remove(missing[0])
                self._dirty = True
        return self._dirty or self._coarse

    def fail(self, error: Exception) -> None:
        """Tell the user; the last picture stays."""
        self._tell("this can't be shown", redact(str(error)), "red")

    def _window(self) -> tuple[int, int]:
        camera = self.client.camera
        return max(1, camera.image_height), max(1, camera.image_width)

    def _draw(self, scale: float, how: tuple[int, int]) -> None:
        start, view, subject = time.perf_counter(), self._view.value, self.subject
        pictures = self._panels(subject, view, self.camera(), scale)
        self._send(arrange(pictures, VIEWS[view], self._window(), how[0]), how[1])
        self._cost = (time.perf_counter() - start) / scale**2

    def _panels(self, subject: Subject, view: str, camera: Camera, scale: float = 1.0) -> list[Picture]:
        scene = subject.scene(self.name)
        drawn = draw(subject.model, scene, camera.cam2world, camera.intrinsics, scale, is_decoded(view))
        return panels(view, drawn, scene, subject.image_size)

    def _draw_thumbnails(self) -> None:
        names = self._names_of_page()
        pictures = [self.subject.thumbnails.get(name) for name in names]
        self._sheet = arrange(pictures or [None], names or [""], self._window(), RESTING[0])
        self._send(self._sheet, RESTING[1])

    def _send(self, sheet: Sheet, quality: int) -> None:
        if self._closed:
            return
        self.client.scene.set_background_image(sheet.picture, format="jpeg", jpeg_quality=quality)
        self.client.flush()

    def _touch(self, moved: bool = False) -> None:
        if moved:
            self._moved = time.monotonic()
        self._dirty = True
        self._wake()

    # Controls.

    def _add_controls(self) -> None:
        gui, subject = self.client.gui, self.subject
        views = views_of(subject.model)
        self._title = gui.add_text("model", subject.title, disabled=True)
        self._view = gui.add_dropdown("view", views, initial_value=ALL if ALL in views else RGB)
        self._view.on_update(lambda _: self._touch())
        with gui.add_folder("scenes"):
            self._choice = gui.add_dropdown("scene", self._options(), initial_value=self.name)
            self._choice.on_update(lambda _: self._select(self._choice.value))
            self._browse = gui.add_button(THUMBNAILS)
            self._browse.on_click(lambda _: self._toggle_thumbnails())
            self._text = gui.add_text("find", "", hint="part of the scenes' names")
            self._text.on_update(lambda _: self._find())
            pages = gui.add_button_group("page", (PREVIOUS, NEXT))
            pages.on_click(lambda _: self._turn(1 if pages.value == NEXT else -1))
            self._place = gui.add_text("shown", self._place_text(), disabled=True)
        with gui.add_folder("camera"):
            angle = min(max(round(2 * subject.angle) / 2, 5.0), 120.0)
            self._angle = gui.add_slider(
                "angle", 5.0, 120.0, 0.5, angle, hint="of view, from top to bottom, in degrees"
            )
            self._angle.on_update(lambda _: self._zoom())
            self._up = gui.add_dropdown("up", list(UP), initial_value="z", hint="the axis that points upwards")
            self._up.on_update(lambda _: self._reset())
            gui.add_button("Reset the view").on_click(lambda _: self._reset())
        with gui.add_folder("camera path"):
            self._count = gui.add_text("cameras", "0", disabled=True)
            gui.add_button("Add this camera").on_click(lambda _: self._set_path([*self._path, self.camera()]))
            gui.add_button("Remove the last").on_click(lambda _: self._set_path(self._path[:-1]))
            gui.add_button("Save path (JSON)").on_click(lambda _: self._save_path())
            upload = gui.add_upload_button("Load path (JSON)", mime_type="application/json")
            upload.on_upload(lambda _: self._load_path(upload.value.content))
        with gui.add_folder("save"):
            gui.add_button("Save picture (PNG)").on_click(lambda _: self._save_picture())
            self._way = gui.add_dropdown("video of", (ORBIT, PATH))
            self._seconds = gui.add_slider("seconds", 1, 30, 1, 5)
            self._video = gui.add_button("Save video (MP4)")
            self._video.on_click(lambda _: self._save_video())

    def _zoom(self) -> None:
        self.client.camera.fov = math.radians(self._angle.value)
        self._touch()

    def _reset(self) -> None:
        """The camera that a scene is first seen from, for the axis that is up."""
        up, camera = UP[self._up.value], self.client.camera
        position = orbit(1, self.subject.distance, ELEVATION, up)[0, :3, 3].double().numpy()
        with self.client.atomic():
            camera.up_direction = up
            camera.position = position
            camera.look_at = np.zeros(3)
        self._touch()

    def _set_path(self, path: list[Camera]) -> None:
        self._path = path
        _set(self._count, str(len(path)))

    # Scenes.

    def _names_of_page(self) -> list[str]:
        return self._found[self._page * PAGE : (self._page + 1) * PAGE]

    def _options(self) -> list[str]:
        """What can be chosen: the scene that is shown, and those of the page."""
        names = self._names_of_page()
        return names if self.name in names else [self.name, *names]

    def _place_text(self) -> str:
        if not self._found:
            return "no scene has this in its name"
        first = self._page * PAGE
        return f"{first + 1} to {min(first + PAGE, len(self._found))} of {len(self._found)}"

    def _find(self) -> None:
        text = self._text.value.strip().lower()
        self._found = [name for name in self.subject.names if text in name.lower()] if text else self.subject.names
        self._page = min(self._page, max(0, (len(self._found) - 1) // PAGE))
        self._turn(0)

    def _turn(self, pages: int) -> None:
        self._page = min(max(self._page + pages, 0), max(0, (len(self._found) - 1) // PAGE))
        self._choice.options = self._options()
        _set(self._place, self._place_text())
        self._touch()

    def _select(self, name: str) -> None:
        self.name = name
        if name not in self._choice.options:
            self._choice.options = self._options()
        _set(self._choice, name)
        if self._sheet is not None:
            self._toggle_thumbnails()
        self._touch()

    def _toggle_thumbnails(self) -> None:
        scene = self.client.scene
        if self._sheet is not None:
            self._sheet = None
            self._browse.label = THUMBNAILS
            scene.remove_click_callback()
        else:
            self._sheet = Sheet(np.zeros((1, 1, 3), np.uint8), [])
            self._browse.label = BACK
            scene.on_click()(lambda event: self._pick(*event.screen_pos))
        self._touch()

    def _pick(self, x: float, y: float) -> None:
        names = self._names_of_page()
        place = self._sheet.at(x, y) if self._sheet is not None else None
        if place is not None and place < len(names):
            self._select(names[place])

    # Files.

    def _save_picture(self) -> None:
        data = io.BytesIO()
        try:
            picture = side_by_side(self._panels(self.subject, self._view.value, self.camera()))
        except (ValueError, OSError) as error:
            return self.fail(error)
        Image.fromarray(picture).save(data, "PNG")
        self._give("png", data.getvalue())

    def _save_path(self) -> None:
        if not self._path:
            return self._tell("there is no path yet", "add cameras to it first", "red")
        self._give("json", dump_path(self._path, self.subject.image_size))

    def _load_path(self, data: bytes) -> None:
        try:
            if len(data) > MAX_UPLOAD:
                raise ValueError("the file is too large for a camera path")
            self._set_path(parse_path(data, self.subject.image_size))
        except ValueError as error:
            self._tell("the path was not loaded", str(error), "red")

    def _save_video(self) -> None:
        path, count = self._path, FPS * self._seconds.value
        if self._way.value == PATH and not path:
            return self._tell("there is no path yet", "add cameras to it first, or choose an orbit", "red")
        cameras = between(path, count) if self._way.value == PATH else self._orbit(count)
        subject, view = self.subject, self._view.value
        self._video.disabled = True
        note = self.client.add_notification("video", "", loading=True, with_close_button=False)
        try:
            frames = []
            for i, camera in enumerate(cameras):
                if self._closed:
                    return
                if i % 8 == 0:
                    note.body = f"{i} of {count} pictures"
                frames.append(side_by_side(self._panels(subject, view, camera)))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "video.mp4"
                write_video(file, np.stack(frames), FPS)
                self._give("mp4", file.read_bytes())
        except (ValueError, OSError, RuntimeError) as error:
            self.fail(error)
        finally:
            note.remove()
            self._video.disabled = False

    def _orbit(self, count: int) -> list[Camera]:
        """Once around what the camera looks at."""
        camera = self.client.camera
        up, center = (torch.tensor(x, dtype=torch.float64) for x in (camera.up_direction, camera.look_at))
        return orbit_from(self.camera(), count, up, center)

    def _give(self, ending: str, data: bytes) -> None:
        name = re.sub(r"[^\w.\-]+", "-", self.name).strip(".-") or "scene"
        self.client.send_file_download(f"{name}.{ending}", data, save_immediately=True)

    def _tell(self, title: str, text: str, color: Any = None) -> None:
        self.client.add_notification(title, text, auto_close_seconds=10, color=color)


def _set(control: Any, value: str) -> None:
    control.value = value  # which viser's annotations call read-only
