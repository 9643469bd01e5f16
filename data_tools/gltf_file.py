# SPDX-License-Identifier: Apache-2.0
"""A glTF 2.0 file: its elements by index, the numbers of its accessors and its pictures."""

import base64
import json
import struct
from functools import cache
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from gltf_keys import check_keys
from numpy.typing import NDArray
from object_files import BadMesh, Neighbours
from object_parts import decoded
from PIL import Image

JSON_CHUNK, BIN_CHUNK = 0x4E4F534A, 0x004E4942
TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
SHAPES = {"SCALAR": (), "VEC2": (2,), "VEC3": (3,), "VEC4": (4,), "MAT4": (4, 4)}


class GltfFile:
    """A parsed file. BadMesh where it, or a file that it refers to, is damaged or has what is not understood."""

    def __init__(self, files: Neighbours, data: bytes) -> None:
        self._files, self._binary = files, b""
        if data[:4] == b"glTF":
            data, self._binary = _chunks(data)
        header = json.loads(data)
        if not isinstance(header, dict):
            raise BadMesh("it is no glTF")
        check_keys(header)
        self.header: dict[str, Any] = header
        self._buffer = cache(self._read_buffer)  # of this file: it goes with it
        self.image = cache(self._read_image)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """The elements of a kind, such as `nodes`."""
        elements: list[dict[str, Any]] = self.header.get(kind, [])
        return elements

    def one(self, kind: str, index: int) -> dict[str, Any]:
        """An element; BadMesh where there is none."""
        if not 0 <= index < len(self.all(kind)):
            raise BadMesh(f"it refers to {kind}[{index}], but has {len(self.all(kind))} {kind}: export it again")
        return self.all(kind)[index]

    def numbers(self, index: int, normalized: bool | None = None) -> NDArray[Any]:
        """The values of an accessor, [count, ...]; matrices as [count, row, column].

        Args:
            normalized: whether integers stand for [0, 1] or [-1, 1]; None: as the file says.
        """
        accessor = self.one("accessors", index)
        count, kind = accessor["count"], accessor["type"]
        if kind not in SHAPES or accessor["componentType"] not in TYPES:
            raise BadMesh(f"its accessors[{index}] has the type {kind}, which no attribute can have: export it again")
        dtype, shape = np.dtype(TYPES[accessor["componentType"]]), (count, *SHAPES[kind])
        if "bufferView" in accessor:
            values = self._strided(accessor, dtype, shape)
        elif "sparse" in accessor:
            values = np.zeros(shape, dtype)
        else:
            raise BadMesh(f"its accessors[{index}] has no data, as if compressed: export it without compression")
        if sparse := accessor.get("sparse"):
            some = sparse["count"]
            where = self._strided(sparse["indices"], np.dtype(TYPES[sparse["indices"]["componentType"]]), (some,))
            values = values.copy()
            values[where] = self._strided(sparse["values"], dtype, (some, *shape[1:]))
        if dtype.kind != "f" and (accessor.get("normalized") if normalized is None else normalized):
            values = np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values.swapaxes(1, 2) if kind == "MAT4" else values

    def _strided(self, place: dict[str, Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        view = self.one("bufferViews", place["bufferView"])
        row = int(np.prod(shape[1:])) * dtype.itemsize
        inner = np.empty(shape[1:], dtype).strides
        strides, start = (view.get("byteStride", row), *inner), place.get("byteOffset", 0)
        try:
            return np.ndarray(shape, dtype, self.view(place["bufferView"]), start, strides)
        except (TypeError, ValueError) as error:
            index = place["bufferView"]
            raise BadMesh(
                f"its bufferViews[{index}] is too short for what an accessor reads: export it again"
            ) from error

    def view(self, index: int) -> bytes:
        """The bytes of a buffer view."""
        view = self.one("bufferViews", index)
        start, length = view.get("byteOffset", 0), view["byteLength"]
        data = self._buffer(view["buffer"])[start : start + length]
        if len(data) < length:
            raise BadMesh(f"its bufferViews[{index}] ends beyond its buffer: it was not copied whole")
        return data

    def _read_buffer(self, index: int) -> bytes:
        buffer = self.one("buffers", index)
        if "uri" in buffer:
            return self._uri(buffer["uri"])
        if index or not self._binary:
            raise BadMesh(f"its buffers[{index}] has no data: export it again")
        return self._binary

    def _read_image(self, index: int) -> Image.Image:
        image = self.one("images", index)
        if "bufferView" in image:
            return decoded(self.view(image["bufferView"]), f"images[{index}]")
        if "uri" not in image:
            raise BadMesh(f"its images[{index}] has no data: export it again")
        uri = image["uri"]
        return decoded(self._uri(uri), f"images[{index}]" if uri.startswith("data:") else repr(uri))

    def _uri(self, uri: str) -> bytes:
        if not uri.startswith("data:"):
            return self._files.get(uri)
        kind, _, text = uri.partition(",")
        data = unquote_to_bytes(text)
        return base64.b64decode(data) if kind.endswith(";base64") else data


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """JSON and, where there is one, buffer of a GLB."""
    _, version, length = struct.unpack_from("<4sII", data)
    if version != 2:
        raise BadMesh(f"it is glTF {version}: only version 2 is supported")
    if len(data) < length:
        raise BadMesh(f"it has {len(data)} bytes of {length}: it was not downloaded whole")
    found: dict[int, bytes] = {}
    start = 12
    while start + 8 <= length:
        size, kind = struct.unpack_from("<II", data, start)
        found.setdefault(kind, data[start + 8 : start + 8 + size])
        start += 8 + size
    return found.get(JSON_CHUNK, b""), found.get(BIN_CHUNK, b"")
