# SPDX-License-Identifier: Apache-2.0
"""Inverse Graphics Autoencoders: image autoencoders with a 3D-consistent latent space, trained with latent scenes."""

__version__ = "0.1.0"
