# SPDX-License-Identifier: Apache-2.0
"""Properties of the renderer: random numbers, samples, gradients, determinism, precision, and what it refuses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pydantic
import pytest
import slow_renderer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igae.rendering import Cameras, DecodingMLP, Rendered, RenderOptions, ray_marching, render, rng
from igae.rendering.ray_marching import (
    coarse_depths,
    importance_depths,
    importance_probabilities,
    interval_weights,
)
from igae.rendering.rays import NEAREST, box_range

F64 = torch.float64
CPU = torch.device("cpu")
WORD = st.integers(0, 2**32 - 1)


def setup(dtype: torch.dtype = torch.float32, scenes: int = 2) -> dict[str, Any]:
    """Arguments of `render` for three views of two scenes, 4x5 pixels."""
    g = torch.Generator().manual_seed(0)
    pose = torch.eye(4, dtype=F64).repeat(3, 1, 1)
    pose[:, :3, 3] = torch.tensor([[0.0, 0.1, -1.5], [0.2, 0.0, -1.2], [-0.1, 0.2, -1.4]])
    intrinsics = torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]], dtype=F64).repeat(3, 1, 1)
    mlp = DecodingMLP(4, 3, hidden=8, generator=g)
    with torch.no_grad():
        mlp.w2[0] *= 10
    return {
        "planes": torch.randn(scenes, 3, 6, 6, 4, generator=g).to(dtype),
        "mlp": mlp.to(dtype),
        "cameras": Cameras(pose.to(dtype), intrinsics.to(dtype), (4, 5)),
        "options": RenderOptions(coarse_samples=6, fine_samples=5),
        "background": torch.rand(3, generator=g).to(dtype),
        "scene": torch.tensor([0, 1, 0]),
    }


def same(a: Rendered, b: Rendered) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


# --- random numbers ---


@given(st.tuples(WORD, WORD, WORD, WORD))
@settings(max_examples=200, deadline=None)
def test_pcg4d_equals_unsigned_arithmetic(words: tuple[int, int, int, int]) -> None:
    expected = slow_renderer.pcg4d(words)
    assert [int(w) for w in rng.pcg4d(*(torch.tensor(w) for w in words))] == expected
    assert list(rng.pcg4d(*words)) == expected


def test_pcg4d_known_answers() -> None:
    # Worked out with NumPy's uint32, which wraps by itself.
    for words in ([0, 0, 0, 0], [1, 2, 3, 4], [2**32 - 1] * 4, [0xDEADBEEF, 0x636F6172, 255, 47]):
        x, y, z, w = (np.array([a], np.uint32) * np.uint32(1664525) + np.uint32(1013904223) for a in words)
        for turn in range(2):
            x = x + y * w
            y = y + z * x
            z = z + x * y
            w = w + y * z
            if turn == 0:
                x, y, z, w = (a ^ (a >> np.uint32(16)) for a in (x, y, z, w))
        assert [int(a) for a in rng.pcg4d(*(torch.tensor(a) for a in words))] == [int(a[0]) for a in (x, y, z, w)]


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([rng.COARSE, rng.FINE]))
@settings(max_examples=30, deadline=None)
def test_uniform_numbers_equal_the_definition(seed: int, stage: int) -> None:
    got = rng.uniform(seed, stage, 5, 3, CPU)
    expected = [[slow_renderer.uniform(seed, stage, r, s) for s in range(3)] for r in range(5)]
    assert got.dtype == torch.float32 and got.tolist() == expected
    assert torch.equal(got, rng.uniform(torch.tensor(seed), stage, 5, 3, CPU))
    assert torch.equal(got, rng.uniform(seed + 2**64, stage, 5, 3, CPU))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    rays, samples = 4096, 48
    u = {
        (seed, stage): rng.uniform(seed, stage, rays, samples, CPU).double()
        for seed in (0, 1, 2**32)
        for stage in (rng.COARSE, rng.FINE)
    }
    for value in u.values():
        assert value.min() >= 0 and value.max() < 1
        # chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6
        counts = torch.histc(value.flatten(), 256, 0, 1)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6
        low = torch.histc((value * 2**16) % 1, 256, 0, 1)  # so are the low bits
        chi2 = ((low - low.mean()) ** 2 / low.mean()).sum()
        assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6
        c = value - 0.5
        for lag in (1, 2, 16):  # correlations have a standard deviation of 1 / sqrt(n)
            for a, b in ((c[lag:], c[:-lag]), (c[:, lag:], c[:, :-lag])):
                assert abs((a * b).mean() * 12) < 5 / a.numel() ** 0.5
    streams = torch.stack([value.flatten() - 0.5 for value in u.values()])
    correlation = streams @ streams.T * 12 / streams.shape[1]
    torch.testing.assert_close(correlation, torch.eye(len(u), dtype=F64), rtol=0, atol=5 / streams.shape[1] ** 0.5)


# --- samples ---


@pytest.mark.parametrize("spacing", ["depth", "disparity"])
@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0.01, 5), st.floats(0, 5))
@settings(max_examples=50, deadline=None)
def test_coarse_depths_ascend_in_their_steps(spacing: str, seed: int, count: int, near: float, length: float) -> None:
    far = near + length
    u = rng.uniform(seed, rng.COARSE, 3, count, CPU)
    t = coarse_depths(torch.full((3,), near), torch.full((3,), far), u, spacing)
    assert (t.diff(dim=1) >= 0).all()
    step = torch.arange(count) / (count - 1)
    if spacing == "depth":
        low, high = near + step * length, near + (step + 1 / (count - 1)) * length
    else:
        rate = 1 / far - 1 / near
        low, high = 1 / (1 / near + step * rate), 1 / (1 / near + (step + 1 / (count - 1)).clamp(max=1) * rate)
    rounding = 1e-5 + 2e-7 * far / near  # of a difference of inverses; measured 1.6e-5 where far / near is 172
    assert (t >= low * (1 - rounding)).all() and (t <= high * (1 + rounding)).all()


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 30), st.floats(0, 6))
@settings(max_examples=100, deadline=None)
def test_weights_and_importance_depths_stay_in_range(seed: int, coarse: int, fine: int, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(4, coarse, generator=g).sort(dim=1).values + 1
    w = interval_weights(t, torch.randn(4, coarse, generator=g) * 10**spread)
    assert (w >= 0).all() and (w.sum(1) <= 1 + 1e-6).all()
    drawn = importance_depths(t, w, torch.rand(4, fine, generator=g))
    assert (drawn >= t[:, :1]).all() and (drawn <= t[:, -1:]).all()
    assert (drawn.diff(dim=1) >= -1e-6).all()


@given(st.integers(0, 2**32), st.floats(0.2, 3))
@settings(max_examples=50, deadline=None)
def test_box_range_is_where_the_ray_is_inside(seed: int, box: float) -> None:
    g = torch.Generator().manual_seed(seed)
    o = torch.randn(20, 3, dtype=F64, generator=g) * 2
    d = torch.nn.functional.normalize(torch.randn(20, 3, dtype=F64, generator=g) - o / 2, dim=-1)
    near, far = box_range(o, d, box)
    t = torch.linspace(NEAREST * box, 15, 3001, dtype=F64)
    inside = ((o[:, None] + t[:, None] * d[:, None]).abs() < box / 2).all(-1)
    clear = ((t - near[:, None]).abs() > 1e-9) & ((t - far[:, None]).abs() > 1e-9)
    assert torch.equal(inside & clear, ((t > near[:, None]) & (t < far[:, None])) & clear)


# --- importance sampling ---


def test_importance_histogram_follows_the_smoothed_weights() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.1, 0.0, 0.0]], dtype=F64)
    # the mean of the larger of each pair: (0+.5)/2, (.5+.5)/2, (.5+.1)/2, (.1+0)/2, 0; then + 0.01
    smooth = np.array([0.26, 0.51, 0.31, 0.06, 0.01])
    probability = smooth / smooth.sum()
    np.testing.assert_allclose(importance_probabilities(weights)[0].numpy(), probability, atol=1e-15)
    t = torch.tensor([[1.0, 1.5, 1.75, 2.5, 4.0, 4.1]], dtype=F64)
    count = 20000
    jitter = torch.rand(1, count, dtype=F64, generator=torch.Generator().manual_seed(4))
    drawn = importance_depths(t, weights, jitter)[0]
    assert (drawn.diff() >= 0).all() and drawn[0] >= 1 and drawn[-1] <= 4.1
    histogram, _ = np.histogram(drawn.numpy(), t[0].numpy())
    np.testing.assert_allclose(histogram, probability * count, atol=2)  # stratified: the ends of the strata, no more
    for k in range(5):  # uniform inside each interval
        inside = drawn[(drawn >= t[0, k]) & (drawn < t[0, k + 1])]
        fraction = ((inside - t[0, k]) / (t[0, k + 1] - t[0, k])).numpy()
        np.testing.assert_allclose(fraction, (np.arange(len(fraction)) + 0.5) / len(fraction), atol=2 / len(fraction))


def test_importance_draws_one_sample_per_stratum() -> None:
    t = torch.linspace(0, 1, 2, dtype=F64)[None]  # one interval: the CDF is the identity
    jitter = torch.rand(1, 10, dtype=F64, generator=torch.Generator().manual_seed(5))
    expected = (torch.arange(10) + jitter) / 10
    torch.testing.assert_close(importance_depths(t, torch.zeros(1, 1, dtype=F64), jitter), expected)


# --- gradients ---


@pytest.mark.parametrize("reduce", ["sum", "product"])
@pytest.mark.parametrize(("fine", "side"), [(0, 1), (4, 1), (4, 2)])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, reduce: Any, fine: int, side: int) -> None:
    args = setup(F64)
    args["planes"] = args["planes"][:, :, 1:4, 1:4]
    options = RenderOptions(coarse_samples=4, fine_samples=fine, reduce=reduce, rays_per_pixel=side)
    args |= {"cameras": args["cameras"]._replace(size=(1, 2)), "options": options}
    if fine:  # positions carry no gradient, so finite differences must not move them
        depths: list[Tensor] = []
        original: Callable[..., Tensor] = ray_marching.importance_depths
        monkeypatch.setattr(ray_marching, "importance_depths", lambda *a: depths.append(original(*a)) or depths[0])
    names = [name for name, _ in args["mlp"].named_parameters()]

    def run(planes: Tensor, background: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        class Decoder:
            in_channels, out_channels = 4, 3

            def __call__(self, features: Tensor) -> Any:
                return torch.func.functional_call(args["mlp"], dict(zip(names, weights, strict=True)), (features,))

        return tuple(
            render(**(args | {"planes": planes, "background": background, "mlp": Decoder()}), seed=3, distortion=True)
        )

    inputs = [args["planes"], args["background"], *(p.detach() for p in args["mlp"].parameters())]
    inputs = [x.clone().requires_grad_() for x in inputs]
    if reduce == "sum":
        assert run(*inputs)[2].mean() > 0.2  # there is something to see
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, fast_mode=False)


def test_gradients_stay_finite_in_hard_fields() -> None:
    args = setup()
    for scale in (0.0, 1e-3, 30.0, 1e4):
        planes = (args["planes"] * scale).requires_grad_()
        out = render(**(args | {"planes": planes}), seed=1)
        loss = out.features.square().sum() + out.depth.diff(dim=1).square().sum() + out.opacity.sum()
        grads = torch.autograd.grad(loss, [planes, *args["mlp"].parameters()])
        assert all(x.isfinite().all() for x in (*out[:3], *grads))


# --- batches ---


def test_scene_index_equals_copied_planes() -> None:
    args = setup(F64)
    planes, copied = (args["planes"].clone().requires_grad_() for _ in range(2))
    a = render(**(args | {"planes": planes}), seed=1)
    b = render(**(args | {"planes": copied[args["scene"]], "scene": None}), seed=1)
    assert same(a, b)
    a.features.square().sum().backward()
    b.features.square().sum().backward()
    torch.testing.assert_close(planes.grad, copied.grad)


def test_views_do_not_touch_each_other() -> None:
    args = setup(F64)
    everything = render(**args)
    for view in range(3):
        cam2world, intrinsics, size = args["cameras"]
        one = Cameras(cam2world[view : view + 1], intrinsics[view : view + 1], size)
        alone = render(**(args | {"cameras": one, "scene": args["scene"][view : view + 1]}))
        for a, b in zip(everything[:3], alone[:3], strict=True):
            torch.testing.assert_close(a[view : view + 1], b, rtol=0, atol=1e-13)


def test_seeds_decide_the_samples() -> None:
    args = setup()
    first = render(**args, seed=5)
    assert same(first, render(**args, seed=5))
    assert same(first, render(**args, seed=torch.tensor(5)))
    for other in (6, 5 + 2**32, -5, None):
        assert not torch.equal(first.features, render(**args, seed=other).features)


def test_planes_may_lie_in_memory_in_any_order() -> None:
    args = setup()
    planes = args["planes"].permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not planes.is_contiguous()
    assert same(render(**args), render(**(args | {"planes": planes})))


# --- precision and compilation ---


def test_autocast_touches_the_mlp_only() -> None:
    args = setup()
    exact = render(**args, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = render(**args, seed=1)
        low = render(**(args | {"mlp": Plain()}), seed=1)
    assert all(x.dtype == torch.float32 for x in out[:3])
    assert not torch.equal(out.features, exact.features)
    torch.testing.assert_close(out.features, exact.features, rtol=0, atol=0.02)  # measured: 0.004
    assert same(low, render(**(args | {"mlp": Plain()}), seed=1))  # without matrix products in the MLP: not one bit


class Plain(torch.nn.Module):
    in_channels, out_channels = 4, 3

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[..., 0] * 3, features[..., 1:]


def test_weights_in_bfloat16_are_accepted() -> None:
    args = setup()
    exact = render(**args, seed=1)
    out = render(**(args | {"mlp": args["mlp"].bfloat16()}), seed=1)
    assert out.features.dtype == torch.float32
    torch.testing.assert_close(out.features, exact.features, rtol=0, atol=0.02)  # measured: 0.004


def test_compiles_to_one_graph() -> None:
    # A read of a tensor's value by the host, or control flow that depends on one, would break the graph.
    args = setup()
    compiled = torch.compile(render, fullgraph=True, backend="eager")
    seed = torch.tensor(9)
    for a, b in zip(compiled(**args, seed=seed)[:3], render(**args, seed=seed)[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# --- the MLP ---


def test_mlp_initialization_and_ranges() -> None:
    mlp = DecodingMLP(32, 16, generator=torch.Generator().manual_seed(0))
    shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    assert shapes == {"w1": (64, 32), "b1": (64,), "w2": (17, 64), "b2": (17,)}
    assert mlp.w1.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert mlp.w2.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert not mlp.b1.any() and not mlp.b2.any()
    again = DecodingMLP(32, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mlp.w1, again.w1) and torch.equal(mlp.w2, again.w2)
    density, color = mlp(torch.randn(7, 5, 32) * 100)
    assert density.shape == (7, 5) and color.shape == (7, 5, 16)
    assert color.min() >= -0.001 - 1e-6 and color.max() <= 1.001 + 1e-6


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": torch.zeros(2, 3, 4, 6, 6)}, r"planes are \[2, 3, 4, 6, 6\]"),
        ({"planes": torch.zeros(2, 2, 6, 6, 4)}, r"planes are \[2, 2, 6, 6, 4\]"),
        ({"planes": torch.zeros(2, 3, 6, 6, 5)}, "5 features and the MLP takes 4"),
        ({"planes": torch.zeros(2, 3, 6, 6, 4).half()}, "torch.float16"),
        ({"cam2world": torch.zeros(3, 3, 4)}, r"cam2world is \[3, 3, 4\]"),
        ({"intrinsics": torch.zeros(2, 3, 3)}, r"intrinsics are \[2, 3, 3\]; they must be \[3, 3, 3\]"),
        ({"size": (0, 5)}, r"size is \(0, 5\)"),
        ({"background": torch.zeros(5, 4, 3)}, r"background is \[5, 4, 3\]; it must be \[3\] or \[4, 5, 3\]"),
        ({"scene": None}, "2 scenes for 3 views"),
        ({"scene": torch.zeros(2, dtype=torch.int64)}, r"scene is torch.int64 \[2\]"),
        ({"scene": torch.zeros(3)}, "scene is torch.float32"),
        ({"scene": torch.zeros(3, dtype=torch.int64, device="meta")}, "scene is on meta and planes are on cpu"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed is torch.int64 \[2\]"),
        ({"seed": torch.tensor(0.5)}, "seed is torch.float32"),
        ({"backend": "metal"}, "backend is 'metal'"),
        ({"backend": "cuda"}, "backend is cuda, but planes are on cpu"),
        ({"planes": torch.zeros(2, 3, 6, 6, 4).bfloat16()}, "torch.bfloat16; they must be torch.float32 or"),
    ],
)
def test_render_refuses(change: dict[str, Any], message: str) -> None:
    args = setup()
    inside = {name: value for name, value in change.items() if name in Cameras._fields}
    others = {name: value for name, value in change.items() if name not in Cameras._fields}
    with pytest.raises(ValueError, match=message):
        render(**(args | {"cameras": args["cameras"]._replace(**inside)} | others))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"near": 1.0}, "near is 1.0 and far is 'auto'"),
        ({"near": 2.0, "far": 1.0}, "near < far"),
        ({"near": -1.0, "far": 1.0}, "near < far"),
        ({"near": 1.0, "far": float("inf")}, "near < far"),
        ({"near": 0.0, "far": 1.0, "spacing": "disparity"}, "positive near"),
        ({"near": "close", "far": "auto"}, "near is 'close'"),
        ({"box": 0.0}, "box is 0.0"),
        ({"coarse_samples": 1}, "coarse_samples is 1"),
        ({"fine_samples": -1}, "fine_samples is -1"),
        ({"axes": "xyz"}, "axes is 'xyz'; it must be one of orthogonal, eg3d"),
        ({"reduce": "mean"}, "reduce is 'mean'"),
        ({"spacing": "log"}, "spacing is 'log'"),
    ],
)
def test_options_refuse(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RenderOptions(**values)


def test_options_are_a_part_of_typed_configs() -> None:
    class Config(pydantic.BaseModel):
        render: RenderOptions = RenderOptions()

    assert Config.model_validate({"render": {"near": 1, "far": 3}}).render == RenderOptions(near=1.0, far=3.0)
    assert Config().model_dump() == {"render": dataclasses.asdict(RenderOptions())}
    for wrong in ({"nera": 1}, {"near": 1}, {"axes": "xyz"}, {"coarse_samples": "many"}):
        with pytest.raises(pydantic.ValidationError):
            Config.model_validate({"render": wrong})
