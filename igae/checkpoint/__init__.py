# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written by all ranks together, read by any number of them, complete or not there at all.

A checkpoint is a folder ``step-00000123`` (``step-00000123-end`` at the end of a stage), at a local path or any fsspec
URL, of

* ``shared.safetensors``: weights and buffers of the shared module;
* ``optimizer.safetensors``: moments of its optimizer;
* ``scenes-00000.safetensors`` and so on, one for each rank: global ids of its scenes, and tensors with a row for each;
* ``config.yaml``: the resolved configuration;
* ``state.json``: where the run stands, and the files above with their sizes and checksums. It is written last: a folder
  with it is complete, and no file that it does not list counts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
