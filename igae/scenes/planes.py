# SPDX-License-Identifier: Apache-2.0
"""What a scene's row is, and how rows become tri-planes: as they are, or with base planes that all scenes share.

With base planes (micro/macro decomposition; Kassab et al., "Fused-Planes", arXiv 2410.23742) the planes of scene i are

    T_i = concat(micro_i, macro_i)  or  micro_i + macro_i,    macro_i = sum over k of w_ik B_k + b_i.

The M base planes B are parameters of the trained module. Micro planes, weights w_i and bias b_i (one number) are the
scene's own, one after another in its row.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from igae.config import Section


class PlanesConfig(Section):
    resolution: int = Field(default=64, ge=2)
    """Texels along a side of a plane (R)."""
    features: int = Field(default=32, ge=1)
    """Features of a texel that the MLP reads (C): with base planes those of micro and macro planes together."""
    init_std: float = Field(default=0.1, ge=0)
    """Standard deviation of the normal noise that planes start from."""
    base_planes: int = Field(default=0, ge=0)
    """Base planes that all scenes share (M); with 0 each scene has planes of its own alone."""
    micro_features: int = Field(default=0, ge=0)
    """Features of a texel that are the scene's own; 0: a scene is its weights (and bias) alone."""
    macro_features: int = Field(default=0, ge=0)
    """Features of a texel that are a weighted sum of base planes."""
    fusion: Literal["concat", "sum"] = "concat"
    """Whether macro features come after the micro ones or are added to them."""
    bias: bool = False
    """Whether a scene has a number that is added to its macro features."""

    @model_validator(mode="after")
    def _check(self) -> "PlanesConfig":
        micro, macro, features = self.micro_features, self.macro_features, self.features
        if self.base_planes == 0:
            if micro or macro or self.bias or self.fusion != "concat":
                raise ValueError(
                    "micro_features, macro_features, fusion and bias are of scenes that share base planes: set "
                    "base_planes, or leave them out"
                )
        elif macro == 0:
            raise ValueError("base_planes are there but macro_features is 0: set it, or leave base_planes out")
        elif self.fusion == "concat" and micro + macro != features:
            raise ValueError(
                f"features is {features}, but micro_features and macro_features one after another are {micro + macro}: "
                f"set features={micro + macro}"
            )
        elif self.fusion == "sum" and not micro == macro == features:
            raise ValueError(
                f"fusion=sum adds {micro} micro_features to {macro} macro_features: set both to features, {features} "
                "(scenes without micro planes take fusion=concat)"
            )
        return self

    @property
    def micro_shape(self) -> tuple[int, ...]:
        return (3, self.resolution, self.resolution, self.micro_features)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a scene's row: [3, R, R, C] or, with base planes, [micro planes + weights + bias]."""
        if self.base_planes == 0:
            return (3, self.resolution, self.resolution, self.features)
        return (math.prod(self.micro_shape) + self.base_planes + self.bias,)

    def start(self, generator: torch.Generator) -> Tensor:
        """A scene's row at the start: noise; weights are such that macro planes have the noise of base planes."""
        if self.base_planes == 0:
            return torch.randn(self.row_shape, generator=generator) * self.init_std
        micro = torch.randn(math.prod(self.micro_shape), generator=generator) * self.init_std
        weights = torch.randn(self.base_planes, generator=generator) / self.base_planes**0.5
        return torch.cat([micro, weights, torch.zeros(int(self.bias))])


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
