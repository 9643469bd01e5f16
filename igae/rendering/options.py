# SPDX-License-Identifier: Apache-2.0
"""What a render is asked for and what it returns."""

from typing import NamedTuple

from torch import Tensor


class Rendered(NamedTuple):
    """Images of B views, h x w pixels, c channels, in the dtype of the planes (float32 for bfloat16 ones)."""

    features: Tensor
    """[B, h, w, c] in [-1, 1], up to the 0.002 by which colors may overshoot."""
    depth: Tensor
    """[B, h, w] mean distance along the ray; the end of the ray's samples where there is nothing to see."""
    opacity: Tensor
    """[B, h, w] in [0, 1]."""
