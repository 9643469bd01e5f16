# SPDX-License-Identifier: Apache-2.0
"""The metrics: what each is called, what it compares, and how it is computed.

Most are means over images or normalized latents in [-1, 1]. LPIPS, a distance, is that of `igae.models.LPIPS`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reports of runs need the names alone
    from torch import Tensor

JSON, CSV, EXAMPLES = "evaluation.json", "evaluation.csv", "examples"
"""Where they are in the folder of a run, and a folder of views of the best, the median and the worst scene."""
MEASURES = {"psnr": "PSNR of {} (dB)", "ssim": "SSIM of {}", "lpips": "LPIPS of {}"}
VIEWS = {
    "latent": ("rendered latents", "encoded latents, both normalized"),
    "rgb": ("decoded renders", "views"),
    "ae": ("autoencoded images", "views"),
    "rgb_ae": ("decoded renders against autoencoded images", "autoencoded images"),
}
COMPARISONS = {
    **{f"heldout/{name}": (f"{what}, held-out views", target) for name, (what, target) in VIEWS.items()},
    "heldout/baseline": ("the mean training image of a scene", "its held-out views: the best guess without the camera"),
    **{f"train/{name}": (f"{what}, training views", target) for name, (what, target) in VIEWS.items()},
    "natural/ae": ("autoencoded natural images", "natural images"),
    "orbit/latent": ("latents rendered around a scene", "the same decoded and encoded again: multi-view consistency"),
}
"""Comparison -> what is measured, and what it is compared with."""
METRICS = {
    **{
        f"{name}_{measure}": title.format(what)
        for name, (what, _) in COMPARISONS.items()
        for measure, title in MEASURES.items()
        if measure == "psnr" or not name.endswith(("latent", "baseline"))
    },
    "heldout/latent_error": "error of rendered latents, held-out views (standard deviations of encoded latents)",
    "train/latent_error": "error of rendered latents, training views (standard deviations of encoded latents)",
    "heldout/depth_error": "difference of depth between held-out and neighboring training views (% of the box)",
    "heldout/opacity_background": "opacity of background, held-out views (0 is right)",
    "heldout/opacity_object": "opacity of objects, held-out views (1 is right)",
    "gap/rgb_psnr": "PSNR of decoded renders, training views minus held-out views (dB)",
}
"""All metrics that there can be -> what each is, in the order in which ranks add them up."""
RANKED_BY = ("heldout/rgb_psnr", "train/rgb_psnr", "heldout/latent_psnr", "train/latent_psnr")
SMALL_IS_GOOD = ("lpips", "mse", "error", "background")
"""Scenes are ranked by the first of these that was measured. The last part of names whose small values are good."""
LARGE_GAP = 3.0
LARGE_ERROR = 0.9  # of latents, where a constant has 1
"""dB by which training views may be better than held-out ones before :func:`problems` says so."""
LARGE_LOSS = 1.0
"""dB that joint training may take from the autoencoder before :func:`verdict` says so."""
RENAMED = {
    "constant_psnr": "baseline_psnr",
    "photos": "natural",
    "imbalance": "straggler_factor",
    **{f"photo_{loss}": f"natural_{loss}" for loss in ("ae", "lpips", "kl", "tv")},
}
"""Parts of names that version 0.1 wrote -> what they are called now."""


def current_name(name: str) -> str:
    """What a metric that a run of version 0.1 has written is called now: `natural/ae_psnr` for `photos/ae_psnr`."""
    return "/".join(RENAMED.get(part, part) for part in name.split("/"))


def ranked(scenes: Mapping[str, Mapping[str, float]]) -> tuple[str, list[str]]:
    """What scenes are ranked by, the PSNR of decoded renders or the nearest thing that was measured, and the names of
    those that have it, the worst first."""
    names = list(dict.fromkeys(name for values in scenes.values() for name in values))
    psnrs = [name for name in names if name.endswith("psnr")]
    by = next((name for name in (*RANKED_BY, *psnrs, *names) if name in names), "")
    sign = -1 if by.rpartition("_")[2] in SMALL_IS_GOOD else 1
    return by, sorted((name for name in scenes if by in scenes[name]), key=lambda name: sign * scenes[name][by])


def verdict(metrics: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """How good the scenes are, in a sentence: held-out views against the mean training image, against the autoencoder
    alone and against training views. Empty where nothing of that was measured.

    Args:
        before: metrics of the same views before joint training, which may have made the autoencoder worse.
    """
    names = ("heldout/rgb_psnr", "heldout/baseline_psnr", "heldout/ae_psnr", "train/rgb_psnr")
    heldout, baseline, autoencoder, train = map(metrics.get, names)
    if heldout is None:
        if train is not None:
            return f"training views {train:.1f} dB; there are no held-out views to compare with"
        natural = metrics.get("natural/ae_psnr")
        return "" if natural is None else f"autoencoded natural images {natural:.1f} dB; there are no scenes"
    found = []
    for number, what in ((baseline, "the mean training image"), (autoencoder, "what the autoencoder alone reaches")):
        if number is not None:
            found.append(f"{abs(heldout - number):.1f} dB {'above' if heldout >= number else 'below'} {what}")
    if autoencoder is not None:
        was = (before or {}).get("heldout/ae_psnr", autoencoder)
        lost = f", {was:.1f} dB before joint training" if was - autoencoder > LARGE_LOSS else ""
        found[-1] += f" ({autoencoder:.1f} dB{lost})"
    better = "" if train is None else f"{abs(train - heldout):.1f} dB {'better' if train >= heldout else 'worse'}"
    text = f"held-out views {heldout:.1f} dB" + (": " if found else "") + ", ".join(found)
    return text + (f"; training views are {better}" if better else "")


def problems(metrics: Mapping[str, float]) -> list[str]:
    """What is wrong with scenes that have these metrics and what helps, each a sentence."""
    names = ("heldout/rgb_psnr", "heldout/baseline_psnr", "train/rgb_psnr")
    heldout, baseline, train = map(metrics.get, names)
    found = []
    if heldout is not None and baseline is not None and heldout < baseline:
        found.append(
            f"held-out views are worse than the mean training image: {heldout:.2f} dB, that image {baseline:.2f} dB; "
            "train longer, or, if training views are good, check the cameras and render.box, and see docs/evaluation.md"
        )
    if metrics.get("heldout/latent_error", 0.0) > LARGE_ERROR:
        found.append(
            f"latents of held-out views are hardly better than a constant (heldout/latent_error "
            f"{metrics['heldout/latent_error']:.2f}): look at the depth pictures, and if they show fog instead of the "
            "objects, train longer, or check masks and cameras (docs/own-data.md)"
        )
    if heldout is not None and train is not None and train - heldout > LARGE_GAP:
        found.append(
            f"training views are {train - heldout:.1f} dB better than held-out ones: the scenes memorize them; what "
            "helps: train.*.augment, render.rays_per_pixel, smaller planes, more views (docs/evaluation.md)"
        )
    return found


def psnr(prediction: "Tensor", target: "Tensor", data_range: float = 2.0) -> "Tensor":
    """Peak signal-to-noise ratio in dB of each image.

    Args:
        prediction: [B, ...], as the target.
        data_range: distance of the largest to the smallest possible value (2 for images in [-1, 1]).

    Returns:
        [B], float64; equal images give a finite 100 dB, so that means over images stay finite.
    """
    mse = (prediction.float() - target.float()).double().square().flatten(1).mean(1)
    return (10.0 * (data_range**2 / mse.clamp_min(1e-30)).log10()).clamp_max(100.0)


def latent_errors(prediction: "Tensor", target: "Tensor") -> "Tensor":
    """Root mean squared error of each image's latents, in standard deviations of the targets.

    This is sqrt(mean over channels of mse / variance), with a channel's variance over all pixels of all targets: the
    scale of channels does not matter. 0 is perfect, and the best constant has about 1.

    Args:
        prediction, target: [B, c, h, w], of one scene.

    Returns:
        [B], float64; [0] where all targets are one constant, of which there is no error to speak of.
    """
    mse = (prediction.double() - target.double()).square().mean((2, 3))
    variance = target.double().var((0, 2, 3), correction=0)
    varies = variance > 0
    return (mse / variance)[:, varies].mean(1).sqrt() if varies.any() else mse.new_zeros(0)


def opacity_on(opacity: "Tensor", lower: "Tensor", upper: "Tensor") -> dict[str, "Tensor"]:
    """Rendered opacity of the pixels of which the views' masks tell for sure what they show.

    Args:
        opacity: [B, h, w] in [0, 1], rendered.
        lower, upper: [B, h, w] in [0, 1], least and greatest value of the mask in the area of each of these pixels.

    Returns:
        ``background`` [n], the opacity of pixels without any object (upper is 0), and ``object`` [m], that of pixels
        with nothing else (lower is 1). Pixels at edges are in neither.
    """
    return {"background": opacity[upper == 0], "object": opacity[lower == 1]}


def ssim(prediction: "Tensor", target: "Tensor") -> "Tensor":
    """Structural similarity [B] of images [B, 3, H, W] in [-1, 1]: Gaussian windows of 11 x 11 pixels, sigma 1.5,
    around all pixels of the mirrored images."""
    import torch  # not torchmetrics: its import takes seconds where SciPy and transformers are installed
    from torch.nn.functional import conv2d, pad

    window = torch.exp(-0.5 * (torch.arange(-5, 6, device=target.device) / 1.5).square())
    window = (window / window.sum()).to(target)
    x, y = (pad(images, (5, 5, 5, 5), "reflect") for images in (prediction, target))
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    means = conv2d(conv2d(maps, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    x, y, xx, yy, xy = means.unflatten(0, (5, *target.shape[:2]))
    small, smaller = (0.03 * 2) ** 2, (0.01 * 2) ** 2
    variances = (xx - x * x).clamp(min=0) + (yy - y * y).clamp(min=0)
    ratio = (2 * x * y + smaller) * (2 * (xy - x * y) + small) / ((x * x + y * y + smaller) * (variances + small))
    found: Tensor = ratio.mean((1, 2, 3, 4))
    return found
