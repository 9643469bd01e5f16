# SPDX-License-Identifier: Apache-2.0
"""Inverse Graphics Autoencoders: image autoencoders with a 3D-consistent latent space, trained with latent scenes."""

import os

__version__ = "0.2.0"
# Names of version 0.1 that commands (`python -m igae.evaluate`) and model cards (`igae.cameras`) use.
__path__.append(os.path.join(__path__[0], "cli", "old"))
