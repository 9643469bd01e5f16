# SPDX-License-Identifier: Apache-2.0
"""Parts of the natural images: what each rank reads."""

import io
import shutil
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scene_files import open_images, write_data

from igae.data import Manifest, PackOptions, ShardReader, StreamState, pack

NATURAL_IMAGES = 23


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("parts")
    data = write_data(folder / "data", views=(3,), images=NATURAL_IMAGES)
    manifest, _ = pack(str(folder / "out"), PackOptions(images=str(data / "natural_images"), shard_size=15_000))
    assert manifest.images == NATURAL_IMAGES and len(manifest.shards) >= 4
    return str(folder / "out"), manifest


def stored(root: str, manifest: Manifest) -> list[bytes]:
    """The decoded natural images in their order."""
    images = [record.image for shard in manifest.shards for record in ShardReader(root).read(shard)]
    return [np.asarray(Image.open(io.BytesIO(image))).transpose(2, 0, 1).tobytes() for image in images]


def read(root: str, manifest: Manifest, batches: int | None = None, **options) -> list[bytes]:
    loader = open_images(root, manifest, workers=0, repeat=batches is not None, **options)
    try:
        found = list(loader) if batches is None else [next(loader) for _ in range(batches)]
        return [image.numpy().tobytes() for batch in found for image in batch]
    finally:
        loader.close()


@st.composite
def shares(draw) -> list[range]:
    """Ranges of all natural images, one for each rank, none empty."""
    ranks = draw(st.integers(1, 6))
    cuts = sorted(
        draw(st.lists(st.integers(1, NATURAL_IMAGES - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    )
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, NATURAL_IMAGES], strict=True)]


@given(parts=shares(), shuffle=st.sampled_from([0, 1, 4, 2000]), seed=st.integers(0, 5), batch=st.integers(1, 9))
@settings(max_examples=40)
def test_parts_are_the_data_set_without_overlap(packed, parts, shuffle, seed, batch):
    root, manifest = packed
    whole = stored(root, manifest)
    options = {"batch_size": batch, "shuffle": shuffle, "seed": seed}
    by_rank = [read(root, manifest, part=part, **options) for part in parts]
    for part, found in zip(parts, by_rank, strict=True):
        expected = [whole[i] for i in part]
        assert found == expected if shuffle < 1 else Counter(found) == Counter(expected)
    assert Counter(image for found in by_rank for image in found) == Counter(whole)


@given(
    start=st.integers(0, NATURAL_IMAGES - 1),
    length=st.integers(1, NATURAL_IMAGES),
    batch=st.integers(1, 9),
    step=st.integers(0, 12),
)
@settings(max_examples=40)
def test_resume_inside_a_part(packed, start, length, batch, step):
    root, manifest = packed
    part = range(start, min(start + length, NATURAL_IMAGES))
    options = {"batch_size": batch, "seed": 7, "shuffle": 5, "part": part}
    whole = read(root, manifest, 14, **options)
    epochs = [whole[i : i + len(part)] for i in range(0, len(whole) - len(part) + 1, len(part))]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == len(part) for epoch in epochs)
    state = StreamState(*divmod(step * batch, len(part)))
    loader = open_images(root, manifest, workers=0, **options)
    for _ in range(step):
        next(loader)
    assert loader.state == state and loader.plan.samples == len(part)
    loader.close()
    assert read(root, manifest, 2, state=state, **options) == whole[step * batch : (step + 2) * batch]


def test_all_is_the_part_of_all(packed):
    root, manifest = packed
    for shuffle in (0, 3, 2000):
        options = {"batch_size": 5, "seed": 3, "shuffle": shuffle}
        assert read(root, manifest, 12, **options) == read(root, manifest, 12, part=range(NATURAL_IMAGES), **options)


def test_only_shards_of_the_part_are_opened(packed, tmp_path):
    root, manifest = packed
    ends = list(accumulate(shard.samples for shard in manifest.shards))
    part = range(ends[0] - 1, ends[1])  # the last of the first shard, and the second
    for shard in manifest.shards[:2]:
        shutil.copy(Path(root, shard.name), tmp_path)
    found = read(str(tmp_path), manifest, batch_size=4, part=part, seed=1)
    assert Counter(found) == Counter(stored(root, manifest)[part.start : part.stop])


def test_order_of_a_shard_is_not_read_beyond_the_part(packed, tmp_path):
    """Damage behind the part is not met."""
    root, manifest = packed
    shard = manifest.shards[0]
    records = list(ShardReader(root).read(shard))
    raw = bytearray(Path(root, shard.name).read_bytes())
    raw[records[3].image_offset] ^= 1
    Path(tmp_path, shard.name).write_bytes(raw)
    images = read(str(tmp_path), manifest, batch_size=1, part=range(0, 2))
    assert len(images) == 2


@pytest.mark.parametrize(
    "part", [range(3, 3), range(-1, 2), range(0, NATURAL_IMAGES + 1), range(5, 2), range(0, 4, 2), range(0)]
)
def test_wrong_parts(packed, part):
    root, manifest = packed
    with pytest.raises(ValueError, match=f"is no part of {NATURAL_IMAGES} natural images"):
        open_images(root, manifest, batch_size=1, part=part)


def test_with_workers(packed):
    root, manifest = packed
    options = {"batch_size": 4, "part": range(5, 17), "repeat": False}
    found = [torch.cat(list(open_images(root, manifest, workers=workers, **options))) for workers in (0, 2)]
    assert torch.equal(*found)
