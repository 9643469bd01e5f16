# SPDX-License-Identifier: Apache-2.0
"""Writing exports: into a folder, to any fsspec URL, or as one commit to a hub repository."""

import math
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch
from huggingface_hub import HfApi
from torch import Tensor

from igae.errors import redact
from igae.export.card import model_card
from igae.export.layout import (
    CARD,
    CONFIG,
    FORMAT,
    INDEX,
    OWN,
    SCENES,
    SHARED,
    Description,
    File,
    Shard,
    dump_description,
    dump_scenes,
)
from igae.export.reader import PLANES, shared_tensors
from igae.models import IGAE
from igae.scenes import PlanesConfig
from igae.storage import join, reason, write_tensors

SHARD_BYTES = 256 << 20
"""Planes in a file of scenes: at least one scene, and at most these bytes."""
_HUB = re.compile(r"hf://(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>.+?))?/?")


@dataclass
class Content:
    """What an export is made of.

    Args:
        background: RGB color in [0, 1] behind the objects.
        scenes: names, all different.
        planes: what a scene's row is.
        rows: of the scenes from ``start`` to ``stop`` (exclusive), [stop - start, *row_shape] float32.
        source: where it comes from, as the card says it.
        config: the run's resolved configuration, YAML without credentials.
        figures: measured on held-out views and natural images, by names of ``metrics.json``.
        camera: distance from the origin and normalized focal length of a typical view, for the card's example.
    """

    model: IGAE
    background: tuple[float, float, float]
    scenes: Sequence[str]
    planes: PlanesConfig
    rows: Callable[[int, int], Tensor] = field(repr=False)
    source: str
    config: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    camera: tuple[float, float] = (1.3, 1.1)


def write(content: Content, target: str) -> Description:
    """Write an export.

    Args:
        target: a local folder or fsspec URL that is empty or not there, or ``hf://user/name[@revision][/folder]``. A
            hub repository is made where there is none, as a private one, and gets all files in one commit; they
            are gathered in the temporary folder first.

    Returns:
        What ``igae.json`` says of it.

    Raises:
        ValueError: something is there already, or it can't be written; nothing of it is left there then.
    """
    assert len(set(content.scenes)) == len(content.scenes)
    check_target(target)
    if target.startswith("hf://"):
        return _to_hub(content, target)
    where = redact(target)
    try:
        fs, path = fsspec.core.url_to_fs(target)
        new = not fs.exists(path)
        fs.makedirs(path, exist_ok=True)
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{where} can't be written: {reason(error)}") from error
    begun: list[str] = []
    try:
        return _write(content, target, fs, path, target, begun)
    except BaseException as error:
        # Own files alone, and without errors of their own: the reason is what has to be heard of.
        for file in begun:
            with suppress(Exception):
                fs.rm_file(join(path, file))
        if new:
            with suppress(Exception):
                fs.rmdir(path)
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        raise ValueError(f"{where} can't be written: {reason(error)}") from error


def check_target(target: str) -> None:
    """Refuse a target where something is already, before what takes its time. Raises as :func:`write`."""
    where, there = redact(target), "is not empty: remove what is there, or choose another folder"
    match = _parse_hub(target) if target.startswith("hf://") else None
    try:
        if match is not None:
            taken = HfApi().file_exists(match["repo"], _index(match), revision=match["revision"])
            there = "already holds an export: choose another name, branch or folder"
        else:
            fs, path = fsspec.core.url_to_fs(target)
            fs.invalidate_cache()
            taken = fs.exists(path) and (fs.isfile(path) or fs.ls(path, detail=False))
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{where} can't be written: {reason(error)}") from error
    if taken:
        raise ValueError(f"{where} {there}")


def _write(content: Content, target: str, fs: Any, path: str, name: str, begun: list[str]) -> Description:
    """Write all files, ``igae.json`` last; ``name`` is what the card calls the export.

    Args:
        begun: gets the names of the files before they are written.
    """
    model, files = content.model, dict[str, File]()

    def put(file: str, data: bytes) -> None:
        begun.append(file)
        fs.pipe_file(join(path, file), data)
        files[file] = File(len(data), zlib.crc32(data))

    with tempfile.TemporaryDirectory() as folder:
        model.autoencoder.save(Path(folder))
        for source in sorted(Path(folder).iterdir()):
            assert source.name not in OWN
            put(source.name, source.read_bytes())
    begun.append(SHARED)
    files[SHARED] = File(*write_tensors(join(target, SHARED), shared_tensors(model)))
    put(SCENES, dump_scenes(_write_scenes(content, target, begun)))
    if content.config is not None:
        put(CONFIG, content.config.encode())
    height, width = model.plain.shape[2:]
    net = model.autoencoder.net
    description = Description(
        FORMAT,
        (height, width),
        content.background,
        content.planes,
        None if net is None else type(net).__name__,
        model.options,
        len(content.scenes),
        files,
    )
    put(CARD, model_card(description, redact(name), content).encode())
    begun.append(INDEX)
    fs.pipe_file(join(path, INDEX), dump_description(description))
    return description


def _write_scenes(content: Content, target: str, begun: list[str]) -> list[Shard]:
    shards: list[Shard] = []
    step = max(1, SHARD_BYTES // (4 * math.prod(content.planes.row_shape)))
    for start in range(0, len(content.scenes), step):
        names = list(content.scenes[start : start + step])
        rows = content.rows(start, start + len(names))
        assert rows.dtype == torch.float32 and rows.shape == (len(names), *content.planes.row_shape)
        name = f"scenes-{len(shards):05d}.safetensors"
        begun.append(name)
        shards.append(Shard(name, *write_tensors(join(target, name), {}, {PLANES: rows}), names))
    return shards


def _parse_hub(target: str) -> re.Match[str]:
    match = _HUB.fullmatch(target)
    if match is None or match["repo"].split("/")[0] in ("datasets", "spaces", "buckets"):
        raise ValueError(f"{target} names no model repository: write hf://user/name, or hf://user/name@branch/folder")
    return match


def _index(match: re.Match[str]) -> str:
    return f"{match['folder']}/{INDEX}" if match["folder"] else INDEX


def _to_hub(content: Content, target: str) -> Description:
    match, api = _parse_hub(target), HfApi()
    repo, revision = match["repo"], match["revision"]
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
            check_target(target)  # a new branch has what the main one has
        with tempfile.TemporaryDirectory() as staging:
            fs, path = fsspec.core.url_to_fs(staging)
            description = _write(content, staging, fs, path, target, [])
            api.upload_folder(
                repo_id=repo,
                folder_path=staging,
                path_in_repo=match["folder"],
                revision=revision,
                commit_message=f"Export of igae, {description.scenes} scenes",
            )
    except ValueError:
        raise
    except Exception as error:  # of the network, of what the token may do
        raise ValueError(f"{target} can't be written: {reason(error)} (log in with `hf auth login`)") from error
    return description
