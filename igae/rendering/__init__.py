# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of tri-planes. This package imports nothing else of igae."""

from igae.rendering.api import render
from igae.rendering.config import RenderOptions
from igae.rendering.mlp import DecodingMLP
from igae.rendering.options import Rendered

__all__ = ["DecodingMLP", "RenderOptions", "Rendered", "render"]
