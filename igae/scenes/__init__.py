# SPDX-License-Identifier: Apache-2.0
"""Latent scenes: their tri-planes, owned by one rank each, and the optimizer of their rows."""

from igae.scenes.config import PlanesConfig
from igae.scenes.planes import BasePlanes
from igae.scenes.row_adam import RowAdam
from igae.scenes.row_adam_cuda import CudaRowAdam, make_row_adam
from igae.scenes.store import SceneBank

__all__ = ["BasePlanes", "CudaRowAdam", "PlanesConfig", "RowAdam", "SceneBank", "make_row_adam"]
