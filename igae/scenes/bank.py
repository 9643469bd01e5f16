# SPDX-License-Identifier: Apache-2.0
"""The tri-planes of the scenes that this rank owns."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from igae.config import Section
from igae.distributed import derive_seed


class PlanesConfig(Section):
    resolution: int = Field(default=64, ge=2)
    """Texels along a side of a plane (R)."""
    features: int = Field(default=32, ge=1)
    """Features of a texel (C)."""
    init_std: float = Field(default=0.1, ge=0)
    """Standard deviation of the normal noise that planes start from."""


class SceneBank:
    """Tri-planes [N, 3, R, R, C] in fp32, one row a scene, in the order of ``scene_ids``.

    The start of a scene depends on (seed, its id) alone, not on which other scenes this rank owns.

    Args:
        scene_ids: global ids of the owned scenes.
        device: where the planes live.
    """

    def __init__(self, config: PlanesConfig, scene_ids: Sequence[int], seed: int, device: torch.device) -> None:
        assert len(set(scene_ids)) == len(scene_ids)
        self.scene_ids = torch.tensor(list(scene_ids), dtype=torch.int64)
        self._row_of = {int(scene): row for row, scene in enumerate(scene_ids)}
        shape = (3, config.resolution, config.resolution, config.features)
        self.planes = torch.empty(len(scene_ids), *shape, device=device)
        generator = torch.Generator()
        for row, scene in enumerate(scene_ids):
            generator.manual_seed(derive_seed(seed, "planes", int(scene)))
            self.planes[row] = torch.randn(shape, generator=generator) * config.init_std

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
