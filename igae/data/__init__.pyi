# SPDX-License-Identifier: Apache-2.0
from .cameras import is_rigid as is_rigid
from .cameras import normalized_intrinsics as normalized_intrinsics
from .cameras import orbit as orbit
from .cameras import orbit_like as orbit_like
from .config import DataConfig as DataConfig
from .decoding import to_device as to_device
from .latents import LatentBatch as LatentBatch
from .latents import LatentCache as LatentCache
from .latents import LatentLoader as LatentLoader
from .manifest import Manifest as Manifest
from .manifest import Scene as Scene
from .streams import ImageLoader as ImageLoader
from .streams import StreamState as StreamState
from .streams import ViewBatch as ViewBatch
from .streams import ViewLoader as ViewLoader
from .streams import image_loader as image_loader
from .streams import view_loader as view_loader
