# SPDX-License-Identifier: Apache-2.0
"""Bucketed all-reduce of gradients, overlapped with the backward pass."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 128 * 2**20
"""Bytes of float32 gradients that are sent together. Fewer cost more launches, and more are sent later."""
LAST = 4 * 2**20
"""Bytes of the last bucket at most, but for one large gradient: nothing is left to compute while it is sent."""
SMALL = 2**18
"""Gradients of fewer bytes are sent with the flags, in one piece."""


class BucketedAllReduce:
    """Sends gradients in buckets, each as soon as a backward pass has all that belong into it.

    It does what torch's DistributedDataParallel does, without a part in forward passes: no call asks the host for
    anything and no autograd node outlives a step, so that whole steps can be captured in a CUDA graph.

    Args:
        parameters: float32, dense in memory, the same ones on all ranks, in the order in which a forward pass meets
            them. Each has its gradient on all ranks in a step, or on none.
        bucket_bytes: a bucket with so many is full.
        last_bytes: the last bucket has no more, or one parameter.
        small_bytes: gradients with fewer are in no bucket.
        sent_as: what gradients in buckets are sent as. One backward pass under an autocast to bfloat16 has those of
            matrices in that precision, so that they lose nothing but in the mean; sums of several, and others, are
            rounded before.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        bucket_bytes: int = BUCKET,
        last_bytes: int = LAST,
        small_bytes: int = SMALL,
        sent_as: torch.dtype = torch.float32,
    ) -> None:
        self._world, self._device, self._sent_as = dist.get_world_size(), parameters[0].device, sent_as
        self._small = [parameter for parameter in parameters if _bytes([parameter]) < small_bytes]
        large = [parameter for parameter in parameters if _bytes([parameter]) >= small_bytes]
        last: list[nn.Parameter] = []  # of a backward pass, which ends with the first parameters
        while large and (not last or _bytes([*last, large[0]]) <= last_bytes):
            last.append(large.pop(0))
        self._buckets: list[list[nn.Parameter]] = []
        for parameter in reversed(large):
            if not self._buckets or _bytes(self._buckets[-1]) >= bucket_bytes:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
        if last:
            self._buckets.append(last)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._bucket_of]
        self._begin()

    def expect(self) -> None:
        """The next backward pass is the last one before the step: its gradients are sent as they come."""
        self._begin()
        self._active = True

    def _begin(self) -> None:
        self._active = False
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[list[nn.Parameter], list[Tensor], Callable[[], None]]] = []

    def _arrived(self, parameter: Tensor) -> None:
        if not self._active:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        # All ranks send in the same order.
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Send the next bucket."""
        bucket = self._buckets[len(self._sent)]
        parameters = [parameter for parameter in bucket if parameter.grad is not None]
        if not parameters:
            self._sent.append(([], [], lambda: None))
            return
        # Copies: a gradient may share its memory with others, or with what still flows back.
        flat, means = _together(parameters, [p.grad for p in parameters if p.grad is not None], self._sent_as)
        for parameter in parameters:
            parameter.grad = None
        self._sent.append((parameters, means, self.mean(flat, overlap=True)))

    def mean(self, vector: Tensor, overlap: bool) -> Callable[[], None]:
        """Begin to make a vector its mean over the ranks; what is returned waits for that.

        Args:
            overlap: other things are to be computed meanwhile. (Without, NCCL works on the current stream, which is
                sooner there.)
        """
        # NCCL divides on the way, which gloo can't: it multiplies by 1 / ranks as the vector's type has it.
        exact = vector.dtype == torch.float32 or self._world & (self._world - 1) == 0
        divides = self._device.type == "cuda" and exact
        work = dist.all_reduce(vector, dist.ReduceOp.AVG if divides else dist.ReduceOp.SUM, async_op=overlap)

        def wait() -> None:
            if work is not None:
                work.wait()
            if not divides:
                vector.div_(self._world)

        return wait

    @torch.no_grad()
    def finish(self, flags: Sequence[Tensor]) -> Tensor:
        """Send what has not been sent, and wait (on a GPU the device does) for all: gradients are means over the ranks.

        Args:
            flags: float32 numbers, 0-d.

        Returns:
            Means over the ranks of the flags, [n].
        """
        while len(self._sent) < len(self._buckets):
            self._send()
        for parameters, means, wait in self._sent:
            wait()
            if parameters and self._sent_as != torch.float32:
                _, means = _together(parameters, means, torch.float32)
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean
        small = [parameter for parameter in self._small if parameter.grad is not None]
        given = [*(p.grad for p in small if p.grad is not None), *flags]
        flat, means = _together([*small, *flags], given, torch.float32)
        self.mean(flat, overlap=False)()
        for parameter, mean in zip(small, means, strict=False):
            parameter.grad = mean
        self._begin()
        return flat[flat.numel() - len(flags) :]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _together(like: Sequence[Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Copies of tensors, in one vector and each by itself. They lie in memory as those that they are like, whose
    strides are the same on all ranks."""
    sizes = [tensor.numel() for tensor in like]
    flat = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    parts: tuple[Tensor, ...] = flat.split(sizes)
    copies = [part.as_strided(one.size(), one.stride()) for one, part in zip(like, parts, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return flat, copies
