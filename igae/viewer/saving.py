# SPDX-License-Identifier: Apache-2.0
"""What a page saves and loads: pictures, videos, camera paths."""

import io
import re
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from igae.errors import redact
from igae.evaluation import Picture, write_video
from igae.viewer.cameras import Camera, between, dump_path, orbit_from, parse_path
from igae.viewer.drawing import Panel, arrange, side_by_side
from igae.viewer.subject import Subject

if TYPE_CHECKING:
    import viser

FPS = 24
SECONDS = (1, 30)  # of a video
PATH = "camera path"
SCREENSHOT = 2048  # pixels of its longer side at least
PATIENCE = 30.0  # seconds that a page has to draw its window


class Saving(ABC):
    """The controls of a page that save and load.

    Attributes:
        name: of the scene that is shown.
        view: the control that says what is drawn.
        path: cameras of the path.
    """

    client: "viser.ClientHandle"
    subject: Subject
    name: str
    view: "viser.GuiDropdownHandle[str]"
    path: list[Camera]
    _closed: bool
    _saving = threading.Lock()
    """Held while a page makes a picture or a video to save: these take the memory of many pictures."""

    @abstractmethod
    def camera(self) -> Camera:
        """Where the page's camera is now."""

    @abstractmethod
    def _panels(self, subject: Subject, view: str, camera: Camera, scale: float = 1.0) -> list[Panel]: ...

    @abstractmethod
    def _shown(self) -> list[Panel]:
        """What is in the window, thumbnails perhaps."""

    @abstractmethod
    def _has_overlay(self) -> bool:
        """Whether something is drawn over the picture."""

    def fail(self, error: Exception, title: str = "this can't be shown") -> None:
        """Tell the user; the last picture stays."""
        self.client.add_notification(title, redact(str(error)), auto_close_seconds=10, color="red")

    def _window(self) -> tuple[int, int]:
        """Height and width of what is left of the controls, in pixels."""
        return max(1, self.client.camera.image_height), max(1, self.client.camera.image_width)

    def _add_saving(self) -> None:
        gui = self.client.gui
        with gui.add_folder("camera path"):
            self.count = gui.add_text("cameras", "0", disabled=True, hint="of the path")
            add = lambda: self._set_path([*self.path, self.camera()])  # noqa: E731
            self._button("Add this camera", add, "the path goes on to where the camera is now")
            self._button("Remove the last", lambda: self._set_path(self.path[:-1]), "camera of the path")
            self._button("Save path (JSON)", self._save_path, "in the layout of the data's transforms_opencv.json")
            hint = "a file as this page saves it, or of the data"
            upload = gui.add_upload_button("Load path (JSON)", mime_type="application/json", hint=hint)
            upload.on_upload(lambda _: self._try("Load path", lambda: self._load_path(upload.value.content)))
        with gui.add_folder("save"):
            hint = "what is drawn, in the model's own pixels, without labels"
            self._button("Save picture (PNG)", lambda: self._save(self._save_picture), hint)
            hint = f"the window with labels, box and cameras, its longer side {SCREENSHOT} pixels or more"
            self._button("Save screenshot (PNG)", lambda: self._save(self._save_screenshot), hint)
            hint = "once around what the camera looks at, or along the camera path"
            self.way = gui.add_dropdown("video of", ("orbit", PATH), hint=hint)
            self.seconds = gui.add_slider("seconds", *SECONDS, 1, 5, hint=f"length of the video, {FPS} pictures each")
            hint = "what is drawn, in the model's own pixels"
            self.video = self._button("Save video (MP4)", lambda: self._save(self._save_video), hint)

    def _button(self, label: str, action: Callable[[], None], hint: str) -> "viser.GuiButtonHandle":
        button = self.client.gui.add_button(label, hint=hint)
        button.on_click(lambda _: self._try(label, action))
        return button

    def _try(self, label: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            self.fail(error, f"{label}: failed")

    def _set_path(self, path: list[Camera]) -> None:
        self.path = path
        set_value(self.count, str(len(path)))

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
        self._give_png(side_by_side(self._panels(self.subject, self.view.value, self.camera())))

    def _save_screenshot(self) -> None:
        window = self._window()  # of as few pixels as a slow page draws
        enlarged = max(1.0, SCREENSHOT / max(window))
        height, width = (round(side * enlarged) for side in window)
        if self._has_overlay():  # a PNG would be larger than the messages that a page may send
            picture = self.client.get_render(height, width, transport_format="jpeg", timeout=PATIENCE)
        else:  # what the page has is compressed
            picture = arrange(self._shown(), (height, width), max(height, width)).picture
        self._give_png(picture)

    def _save_video(self) -> None:
        subject, view = self.subject, self.view.value
        cameras = self._cameras_of_video(FPS * int(clamp(self.seconds.value, *SECONDS)))
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

    def _give_png(self, picture: Picture) -> None:
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        self._give("png", data.getvalue())

    def _give(self, ending: str, data: bytes) -> None:
        name = re.sub(r"[^\w.\-]+", "-", self.name).strip(".-") or "scene"
        self.client.send_file_download(f"{name}.{ending}", data, save_immediately=True)


def clamp(value: float, low: float, high: float) -> float:
    return min(max(low, value), high)  # in this order: low, where a page sends what is no number


def set_value(control: Any, value: str | float) -> None:
    control.value = value  # which viser's annotations call read-only
