# SPDX-License-Identifier: Apache-2.0
"""A trained model that another run starts from, or fits scenes to: of a checkpoint or an export."""

import logging
from typing import Any

import torch
import yaml

from igae import checkpoint, export
from igae.errors import redact
from igae.models import IGAE

SECTIONS = ("autoencoder", "planes", "render")
FREE = ("autoencoder.latents", "planes.init_std", "render.coarse_samples", "render.fine_samples")
"""What of them doesn't have to be as the model was trained."""
log = logging.getLogger("igae")


def find_model(where: str) -> str:
    """The export that is there, or the checkpoint that a run's folder (its newest) or its own path or URL stands for.

    Raises:
        ValueError: there is none.
    """
    where = where.rstrip("/")
    if export.is_export(where):
        return where
    try:
        return export.find_checkpoint(where)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def take_settings(data: dict[str, Any]) -> None:
    """Where raw settings name a ``model``, put the checkpoint or export in its place and add what it determines:
    autoencoder, planes and renderer (but for FREE).

    Raises:
        ValueError: there is no such model, or the settings have other values than it.
    """
    if not isinstance(data.get("model"), str):
        return
    data["model"] = find_model(data["model"])
    if export.is_export(data["model"]):
        trained = export.load_settings(data["model"])
    else:
        trained = yaml.safe_load(checkpoint.saved_config(data["model"]))
    for name in SECTIONS:
        given, wanted = data.get(name) or {}, trained[name]
        if not isinstance(given, dict):
            continue  # validation says what is wrong
        fixed = [key for key in given if f"{name}.{key}" not in FREE]
        other = [key for key in fixed if key not in wanted or given[key] != wanted[key]]
        if other:
            raise ValueError(
                f"{name}.{other[0]} is the model's ({redact(data['model'])}): leave it out; of {name} only "
                f"{', '.join(key.partition('.')[2] for key in FREE if key.startswith(name))} can be set"
            )
        data[name] = {**wanted, **given}


def load_weights(folder: str, model: IGAE) -> None:
    """Take autoencoder, normalizer, MLP, base planes and background from a checkpoint or export.

    Raises:
        ValueError: they are of another architecture.
    """
    if export.is_export(folder):
        weights = dict(export.load_model(folder).state_dict())
    else:
        weights = checkpoint.load_checkpoint(folder, moments=False).shared
    trained = weights["background"].to(model.background)
    weights["background"] = model.background  # of the size of these views
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"model: {redact(folder)} has weights of another model than its settings say ({reason})"
        ) from error
    model.refresh_background()
    # To the last bit as it was, where the views have the size and color that they had.
    if trained.shape == model.background.shape and torch.allclose(trained, model.background, rtol=0, atol=1e-3):
        model.background.copy_(trained)
    log.info("the model is %s", redact(folder))
