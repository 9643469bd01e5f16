# SPDX-License-Identifier: Apache-2.0
"""Facts about the ranks of a run, and the seeds that every rank derives alike."""

import hashlib
import os


def rank() -> int:
    """Rank of this process, as the launcher set it (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, as the launcher set it (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else.

    All random numbers of a run come from seeds like ``derive_seed(seed, "joint", step, rank)``: no generator state
    has to be saved for a resumed run to be equal to an uninterrupted one.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
