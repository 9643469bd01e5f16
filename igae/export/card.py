# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: a README with metadata that model hubs read, made of ``card.md``."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from igae.config import entry_point
from igae.evaluation import METRICS
from igae.export.format import Description, parse_hub
from igae.export.model import Content

SHOWN = ("heldout/rgb_psnr", "heldout/rgb_ssim", "heldout/latent_psnr", "heldout/ae_psnr", "natural/ae_psnr")


def model_card(description: Description, where: str, content: Content) -> str:
    """The text of README.md.

    Args:
        where: target of the export, without credentials.
    """
    name = where.removeprefix("hf://").rstrip("/").rsplit("/", 1)[-1] or "export"
    metrics = {key: content.metrics[key] for key in SHOWN if key in content.metrics}
    data = ModelCardData(
        library_name="igae",
        tags=["igae", "autoencoder", "tri-planes", "3d", "arxiv:2410.22936"],
        model_name=name if metrics else None,
        eval_results=[
            EvalResult(
                task_type="image-to-3d",
                dataset_type="views",
                dataset_name="views of its own scenes" if key.startswith("heldout") else "natural images",
                metric_type=key.rsplit("_", 1)[-1],
                metric_name=METRICS[key],
                metric_value=round(value, 4),
            )
            for key, value in metrics.items()
        ]
        or None,
    )
    pretrained, options = _of_diffusers(where)
    net, field = content.model.autoencoder.net, content.model.options.field
    of_diffusers = net is None or type(net).__module__.startswith("diffusers.")
    own = None if of_diffusers else entry_point("autoencoders", type(net).__name__)
    needed = [own, None if field == "mlp" else entry_point("fields", field)]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        name=name,
        where=where,
        description=description,
        content=content,
        metrics=[(METRICS[key], value) for key, value in metrics.items()],
        pretrained=pretrained,
        options=options,
        module="diffusers" if own is None else own.module,
        packages=sorted({f"{point.dist.name} {point.dist.version}" for point in needed if point and point.dist}),
    )
    return str(card)


def _of_diffusers(where: str) -> tuple[str, str]:
    """What ``from_pretrained`` is called with: the first argument, and the others as they are written."""
    if not where.startswith("hf://"):
        return ("a local copy of this folder" if "://" in where else where), ""
    repo, revision, folder = parse_hub(where).groups()
    return repo, (f', revision="{revision}"' if revision else "") + (f', subfolder="{folder}"' if folder else "")
