# SPDX-License-Identifier: Apache-2.0
"""Files in folders and object stores: retried reads, atomic writes, files of tensors, copies on a local disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
