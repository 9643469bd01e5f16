# SPDX-License-Identifier: Apache-2.0
"""The API reference shows of each room the names of its face, `__init__.pyi`, in their order."""

import re
from typing import Any

import griffe


class Faces(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for room in pkg.modules.values():
            names = [name for name, member in room.members.items() if member.is_alias]
            room.exports = [name for name in names if room.members[name].target_path.startswith("igae.")]

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Sphinx's roles, which some docstrings have, become plain names."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":(meth|class|func|attr|mod|data):`", "`", obj.docstring.value)
