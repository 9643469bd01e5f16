# SPDX-License-Identifier: Apache-2.0
"""Facts about the ranks of a run, the seeds that every rank derives alike, and exchanges of small things."""

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Rank of this process, as the launcher set it (0 without a launcher)."""
    return _variable("RANK", 0)


def world_size() -> int:
    """Number of processes, as the launcher set it (1 without a launcher)."""
    return _variable("WORLD_SIZE", 1)


def _variable(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    return int(text) if text.isdecimal() else otherwise


def check_rank_variables() -> None:
    """Refuse RANK and WORLD_SIZE that no launcher sets: they are left over from something else.

    Raises:
        ValueError: the sentence names the variable.
    """
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(f"{name}={os.environ[name]} in the environment is no number: unset it")
    if rank() >= world_size():
        raise ValueError(
            f"RANK={rank()} and WORLD_SIZE={world_size()} in the environment don't belong together: unset both, or "
            "start with accelerate launch"
        )


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else.

    All random numbers of a run come from seeds like ``derive_seed(seed, "joint", step, rank)``: no generator state
    has to be saved for a resumed run to be equal to an uninterrupted one.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Channel:
    """Exchanges small things between all ranks, over the CPU, apart from training's collectives.

    All methods are collective: every rank calls them, in the same order. A thread needs a channel of its own. Channels
    are made on all ranks, in the same order. With one rank everything returns at once.

    Args:
        timeout: seconds after which a rank that waits for another one gives up.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        self._group: Any = None
        if world_size() > 1:
            import torch.distributed as dist  # here: configurations are checked before torch is imported

            self._dist = dist
            # gloo would wait for half an hour, whatever the main group does
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank (pickled: only what the ranks of this run themselves made)."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def on_first_rank(self, action: Callable[[], T]) -> T:
        """Run an action on the first rank only and return its result on all. Where it fails with a ValueError or
        OSError, all ranks raise the same ValueError."""
        done: tuple[Any, str | None] = (None, None)
        if rank() == 0:
            try:
                done = (action(), None)
            except (OSError, ValueError) as error:
                done = (None, str(error))
        value, problem = self.gather(done)[0]
        if problem is not None:
            raise ValueError(problem)
        result: T = value
        return result

    def sum(self, values: "Tensor") -> "Tensor":
        """Element-wise sum over the ranks of a CPU tensor."""
        total = values.clone()
        if self._group is not None:
            self._dist.all_reduce(total, group=self._group)
        return total
