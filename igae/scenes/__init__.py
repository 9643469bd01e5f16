# SPDX-License-Identifier: Apache-2.0
"""Latent scenes: their tri-planes, owned by one rank each, and the optimizer of their rows."""

from igae.scenes.bank import PlanesConfig, SceneBank
from igae.scenes.row_adam import RowAdam

__all__ = ["PlanesConfig", "RowAdam", "SceneBank"]
