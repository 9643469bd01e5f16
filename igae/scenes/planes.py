# SPDX-License-Identifier: Apache-2.0
"""What a scene's row is, and how rows become tri-planes: as they are, or with base planes that all scenes share.

With base planes (micro/macro decomposition; Kassab et al., "Fused-Planes", arXiv 2410.23742) the planes of scene i are

    T_i = concat(micro_i, macro_i)  or  micro_i + macro_i,    macro_i = sum over k of w_ik B_k + b_i.

The M base planes B are parameters of the trained module. Micro planes, weights w_i and bias b_i (one number) are the
scene's own, one after another in its row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from igae.scenes.config import PlanesConfig


def initial_row(config: PlanesConfig, generator: torch.Generator) -> Tensor:
    """A scene's row at the start: noise; weights are such that macro planes have the noise of base planes."""
    if config.base_planes == 0:
        return torch.randn(config.row_shape, generator=generator) * config.init_std
    micro = torch.randn(math.prod(config.micro_shape), generator=generator) * config.init_std
    weights = torch.randn(config.base_planes, generator=generator) / config.base_planes**0.5
    return torch.cat([micro, weights, torch.zeros(int(config.bias))])


class BasePlanes(nn.Module):
    """The planes that all scenes share: `planes` [M, 3, R, R, F], drawn from N(0, init_std^2) with ``generator``."""

    def __init__(self, config: PlanesConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert config.base_planes > 0
        self.config = config
        shape = (config.base_planes, 3, config.resolution, config.resolution, config.macro_features)
        self.planes = nn.Parameter(torch.randn(shape, generator=generator) * config.init_std)

    def forward(self, rows: Tensor, measure: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Planes [S, 3, R, R, C] of scenes' rows [S, ...], and what ``measure`` gives of the base planes (in the same
        call: some strategies have the parameters of a module together only while it is called).

        The macro planes of all rows are one matrix product.
        """
        config, count = self.config, len(rows)
        sizes = [math.prod(config.micro_shape), config.base_planes, int(config.bias)]
        micro, weights, bias = rows.split(sizes, dim=1)
        base = self.planes.flatten(1)
        if config.fusion == "sum":
            fused = torch.addmm(micro + bias if config.bias else micro, weights, base).view(count, *config.micro_shape)
        else:
            macro = torch.addmm(bias, weights, base) if config.bias else weights @ base
            fused = macro.view(count, *self.planes.shape[1:])
            if config.micro_features:
                fused = torch.cat([micro.view(count, *config.micro_shape), fused], -1)
        return fused, measure(self.planes) if measure is not None else None
