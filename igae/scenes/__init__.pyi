# SPDX-License-Identifier: Apache-2.0
from .config import STORAGE as STORAGE
from .config import PlanesConfig as PlanesConfig
from .config import StoredPlanesConfig as StoredPlanesConfig
from .config import Tier as Tier
from .ownership import assign_scenes as assign_scenes
from .ownership import ownership_table as ownership_table
from .ownership import part as part
from .ownership import share_images as share_images
from .planes import BasePlanes as BasePlanes
from .row_adam import RowAdam as RowAdam
from .row_adam_cuda import KERNELS as KERNELS
from .row_adam_cuda import CudaRowAdam as CudaRowAdam
from .row_adam_cuda import make_row_adam as make_row_adam
from .store import SceneStore as SceneStore
from .tiers import Storage as Storage
