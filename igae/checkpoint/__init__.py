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

from igae.checkpoint.layout import FORMAT, Progress, folder_of, is_complete, list_complete
from igae.checkpoint.parts import Parts
from igae.checkpoint.reader import Loaded, load, settings
from igae.checkpoint.writer import Writer

__all__ = [
    "FORMAT",
    "Loaded",
    "Parts",
    "Progress",
    "Writer",
    "folder_of",
    "is_complete",
    "list_complete",
    "load",
    "settings",
]
