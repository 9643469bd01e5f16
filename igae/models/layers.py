# SPDX-License-Identifier: Apache-2.0
"""Layers of diffusers' networks, computed in ways that suit autocast, channels last in memory and GPUs."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from igae.models import fused

FLASH_HEAD = 256
"""Channels of a head that flash attention takes at most."""
MOST_PIXELS = 1024
"""Whose attention is a matrix of 4 MB an image and a head."""


class GroupNorm(nn.GroupNorm):
    """Keeps the dtype of its input under autocast, which would go on in float32. Statistics are in float32 anyway."""

    silu, kernels = False, False
    """SiLU follows; CUDA kernels compute it where they can."""

    def forward(self, input: Tensor) -> Tensor:
        if self.kernels and self.affine and fused.fits(input, self.num_channels):
            return fused.norm(input, self, self.silu)[0]
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = (None if p is None else p.to(input.dtype) for p in (self.weight, self.bias))
            y = F.group_norm(input, self.num_groups, weight, bias, self.eps)
        return F.silu(y) if self.silu else y


class Convolution(nn.Conv2d):
    """Adds its bias in one pass, and sums up that one's gradient in one."""

    def forward(self, input: Tensor) -> Tensor:
        if not fused.fits(input, self.out_channels):
            return super().forward(input)
        return fused.bias_sum(None, self._conv_forward(input, self.weight, None), self.bias)


class ResnetBlock(ResnetBlock2D):
    """In two normalizations, two convolutions and a sum."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        x, first, second, shortcut = input_tensor, self.conv1, self.conv2, self.conv_shortcut
        channels = (first.in_channels, first.out_channels, second.out_channels)
        if not (self._is_plain and temb is None and all(fused.fits(x, count) for count in channels)):
            result: Tensor = super().forward(x, temb, *args, **kwargs)  # type: ignore[arg-type]
            return result
        y, x = fused.norm(x, self.norm1, silu=True)
        y = first._conv_forward(y, first.weight, None)
        y = fused.norm(y, self.norm2, silu=True, bias=first.bias)[0]
        y, bias = second._conv_forward(y, second.weight, None), second.bias
        if shortcut is not None:
            x = shortcut._conv_forward(x, shortcut.weight, None)
            bias = shortcut.bias if bias is None else bias if shortcut.bias is None else bias + shortcut.bias
        return fused.bias_sum(x, y, bias)

    @property
    def _is_plain(self) -> bool:
        changes_size = self.upsample is not None or self.downsample is not None
        drops = self.dropout.p > 0 and self.training
        norms = all(type(norm) is GroupNorm and norm.affine for norm in (self.norm1, self.norm2))
        plain = norms and isinstance(self.nonlinearity, nn.SiLU) and self.time_embedding_norm != "scale_shift"
        return bool(plain and not changes_size and not drops and self.output_scale_factor == 1)


class Matrices(AttnProcessor2_0):
    """Attention of up to MOST_PIXELS in products of matrices: torch's fused kernels for heads of more than FLASH_HEAD
    channels are slower, the more so backward. Of more pixels the matrix would be large."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        few = hidden_states.ndim == 4 and hidden_states[0, 0].numel() <= MOST_PIXELS
        with sdpa_kernel(SDPBackend.MATH) if few else nullcontext():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


class Upsample(Upsample2D):
    """Repeats pixels and convolves them, with 4 of 9 products: of the nine pixels under a 3 x 3 kernel four differ.

    Each of four phases of the result, every second pixel along both sides, is a 2 x 2 convolution of the small image.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        if not (self._is_plain and output_size is None):
            result: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return result
        if not all(
            fused.fits(hidden_states, count) for count in (conv.in_channels, conv.out_channels, conv.out_channels * 4)
        ):
            y = woven(F.conv2d(hidden_states, folded(conv.weight), padding=1))
            return y if conv.bias is None else y + conv.bias.to(y.dtype).view(-1, 1, 1)
        return fused.weave(F.conv2d(hidden_states, fused.fold(conv.weight, hidden_states.dtype), padding=1), conv.bias)

    @property
    def _is_plain(self) -> bool:
        if self.norm is not None or not self.interpolate or not self.use_conv or self.name != "conv":
            return False
        conv: Any = self.conv
        usual = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.padding_mode == "zeros"
        return usual and conv.stride == conv.dilation == (1, 1) and conv.groups == 1


def folded(weight: Tensor) -> Tensor:
    """Weights [4 O, I, 2, 2] with which to convolve an image (padding 1) for the four phases of what weights
    [O, I, 3, 3] make of it with each pixel repeated; phases (0, 0), (0, 1), (1, 0), (1, 1) one after the other."""

    def sides(w: Tensor, dim: int) -> list[Tensor]:
        first, middle, last = w.unbind(dim)
        return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]

    return torch.cat([phase for half in sides(weight, 2) for phase in sides(half, 3)])


def woven(x: Tensor) -> Tensor:
    """The image [B, C, 2 H, 2 W] of phases [B, 4 C, H + 1, W + 1], each of which has one row and one column too many:
    the last where the phase is 0 along a side, else the first."""
    height, width = x.shape[2] - 1, x.shape[3] - 1
    phases = x.unflatten(1, (2, 2, -1))
    rows = [torch.stack([phases[:, v, u, :, v : v + height, u : u + width] for u in range(2)], -1) for v in range(2)]
    return torch.stack(rows, 3).flatten(2, 3).flatten(3, 4)


def keep_dtypes(net: nn.Module) -> None:
    """Make a network's norms keep the dtype that autocast chose for its convolutions."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm


def skip_products(net: nn.Module) -> None:
    """Have a network's layers that repeat pixels and convolve them compute no product twice."""
    for module in net.modules():
        if type(module) is Upsample2D:
            module.__class__ = Upsample


def to_channels_last(net: Any) -> None:
    """Have a network's activations and weights with channels as the last dimension in memory, and CUDA kernels compute
    what is between convolutions, where they can."""
    net.to(memory_format=torch.channels_last)
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Convolution
        elif type(module) is ResnetBlock2D:
            module.__class__ = ResnetBlock
        elif type(module) is GroupNorm:
            module.kernels = True
        elif type(module) is Attention and isinstance(module.processor, AttnProcessor2_0):
            if module.inner_dim // module.heads > FLASH_HEAD:
                processor: Any = Matrices
                module.processor = processor()
        if isinstance(getattr(module, "conv_norm_out", None), GroupNorm) and isinstance(module.conv_act, nn.SiLU):
            module.conv_norm_out.silu, module.conv_act = True, nn.Identity()
