# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

import torch
from hypothesis import settings

# Tests work on small tensors: more threads only get into each other's way.
torch.set_num_threads(1)

settings.register_profile("igae", deadline=None)  # the first example pays for imports
settings.load_profile("igae")
