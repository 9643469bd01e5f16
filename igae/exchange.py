# SPDX-License-Identifier: Apache-2.0
"""The mean over the ranks of the gradients of what they share, exchanged while others are still computed."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 128 * 2**20
"""Bytes of gradients that are sent together. Fewer cost more launches, and more are sent later."""
LAST = 4 * 2**20
"""Bytes of the last bucket at most: nothing is left to compute while it is sent."""
ALONE = 2**20
"""Gradients of so many bytes are sent each from a copy of its own; smaller ones are put together first."""


class Exchange:
    """Sends gradients in buckets, each as soon as a backward pass has all that belong into it.

    It does what torch's DistributedDataParallel does, in the gradients' places alone: no call asks the host for
    anything and no autograd node outlives a step, so that whole steps can be captured in a CUDA graph.

    Args:
        parameters: float32, the same ones on all ranks, in the order in which a forward pass meets them. Each has its
            gradient on all ranks in a step, or on none.
        bucket_bytes: a bucket with so many is full.
        last_bytes: the last bucket has no more.
        alone_bytes: a gradient with so many is sent from a copy of its own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        bucket_bytes: int = BUCKET,
        last_bytes: int = LAST,
        alone_bytes: int = ALONE,
    ) -> None:
        self._alone_bytes = alone_bytes
        self.active = False
        """Gradients are sent as they come: they are those of the last backward pass before the step."""
        self._world, self._device = dist.get_world_size(), parameters[0].device
        last: list[nn.Parameter] = []
        for parameter in parameters:  # a backward pass ends with the first one
            if _bytes([*last, parameter]) > last_bytes:
                break
            last.append(parameter)
        self._buckets: list[list[nn.Parameter]] = []
        for parameter in reversed(parameters[len(last) :]):
            if not self._buckets or _bytes(self._buckets[-1]) >= bucket_bytes:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
        self._buckets.append(last)
        for bucket in self._buckets:
            # Those of an odd length behind the others: gradients that begin at 16 bytes are read faster.
            bucket.sort(key=lambda parameter: parameter.numel() % 4 != 0)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[Callable[[], None]] = []
        self.active = False

    def _arrived(self, parameter: Tensor) -> None:
        if not self.active:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        # All ranks send in the same order. The last bucket waits for what goes with it.
        while len(self._sent) < len(self._buckets) - 1 and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self, flags: Sequence[Tensor] = (), overlap: bool = True) -> Tensor:
        """Send the next bucket, with some more numbers; returns where these are."""
        alone: list[Tensor] = []
        together: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in self._buckets[len(self._sent)]:
            if parameter.grad is None:
                continue
            if _bytes([parameter]) >= self._alone_bytes:
                # A gradient may share its memory with others, or with what still flows back.
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
                alone.append(_as_it_lies(parameter.grad))
            else:
                together.append((parameter, _like(parameter, parameter.grad)))
        pieces = [*(_as_it_lies(gradient) for _, gradient in together), *(flag.view(1) for flag in flags)]
        flat = torch.cat(pieces) if pieces else torch.empty(0, device=self._device)
        parts: tuple[Tensor, ...] = flat.split([*(parameter.numel() for parameter, _ in together), len(flags)])
        for (parameter, _), part in zip(together, parts, strict=False):
            parameter.grad = part.as_strided(parameter.size(), parameter.stride())
        self._sent.append(self.mean([*alone, flat] if pieces else alone, overlap))
        return parts[-1]

    def mean(self, vectors: Sequence[Tensor], overlap: bool) -> Callable[[], None]:
        """Begin to make vectors their means over the ranks; what is returned waits for that.

        Args:
            overlap: other things are to be computed meanwhile. (Without, NCCL works on the current stream, which is
                sooner there.)
        """
        if not vectors:
            return lambda: None
        divides = self._device.type == "cuda"  # NCCL divides on the way; gloo can't
        options = dist.AllreduceCoalescedOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG if divides else dist.ReduceOp.SUM)
        options.asyncOp = overlap
        group = dist.group.WORLD
        assert group is not None
        work = group.allreduce_coalesced(list(vectors), options)

        def wait() -> None:
            if work is not None:
                work.wait()
            if not divides:
                for vector in vectors:
                    vector.div_(self._world)

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
        for wait in self._sent:
            wait()
        means = self._send(flags, overlap=False)
        self._sent[-1]()
        self._begin()
        return means

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient that lies in memory as its parameter does, which is the same on all ranks."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _as_it_lies(gradient: Tensor) -> Tensor:
    """A gradient as a vector, in the order in which it lies in memory."""
    return gradient.as_strided((gradient.numel(),), (1,))
