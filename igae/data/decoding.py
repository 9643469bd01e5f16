# SPDX-License-Identifier: Apache-2.0
"""Decoding of raw samples into batches. Images and JSON are all that is decoded; nothing is unpickled."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from igae.data.cameras import LARGEST
from igae.data.shards import RawSample, ShardError, damaged_shard


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to another device; pinned first, because a copy from pageable memory blocks on the device."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass
class ViewBatch:
    """Views of scenes.

    Attributes:
        images: uint8 [B, 3, H, W], over the background.
        scene: int64 [B], ids of the manifest.
        view: int64 [B], indices in the scenes' transforms files.
        cam2world: float32 [B, 4, 4], OpenCV.
        intrinsics: float32 [B, 3, 3], normalized by the image size.
        masks: uint8 [B, H, W], the images' alpha; of images without alpha, or with 255 all over, 255 where a pixel
            differs from the background, else 0.
        has_alpha: bool [B]. Where it is false, a pixel whose mask is 0 may be of an object as bright as the background.
    """

    images: Tensor
    scene: Tensor
    view: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    masks: Tensor
    has_alpha: Tensor

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The batch on another device."""
        return ViewBatch(**{name: value.to(device) for name, value in vars(self).items()})


B = TypeVar("B", ViewBatch, Tensor)


def pixel_of(color: Sequence[float]) -> np.ndarray:
    """An RGB color in [0, 1] as the uint8 [3] of a pixel."""
    return np.asarray([round(255 * channel) for channel in color], dtype=np.uint8)


def decode_image(data: bytes, size: tuple[int, int], background: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes an image file to uint8 [H, W, 3] and its alpha, uint8 [H, W], or None where it has none or is opaque all
    over, as ShapeNet-SRN's; transparent pixels show `background`, uint8 [3].

    Raises:
        Exception: it is damaged, or is not of `size` (height, width). Decoders raise errors of many kinds.
    """
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    if (image.height, image.width) != size:  # before decoding: a damaged header must not cost memory
        raise ValueError(f"it is {image.width}x{image.height} pixels, the manifest says {size[1]}x{size[0]}")
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), None
    pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
    alpha = pixels[..., 3:]
    if alpha.min() == 255:
        return pixels[..., :3].astype(np.uint8), None
    # At most 255 * 255 + 127: fits 16 bits; rounds to the nearest.
    over = ((pixels[..., :3] * alpha + background.astype(np.uint16) * (255 - alpha) + 127) // 255).astype(np.uint8)
    return over, alpha[..., 0].astype(np.uint8)


class Decoder(Dataset[B], Generic[B]):
    """A data set whose indices are raw samples. What goes wrong is returned, so that the caller can raise it.

    Args:
        root: where the shards are, for messages.
        size: (height, width) of all images.
        background: color in [0, 1] that transparent pixels show.
        ids: id of each scene by name; None: samples are natural images.
    """

    def __init__(
        self, root: str, size: tuple[int, int], background: Sequence[float], ids: dict[str, int] | None
    ) -> None:
        self._root, self._size, self._ids = root, size, ids
        self._background = pixel_of(background)

    def __getitems__(self, samples: list[RawSample]) -> B | ShardError:
        height, width = self._size
        images = np.empty((len(samples), 3, height, width), np.uint8)
        masks, has_alpha = np.empty((len(samples), height, width), np.uint8), np.zeros(len(samples), np.bool_)
        cameras = np.empty((len(samples), 25), np.float32)
        for index, sample in enumerate(samples):
            try:
                pixels, alpha = decode_image(sample.image, self._size, self._background)
            except Exception as error:
                return self._damaged(sample, "image", sample.image_offset, error)
            images[index], has_alpha[index] = pixels.transpose(2, 0, 1), alpha is not None
            if self._ids is not None:
                masks[index] = 255 * (pixels != self._background).any(-1) if alpha is None else alpha
            if sample.camera is not None:
                try:
                    cameras[index] = _decode_camera(sample.camera)
                except Exception as error:
                    return self._damaged(sample, "camera", sample.camera_offset, error)
        if self._ids is None:
            return torch.from_numpy(images)  # type: ignore[return-value]
        keys = [sample.key.rsplit("/", 1) for sample in samples]
        return ViewBatch(  # type: ignore[return-value]
            images=torch.from_numpy(images),
            scene=torch.tensor([self._ids[scene] for scene, _ in keys]),
            view=torch.tensor([int(view) for _, view in keys]),
            cam2world=torch.from_numpy(cameras[:, :16].reshape(-1, 4, 4)),
            intrinsics=torch.from_numpy(cameras[:, 16:].reshape(-1, 3, 3)),
            masks=torch.from_numpy(masks),
            has_alpha=torch.from_numpy(has_alpha),
        )

    def _damaged(self, sample: RawSample, what: str, offset: int, error: Exception) -> ShardError:
        # Pillow's message has the address of a buffer in it.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is no PNG, JPEG or WebP" if unknown else " ".join(str(error)[:300].split()) or type(error).__name__
        how = f"is damaged at byte {offset}: the {what} of sample {sample.key!r} cannot be decoded ({reason})"
        return damaged_shard(self._root, sample.shard, how)


def _decode_camera(data: bytes) -> np.ndarray:
    """float64 [25]: rows of cam2world, rows of the intrinsics."""
    camera = json.loads(data)
    parts = [np.asarray(camera[name], np.float64).reshape(n) for name, n in (("cam2world", 16), ("intrinsics", 9))]
    numbers = np.concatenate(parts)
    if not (np.abs(numbers) <= LARGEST).all() or min(numbers[16], numbers[20]) < 1 / LARGEST:
        raise ValueError(f"NaN or infinite numbers, some beyond {LARGEST:g}, or no focal lengths")
    return numbers
