# SPDX-License-Identifier: Apache-2.0
"""The tri-planes of the scenes that this rank owns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from igae.ranks import derive_seed
from igae.scenes.config import PlanesConfig
from igae.scenes.planes import initial_row


class SceneBank:
    """Rows ``planes`` [N, *row_shape] in fp32, one a scene, in the order of ``scene_ids``: its tri-planes [3, R, R, C]
    or, with base planes, what of them is its own (see `igae.scenes.planes`).

    The start of a scene depends on (seed, its id) alone, not on which other scenes this rank owns.

    Args:
        scene_ids: global ids of the owned scenes.
        device: where the rows live.
    """

    def __init__(self, config: PlanesConfig, scene_ids: Sequence[int], seed: int, device: torch.device) -> None:
        assert len(set(scene_ids)) == len(scene_ids)
        self.scene_ids = torch.tensor(list(scene_ids), dtype=torch.int64)
        self._row_of = {int(scene): row for row, scene in enumerate(scene_ids)}
        self.planes = torch.empty(len(scene_ids), *config.row_shape, device=device)
        generator = torch.Generator()
        for row, scene in enumerate(scene_ids):
            generator.manual_seed(derive_seed(seed, "planes", int(scene)))
            self.planes[row] = initial_row(config, generator)

    def __len__(self) -> int:
        return len(self.scene_ids)

    def rows_of(self, scene: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows that a batch touches, and the place of each view's scene among them.

        Args:
            scene: global scene ids [B], on the CPU.

        Returns:
            rows [S] and index [B] with ``scene_ids[rows[index]] == scene``, both int64 on the CPU.
        """
        owned = torch.tensor([self._row_of[int(i)] for i in scene], dtype=torch.int64)
        rows, index = torch.unique(owned, return_inverse=True)
        return rows, index
