# SPDX-License-Identifier: Apache-2.0
"""Packed data: reading raw scenes and photographs (`sources`), packing them (`pack`), streaming them (`streams`)."""
