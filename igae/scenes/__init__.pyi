# SPDX-License-Identifier: Apache-2.0
from . import ownership as ownership
from .config import PlanesConfig as PlanesConfig
from .ownership import part as part
from .planes import BasePlanes as BasePlanes
from .row_adam import RowAdam as RowAdam
from .row_adam_cuda import CudaRowAdam as CudaRowAdam
from .row_adam_cuda import make_row_adam as make_row_adam
from .store import SceneStore as SceneStore
