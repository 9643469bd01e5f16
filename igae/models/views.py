# SPDX-License-Identifier: Apache-2.0
"""Views of scenes as the model takes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Views:
    """Views of scenes: cam2world [B, 4, 4], intrinsics [B, 3, 3], index [B] of each view's scene among the plane rows,
    and either images uint8 [B, 3, H, W] or latents [B, c, h, w] that were encoded before. For losses of opacity also
    masks uint8 [B, H, W] and has_alpha [B] (see `igae.data.ViewBatch`), or what `coverage_bounds` makes of them."""

    index: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    images: Tensor | None = None
    latents: Tensor | None = None
    masks: Tensor | None = None
    has_alpha: Tensor | None = None
    coverage: Tensor | None = None


def to_signed(images: Tensor) -> Tensor:
    """uint8 images as floats in [-1, 1]."""
    return images.float() / 127.5 - 1.0
