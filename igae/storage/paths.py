# SPDX-License-Identifier: Apache-2.0
"""Paths and URLs."""


def join(root: str, *parts: str) -> str:
    """Joins a path or URL and names below it; the query of an HTTP URL stays at the end."""
    path, mark, query = root.partition("?") if root.startswith(("http://", "https://")) else (root, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query
