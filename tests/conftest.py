# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from igae.models import import_diffusers

if TYPE_CHECKING:
    from view_models import Made

# Tests work on small tensors: more threads only get into each other's way. It is as if the user had said so.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# As commands import it: without SciPy and transformers, three seconds of each process of the tests.
import_diffusers()

settings.register_profile("igae", deadline=None)  # the first example pays for imports
settings.load_profile("igae")


SLOW = "system_faults slurm docs kill tiers_runs launch hosts run_faults fit training power_cut export_hub export "
SLOW += "ranks_equal resharding cuda_build cuda_emulated checkpoint_ranks evaluator_ranks damage cloud"
"""Files of half a minute and more, the longest first: they begin first, so that none of them is alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOW.split())}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


@pytest.fixture(scope="session")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """Models to look at: a small run and its export."""
    from view_models import make

    found = make(tmp_path_factory.mktemp("view"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the shards that small runs train on."""
    import runs

    return runs.packed_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe_file(tmp_path: Path, shards: str) -> str:
    """The recipe of small runs, whose outputs are the test's own."""
    import runs

    return str(runs.recipe_file(tmp_path, shards))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def one_run_a_process() -> Iterator[None]:
    """For tests that train here: Accelerate keeps its state per process, where a real run is the only one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
