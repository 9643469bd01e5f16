# SPDX-License-Identifier: Apache-2.0
"""Writing exports: into a folder, to any fsspec URL, or as one commit to a hub repository."""

import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor

from igae.errors import progress, redact
from igae.export.card import model_card
from igae.export.format import (
    CARD,
    CONFIG,
    FORMAT,
    INDEX,
    OWN,
    PLANES,
    SCENES,
    SHARED,
    Description,
    SceneFile,
    dump_description,
    dump_scenes,
    parse_hub,
)
from igae.export.model import Content
from igae.export.reader import shared_tensors
from igae.storage import Stamp, file_system, join, make_folder, reason, write_file, write_tensors

FILE_BYTES = 256 << 20


def write(content: Content, target: str, file_bytes: int = FILE_BYTES) -> Description:
    """Write an export.

    Args:
        target: a local folder or fsspec URL that is empty or not there, or ``hf://user/name[@revision][/folder]``. A
            hub repository is made where there is none, as a private one, and gets all files in one commit; they
            are gathered in the temporary folder first.
        file_bytes: most bytes of planes in a file, which has one scene at least.

    Returns:
        What ``igae.json`` says of it.

    Raises:
        ValueError: something is there already, or it can't be written; nothing of it is left there then.
    """
    assert len(set(content.scenes)) == len(content.scenes)
    check_target(target)
    if not target.startswith("hf://"):
        return _write(content, target, target, file_bytes)
    match, api = parse_hub(target), HfApi()
    repo, revision = match["repo"], match["revision"]
    with _told(target, " (log in with `hf auth login`)"):
        api.create_repo(repo, private=True, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
            check_target(target)  # a new branch has what the main one has
        with tempfile.TemporaryDirectory() as staging:
            description = _write(content, staging, target, file_bytes)
            api.upload_folder(
                repo_id=repo,
                folder_path=staging,
                path_in_repo=match["folder"],
                revision=revision,
                commit_message=f"Export of igae, {description.scenes} scenes",
            )
    return description


def check_target(target: str) -> None:
    """Refuse a target where something is already, before what takes its time. Raises as :func:`write`."""
    if target.startswith("hf://"):
        match = parse_hub(target)
        index = f"{match['folder']}/{INDEX}" if match["folder"] else INDEX
        with _told(target):
            taken = HfApi().file_exists(match["repo"], index, revision=match["revision"])
        there = "already holds an export: choose another name, branch or folder"
    else:
        fs, path = file_system(target)
        fs.invalidate_cache()
        with _told(target):
            taken = fs.exists(path) and (fs.isfile(path) or fs.ls(path, detail=False))
        there = "is not empty: remove what is there, or choose another folder"
    if taken:
        raise ValueError(f"{redact(target)} {there}")


@contextmanager
def _told(target: str, hint: str = "") -> Iterator[None]:
    """Make a sentence of what goes wrong with a target."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # object stores have errors of their own, for credentials and for the network
        raise ValueError(f"{redact(target)} can't be written: {reason(error)}{hint}") from error


class _Files:
    """Files on their way into a folder, and the names of all that were begun."""

    def __init__(self, target: str) -> None:
        self.fs, self.path = file_system(target)
        self.target, self.begun = target, list[str]()

    def put(self, name: str, data: bytes) -> Stamp:
        self.begun.append(name)
        write_file(join(self.target, name), data)
        return Stamp(len(data), zlib.crc32(data))

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Stamp:
        self.begun.append(name)
        return write_tensors(join(self.target, name), tensors, rows)


def _write(content: Content, target: str, name: str, file_bytes: int) -> Description:
    """Write into a folder, all or nothing; ``name`` is what the card calls the export."""
    files = _Files(target)
    with _told(target):
        new = not files.fs.exists(files.path)
        make_folder(target)
        try:
            return _write_files(content, files, name, file_bytes)
        except BaseException:
            # Remove only files begun here, and ignore errors of that: the original error is the one to report.
            for file in files.begun:
                with suppress(Exception):
                    files.fs.rm_file(join(files.path, file))
            if new:
                with suppress(Exception):
                    files.fs.rmdir(files.path)
            raise


def _write_files(content: Content, files: _Files, name: str, file_bytes: int) -> Description:
    """Write all files, ``igae.json`` last."""
    model, sums = content.model, dict[str, Stamp]()
    with tempfile.TemporaryDirectory() as folder:
        model.autoencoder.save(Path(folder))
        for source in sorted(Path(folder).iterdir()):
            assert source.name not in OWN
            sums[source.name] = files.put(source.name, source.read_bytes())
    sums[SHARED] = files.put_tensors(SHARED, shared_tensors(model), {})
    scenes: list[SceneFile] = []
    step = max(1, file_bytes // (4 * math.prod(content.planes.row_shape)))
    starts = range(0, len(content.scenes), step)
    for start in progress("writing scenes", len(starts), "files", starts):
        names = list(content.scenes[start : start + step])
        rows = content.rows(start, start + len(names))
        assert rows.dtype == torch.float32 and rows.shape == (len(names), *content.planes.row_shape)
        file = f"scenes-{len(scenes):05d}.safetensors"
        found = files.put_tensors(file, {}, {PLANES: rows})
        moved = {name: content.normalizations[name] for name in names if name in content.normalizations}
        scenes.append(SceneFile(file, found.bytes, found.crc32, names, moved))
    sums[SCENES] = files.put(SCENES, dump_scenes(scenes))
    if content.config is not None:
        sums[CONFIG] = files.put(CONFIG, content.config.encode())
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
        sums,
    )
    sums[CARD] = files.put(CARD, model_card(description, redact(name), content).encode())
    files.put(INDEX, dump_description(description))
    return description
