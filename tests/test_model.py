# SPDX-License-Identifier: Apache-2.0
"""The trained module: each loss from its formula, where gradients go, the background, and batched passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import create_autoencoder as create
from torch import Tensor, nn

from igae.data import orbit
from igae.models import (
    IGAE,
    Autoencoder,
    AutoencoderConfig,
    LossWeights,
    Views,
    coverage_bounds,
    load_autoencoder,
    to_signed,
)
from igae.rendering import Cameras, Rendered, RenderOptions, render
from igae.scenes import PlanesConfig

SIZE, SEED, SCALE = 16, 1234, 0.3
OPTIONS = RenderOptions(coarse_samples=5, fine_samples=5)
# Of the others: tests/test_planes.py, tests/test_extending.py.
NAMES = tuple(name for name in LossWeights.model_fields if name not in ("base_orthogonality", "plugins"))
ALL = {
    "latent": 1.0,
    "rgb": 0.7,
    "ae": 0.1,
    "natural_ae": 0.3,
    "natural_lpips": 0.01,
    "natural_kl": 0.02,
    "natural_tv": 0.05,
    "planes_tv": 0.4,
    "depth_tv": 0.6,
    "opacity": 0.9,
    "distortion": 0.8,
}


class Distance(nn.Module):
    """Stands for LPIPS: that network's own numbers are tested with the losses."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean() ** 3


def weights(**values: float) -> LossWeights:
    return LossWeights(**{"latent": 0.0, **values})


def build(autoencoder: Autoencoder | None = None, background: tuple[float, float, float] = (1.0, 0.5, 0.0)) -> IGAE:
    model = IGAE(
        autoencoder or create("AutoencoderKL", scale=SCALE),
        PlanesConfig(resolution=6, features=8),
        OPTIONS,
        (SIZE, SIZE),
        background,
        seed=3,
        perceptual=Distance(),  # type: ignore[arg-type]
    )
    model.refresh_background()
    return model


@pytest.fixture
def model() -> IGAE:
    return build()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planes(scenes: int = 3) -> Tensor:
    # Different in scale along rows and columns, so that a wrong axis shows.
    slope = torch.linspace(1, 3, 6)[:, None, None]
    return (0.5 * slope * torch.randn(scenes, 3, 6, 6, 8, generator=generator(1))).requires_grad_()


def noise_images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator(seed), dtype=torch.uint8)


def views(**values: Any) -> Views:
    """Five views of three scenes, as images unless latents are given."""
    intrinsics = torch.tensor([[1.1, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]]).expand(5, 3, 3)
    index = torch.tensor([0, 2, 2, 1, 0])
    if "latents" not in values:
        values["images"] = noise_images(5, 5)
        values |= {"masks": values["images"][:, 0], "has_alpha": torch.tensor([True, False, True, False, True])}
    return Views(index, orbit(5, 1.3, 0.3), intrinsics, **values)


NATURAL_IMAGES = noise_images(2, 6)


