# SPDX-License-Identifier: Apache-2.0
"""The trained modules: autoencoder, losses, and the module that puts them together with rendering."""
