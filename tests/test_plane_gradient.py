# SPDX-License-Identifier: Apache-2.0
"""The gradient of planes, which CPUs compute by a product with a sparse matrix."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from igae.rendering import RenderOptions
from igae.rendering.ray_marching import plane_features

F64 = torch.float64


@pytest.mark.parametrize("reduce", ["sum", "product"])
def test_gradient_of_planes_equals_that_of_grid_sample(reduce: Any) -> None:
    g = torch.Generator().manual_seed(2)
    planes = torch.randn(2, 3, 5, 5, 3, dtype=F64, generator=g).requires_grad_()
    points = (torch.rand(9, 40, 3, dtype=F64, generator=g) - 0.5) * 2.6  # many points to a texel, some in no plane
    scene = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    read = plane_features(planes, scene, points, RenderOptions(reduce=reduce, box=2.0))
    upstream = torch.randn(9, 40, 3, dtype=F64, generator=g)
    (ours,) = torch.autograd.grad(read, planes, upstream)
    planes_of_ray = planes[scene].permute(1, 0, 4, 2, 3)
    parts = [
        F.grid_sample(plane, points[:, None][..., [a, b]], align_corners=False, padding_mode="zeros")
        for plane, (a, b) in zip(planes_of_ray, [(0, 1), (0, 2), (1, 2)], strict=True)
    ]
    whole = parts[0] + parts[1] + parts[2] if reduce == "sum" else parts[0] * parts[1] * parts[2]
    (library,) = torch.autograd.grad(whole[:, :, 0].transpose(1, 2), planes, upstream)
    torch.testing.assert_close(ours, library, rtol=0, atol=1e-12)
