# SPDX-License-Identifier: Apache-2.0
"""From rendered patches to latent pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchHead(nn.Module):
    """Makes one latent pixel of each patch of g x g rendered ones: their mean, and a learned linear map of how they
    differ from it.

    A mean has lost where in its patch an edge is, which an autoencoder's latents know. Where all of a patch is alike,
    as the background is, the map has nothing to add; its weight [c, g g c] starts at zero.
    """

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.zeros(channels, patch * patch * channels))

    def forward(self, fine: Tensor) -> Tensor:
        """[B, h g, w g, c] -> [B, h, w, c]."""
        views, height, width, channels = fine.shape
        g = self.patch
        patches = fine.view(views, height // g, g, width // g, g, channels).transpose(2, 3).flatten(3, 4)
        mean = patches.mean(3)
        return mean + F.linear((patches - mean[..., None, :]).flatten(3), self.weight)
