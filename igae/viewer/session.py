# SPDX-License-Identifier: Apache-2.0
"""One open page: its controls, its camera, and what it is sent."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from igae.data import orbit
from igae.viewer.cameras import Camera, angle_of, lens_of, pose_of, quaternion_of, rotation_of
from igae.viewer.drawing import (
    ALL,
    CHANNEL,
    CHANNELS,
    DATA,
    RGB,
    VIEWS,
    Panel,
    Sheet,
    arrange,
    draw,
    is_decoded,
    panels,
    views_of,
)
from igae.viewer.guard import Uploads
from igae.viewer.overlay import Overlay
from igae.viewer.saving import Saving, clamp, set_value
from igae.viewer.subject import ELEVATION, Subject
from igae.viewer.truth import DataView, Split, nearest

if TYPE_CHECKING:
    import viser

PAGE = 12  # scenes on a page of thumbnails
REST = 0.25  # seconds without a new camera after which it rests
BUDGET = 0.12  # seconds that a picture may take while the camera moves; else fewer pixels are rendered
MOVING, RESTING = (768, 85), (1280, 95)
"""Pixels of a picture's longer side at most, and quality of its JPEG; a PNG takes 15 times as long."""
ANGLES = (5.0, 120.0)  # degrees
OF_DATA = "data"
UP = {"z": (0, 0, 1), "y": (0, 1, 0), "x": (1, 0, 0), "-z": (0, 0, -1), "-y": (0, -1, 0), "-x": (-1, 0, 0)}
UPRIGHT = 0.9  # cosine of the angle up to which one direction is as good as another
NEXT = "next"
THUMBNAILS, BACK = "Show thumbnails", "Back to the scene"
SPLITS: dict[str, Split] = {"held-out": "heldout", "training": "train"}


def scale_for(cost: float) -> float:
    """Scale of the latents' sides while the camera moves, if a whole picture takes ``cost`` seconds."""
    return next((scale for scale in (1.0, 0.5) if cost * scale**2 <= BUDGET), 0.25)


