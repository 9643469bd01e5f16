# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose scenes are finished one part after another, each by any rank and perhaps after a restart."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from igae.checkpoint.layout import OPTIMIZER, SHARED, STATE, File, Progress, reason, scenes_name
from igae.checkpoint.reader import head
from igae.checkpoint.writer import Tensors, publish, put, sync_folder
from igae.errors import redact
from igae.storage import join
from igae.storage import tensors as tensorfile

BEGUN = "begun.json"
_FILE = TypeAdapter(File)


class Parts:
    """A folder that becomes a checkpoint when all of its parts are there.

    Part number i is a file of scenes, ``scenes-0000i.safetensors``, and, written after it, ``scenes-0000i.json`` with
    its size and checksum: a part with that is finished. ``begun.json`` says what the parts have in common. Methods are
    not collective.

    Raises (all methods):
        ValueError: the folder can't be read or written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with self._naming("read"):
            self._fs, self._path = fsspec.core.url_to_fs(folder)

    def begin(self, config: str, data: str) -> tuple[str, str]:
        """Start with these settings and data, or go on.

        Returns:
            The settings and the digest of the data that the folder was started with.
        """
        with self._naming("written"):
            if self.complete:
                progress, _, settings = head(self.folder)
                return settings, progress.data
            self._fs.makedirs(self._path, exist_ok=True)
            path = join(self._path, BEGUN)
            if not self._fs.exists(path):
                put(self._fs, path, json.dumps([config, data]).encode())
            begun = json.loads(self._fs.cat_file(path))
            return str(begun[0]), str(begun[1])

    def finished(self) -> dict[int, File]:
        """The parts that are there, by number."""
        with self._naming("read"):
            self._fs.invalidate_cache()
            names = [str(path).rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)]
            found = {}
            for name in sorted(names):
                if name.startswith("scenes-") and name.endswith(".json"):
                    number = int(name.removeprefix("scenes-").removesuffix(".json"))
                    found[number] = _parse(self._fs.cat_file(join(self._path, name)), name)
            return found

    def write(self, number: int, scenes: Tensors) -> None:
        """Write a part: ``ids`` (int64 [N]) and tensors [N, ...] of its scenes, with the same names and shapes of rows
        in all parts."""
        with self._naming("written"):
            if isinstance(self._fs, LocalFileSystem):
                os.makedirs(self._path, exist_ok=True)
            name = scenes_name(number)
            rows = {key: value for key, value in scenes.items() if key != "ids"}
            stamp = tensorfile.write(join(self.folder, name), {"ids": scenes["ids"]}, rows)
            sync_folder(self._fs, self._path)
            file = File(stamp.bytes, stamp.crc32, len(scenes["ids"]))
            put(self._fs, join(self._path, _mark(number)), json.dumps(asdict(file)).encode())

    def close(self, progress: Progress, config: str, shared: Tensors) -> None:
        """Make the checkpoint, of which all parts must be there; for one rank.

        Args:
            progress: its number of ranks is set to that of the parts.
            shared: weights and buffers of the shared module.
        """
        with self._naming("written"):
            parts = self.finished()
            files = {scenes_name(number): file for number, file in parts.items()}
            for name, tensors in ((SHARED, shared), (OPTIMIZER, {})):
                stamp = tensorfile.write(join(self.folder, name), tensors)
                files[name] = File(stamp.bytes, stamp.crc32)
            publish(self.folder, {**asdict(progress), "world": len(parts)}, config, files)
            for name in (*map(_mark, parts), BEGUN):
                self._fs.rm_file(join(self._path, name))

    @property
    def complete(self) -> bool:
        with self._naming("read"):
            return bool(self._fs.exists(join(self._path, STATE)))

    @contextmanager
    def _naming(self, how: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # object stores have errors of their own
            raise ValueError(f"{redact(self.folder)} can't be {how}: {reason(error)}") from error


def _mark(number: int) -> str:
    return scenes_name(number).replace(".safetensors", ".json")


def _parse(data: bytes, name: str) -> File:
    try:
        return _FILE.validate_json(data)
    except ValidationError:
        raise ValueError(f"{name} is damaged: remove it, and the scenes beside it are fitted again") from None
