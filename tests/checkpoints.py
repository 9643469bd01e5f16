# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: an example for each step, and whether one that was read is equal to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from igae.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    DamagedCheckpoint,
    Progress,
    folder_of,
    list_complete,
    load_checkpoint,
)
from igae.ranks import Channel, RefusedByAll

FILES = {"shared.safetensors", "optimizer.safetensors", "scenes-00000.safetensors", "config.yaml", "state.json"}
IDS = [4, 2, 9]


@dataclass
class State:
    """What a save is given."""

    progress: Progress
    config: str
    shared: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scenes: dict[str, Tensor]


def example(total: int) -> State:
    generator = torch.Generator().manual_seed(total)
    shared = {
        "net.weight": torch.randn(3, 4, 2, 2, generator=generator),
        "net.turned": torch.randn(5, 6, generator=generator).T,  # not contiguous
        "scale": torch.tensor(0.02),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "half": torch.randn(7, generator=generator).bfloat16(),
    }
    optimizer = {
        "net.weight/exp_avg": torch.randn(3, 4, 2, 2, generator=generator),
        "net.weight/step": torch.tensor(7.0),
    }
    scenes = {
        "ids": torch.tensor(IDS),
        "planes": torch.randn(3, 3, 4, 4, 2, generator=generator).requires_grad_(),
        "updated": torch.randint(0, 100, (3,), generator=generator),
        "flags": torch.rand(3, 5, generator=generator) > 0.5,
    }
    consumed = {"views": total * 4, "natural_images": 1}
    progress = Progress(
        "joint", max(total - 1, 0), total, skipped=2, skipped_in_a_row=1, data="ab12", consumed=consumed
    )
    return State(progress, f"experiment: größe\nseed: {total}\n", shared, optimizer, scenes)


def put(maker: CheckpointWriter, state: State) -> Path:
    return Path(maker.save(state.progress, state.config, state.shared, state.optimizer, state.scenes))


def save(root: Path, state: State, keep: int) -> Path:
    return put(CheckpointWriter(str(root), keep, Channel()), state)


def at(root: Path, total: int, finished: bool = False) -> Path:
    return Path(folder_of(str(root), total, finished))


Bits = dict[str, tuple[torch.dtype, torch.Size, bytes]]


def bits(tensors: Mapping[str, Tensor]) -> Bits:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def same(folder: Path | str, expected: State) -> bool:
    """Whether all of a checkpoint is what was saved, bit for bit."""
    found = load_checkpoint(str(folder))
    ids = expected.scenes["ids"].tolist()
    rows = {name: tensor for name, tensor in expected.scenes.items() if name != "ids"}
    return (
        found.progress == expected.progress
        and found.config == expected.config
        and bits(found.shared) == bits(expected.shared)
        and bits(found.optimizer) == bits(expected.optimizer)
        and found.ids.tolist() == sorted(ids)
        and bits(found.rows(ids)) == bits(rows)
    )


def read_all(folder: Path) -> Checkpoint:
    found = load_checkpoint(str(folder))
    found.rows(sorted(found.ids))
    return found


def sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert type(error.value) in (ValueError, RefusedByAll, DamagedCheckpoint) and "\n" not in str(error.value)
    return str(error.value)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def complete(root: Path) -> list[str]:
    return [Path(folder).name for folder in list_complete(str(root))]
