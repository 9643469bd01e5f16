# SPDX-License-Identifier: Apache-2.0
"""The network that turns the features of a point into its density and color."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igae.config import plug_in


def make_field(name: str, in_channels: int, out_channels: int, generator: torch.Generator) -> "DecodingMLP":
    """The network that `RenderOptions.field` names: a DecodingMLP, or another module that is called as one.

    Raises:
        ValueError: no installed package has it.
    """
    field = DecodingMLP if name == "mlp" else plug_in("fields", name)
    network: DecodingMLP = field(in_channels, out_channels, generator=generator)
    return network


class DecodingMLP(nn.Module):
    """in_channels -> hidden (softplus) -> 1 raw density + out_channels colors.

    Parameters: `w1` [hidden, in_channels] and `w2` [1 + out_channels, hidden], drawn from N(0, 1 / fan_in) with
    `generator`; `b1` [hidden] and `b2` [1 + out_channels], zeros. Row 0 of `w2` and `b2` makes the density.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int = 64, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, hidden) < 1:
            raise ValueError(f"a decoding MLP cannot have {in_channels} -> {hidden} -> 1 + {out_channels} channels")
        self.in_channels, self.out_channels, self.hidden = in_channels, out_channels, hidden
        self.w1 = nn.Parameter(torch.randn(hidden, in_channels, generator=generator) / in_channels**0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(1 + out_channels, hidden, generator=generator) / hidden**0.5)
        self.b2 = nn.Parameter(torch.zeros(1 + out_channels))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [..., in_channels] -> raw density [...], color [..., out_channels] in (-0.001, 1.001).

        The density becomes sigma = softplus(raw - 1) when it is composited. The matrix products are done in the dtype
        of the weights, or that of the surrounding autocast; the results come in the dtype of the features.
        """
        hidden = F.softplus(F.linear(features.to(self.w1.dtype), self.w1, self.b1))
        out = F.linear(hidden.to(self.w2.dtype), self.w2, self.b2).to(features.dtype)
        return out[..., 0], torch.sigmoid(out[..., 1:]) * 1.002 - 0.001
