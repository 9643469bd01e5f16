# SPDX-License-Identifier: Apache-2.0
"""Files and object stores: paths and URLs, reads that are retried, tensor files."""
