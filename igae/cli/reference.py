# SPDX-License-Identifier: Apache-2.0
"""The reference of the configuration, made from its types.

igae reference > docs/configuration.md
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pydantic.dataclasses
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from igae.config import Section
from igae.errors import command
from igae.training import Recipe

HEAD = """# Configuration

Every key of a configuration file, and of the `key=value` arguments of `train.py` (`train.joint.batch_size=8`). A key
without a default has to be in the file; `configs/` has some. A path may begin with `~`. Made by `igae reference`.
"""


@command
def main(argv: list[str] | None = None) -> None:
    """Print the page."""
    argparse.ArgumentParser(description="Print all configuration keys as Markdown.").parse_args(argv)
    print(text(Recipe), end="")


def defaults(recipe: type[Any]) -> Iterator[tuple[str, str]]:
    """All keys, dotted, with their defaults (`(required)` where there is none)."""
    for path, fields in _sections("", recipe):
        for name, field in fields.items():
            if _fields(field.annotation) is None:
                required = field.default is PydanticUndefined
                yield f"{path}.{name}".lstrip("."), "(required)" if required else _value(field.default)


def text(recipe: type[Any]) -> str:
    """All keys in Markdown, one table for each section."""
    parts = [HEAD]
    for path, fields in _sections("", recipe):
        rows = [_row(name, field) for name, field in fields.items() if _fields(field.annotation) is None]
        if rows:
            parts.append(
                f"\n## {f'`{path}`' if path else 'At the top'}\n\n| key | values | default | |\n|---|---|---|---|\n"
            )
            parts += rows
    return "".join(parts)


def _sections(path: str, section: Any) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    fields = _fields(section)
    if fields is not None:
        yield path, fields
        for name, field in fields.items():
            yield from _sections(f"{path}.{name}".lstrip("."), field.annotation)


def _fields(kind: Any) -> dict[str, FieldInfo] | None:
    """The keys of a section; None: it is none."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind.model_fields
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        made: Any = pydantic.dataclasses.dataclass(kind, frozen=True)
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for attribute, text in itertools.pairwise(body):
            if isinstance(attribute, ast.AnnAssign) and isinstance(text, ast.Expr):
                made.__pydantic_fields__[attribute.target.id].description = text.value.value  # type: ignore[union-attr, attr-defined]
        return dict(made.__pydantic_fields__)
    return None


def _row(name: str, field: FieldInfo) -> str:
    limits = "".join(f", {_limit(limit)}" for limit in field.metadata if _limit(limit))
    default = "" if field.default is PydanticUndefined else f"`{_value(field.default)}`"
    return f"| `{name}` | {_cell(_kind(field.annotation) + limits)} | {default} | {_cell(field.description or '')} |\n"


def _limit(limit: Any) -> str:
    for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "a multiple of")):
        if getattr(limit, attribute, None) is not None:
            return f"{sign} {getattr(limit, attribute)}"
    return ""


def _kind(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " | ".join(f"`{_value(value)}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_kind(part) for part in inner)
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(_kind(part) for part in inner if part is not Ellipsis)}"
    names = {str: "text", bool: "`true` | `false`", int: "integer", float: "number", type(None): "`null`"}
    return names.get(kind, getattr(kind, "__name__", str(kind)).lower())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _cell(words: str) -> str:
    return re.sub(r"\s+", " ", words).strip().replace("|", "\\|")
