#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a step by the rays of a latent pixel: means of S x S rays, and patches of P x P rendered pixels.

    python benchmarks/rays_step.py warmup --json warmup.json
    python benchmarks/rays_step.py joint

See joint_step.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.joint_step import main

FAST = {"train.precision": "bf16", "train.kernels": "cuda", "train.async_steps": "true", "train.cuda_graph": "true"}


def variants(first: dict[str, str]) -> dict[str, dict[str, str]]:
    found = {"one ray": {**first, "planes.resolution": "48"}}
    found |= {f"mean of {n} x {n}": {"render.rays_per_pixel": str(n)} for n in (2, 4)}
    found |= {f"patch of {n} x {n}": {"render.rays_per_pixel": "1", "render.patch": str(n)} for n in (2, 4)}
    return found | {"patch of 4, 24 samples": {"render.coarse_samples": "12", "render.fine_samples": "12"}}


if __name__ == "__main__":
    stage = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ("warmup", "joint") else "warmup"
    main(stage, variants(FAST), __doc__)
