# SPDX-License-Identifier: Apache-2.0
"""Streams of batches out of packed data.

One thread of this process reads raw samples, shard after shard, and decides the order; DataLoader workers only decode
them. So the order depends on the seed alone, not on the number of workers, and a `StreamState` of two numbers says
exactly where a stream is.
"""

import atexit
import hashlib
import io
import json
import queue
import random
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from webdataset import filters

from igae.data.manifest import Manifest, Scene, Shard
from igae.data.shards import Record, ShardError, read_records

READ_AHEAD = 8
"""Batches of raw samples that the reading thread keeps ready."""


@dataclass
class StreamState:
    """Where a stream is: `position` samples of epoch `epoch` have been yielded."""

    epoch: int = 0
    position: int = 0


@dataclass
class ViewBatch:
    """Views of scenes.

    Attributes:
        images: uint8 [B, 3, H, W], over the background.
        scene: int64 [B], ids of the manifest.
        view: int64 [B], indices in the scenes' transforms files.
        cam2world: float32 [B, 4, 4], OpenCV.
        intrinsics: float32 [B, 3, 3], normalised by the image size.
    """

    images: Tensor
    scene: Tensor
    view: Tensor
    cam2world: Tensor
    intrinsics: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ViewBatch":
        """The batch on another device."""
        return ViewBatch(**{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()})


B = TypeVar("B", ViewBatch, Tensor)


