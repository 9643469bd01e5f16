# SPDX-License-Identifier: Apache-2.0
"""Packed data: reading raw scenes and natural images (`sources`), packing them (`pack`), streaming them (`streams`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
