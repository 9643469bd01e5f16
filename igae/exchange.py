# SPDX-License-Identifier: Apache-2.0
"""The mean over the ranks of the gradients of what they share, exchanged while others are still computed."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 32 * 2**20
"""Bytes of gradients that are sent together. Fewer cost more launches, and more are sent later."""


class Exchange:
    """Sends gradients in buckets, each as soon as a backward pass has all that belong into it.

    It does what torch's DistributedDataParallel does, in the gradients' places alone: no call asks the host for
    anything and no autograd node outlives a step, so that whole steps can be captured in a CUDA graph.

    Args:
        parameters: the same ones on all ranks, in the order in which a forward pass meets them. Each has its gradient
            on all ranks in a step, or on none.
        bucket_bytes: a bucket with so many is full.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET) -> None:
        self.active = False
        """Gradients are sent as they come: they are those of the last backward pass before the step."""
        self._world, self._device = dist.get_world_size(), parameters[0].device
        self._buckets: list[list[nn.Parameter]] = [[]]
        filled = 0
        for parameter in reversed(parameters):  # a backward pass begins with the last one
            if filled >= bucket_bytes:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(parameter)
            filled += parameter.numel() * parameter.element_size()
        for bucket in self._buckets:
            # Those of an odd length behind the others: gradients that begin at 16 bytes are read faster.
            bucket.sort(key=lambda parameter: parameter.numel() % 4 != 0)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Callable[[], None]]] = []
        self.active = False

    def _arrived(self, parameter: Tensor) -> None:
        if not self.active:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        # All ranks send in the same order. The last bucket waits for what goes with it.
        while len(self._sent) < len(self._buckets) - 1 and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self, flags: Sequence[Tensor] = (), overlap: bool = True) -> None:
        """Send the next bucket, with some more numbers at its end."""
        bucket = self._buckets[len(self._sent)]
        reached = [(parameter, parameter.grad) for parameter in bucket if parameter.grad is not None]
        pieces = [*(_as_it_lies(*pair) for pair in reached), *(flag.view(1) for flag in flags)]
        flat = torch.cat(pieces) if pieces else torch.empty(0, device=self._device)
        sizes = [parameter.numel() for parameter, _ in reached]
        for (parameter, _), piece in zip(reached, flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = piece.as_strided(parameter.size(), parameter.stride())
        self._sent.append((flat, self.mean(flat, overlap)))

    def mean(self, flat: Tensor, overlap: bool) -> Callable[[], None]:
        """Begin to make a vector its mean over the ranks; what is returned waits for that.

        Args:
            overlap: other things are to be computed meanwhile. (Without, NCCL works on the current stream, which is
                sooner there.)
        """
        divides = self._device.type == "cuda"  # NCCL divides on the way; gloo can't
        work = dist.all_reduce(flat, dist.ReduceOp.AVG if divides else dist.ReduceOp.SUM, async_op=overlap)

        def wait() -> None:
            if work is not None:
                work.wait()
            if not divides:
                flat.div_(self._world)

        return wait

    def finish(self, flags: Sequence[Tensor]) -> Tensor:
        """Send what has not been sent, and wait (on a GPU the device does) for all: gradients are means over the ranks.

        Args:
            flags: float32 numbers.

        Returns:
            Means over the ranks of the flags, [n].
        """
        while len(self._sent) < len(self._buckets) - 1:
            self._send()
        for _, wait in self._sent:
            wait()
        self._send(flags, overlap=False)
        flat, wait = self._sent[-1]
        wait()
        self._begin()
        return flat[len(flat) - len(flags) :]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _as_it_lies(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient as a vector in the order in which its parameter lies in memory, which is the same on all ranks."""
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