def decode_image(data: bytes, size: tuple[int, int], background: np.ndarray) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, 3]; transparent pixels show `background`, uint8 [3].

    Raises:
        ValueError, OSError: it is damaged, or is not of `size` (height, width).
    """
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    if (image.height, image.width) != size:  # before decoding: a damaged header must not cost memory
        raise ValueError(f"it is {image.width}x{image.height} pixels, the manifest says {size[1]}x{size[0]}")
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
    alpha = pixels[..., 3:]
    # At most 255 * 255 + 127: fits 16 bits; rounds to the nearest.
    return ((pixels[..., :3] * alpha + background.astype(np.uint16) * (255 - alpha) + 127) // 255).astype(np.uint8)


class _Decoder(Dataset[B], Generic[B]):
    """A data set whose indices are raw samples. What goes wrong is returned, so that the caller can raise it."""

    def __init__(self, size: tuple[int, int], background: Sequence[float], ids: dict[str, int] | None) -> None:
        self._size = size
        self._background = np.asarray([round(255 * channel) for channel in background], dtype=np.uint8)
        self._ids = ids

    def __getitems__(self, records: list[Record]) -> B | ShardError:
        height, width = self._size
        images = np.empty((len(records), 3, height, width), np.uint8)
        cameras = np.empty((len(records), 25), np.float32)
        for index, record in enumerate(records):
            try:
                images[index] = decode_image(record.image, self._size, self._background).transpose(2, 0, 1)
                if record.camera is not None:
                    camera = json.loads(record.camera)
                    cameras[index, :16] = np.asarray(camera["cam2world"], np.float64).reshape(16)
                    cameras[index, 16:] = np.asarray(camera["intrinsics"], np.float64).reshape(9)
            except Exception as error:  # decoders raise whatever damaged data makes them raise
                return ShardError(f"sample {record.key!r} of shard {record.shard} cannot be decoded: {error}")
        if self._ids is None:
            return torch.from_numpy(images)  # type: ignore[return-value]
        keys = [record.key.rsplit("/", 1) for record in records]
        return ViewBatch(  # type: ignore[return-value]
            images=torch.from_numpy(images),
            scene=torch.tensor([self._ids[scene] for scene, _ in keys]),
            view=torch.tensor([int(view) for _, view in keys]),
            cam2world=torch.from_numpy(cameras[:, :16].reshape(-1, 4, 4)),
            intrinsics=torch.from_numpy(cameras[:, 16:].reshape(-1, 3, 3)),
        )


@dataclass(frozen=True)
class _Plan:
    """What is read, in which order. `counts`: samples of each shard that are wanted; shards without any are absent."""

    root: str
    shards: Sequence[Shard]
    counts: dict[str, int]
    scenes: frozenset[str] | None
    seed: int
    shuffle: int
    repeat: bool

    @property
    def samples(self) -> int:
        return sum(self.counts.values())

    def records(self, state: StreamState) -> Iterator[Record]:
        """Raw samples from `state` on, endless with `repeat`."""
        skip = state.position
        for epoch in _count_from(state.epoch) if self.repeat else [state.epoch]:
            shards = list(self.shards)
            if self.shuffle:
                _rng(self.seed, epoch, "").shuffle(shards)
            for shard in shards:
                if skip >= self.counts[shard.name]:
                    skip -= self.counts[shard.name]
                    continue
                for record in self._shard(shard, epoch):
                    if skip:
                        skip -= 1
                    else:
                        yield record

    def _shard(self, shard: Shard, epoch: int) -> Iterator[Record]:
        wanted = None if self.scenes is None else self.scenes.__contains__
        records = read_records(self.root, shard, wanted)
        if self.shuffle < 2:
            return records
        rng = _rng(self.seed, epoch, shard.name)
        shuffled: Iterator[Record] = filters.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(records)
        return shuffled


def _count_from(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def _rng(seed: int, epoch: int, shard: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{shard}".encode()).digest()[:8], "big"))


class _Batches:
    """Batches of raw samples, read ahead by a thread; the batch sampler of a DataLoader.

    The thread starts at the first `next`, which is after the DataLoader has forked its workers. An error ends the
    batches and is kept: raised here, it would leave a half made DataLoader, whose workers nobody could end.
    """

    def __init__(self, records: Iterator[Record], batch_size: int) -> None:
        self._records, self._batch_size = records, batch_size
        self._ready: queue.Queue[list[Record] | None] = queue.Queue(READ_AHEAD)
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[list[Record]]:
        self._thread = threading.Thread(target=self._read, name="igae-read-ahead", daemon=True)
        self._thread.start()
        while (batch := self._ready.get()) is not None:
            yield batch

    def _read(self) -> None:
        batch: list[Record] = []
        try:
            for record in self._records:
                batch.append(record)
                if len(batch) == self._batch_size:
                    if not self._put(batch):
                        return
                    batch = []
            if batch:
                self._put(batch)
        except Exception as error:
            self.error = error
        self._put(None)

    def _put(self, item: list[Record] | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # it is a daemon: a read that hangs does not keep the process


def _same(batch: B | ShardError) -> B | ShardError:
    return batch


def _ignore_sigterm(_: int) -> None:
    # Schedulers send SIGTERM to each process of a job, but training needs its workers to end its step. Only the first
    # is ignored: a worker that hangs must still end.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


_open: "weakref.WeakSet[Loader[Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:  # before multiprocessing's exit, which sends workers a SIGTERM and waits for them
    for loader in list(_open):
        loader.close()


class Loader(Generic[B]):
    """An iterator over batches; `state` is where it is after the batch that was yielded last."""

    def __init__(self, plan: _Plan, decoder: _Decoder[B], batch_size: int, workers: int, state: StreamState | None):
        if batch_size < 1 or workers < 0 or plan.shuffle < 0:
            raise ValueError(f"batch_size {batch_size}, workers {workers}, shuffle {plan.shuffle}: too small")
        self._plan = plan
        self._state = replace(state) if state else StreamState()
        if self._state.epoch < 0 or not 0 <= self._state.position <= plan.samples:
            raise ValueError(f"{self._state} does not fit this stream, which has {plan.samples} samples an epoch")
        self._batches = _Batches(plan.records(replace(self._state)), batch_size)
        self._loader: DataLoader[B] = DataLoader(
            decoder,
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_ignore_sigterm,
            multiprocessing_context="fork" if workers else None,
            # An own generator: a DataLoader would otherwise draw from the global one.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[B | ShardError] | None = None
        self._closed = False
        _open.add(self)

    @property
    def state(self) -> StreamState:
        """A copy of the state; a new loader with it yields what this one would yield next."""
        return replace(self._state)

    @property
    def samples(self) -> int:
        """Number of samples of an epoch."""
        return self._plan.samples

    def __iter__(self) -> "Loader[B]":
        return self

    def __next__(self) -> B:
        if self._closed:
            raise StopIteration
        try:
            if self._iterator is None:
                self._iterator = iter(self._loader)
            batch: B | ShardError | None = next(self._iterator, None)
            if batch is None or isinstance(batch, ShardError):
                raise batch or self._batches.error or StopIteration
        except BaseException:
            self.close()
            raise
        self._advance(len(batch.images if isinstance(batch, ViewBatch) else batch))
        return batch

    def _advance(self, number: int) -> None:
        epochs, position = divmod(self._state.position + number, self._plan.samples)
        if self._plan.repeat:
            self._state = StreamState(self._state.epoch + epochs, position)
        else:
            self._state.position += number

    def close(self) -> None:
        """Ends the thread and the workers; the loader yields nothing more."""
        self._closed = True
        self._batches.close()
        # The iterator's destructor does this too, but an exception's traceback may keep the iterator.
        if (shutdown := getattr(self._iterator, "_shutdown_workers", None)) is not None:
            shutdown()
        self._iterator = None

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


ViewLoader = Loader[ViewBatch]
ImageLoader = Loader[Tensor]


def view_loader(
    root: str,
    manifest: Manifest,
    scenes: Sequence[Scene],
    *,
    batch_size: int,
    seed: int = 0,
    split: Literal["train", "heldout"] = "train",
    shuffle: int = 2000,
    repeat: bool = True,
    workers: int = 2,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    state: StreamState | None = None,
) -> ViewLoader:
    """Batches of views of some scenes.

    Args:
        root: folder or URL of the packed data.
        manifest: its manifest.
        scenes: the scenes whose views are wanted; shards with none of them are not read.
        batch_size: views in a batch.
        seed: an epoch's order is a function of (seed, epoch).
        split: training or held-out views.
        shuffle: views in the buffer that batches are drawn from, inside a shard; shards are permuted too. 0: views come
            in their stored order.
        repeat: endless, and batches go across epochs; otherwise one pass, and the last batch may be smaller.
        workers: decoding processes; 0 decodes in this one.
        background: colour in [0, 1] that transparent pixels show.
        state: where to begin.

    Raises:
        ValueError: no such views, or a number out of range. While iterating `ShardError`, which names the shard.
    """
    if not all(0 <= channel <= 1 for channel in background):
        raise ValueError(f"background {background} is not a colour in [0, 1]")
    kind = "scenes" if split == "train" else "heldout"
    names = frozenset(scene.name for scene in scenes)
    counts = Counter[str]()
    for shard in manifest.shards:
        if shard.kind == kind:
            counts[shard.name] = sum(number for scene, number in shard.scenes.items() if scene in names)
    plan = _plan(root, manifest, counts, names, seed, shuffle, repeat)
    if not plan.samples:
        raise ValueError(f"the {len(scenes)} chosen scenes have no {split} views in {root}")
    decoder = _Decoder[ViewBatch](manifest.image_size, background, {scene.name: scene.id for scene in scenes})
    return Loader(plan, decoder, batch_size, workers, state)


def image_loader(
    root: str,
    manifest: Manifest,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: int = 2000,
    repeat: bool = True,
    workers: int = 2,
    state: StreamState | None = None,
) -> ImageLoader:
    """Batches uint8 [B, 3, H, W] of photographs; arguments and errors as in `view_loader`."""
    counts = Counter({shard.name: shard.samples for shard in manifest.shards if shard.kind == "images"})
    plan = _plan(root, manifest, counts, None, seed, shuffle, repeat)
    if not plan.samples:
        raise ValueError(f"there are no photographs in {root}: pack some with --images")
    return Loader(plan, _Decoder[Tensor](manifest.image_size, (1.0, 1.0, 1.0), None), batch_size, workers, state)


def _plan(
    root: str,
    manifest: Manifest,
    counts: Counter[str],
    scenes: frozenset[str] | None,
    seed: int,
    shuffle: int,
    repeat: bool,
) -> _Plan:
    counts = +counts  # without the shards that have nothing
    shards = [shard for shard in manifest.shards if shard.name in counts]
    return _Plan(root, shards, dict(counts), scenes, seed, shuffle, repeat)
