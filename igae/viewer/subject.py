# SPDX-License-Identifier: Apache-2.0
"""The model that is shown, with its scenes: of a checkpoint, an export, or the newest checkpoint of a run."""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from igae.data import orbit, orbit_like, up_of
from igae.evaluation import Picture
from igae.export import find_model, load_trained
from igae.models import IGAE
from igae.viewer.cameras import angle_of, lens_of
from igae.viewer.drawing import ShownScene, choose_threads, draw, psnr_of
from igae.viewer.truth import Truth

ELEVATION = 0.4
MEASURED = 4
"""Held-out views of a scene, spread evenly, that its PSNR is the mean of."""
log = logging.getLogger("igae")


@dataclass
class Subject:
    """A model on its device, and its scenes, which are read when they are first asked for.

    ``title`` names the model; ``distance`` (from the origin) and ``angle`` (vertical angle of view in degrees) are
    those of a camera like the data's. ``truth`` has the views of the data, where it is known where they are. By name:
    ``scenes`` are those in memory, ``thumbnails`` those that were drawn, ``psnr`` in dB those that were measured (NaN:
    a scene without held-out views).
    """

    title: str
    model: IGAE
    names: list[str]
    distance: float
    angle: float
    _rows: Callable[[str], Tensor]
    truth: Truth | None = None
    kept: int = 32
    """Scenes whose planes stay in memory."""
    kept_thumbnails: int = 1000

    def __post_init__(self) -> None:
        self.thumbnails: dict[str, Picture] = {}
        self.psnr: dict[str, float] = {}
        self.scenes: OrderedDict[str, ShownScene] = OrderedDict()
        self._fronts: dict[str, tuple[Tensor, Tensor]] = {}
        self._lock = Lock()

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of decoded images."""
        return self.model.plain.shape[2], self.model.plain.shape[3]

    def front(self, name: str) -> tuple[Tensor, Tensor]:
        """The camera that a scene is first seen from, cam2world [4, 4], and the direction [3] that is up: those of the
        scene's views, which are waited for, or around the z axis where there are none. float64."""
        if name not in self._fronts:
            cameras = self.truth.cameras(name) if self.truth else torch.empty(0, 4, 4)
            if len(cameras):
                # Of the orbit, the camera where most views are: a capture may be of one side.
                ring, middle = orbit_like(cameras, 36).double(), cameras[:, :3, 3].mean(0)
                self._fronts[name] = ring[(ring[:, :3, 3] @ middle).argmax()], up_of(cameras)
            else:
                up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
                self._fronts[name] = orbit(1, self.distance, ELEVATION)[0].double(), up
        return self._fronts[name]

    def make_thumbnail(self, name: str) -> None:
        """Draw a scene as it is first seen. Raises as :meth:`scene`."""
        lens = lens_of(self.angle, self.image_size)
        image = draw(self.model, self.scene(name), self.front(name)[0], lens).image
        assert image is not None
        if len(self.thumbnails) >= self.kept_thumbnails:
            del self.thumbnails[next(iter(self.thumbnails))]
        self.thumbnails[name] = image

    def measure(self, name: str, then: Callable[[], None]) -> bool:
        """Measure a scene's PSNR: decoded renders against held-out views. False: these are still to be read, and
        ``then`` is called when they are there. Raises as :meth:`scene`."""
        views = self.truth.views(name, "heldout", then) if self.truth else []
        if views is None:
            return False
        scene, count = self.scene(name), min(MEASURED, len(views))
        errors = []
        for view in (views[i * len(views) // count] for i in range(count)):
            drawn = draw(self.model, scene, view.camera.cam2world, view.camera.intrinsics)
            errors.append(psnr_of(drawn, view.image))
        self.psnr[name] = sum(errors) / len(errors) if errors else math.nan
        return True

    def label(self, name: str) -> str:
        """A scene's name, with its PSNR where that was measured."""
        error = self.psnr.get(name, math.nan)
        return name if math.isnan(error) else f"{name} · {error:.1f} dB"

    def choose_threads(self, most: int) -> int:
        """See :func:`igae.viewer.drawing.choose_threads`."""
        lens = lens_of(self.angle, self.image_size)
        name = self.names[0]
        return choose_threads(self.model, self.scene(name), self.front(name)[0], lens, most)

    @torch.no_grad()
    def scene(self, name: str) -> ShownScene:
        """A scene's planes. Raises ValueError or OSError if its file can't be read."""
        with self._lock:
            if name not in self.scenes:
                row = self._rows(name).to(self.model.background.device)
                scene = ShownScene(self.model.planes_of(row[None])[0])
                lens = lens_of(self.angle, self.image_size)
                latents = draw(self.model, scene, self.front(name)[0], lens, decode=False).latents
                scene.mean, scene.std = latents.mean((1, 2)), latents.std((1, 2), correction=0)
                self.scenes[name] = scene
                if len(self.scenes) > self.kept:
                    self.scenes.popitem(last=False)
            self.scenes.move_to_end(name)
            return self.scenes[name]


def open_subject(where: str, overrides: Sequence[str], device: torch.device, truth: Truth | None = None) -> Subject:
    """Read the model of a checkpoint or an export.

    Args:
        overrides: ``key=value``, of what is elsewhere now than the checkpoint's configuration says (``data.root``).
        truth: views that were read before, for a model of the same data.

    Raises:
        ValueError: it is missing or damaged, or its data or autoencoder can't be found.
    """
    trained = load_trained(where, overrides)
    model, (distance, focal) = trained.model.to(device), trained.camera
    size = (model.plain.shape[2], model.plain.shape[3])
    rows = lambda name: trained.rows([name])[0]  # noqa: E731
    if trained.data and trained.manifest and not (truth and truth.is_of(trained.manifest)):
        truth = Truth(trained.data, trained.manifest)
    return Subject(trained.title, model, trained.names, distance, angle_of(focal, size), rows, truth)


class Followed:
    """What a path or URL stands for, which is another checkpoint from time to time if it is that of a run.

    Attributes:
        subject: of the newest checkpoint that could be read.

    Raises ValueError as :func:`open_subject` where there is none at the start.
    """

    def __init__(self, where: str, overrides: Sequence[str], device: torch.device) -> None:
        self._where, self._overrides, self._device = where, overrides, device
        self._shown, self._broken, self._said = find_model(where), "", ""
        self.is_run = self._shown != where.rstrip("/")
        self.subject = open_subject(self._shown, overrides, device)

    def check(self) -> Subject | None:
        """The subject of a checkpoint that has come since the last call, or None. One that can't be read is left alone,
        with a line in the log."""
        found = ""
        try:
            found = find_model(self._where, whole=False)
            if found == self._shown:
                self._broken = ""
            if found in (self._shown, self._broken):
                return None
            self.subject = open_subject(found, self._overrides, self._device, self.subject.truth)
            self._shown, self._broken, self._said = found, "", ""
            return self.subject
        except (ValueError, OSError, RuntimeError) as error:
            self._broken = found
            if str(error) != self._said:
                self._said = str(error)
                log.warning("a new checkpoint can't be shown, %s stays: %s", self.subject.title, error)
            return None
