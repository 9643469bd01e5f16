# SPDX-License-Identifier: Apache-2.0
"""Data: input formats (`sources`), packing them into shards (`packing`), streams of batches (`streams`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