def rendered(model: IGAE, rows: Tensor, given: Views, seed: int | None) -> Rendered:
    return render(
        rows,
        model.mlp,
        Cameras(given.cam2world, given.intrinsics, (SIZE // 2, SIZE // 2)),
        OPTIONS,
        background=model.background,
        scene=given.index,
        seed=seed,
        distortion=True,
    )


@torch.no_grad()
@pytest.mark.parametrize("sample", [False, True], ids=["mean", "sample"])
def test_every_loss_is_its_formula(model: IGAE, sample: bool) -> None:
    rows, given = planes(), views()
    torch.manual_seed(77)
    found = model(rows, given, NATURAL_IMAGES, LossWeights(**ALL), sample, SEED)

    net = model.autoencoder.net
    x, y = given.images.float() / 255 * 2 - 1, NATURAL_IMAGES.float() / 255 * 2 - 1
    dist_x, dist_y = net.encode(x).latent_dist, net.encode(y).latent_dist
    z_x, z_y = dist_x.mean, dist_y.mean
    if sample:
        torch.manual_seed(77)
        noise = torch.randn(net.encode(torch.cat([x, y])).latent_dist.mean.shape)
        z_x, z_y = z_x + dist_x.std * noise[:5], z_y + dist_y.std * noise[5:]
    features, depth, opacity, distortion = rendered(model, rows, given, SEED)
    r = features.permute(0, 3, 1, 2)
    inverse = torch.atanh(r.clamp(-0.999, 0.999)) / SCALE
    normal = torch.distributions.Normal(dist_y.mean, dist_y.std)
    d_y = net.decode(z_y).sample

    def tv(t: Tensor, a: int, b: int) -> Tensor:
        return sum(  # type: ignore[return-value]
            (t.narrow(d, 1, t.shape[d] - 1) - t.narrow(d, 0, t.shape[d] - 1)).pow(2).mean() for d in (a, b)
        )

    # No cell of such noise is empty: without alpha it may be covered by more than its mask.
    covered = coverage_bounds(given.masks, given.has_alpha, (SIZE // 2, SIZE // 2))[:, 0]
    outside = torch.where(given.has_alpha[:, None, None], opacity - covered, (opacity - covered).clamp(max=0))
    expected = {
        "latent": ((torch.tanh(SCALE * z_x) - r) ** 2).mean(),
        "rgb": ((net.decode(inverse).sample - x) ** 2).mean(),
        "ae": ((net.decode(z_x).sample - x) ** 2).mean(),
        "natural_ae": ((d_y - y) ** 2).mean(),
        "natural_lpips": Distance()(d_y, y),
        "natural_kl": torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean(),
        "natural_tv": tv(z_y, 2, 3),
        "planes_tv": tv(rows[given.index], 2, 3),
        "depth_tv": tv(depth, 1, 2),
        "opacity": outside.square().mean(),
        "distortion": distortion.mean(),
    }
    assert found.keys() == {*expected, "total"} and expected.keys() == set(NAMES)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-5), name  # measured 0: the same operations
        assert value > 1e-6
    total = sum(ALL[name] * value.double() for name, value in expected.items())
    assert found["total"].item() == pytest.approx(float(total), rel=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_leaves_the_term_out(model: IGAE, name: str) -> None:
    rows, given = planes(), views()
    every = model(rows, given, NATURAL_IMAGES, LossWeights(**ALL), False, SEED)
    found = model(rows, given, NATURAL_IMAGES, LossWeights(**{**ALL, name: 0.0}), False, SEED)
    assert found.keys() == every.keys() - {name}
    # And the others stay as they are, up to other batch sizes in the decoder.
    for other in found.keys() - {"total"}:
        assert found[other].item() == pytest.approx(every[other].item(), rel=1e-5)
    missing = ALL[name] * every[name].item()
    assert found["total"].item() == pytest.approx(every["total"].item() - missing, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_weight_alone_makes_the_total(model: IGAE, name: str) -> None:
    found = model(planes(), views(), NATURAL_IMAGES, weights(**{name: 2.5}), False, SEED)
    assert found["total"].item() == pytest.approx(2.5 * found[name].item(), rel=1e-6)


REACHES = {
    "latent": {"rows", "mlp", "encoder"},
    "rgb": {"rows", "mlp", "decoder"},
    "ae": {"encoder", "decoder"},
    "natural_ae": {"encoder", "decoder"},
    "natural_lpips": {"encoder", "decoder"},
    "natural_kl": {"encoder"},
    "natural_tv": {"encoder"},
    "planes_tv": {"rows"},
    "depth_tv": {"rows", "mlp"},
    "opacity": {"rows", "mlp"},
    "distortion": {"rows", "mlp"},
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_a_loss_teaches(model: IGAE, name: str) -> None:
    rows = planes()
    torch.manual_seed(0)
    model(rows, views(), NATURAL_IMAGES, weights(**{name: 1.0}), True, SEED)["total"].backward()
    parts = model.autoencoder.parts()
    groups = {"rows": [rows], "mlp": list(model.mlp.parameters())}
    groups |= {part: [p for _, p in parts[part]] for part in ("encoder", "decoder")}  # type: ignore[index]

    def moved(parameters: list[Any]) -> bool:
        return any(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)

    assert {group for group, parameters in groups.items() if moved(parameters)} == REACHES[name]
    for parameters in groups.values():
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)


def test_only_rows_in_the_batch_get_gradients(model: IGAE) -> None:
    rows = planes(4)  # no view shows the last
    model(rows, views(), None, weights(latent=1.0), False, SEED)["total"].backward()
    assert rows.grad is not None
    assert (rows.grad != 0).flatten(1).any(1).tolist() == [True, True, True, False]


@torch.no_grad()
def test_latents_from_a_cache_replace_the_encoder(model: IGAE, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, given = planes(), views()
    latents = model.autoencoder.posterior(to_signed(given.images)).mean  # type: ignore[arg-type]
    wanted = weights(latent=1.0, planes_tv=0.1)
    expected = model(rows, given, None, wanted, False, SEED)
    monkeypatch.setattr(model.autoencoder, "posterior", lambda *_: pytest.fail("the encoder ran"))
    found = model(rows, views(latents=latents), None, wanted, False, SEED)
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found)
    # And bounds of their coverage, in steps of 1/255, replace their masks.
    expected = model(rows, given, None, weights(opacity=1.0), False, SEED)
    assert given.masks is not None and given.has_alpha is not None
    coverage = coverage_bounds(given.masks, given.has_alpha, model.latent_shape[1:]).mul(255).round().to(torch.uint8)
    found = model(rows, views(latents=latents, coverage=coverage), None, weights(opacity=1.0), False, SEED)
    assert found["opacity"].item() == pytest.approx(expected["opacity"].item(), rel=5e-3)  # measured 1.5e-3


@torch.no_grad()
def test_views_and_natural_images_apart_equal_both_together(model: IGAE) -> None:
    rows, given, every = planes(), views(), LossWeights(**ALL)
    both = model(rows, given, NATURAL_IMAGES, every, False, SEED)
    one, other = model(rows, given, None, every, False, SEED), model(None, None, NATURAL_IMAGES, every, False, SEED)
    apart = {**one, **other}
    assert one.keys() & other.keys() == {"total"} and apart.keys() == both.keys()
    for name in apart.keys() - {"total"}:
        assert apart[name].item() == pytest.approx(both[name].item(), rel=1e-5)  # measured 0
    assert (one["total"] + other["total"]).item() == pytest.approx(both["total"].item(), rel=1e-5)


@torch.no_grad()
def test_terms_of_absent_inputs_are_absent(model: IGAE) -> None:
    found = model(None, None, NATURAL_IMAGES, LossWeights(**ALL), False, SEED)
    assert found.keys() == {"natural_ae", "natural_lpips", "natural_kl", "natural_tv", "total"}


@torch.no_grad()
def test_samples_follow_the_seed_and_evaluation_has_none(model: IGAE) -> None:
    rows, given, wanted = planes(), views(), weights(latent=1.0)
    losses = [model(rows, given, None, wanted, False, seed)["latent"].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    features, depth, opacity = model.render(rows, given, None)
    expected = rendered(model, rows, given, None)
    assert torch.equal(features, expected.features.permute(0, 3, 1, 2)) and features.shape == (5, 4, 8, 8)
    assert torch.equal(depth, expected.depth) and torch.equal(opacity, expected.opacity)


@torch.no_grad()
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_background_is_the_encoded_plain_image(name: str) -> None:
    model = build(create(name, scale=SCALE))
    plain = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
    encoded = model.autoencoder.net.encode(plain)
    latents = encoded.latent_dist.mean if name == "AutoencoderKL" else encoded.latents
    expected = torch.tanh(SCALE * latents)
    mapped = model.background.permute(2, 0, 1) * 2 - 1
    assert (mapped - expected[0]).abs().max() < 5e-7  # float32, measured 6e-8
    # It is not one color: an encoder sees the image's border.
    assert model.background.flatten(0, 1).std(0).max() > 1e-4
    # Empty space shows exactly that, through all samples.
    model.mlp.b2[0] = -1e4
    features, _, opacity = model.render(planes(), views(), SEED)
    assert torch.equal(opacity, torch.zeros_like(opacity))
    assert torch.equal(features, (model.background * 2 - 1).permute(2, 0, 1).expand_as(features))


@torch.no_grad()
def test_the_background_follows_the_encoder(model: IGAE) -> None:
    before = model.background.clone()
    for _, parameter in model.autoencoder.parts()["encoder"]:
        parameter.mul_(1.3)
    assert torch.equal(model.background, before)
    model.refresh_background()
    assert not torch.equal(model.background, before)
    assert "background" in model.state_dict()


@torch.no_grad()
def test_identity_renders_colors_at_image_size() -> None:
    model = build(load_autoencoder(AutoencoderConfig(path="identity")), (1.0, 0.5, 0.25))
    assert model.latent_shape == (3, SIZE, SIZE) and model.mlp.out_channels == 3
    assert torch.equal(model.background, torch.tensor([1.0, 0.5, 0.25]).expand(SIZE, SIZE, 3))
    rows, given = planes(), views()
    features, depth, _ = model.render(rows, given, None)
    assert features.shape == (5, 3, SIZE, SIZE) and depth.shape == (5, SIZE, SIZE)
    found = model(rows, given, None, weights(latent=1.0), True, SEED)
    features, _, _ = model.render(rows, given, SEED)
    truth = given.images.float() / 127.5 - 1  # type: ignore[union-attr]
    assert found["latent"].item() == pytest.approx(F.mse_loss(features, truth).item(), rel=1e-6)


def test_the_perceptual_network_is_not_part_of_the_module(model: IGAE) -> None:
    assert not any(isinstance(module, Distance) for module in model.modules())
    keys = model.state_dict().keys()
    assert {"background", "mlp.w1", "mlp.b1", "mlp.w2", "mlp.b2", "autoencoder.scale"} <= keys
    assert not any("plain" in key or "perceptual" in key for key in keys)


def test_the_mlp_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(1)
    second = build()
    assert all(torch.equal(a, b) for a, b in zip(first.mlp.parameters(), second.mlp.parameters(), strict=True))


def test_bytes_become_signed_values() -> None:
    found = to_signed(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
    assert found.tolist() == pytest.approx([-1, -1 / 255, 1 / 255, 1], abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, False), ({"rgb": 1.0}, True), ({"ae": 1.0}, True), ({"natural_ae": 1.0, "planes_tv": 1.0}, False)],
)
def test_which_losses_need_images(settings: dict[str, float], needed: bool) -> None:
    assert LossWeights(**settings).needs_images is needed
    assert LossWeights().latent == 1.0