class Session(Saving):
    """A page that is open in a browser.

    Callbacks of its controls only note what is to be drawn; a thread of the server draws it with :meth:`update`.

    Args:
        wake: called when there is something to draw.

    Attributes:
        name: of the scene that is shown.
        path: cameras of the path.
        sheet: of thumbnails, while they are shown.
        split, place: views of the data that are compared with, and the one that is shown.
    """

    def __init__(self, client: "viser.ClientHandle", subject: Subject, wake: Callable[[], None]) -> None:
        self.client, self.subject, self._wake = client, subject, wake
        self.name, self.path = subject.names[0], list[Camera]()
        self.sheet: Sheet | None = None
        self.split: Split = "heldout"
        self.place = 0
        self._next_place: int | None = None
        self._labels, self._label, self._cameras_of = dict[str, str](), self.name, ""
        self._failed: set[str] = set()
        self._found, self._page = subject.names, 0
        self._dirty, self._coarse, self._moved, self._cost = True, False, 0.0, 0.0
        self._closed = False
        large = ValueError("the file is too large for a camera path")
        client.gui._current_file_upload_states = Uploads(lambda: self.fail(large, "Load path: failed"))
        self.overlay = Overlay(client, lambda split, view: self._compare(split, view.place))
        self._add_controls()
        client.camera.on_update(lambda _: self._touch(moved=True))
        self._list()
        self._reset()  # a page may have connected before the server's first camera reached it

    # Drawing

    def show(self, subject: Subject) -> None:
        """Show another model; scene and camera stay what they are."""
        self.subject = subject
        self._failed.clear()
        set_value(self.title, subject.title)
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
            pose_of(rotation_of(wxyz), position), lens_of(clamp(self.angle.value, *ANGLES), self.subject.image_size)
        )

    def update(self) -> bool:
        """Draw what has to be drawn now, if anything. Returns whether there will be more to draw soon."""
        rests = time.monotonic() - self._moved > REST
        # Captures have worlds of their own: another scene may have to be turned the right way up.
        if self.up.value == OF_DATA and self.subject.front(self.name)[1] @ self._up < UPRIGHT:
            self._reset()
        if self._dirty or (self._coarse and rests):
            self._dirty = False
            self._coarse = not rests and self.sheet is None
            self._show_cameras()
            if self.sheet is not None:
                self.sheet = arrange(self._shown(), self._window(), RESTING[0])
                self._send(self.sheet, RESTING[1], False)
            else:
                whole = rests or self.view.value == DATA
                self._draw(1.0 if whole else scale_for(self._cost), *(RESTING if rests else MOVING))
        elif self.sheet is not None:
            there = self.subject.thumbnails.keys() | self._failed
            missing = next((name for name in self._listed() if name not in there), None)
            if missing is not None:
                self._failed.add(missing)  # which is not tried again
                self.subject.make_thumbnail(missing)
                self._failed.remove(missing)
                self._dirty = True
        if rests and not self._dirty:
            self._measure()
        return self._dirty or self._coarse

    def _draw(self, scale: float, most: int, quality: int) -> None:
        start, view = time.perf_counter(), self.view.value
        shown = self._panels(self.subject, view, self.camera(), scale)
        self._send(arrange(shown, self._window(), most), quality, self._is_single)
        self._cost = (time.perf_counter() - start) / scale**2

    def _panels(self, subject: Subject, view: str, camera: Camera, scale: float = 1.0) -> list[Panel]:
        scene, truth = subject.scene(self.name), None
        if view == DATA and (found := self._data_view(subject, camera)) is not None:
            camera, truth = found.camera, found.image
        drawn = draw(subject.model, scene, camera.cam2world, camera.intrinsics, scale, is_decoded(view))
        return panels(view, drawn, scene, subject.image_size, int(clamp(self.channel.value, 1, 1e6)) - 1, truth)

    def _has_overlay(self) -> bool:
        return self.sheet is None and self._is_single and (self.box.value or self.cameras.value)

    @property
    def _is_single(self) -> bool:
        """Whether one picture is drawn: box and cameras have no place over several."""
        return len(VIEWS[self.view.value]) == 1 and self.view.value != CHANNELS

    def _shown(self) -> list[Panel]:
        if self.sheet is None:
            return self._panels(self.subject, self.view.value, self.camera())
        names, subject = self._listed() or [""], self.subject
        return [Panel(subject.label(name), subject.thumbnails.get(name)) for name in names]

    def _send(self, sheet: Sheet, quality: int, single: bool) -> None:
        if not self._closed:
            self.overlay.show(single)
            # The angle of view with which the overlay fits the picture, which may be less high than the window.
            (height, width), (h, w) = self._window(), self.subject.image_size
            tangent = math.tan(math.radians(clamp(self.angle.value, *ANGLES)) / 2)
            self.client.camera.fov = 2 * math.atan(tangent * height / min(height, width * h / w))
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
        views, channels = views_of(subject.model, subject.truth is not None), subject.model.latent_shape[0]
        self.title = gui.add_text("model", subject.title, disabled=True, hint="run and step, or path, of what is shown")
        hint = "what is drawn; colors of latents are those of the scene's first view"
        self.view = gui.add_dropdown("view", views, initial_value=ALL if ALL in views else RGB, hint=hint)
        self.view.on_update(lambda _: self._change_view())
        hint = "number of the latent channel that is drawn in gray"
        self.channel = gui.add_slider("channel", 1, max(2, channels), 1, 1, visible=False, hint=hint)
        self.channel.on_update(lambda _: self._touch())
        with gui.add_folder("scenes"):
            hint = "with the PSNR of its decoded renders against held-out views, where the data are there"
            self.choice = gui.add_dropdown("scene", [self.name], hint=hint)
            self.choice.on_update(lambda _: self._select(self._labels.get(self.choice.value, self.choice.value)))
            self.browse = self._button(THUMBNAILS, self._toggle_thumbnails, "a page of scenes; click one to open it")
            self.text = gui.add_text("find", "", hint="part of the scenes' names")
            self.text.on_update(lambda _: self._list())
            pages = gui.add_button_group("page", ("previous", NEXT), hint=f"of the list, {PAGE} scenes each")
            pages.on_click(lambda _: self._list(1 if pages.value == NEXT else -1))
            self.listed = gui.add_text(
                "shown", "", disabled=True, hint="which of the scenes that were found are listed"
            )
        with gui.add_folder("data", visible=subject.truth is not None):
            hint = "show the nearest view that was held out, or trained on, beside its render and their difference"
            splits = gui.add_button_group("compare", tuple(SPLITS), hint=hint)
            splits.on_click(lambda _: self._compare(SPLITS.get(splits.value, "heldout")))
            self.number = gui.add_number("number", 1, min=1, max=1, step=1, hint="of the view that is compared")
            self.number.on_update(lambda _: self._choose_place(int(clamp(self.number.value, 1, self.number.max or 1))))
            hint = "frustums of the cameras, training blue and held-out orange; click one to compare its view"
            self.cameras = gui.add_checkbox("cameras", False, hint=hint)
            self.cameras.on_update(lambda _: self._change_overlay(self.cameras.value))
        with gui.add_folder("camera"):
            self.box = gui.add_checkbox("box", False, hint="edges of the cube that the planes cover")
            self.box.on_update(lambda _: self._change_overlay(self.box.value))
            angle, hint = clamp(round(2 * subject.angle) / 2, *ANGLES), "vertical angle of view in degrees"
            self.angle = gui.add_slider("angle", *ANGLES, 0.5, angle, hint=hint)
            self.angle.on_update(lambda _: self._touch())
            ups, hint = [*UP] if subject.truth is None else [OF_DATA, *UP], "the axis that points upwards"
            self.up = gui.add_dropdown("up", ups, initial_value=ups[0], hint=hint)
            self.up.on_update(lambda _: self._reset())
            self._button("Reset the view", self._reset, "back to where a scene is first seen from")
        self._add_saving()

    def _change_view(self) -> None:
        self.channel.visible = self.view.value == CHANNEL
        self._touch()

    def _change_overlay(self, on: bool) -> None:
        self.overlay.set_box(self.subject.model.options.box if self.box.value else None)
        if on and not self._is_single:
            set_value(self.view, RGB)
        self._touch()

    def _reset(self) -> None:
        """The camera that a scene is first seen from, for the axis that is up."""
        camera, (front, self._up) = self.client.camera, self.subject.front(self.name)
        if self.up.value != OF_DATA:
            self._up = torch.tensor(UP[self.up.value], dtype=torch.float64)
            front = orbit(1, self.subject.distance, ELEVATION, self._up)[0].double()
        with self.client.atomic():
            camera.up_direction = self._up.numpy()
            camera.position = front[:3, 3].numpy()
            camera.look_at = np.zeros(3)
        self._touch()

    # Scenes

    def _listed(self) -> list[str]:
        """Scenes on the page of the list."""
        return self._found[self._page * PAGE : (self._page + 1) * PAGE]

    def _relabel(self) -> None:
        """Name the scenes to choose from: the one that is shown, and those on the page of the list."""
        names = self._listed()
        labels = {self.subject.label(name): name for name in (names if self.name in names else [self.name, *names])}
        self._labels |= labels
        self._label = self.subject.label(self.name)
        set_value(self.choice, self._label)  # first: viser chooses another one where it is no option
        self.choice.options = list(labels)

    def _list(self, pages: int = 0) -> None:
        """List the scenes with the text in their names, some pages on."""
        text = self.text.value.strip().lower()
        self._found = [name for name in self.subject.names if text in name.lower()]
        count = len(self._found)
        self._page = min(max(self._page + pages, 0), max(0, (count - 1) // PAGE))
        self._relabel()
        first = self._page * PAGE
        shown = f"{first + 1} to {min(first + PAGE, count)} of {count}"
        set_value(self.listed, shown if count else "no scene has this in its name")
        self._touch()

    def _select(self, name: str) -> None:
        if name not in self.subject.names:
            return  # a page can send anything
        if name != self.name:
            self.name, self._next_place = name, None
            self._relabel()
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

    # Data

    def _compare(self, split: Split, place: int | None = None) -> None:
        """Compare with a view of the data: with the nearest one, or with the one at a place."""
        self.split, self._next_place = split, -1 if place is None else place
        set_value(self.view, DATA)
        if self.sheet is not None:
            self._toggle_thumbnails()
        self._touch()

    def _choose_place(self, number: int) -> None:
        if number - 1 != self.place:
            self._compare(self.split, number - 1)

    def _data_view(self, subject: Subject, camera: Camera) -> DataView | None:
        """The view of the data that is compared with: the one that was asked for, to which the camera moves, or the one
        that is nearest to the camera. None: there are none, or they are still to be read."""
        views = subject.truth.views(self.name, self.split, self._touch) if subject.truth else []
        if not views:
            return None
        asked, self._next_place = self._next_place, None
        found = nearest(views, camera) if asked in (None, -1) else views[min(asked or 0, len(views) - 1)]
        self.place, self.number.max = found.place, len(views)
        set_value(self.number, found.place + 1)
        if asked is not None:
            self._move_to(found.camera)
        return found

    def _move_to(self, to: Camera) -> None:
        """Move the page's camera; it turns around the point before it that is as far away as the origin."""
        camera, position = self.client.camera, to.cam2world[:3, 3]
        set_value(self.angle, angle_of(float(to.intrinsics[1, 1]), (1, 1)))
        with self.client.atomic():
            camera.position = position.numpy()
            camera.look_at = (position + to.cam2world[:3, 2] * position.norm().clamp_min(1e-3)).numpy()
            camera.wxyz = quaternion_of(to.cam2world[:3, :3]).numpy()

    def _show_cameras(self) -> None:
        """Draw the cameras of the scene's views, or none, where that is not done yet."""
        wanted, truth = self.name if self.cameras.value else "", self.subject.truth
        if wanted == self._cameras_of or truth is None:
            return
        of_splits = [(split, truth.views(wanted, split, self._touch)) for split in SPLITS.values() if wanted]
        if all(views is not None for _, views in of_splits):
            every = [(split, view) for split, views in of_splits for view in views or []]
            self.overlay.set_cameras(every, self.subject.model.options.box)
            self._cameras_of = wanted

    def _measure(self) -> None:
        """Measure one of the scenes that are shown, and write what was measured beside their names."""
        subject, names = self.subject, [self.name, *(self._listed() if self.sheet is not None else [])]
        name = next((name for name in names if name not in subject.psnr), None)
        if name is not None and subject.truth is not None:
            try:
                if subject.measure(name, self._wake) and self.sheet is not None:
                    self._dirty = True
            except Exception as error:
                subject.psnr[name] = math.nan  # it is not tried again
                if not isinstance(error, (ValueError, OSError)):  # of files, which drawing has told
                    raise
        if self._label != subject.label(self.name):
            self._relabel()
