# SPDX-License-Identifier: Apache-2.0
from .api import render as render
from .build import build_main as build_main
from .config import RenderOptions as RenderOptions
from .mlp import DecodingMLP as DecodingMLP
from .mlp import make_field as make_field
from .ray_marching import Rendered as Rendered
from .rays import Cameras as Cameras
from .rays import box_range as box_range
from .rays import pixel_rays as pixel_rays
from .rng import uniform as uniform
