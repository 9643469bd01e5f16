# SPDX-License-Identifier: Apache-2.0
"""The renderer against closed forms and against slow_renderer, an independent loop."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import slow_renderer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igae.rendering import Cameras, DecodingMLP, RenderOptions, ray_marching, render, rng
from igae.rendering.ray_marching import composite, interval_weights, plane_features
from igae.rendering.rays import box_range, pixel_rays

F64 = torch.float64


class Direct(nn.Module):
    """A stand-in for the MLP: feature 0 becomes the raw density scale * f + shift, the others are colors."""

    def __init__(self, channels: int, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.scale, self.shift = channels, channels - 1, scale, shift

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[..., 0] * self.scale + self.shift, features[..., 1:]


def look_at(position: tuple[float, float, float], target: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
    """OpenCV cam2world [4, 4] whose image's down is the world's -z as far as possible."""
    p = torch.tensor(position, dtype=F64)
    z = F.normalize(torch.tensor(target, dtype=F64) - p, dim=0)
    x = F.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0], dtype=F64)), dim=0)
    pose = torch.eye(4, dtype=F64)
    pose[:3] = torch.stack((x, torch.linalg.cross(z, x), z, p), 1)
    return pose


def pinhole(focal: float = 1.1, views: int = 1) -> Tensor:
    return torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=F64).repeat(views, 1, 1)


def along_z(distance: float = 2.0) -> Tensor:
    """A camera on the negative z axis that looks along z, x right and y down as in the world: [1, 4, 4]."""
    pose = torch.eye(4, dtype=F64)[None].clone()
    pose[0, 2, 3] = -distance
    return pose


def constant_planes(values: list[float], resolution: int = 4) -> Tensor:
    """[1, 3, R, R, C] whose sum over the planes is `values`, away from the border."""
    return (torch.tensor(values, dtype=F64) / 3).expand(1, 3, resolution, resolution, -1).contiguous()


def coordinates(resolution: int, box: float) -> Tensor:
    """Where the pixel centers lie along an axis of the box."""
    return ((torch.arange(resolution, dtype=F64) + 0.5) / resolution - 0.5) * box


# --- the field ---


@pytest.mark.parametrize("axes", ["orthogonal", "eg3d"])
def test_linear_field_is_read_exactly(axes: Any) -> None:
    resolution, box = 8, 1.5
    pairs = {"orthogonal": "xy xz yz", "eg3d": "xy xz zx"}[axes].split()
    slope = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]], dtype=F64)
    c = coordinates(resolution, box)
    planes = torch.stack([a * c[None, :] + b * c[:, None] for a, b in slope])[None, ..., None]
    edge = box / 2 * (1 - 1 / resolution)  # half a pixel inside the box
    points = (torch.rand(50, 7, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2 - 1) * edge
    world = dict(zip("xyz", points.unbind(-1), strict=True))
    expected = sum(a * world[pair[0]] + b * world[pair[1]] for pair, (a, b) in zip(pairs, slope.tolist(), strict=True))
    read = plane_features(planes, torch.zeros(50, dtype=torch.int64), points, RenderOptions(axes=axes, box=box))
    torch.testing.assert_close(read[..., 0], expected, rtol=0, atol=1e-13)  # measured: 1.3e-15


@pytest.mark.parametrize("axes", ["orthogonal", "eg3d"])
@pytest.mark.parametrize("reduce", ["sum", "product"])
def test_field_equals_a_loop_over_points_and_grid_sample(axes: Any, reduce: Any) -> None:
    g = torch.Generator().manual_seed(1)
    planes = torch.randn(2, 3, 5, 5, 3, dtype=F64, generator=g)
    points = (torch.rand(9, 6, 3, dtype=F64, generator=g) - 0.5) * 2.6  # the box ends at 1: inside, border, outside
    points[0, 0] = torch.tensor([1e12, -1e12, 0.0])
    scene = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    read = plane_features(planes, scene, points, RenderOptions(axes=axes, reduce=reduce, box=2.0))
    for n, k in itertools.product(range(9), range(6)):
        x, y, z = points[n, k].tolist()
        third = (y, z) if axes == "orthogonal" else (z, x)
        taps = [
            slow_renderer.bilinear(plane.numpy(), *uv)
            for plane, uv in zip(planes[scene[n]], ((x, y), (x, z), third), strict=True)
        ]
        expected = sum(taps) if reduce == "sum" else taps[0] * taps[1] * taps[2]
        np.testing.assert_allclose(read[n, k].numpy(), expected, atol=1e-13)  # measured: 9e-16
    grid = points[scene == 1][None, :, :, :2]
    library = F.grid_sample(planes[1:, 0].permute(0, 3, 1, 2), grid, align_corners=False, padding_mode="zeros")
    one = torch.cat((planes[1:, :1], torch.zeros_like(planes[1:, :2])), 1)
    ours = plane_features(one, scene[scene == 1] * 0, points[scene == 1], RenderOptions(axes=axes, box=2.0))
    torch.testing.assert_close(ours, library[0].permute(1, 2, 0), rtol=0, atol=1e-13)


# --- rays ---


def test_box_range_hits_misses_and_inside() -> None:
    s = 1 / math.sqrt(2)
    cases = [  # origin, direction, near, far for a cube of side 1
        ((0, 0, -2), (0, 0, 1), 1.5, 2.5),
        ((0, 0, 2), (0, 0, -1), 1.5, 2.5),
        ((-1, 0, 0), (s, s, 0), math.sqrt(0.5), math.sqrt(0.5)),  # through an edge: a miss, closest at sqrt(0.5)
        ((-0.75, 0, 0), (s, s, 0), 0.25 / s, 0.5 / s),
        ((0, 0, 0), (1, 0, 0), 1e-3, 0.5),  # inside
        ((0.25, 0, 0), (-1, 0, 0), 1e-3, 0.75),
        ((0, 0, -2), (0, 0, -1), 1e-3, 1e-3),  # looks away
        ((0, 0.6, -2), (0, 0, 1), 2.0, 2.0),  # parallel to a face, outside
        ((0, 0.5, -2), (0, 0, 1), 2.0, 2.0),  # within a face
        ((3, 4, -2), (0, 0, 1), 2.0, 2.0),
    ]
    for dtype in (torch.float32, F64):
        o, d, near, far = (torch.tensor([case[i] for case in cases], dtype=dtype) for i in range(4))
        got_near, got_far = box_range(o, d, 1.0)
        torch.testing.assert_close(got_near, near, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_far, far, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", ["depth", "disparity"])
def test_rays_that_miss_the_box_are_background_with_finite_gradients(spacing: Any) -> None:
    planes = constant_planes([50.0, 0.9]).float().requires_grad_()
    background = torch.tensor([0.3], requires_grad=True)
    pose = along_z(3.0).float()
    pose[0, 0, 3] = 5.0  # the box is far to the left of the view
    options = RenderOptions(spacing=spacing)
    out = render(planes, Direct(2), Cameras(pose, pinhole().float(), (4, 4)), options, background=background, seed=0)
    assert (out.opacity == 0).all()
    assert (out.features == 2 * background.detach() - 1).all()
    assert out.depth.isfinite().all() and (out.depth > 0).all()
    planes_grad, background_grad = torch.autograd.grad(sum(o.sum() for o in out[:3]), (planes, background))
    assert (planes_grad == 0).all() and background_grad == 2 * 16


def test_pixel_rays_invert_the_projection() -> None:
    pose, k = look_at((1.0, -2.0, 0.7))[None], pinhole(1.3)
    k[0, 0, 1], k[0, 0, 2], k[0, 1, 1] = 0.07, 0.45, 0.9  # skew, off-center, another focal length
    origins, directions = pixel_rays(Cameras(pose, k, (3, 5)), F64)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(15, dtype=F64))
    points = (origins + 2.5 * directions) @ pose[0, :3, :3] - pose[0, :3, 3] @ pose[0, :3, :3]
    assert (points[:, 2] > 0).all()
    projected = points @ k[0].T
    projected = projected[:, :2] / projected[:, 2:]
    expected = torch.tensor([[(j + 0.5) / 5, (i + 0.5) / 3] for i in range(3) for j in range(5)], dtype=F64)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("point", [(0.2, 0.1, 0.0), (-0.25, 0.15, 0.2), (0.0, 0.0, -0.3)])
def test_a_blob_appears_where_it_projects(point: tuple[float, float, float]) -> None:
    size, c = 48, coordinates(128, 1.0)
    bumps = [torch.exp(-(((c - p) / 0.04) ** 2) / 2) for p in point]
    pairs = ((0, 1), (0, 2), (1, 2))
    planes = torch.stack([bumps[b][:, None] * bumps[a][None, :] for a, b in pairs])[None, ..., None]
    planes = torch.cat((planes, torch.ones_like(planes)), -1)
    poses = torch.cat((along_z(), look_at((1.1, 1.3, 0.8))[None]))
    k = pinhole(1.2, 2)
    options = RenderOptions(reduce="product", coarse_samples=96)
    out = render(
        planes, Direct(2, 400.0, -20.0), Cameras(poses, k, (size, size)), options,
        background=torch.zeros(1, dtype=F64), scene=torch.tensor([0, 0]),
    )  # fmt: skip
    grid = (torch.arange(size, dtype=F64) + 0.5) / size
    for view in range(2):
        local = torch.linalg.inv(poses[view]) @ torch.tensor([*point, 1.0], dtype=F64)
        u, v = (k[view] @ local[:3] / local[2])[:2].tolist()
        mass = out.opacity[view] / out.opacity[view].sum()
        assert out.opacity[view].max() > 0.5
        found_u, found_v = (mass.sum(0) * grid).sum().item(), (mass.sum(1) * grid).sum().item()
        assert abs(found_u - u) * size < 0.2 and abs(found_v - v) * size < 0.2  # pixels; measured: 0.065
        # Depth is the distance along the ray, not the z coordinate; the blob's front is 0.044 before its center.
        assert abs(out.depth[view][int(v * size), int(u * size)] - local[:3].norm()) < 0.06
    if point == (0.2, 0.1, 0.0):  # x right, y down
        mass = out.opacity[0] / out.opacity[0].sum()
        assert (mass.sum(0) * grid).sum() > 0.55 and (mass.sum(1) * grid).sum() > 0.52


# --- compositing ---


@pytest.mark.parametrize(("coarse", "fine"), [(2, 0), (7, 0), (48, 48), (5, 64)])
def test_slab_of_constant_density(coarse: int, fine: int) -> None:
    raw, color, behind, near, far = 2.5, 0.7, 0.2, 1.6, 2.4
    options = RenderOptions(near=near, far=far, box=4.0, coarse_samples=coarse, fine_samples=fine)
    out = render(
        constant_planes([raw, color]), Direct(2), Cameras(along_z(), pinhole(20.0), (3, 3)), options,
        background=torch.tensor([behind], dtype=F64),
    )  # fmt: skip
    # Equal densities: the intervals' products telescope, wherever the samples are. The leak makes it 3e-9.
    opacity = 1 - math.exp(-math.log1p(math.exp(raw - 1)) * (far - near))
    torch.testing.assert_close(out.opacity, torch.full((1, 3, 3), opacity, dtype=F64), rtol=0, atol=1e-8)
    feature = 2 * (opacity * color + (1 - opacity) * behind) - 1
    torch.testing.assert_close(out.features, torch.full((1, 3, 3, 1), feature, dtype=F64), rtol=0, atol=1e-8)


def test_slab_depth_is_the_discrete_rule_and_its_limit() -> None:
    raw, near, far = 2.5, 1.6, 2.4
    sigma = math.log1p(math.exp(raw - 1))

    def depth(count: int) -> float:
        options = RenderOptions(near=near, far=far, box=6.0, coarse_samples=count, fine_samples=0)
        planes, bg = constant_planes([raw, 0.5]), torch.zeros(1, dtype=F64)
        out = render(planes, Direct(2), Cameras(along_z(), pinhole(9.0), (1, 1)), options, background=bg)
        return out.depth.item()

    step = (far - near) / 3  # 4 samples, jitter 1/2
    alpha = 1 - math.exp(-sigma * step)
    w = [alpha * (1 - alpha) ** k for k in range(3)]
    expected = sum(a * (near + (k + 1) * step) for k, a in enumerate(w)) / sum(w)
    assert depth(4) == pytest.approx(expected, abs=1e-9)
    length = far - near
    limit = near + 1 / sigma - length * math.exp(-sigma * length) / (1 - math.exp(-sigma * length))
    assert depth(4001) == pytest.approx(limit + length / 4000 / 2, abs=1e-7)  # the jitter moves all by half a step


def test_linear_density_is_integrated_exactly() -> None:
    box, resolution = 0.04, 16
    c = coordinates(resolution, box)
    planes = torch.zeros(1, 3, resolution, resolution, 2, dtype=F64)
    planes[0, 1, ..., 0] = 60 + 800 * c[:, None]  # (x, z): linear in z, and softplus(raw - 1) = raw - 1 up here
    options = RenderOptions(near=1.99, far=2.01, box=box, coarse_samples=9, fine_samples=5)
    bg = torch.zeros(1, dtype=F64)
    out = render(planes, Direct(2), Cameras(along_z(), pinhole(50.0), (1, 1)), options, background=bg)
    first, last = -0.01 + 0.02 / 8 / 2, 0.01 + 0.02 / 8 / 2
    depth = 59 * (last - first) + 400 * (last**2 - first**2)
    assert out.opacity.item() == pytest.approx(1 - math.exp(-depth), abs=1e-9)


def test_empty_field_is_background_at_the_end_of_the_ray() -> None:
    planes = constant_planes([-1000.0, 0.9]).requires_grad_()
    background = torch.rand(3, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(2))
    options = RenderOptions(near=1.0, far=3.0, box=8.0, coarse_samples=5, fine_samples=4)
    out = render(planes, Direct(2), Cameras(along_z(), pinhole(), (3, 4)), options, background=background)
    assert (out.opacity == 0).all()
    torch.testing.assert_close(out.features[0], 2 * background - 1, rtol=0, atol=0)
    torch.testing.assert_close(out.depth, torch.full((1, 3, 4), 3.25, dtype=F64))
    (grad,) = torch.autograd.grad(out.depth.sum() + out.features.sum(), planes)
    assert grad.isfinite().all()


def half_space(resolution: int = 64, at: float = 0.0) -> Tensor:
    """Empty where z < at, opaque behind; color 0.8."""
    planes = constant_planes([-30.0, 0.8], resolution)
    planes[0, 1, coordinates(resolution, 1.0) > at, :, 0] += 30000.0
    return planes


def test_opaque_field_shows_its_surface() -> None:
    options, bg = RenderOptions(near=1.55, far=2.45), torch.zeros(1, dtype=F64)
    out = render(half_space(), Direct(2), Cameras(along_z(), pinhole(8.0), (4, 4)), options, background=bg)
    torch.testing.assert_close(out.opacity, torch.ones(1, 4, 4, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.features, torch.full((1, 4, 4, 1), 0.6, dtype=F64), rtol=0, atol=1e-5)
    assert (out.depth - 2.0).abs().max() < 0.012  # a pixel is 0.016; measured: 0.007


def test_importance_samples_reduce_the_error_on_a_thin_surface() -> None:
    def error(coarse: int, fine: int) -> float:
        errors = []
        for at in np.linspace(-0.2, 0.2, 13):
            planes = constant_planes([-30.0, 0.8], 256)
            z = coordinates(256, 1.0)
            planes[0, 1, (z > at) & (z < at + 0.03), :, 0] += 400.0
            options = RenderOptions(near=1.55, far=2.45, coarse_samples=coarse, fine_samples=fine)
            bg = torch.zeros(1, dtype=F64)
            out, exact = (
                render(planes, Direct(2), Cameras(along_z(), pinhole(40.0), (1, 1)), o, background=bg)
                for o in (options, RenderOptions(near=1.55, far=2.45, coarse_samples=4000, fine_samples=0))
            )
            errors.append((out.depth - exact.depth).abs().item())
        return sum(errors) / len(errors)

    equal_cost, importance = error(64, 0), error(32, 32)
    assert importance < equal_cost / 10, (importance, equal_cost)  # measured: 7e-5, 3.2e-3


def test_composite_does_not_depend_on_the_order_of_samples() -> None:
    g = torch.Generator().manual_seed(3)
    t = torch.rand(6, 20, dtype=F64, generator=g) + 1
    density, color = torch.randn(6, 20, dtype=F64, generator=g) * 3, torch.rand(6, 20, 4, dtype=F64, generator=g)
    order = t.argsort(1)
    expected = composite(t.gather(1, order), density.gather(1, order), color.take_along_dim(order[..., None], 1), True)
    for got, wanted in zip(composite(t, density, color, True), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    # and directly: sum of interval weight times mean color
    st, sd, sc = (x.take_along_dim(order.view(6, 20, *[1] * (x.ndim - 2)), 1) for x in (t, density, color))
    w = interval_weights(st, sd)
    mean = (w[..., None] * (sc[:, 1:] + sc[:, :-1]) / 2).sum(1)
    torch.testing.assert_close(expected[0], mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(expected[1], (w * (st[:, 1:] + st[:, :-1]) / 2).sum(1) / w.sum(1), rtol=0, atol=1e-12)


# --- the whole image ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fine_samples": 0, "reduce": "product", "axes": "eg3d"},
        {"near": 0.9, "far": 3.2, "spacing": "disparity", "axes": "eg3d"},
        {"near": 0.9, "far": 3.2, "reduce": "product"},
        {"spacing": "disparity", "coarse_samples": 2, "fine_samples": 5},
        {"rays_per_pixel": 2, "coarse_samples": 4, "fine_samples": 3},
    ],
)
@pytest.mark.parametrize("seeded", [False, True])
def test_image_equals_the_slow_renderer(options: dict[str, Any], seeded: bool) -> None:
    g = torch.Generator().manual_seed(6)
    options = {
        "near": "auto", "far": "auto", "box": 1.3, "coarse_samples": 9, "fine_samples": 7,
        "spacing": "depth", "axes": "orthogonal", "reduce": "sum",
    } | options  # fmt: skip
    planes = torch.randn(2, 3, 6, 6, 4, dtype=F64, generator=g) * 2
    mlp = DecodingMLP(4, 3, hidden=8, generator=g).to(F64)
    with torch.no_grad():
        mlp.b1.normal_(generator=g)
        mlp.b2.normal_(generator=g)
        mlp.w2[0] *= 6
    poses = torch.stack([look_at((1.5, 0.4, 0.9)), look_at((-0.2, -1.2, 1.4)), look_at((0.1, 0.2, 0.3), (1, 1, 0))])
    k = pinhole(0.8, 3)
    k[1, 0, 1] = 0.1
    size, scene = (3, 4), [1, 0, 1]
    background = torch.rand(*size, 3, dtype=F64, generator=g)
    rays = 3 * 12 * options.get("rays_per_pixel", 1) ** 2
    counts = options["coarse_samples"], options["fine_samples"]
    seed = (123 << 40) + 77 if seeded else None  # without one every jitter is 1/2
    coarse, fine = (
        np.array(
            [[0.5 if seed is None else slow_renderer.uniform(seed, tag, r, s) for s in range(n)] for r in range(rays)]
        ).reshape(rays, n)
        for n, tag in zip(counts, (slow_renderer.COARSE_TAG, slow_renderer.FINE_TAG), strict=True)
    )
    weights = {name: value.detach().numpy() for name, value in mlp.named_parameters()}
    expected = slow_renderer.render(
        planes.numpy(), weights, poses.numpy(), k.numpy(), size, options, background.numpy(), scene, (coarse, fine)
    )
    assert expected[2].std() > 0.05  # a picture, not a wall
    shared = {"background": background, "scene": torch.tensor(scene), "seed": seed, "distortion": True}
    out = render(planes, mlp, Cameras(poses, k, size), RenderOptions(**options), **shared)
    for got, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=0, atol=1e-9)  # measured: 7e-11
    single = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in shared.items()
    }
    out = render(
        planes.float(), mlp.float(), Cameras(poses.float(), k.float(), size), RenderOptions(**options), **single
    )
    for got, wanted in zip(out, expected, strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=0, atol=2e-4)  # measured: 3e-5


def test_without_a_seed_every_jitter_is_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(7)
    planes, mlp = torch.randn(1, 3, 6, 6, 4, dtype=F64, generator=g), DecodingMLP(4, 3, generator=g).to(F64)
    options, bg = RenderOptions(coarse_samples=6, fine_samples=5), torch.zeros(3, dtype=F64)
    plain = render(planes, mlp, Cameras(along_z(), pinhole(), (4, 4)), options, background=bg)
    monkeypatch.setattr(ray_marching, "uniform", lambda seed, stage, rays, samples, _: torch.full((rays, samples), 0.5))
    halves = render(planes, mlp, Cameras(along_z(), pinhole(), (4, 4)), options, background=bg, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], halves[:3], strict=True))


def test_stage_tags_are_those_of_the_definition() -> None:
    assert (rng.COARSE, rng.FINE) == (slow_renderer.COARSE_TAG, slow_renderer.FINE_TAG)


def test_broken_planes_give_nan_and_no_wild_read() -> None:
    mlp = DecodingMLP(4, 2, generator=torch.Generator().manual_seed(0))
    planes = torch.full((1, 3, 8, 8, 4), float("nan"))
    image = render(
        planes, mlp, Cameras(along_z(), pinhole(), (4, 4)), RenderOptions(), background=torch.ones(2), seed=0
    )
    assert image.features.isnan().any()
