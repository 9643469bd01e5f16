#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a warm-up step of 32 views from 500 scenes: the plain way, then with what makes it faster.

    python benchmarks/warmup_step.py --json warmup_step.json

Everything is included: drawing the views, rendering, losses, gradients, the step of planes and MLP. See joint_step.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.joint_step import main

VARIANTS = {
    "plain": {},
    "+ fused kernels": {"train.kernels": "cuda"},
    "+ host runs ahead": {"train.async_steps": "true"},
    "+ CUDA graph": {"train.cuda_graph": "true"},
}

if __name__ == "__main__":
    main("warmup", VARIANTS, __doc__)
