# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: a pure function of (seed, stage, ray, sample), the same on every device.

The hash is pcg4d of M. Jarzynski and M. Olano, "Hash Functions for GPU Rendering", Journal of Computer Graphics
Techniques 9(3), 2020. Its 32-bit unsigned words are held in int64 tensors (or Python integers).
"""

from typing import TypeAlias

import torch
from torch import Tensor

Word: TypeAlias = Tensor | int

COARSE, FINE = 0x636F6172, 0x66696E65
"""Stage tags: arbitrary constants far from any seed's high word, so that the stages of two seeds do not meet."""

_MASK = 0xFFFFFFFF


def pcg4d(x: Word, y: Word, z: Word, w: Word) -> tuple[Word, Word, Word, Word]:
    """Hash four 32-bit words (broadcast against each other) into four."""
    # A product of two words can exceed int64; it wraps, and the low 32 bits that the mask keeps are still right.
    x, y, z, w = ((word * 1664525 + 1013904223) & _MASK for word in (x, y, z, w))
    x, y, z, w = _mix(x, y, z, w)
    x, y, z, w = (word ^ (word >> 16) for word in (x, y, z, w))
    return _mix(x, y, z, w)


def _mix(x: Word, y: Word, z: Word, w: Word) -> tuple[Word, Word, Word, Word]:
    x = (x + y * w) & _MASK
    y = (y + z * x) & _MASK
    z = (z + x * y) & _MASK
    w = (w + y * z) & _MASK
    return x, y, z, w


def uniform(seed: int | Tensor, stage: int, rays: int, samples: int, device: torch.device) -> Tensor:
    """Float32 [rays, samples] in [0, 1), multiples of 2^-24.

    `seed` is an integer (taken modulo 2^64) or a 0-d int64 tensor, which is never read by the host; `stage` is COARSE
    or FINE.
    """
    ray = torch.arange(rays, device=device)[:, None]
    sample = torch.arange(samples, device=device)
    *_, word = pcg4d(seed & _MASK, ((seed >> 32) & _MASK) ^ stage, ray & _MASK, sample)
    assert isinstance(word, Tensor)
    return (word >> 8).to(torch.float32) * 2.0**-24
