# SPDX-License-Identifier: Apache-2.0
"""Layers of diffusers' networks, computed in ways that suit autocast, torch.compile and channels last in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Keeps the dtype of its input under autocast, which would go on in float32. Statistics are in float32 anyway."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            if torch.compiler.is_compiling() and self.affine:
                return self._by_channels(input)
            weight, bias = (None if p is None else p.to(input.dtype) for p in (self.weight, self.bias))
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)

    def _by_channels(self, input: Tensor) -> Tensor:
        """In sums over the pixels of a channel, and never in another layout than the input's.

        torch's own operator takes channels_last apart, and each convolution after it has to put it together again.
        """
        shape, pixels = (*input.shape[:2], *[1] * (input.ndim - 2)), input[0, 0].numel()
        groups = (shape[0], self.num_groups, shape[1] // self.num_groups)
        wide, dims = input.float(), tuple(range(2, input.ndim))
        # Squares are summed around a pixel of the channel: where the mean is far from 0, that is nearer to it.
        pivot = wide.detach().select(-1, 0)
        pivot = pivot.select(-1, 0) if input.ndim == 4 else pivot
        centered = wide - pivot.view(shape)
        offset, square = centered.sum(dims) / pixels, centered.square().sum(dims) / pixels
        means = (pivot + offset).view(groups)
        mean = means.mean(2, keepdim=True)
        variance = ((square - offset.square()).view(groups) + (means - mean).square()).mean(2, keepdim=True)
        scale = (variance.clamp(min=0) + self.eps).rsqrt().expand(groups).reshape(shape[:2]) * self.weight
        shift = self.bias + (pivot - mean.expand(groups).reshape(shape[:2])) * scale
        return (centered * scale.view(shape) + shift.view(shape)).to(input.dtype)


class Upsample(Upsample2D):
    """Repeats pixels by copying: the backward pass is then a sum, and not as many atomic additions."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.norm is None and self.interpolate and self.use_conv and self.name == "conv"
        if not (torch.compiler.is_compiling() and plain and output_size is None):
            result: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return result
        batch, channels, height, width = hidden_states.shape
        pixels = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None]
        wide = pixels.expand(-1, -1, 2, -1, 2, -1).reshape(batch, 2 * height, 2 * width, channels)
        convolution: Any = self.conv
        convolved: Tensor = convolution(wide.permute(0, 3, 1, 2))
        return convolved


class Shortcut(nn.Conv2d):
    """The 1x1 shortcut of a ResnetBlock2D, whose input may not be channels-last: converts it first."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous(memory_format=torch.channels_last))


def keep_dtypes(net: nn.Module) -> None:
    """Make a network's norms keep the dtype that autocast chose for its convolutions."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm


def to_channels_last(net: Any) -> None:
    """Have a network's activations and weights with channels as the last dimension in memory."""
    net.to(memory_format=torch.channels_last)
    for name, module in net.named_modules():
        if type(module) is Upsample2D:
            module.__class__ = Upsample
        elif type(module) is nn.Conv2d and name.endswith(".conv_shortcut"):
            module.__class__ = Shortcut
