# SPDX-License-Identifier: Apache-2.0
"""What is drawn over a picture: the box that the planes cover, and the cameras of the data as frustums."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from igae.viewer.cameras import quaternion_of
from igae.viewer.truth import DataView, Split

if TYPE_CHECKING:
    import viser

COLORS: dict[Split, tuple[int, int, int]] = {"train": (40, 90, 220), "heldout": (230, 110, 20)}
"""Of the frustums."""
GREEN = (20, 150, 60)
SIZE = 0.08
"""Length of a frustum, by the side of the box."""
LINE = 1.5  # pixels


class Overlay:
    """Nodes of a page's three-dimensional scene, all below one that is hidden where pictures are side by side.

    Args:
        chosen: called with the view whose frustum is clicked.
    """

    def __init__(self, client: "viser.ClientHandle", chosen: Callable[[Split, DataView], None]) -> None:
        self._scene, self._chosen = client.scene, chosen
        self._root = self._scene.add_frame("/shown", show_axes=False)
        self._box: viser.LineSegmentsHandle | None = None
        self._cameras: viser.FrameHandle | None = None

    def show(self, visible: bool) -> None:
        """Show or hide all."""
        if self._root.visible != visible:
            self._root.visible = visible

    def set_box(self, side: float | None) -> None:
        """A cube of this side around the origin; None: no box."""
        if self._box is not None:
            self._box.remove()
        self._box = None
        if side is not None:
            corners = list(itertools.product((-side / 2, side / 2), repeat=3))
            pairs = itertools.combinations(corners, 2)
            edges = np.array([(a, b) for a, b in pairs if sum(x != y for x, y in zip(a, b, strict=True)) == 1])
            self._box = self._scene.add_line_segments(
                "/shown/box", edges, GREEN, thickness=LINE, thickness_units="screen"
            )

    def set_cameras(self, views: Iterable[tuple[Split, DataView]], side: float) -> None:
        """Frustums of views, in a box of this side."""
        if self._cameras is not None:
            self._cameras.remove()
        self._cameras = self._scene.add_frame("/shown/cameras", show_axes=False)
        for split, view in views:
            pose, fy = view.camera.cam2world, float(view.camera.intrinsics[1, 1])
            frustum = self._scene.add_camera_frustum(
                f"/shown/cameras/{split}-{view.place}",
                2 * math.atan(0.5 / fy),
                fy / float(view.camera.intrinsics[0, 0]),
                scale=SIZE * side,
                thickness=LINE,
                thickness_units="screen",
                color=COLORS[split],
                wxyz=quaternion_of(pose[:3, :3]).numpy(),
                position=pose[:3, 3].numpy(),
            )
            frustum.on_click(partial(self._choose, split, view))

    def _choose(self, split: Split, view: DataView, _: Any) -> None:
        self._chosen(split, view)
