# SPDX-License-Identifier: Apache-2.0
"""Which views of a scene are held out."""

from collections.abc import Sequence

from igae.data.config import HeldOut
from igae.data.shards import seeded
from igae.data.sources.scene import BadInput, SceneRef, View


def split(ref: SceneRef, views: Sequence[View], heldout: HeldOut, seed: int) -> tuple[Sequence[View], Sequence[View]]:
    """Divide a scene's views: (training views, held-out views), each in the source's order.

    A tenth of the views are held out, at least one where there is more than one, unless the source lists them. Captures
    and many renders order views along a path, so the first tenth would be a region that no training view sees: the
    split of igae-data alone is that.

    Raises:
        BadInput: the source lists none, or all.
    """
    listed = any(view.heldout is not None for view in views)
    if heldout == "auto":
        heldout = "listed" if listed else "first" if ref.format == "igae-data" else "every"
    count = max(len(views) // 10, 1) if len(views) > 1 else 0
    if heldout == "listed":
        chosen = {i for i, view in enumerate(views) if view.heldout}
        if not listed or len(chosen) == len(views):
            what = "lists no held-out views" if not listed else "holds all of its views out"
            raise BadInput(f"scene {ref.name!r} {what}: pack with --heldout every")
    elif heldout == "first":
        chosen = set(range(count))
    elif heldout == "every":
        chosen = {(2 * i + 1) * len(views) // (2 * count) for i in range(count)}
    else:
        order = list(range(len(views)))
        seeded(seed, f"heldout/{ref.name}").shuffle(order)
        chosen = set(order[:count])
    training = [view for i, view in enumerate(views) if i not in chosen]
    return training, [view for i, view in enumerate(views) if i in chosen]
