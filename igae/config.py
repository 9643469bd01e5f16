# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: YAML files and command-line overrides in, one frozen tree of `Section`s out.

A configuration file may start from another one (`base: other.yaml`) and use the environment (`${NAME}`,
`${NAME:-default}`, `$${` for a literal `${`). Whatever is wrong with it is one `ConfigError` of one line that names
the key.
"""

import difflib
import logging
import os
import re
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from igae.errors import did_you_mean

Key = tuple[str, ...]
log = logging.getLogger("igae")
SEARCH = (Path("configs"), Path(__file__).resolve().parent.parent / "configs")


class ConfigError(ValueError):
    """A mistake in a configuration; its text is one line that names the key (dotted), the mistake and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Section(BaseModel):
    """Base of every part of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        ser_json_inf_nan="constants",  # pydantic would dump an infinity among untyped values as null
    )

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Keys of the last version -> what they are called now. They are accepted for one version, with a warning."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        old = [key for key in cls.RENAMED if isinstance(data, dict) and key in data]
        for key in old:
            log.warning("the key %s is called %s now: rename it", key, cls.RENAMED[key])
        return {cls.RENAMED.get(key, key): value for key, value in data.items()} if old else data

    @field_validator("*", mode="wrap")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        result = handler(value)
        if isinstance(value, bool) and type(result) in (int, float):
            raise ValueError(f"got {value}, expected a number")
        return result


S = TypeVar("S", bound=Section)


def load(
    cls: type[S],
    source: str | Path,
    overrides: Sequence[str] = (),
    search: Sequence[Path] = SEARCH,
    complete: Callable[[dict[str, Any]], None] | None = None,
    saved: str | None = None,
) -> S:
    """Read a configuration file, apply overrides and validate the result.

    Args:
        source: a path, or a name that is then looked up in the folders of `search`.
        overrides: `a.b.c=VALUE` with VALUE in YAML. VALUE replaces what the key had, and missing sections are created.
        complete: may add to the keys and values before they are validated.
        saved: text that :func:`dump` wrote, instead of the file: data without `base`, which sees no environment.

    Raises:
        ConfigError: anything wrong with the file, the overrides or the values.
    """
    origins: dict[Key, str] = {}
    where = str(_find(str(source), list(search)) if saved is None else source)
    data = _read(Path(where), search, origins, ()) if saved is None else _parse(saved, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values at the top, got {_kind(data)}")
    for override in overrides:
        _override(data, override, origins)
    unescape = lambda text: text.replace("$${", "${")  # noqa: E731
    data = _interpolate(data, (), origins, where) if saved is None else _map_strings(data, unescape)
    if complete is not None:
        complete(data)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _explain(error, cls, data, origins, where) from None


def dump(section: Section) -> str:
    """YAML text of the whole section, defaults included; loading it gives an equal section."""
    tree = _map_strings(section.model_dump(mode="json"), lambda text: text.replace("${", "$${"))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120)


# ---- YAML: the scalars of YAML 1.2 (PyYAML's are those of 1.1, where 1e-4 is a string and `no` a boolean)

_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name.value}", name.start_mark)
                seen.add(name.value)
                name.tag = "tag:yaml.org,2002:str"  # a category may be called 02691156
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _tag, _pattern, _first in _SCALARS:
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} {error.problem or error.context}; mend the YAML") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: this is not YAML: {error}") from None


# ---- Files, overrides, environment


def _find(name: str, folders: Sequence[Path]) -> Path:
    for path in (Path(name), *(folder / name for folder in folders)):
        if path.is_file():
            return path
    names = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    hint = did_you_mean(Path(name).name, names) or f"; there are: {', '.join(names) or 'none'}"
    raise ConfigError(f"{name}: no such configuration, neither as a path nor in {', '.join(map(str, folders))}{hint}")


def _read(path: Path, search: Sequence[Path], origins: dict[Key, str], above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    data = _parse(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {_kind(data)}")
    above = (*above, path.resolve())
    base = data.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: got {reprlib.repr(base)}, expected the name of one configuration file")
        found = _find(base, [path.parent, *search]) if not (path.parent / base).is_file() else path.parent / base
        if found.resolve() in above:
            raise ConfigError(f"{path}: base: {base} starts from this file again; break the circle")
        merged = _read(found, search, origins, above)
    _merge(merged, data, (), origins, str(path))
    return merged


def _merge(into: dict[str, Any], data: Mapping[Any, Any], prefix: Key, origins: dict[Key, str], origin: str) -> None:
    for name, value in data.items():
        key = (*prefix, str(name))
        origins[key] = origin
        if isinstance(value, dict):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            _merge(into[name], value, key, origins, origin)
        else:
            into[name] = value


def _override(data: dict[str, Any], override: str, origins: dict[Key, str]) -> None:
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise ConfigError(f"command line: {override!r} is not an override; write section.key=value")
    for depth, name in enumerate(key[:-1], start=1):
        if data.get(name) is None:
            data[name] = {}
            origins[key[:depth]] = "command line"
        data = data[name]
        if not isinstance(data, dict):
            raise ConfigError(
                f"command line: {dotted}: {'.'.join(key[:depth])} is {_kind(data)}, not a section; set it as a whole"
            )
    data[key[-1]] = _parse(text, f"command line: {dotted}")
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = "command line"


_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")


def _interpolate(value: Any, key: Key, origins: Mapping[Key, str], fallback: str) -> Any:
    def replace(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        where = f"{_origin(key, origins, fallback)}: {'.'.join(key)}"
        if name is None:
            raise ConfigError(f"{where}: '${{' must be followed by a variable name and '}}'; write '$${{' for the text")
        if default is not None:
            return os.environ.get(name) or default
        if name not in os.environ:
            raise ConfigError(f"{where}: the environment variable {name} is not set; set it or this key")
        return os.environ[name]

    if isinstance(value, dict):
        return {k: _interpolate(v, (*key, str(k)), origins, fallback) for k, v in value.items()}
    if isinstance(value, list):
        return [_interpolate(v, (*key, str(i)), origins, fallback) for i, v in enumerate(value)]
    return _VARIABLE.sub(replace, value) if isinstance(value, str) else value


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {k: _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(v, change) for v in value]
    return change(value) if isinstance(value, str) else value


# ---- Explaining what pydantic found


def _explain(
    error: ValidationError, cls: type[Section], data: Any, origins: Mapping[Key, str], fallback: str
) -> ConfigError:
    """The most telling of pydantic's errors: an unknown key first, else the deepest, alternatives of a union joined."""
    found = [(_position(item["loc"], data, item["type"]), item) for item in error.errors(include_url=False)]
    unknown = [key for key, item in found if item["type"] in ("extra_forbidden", "unexpected_keyword_argument")]
    key = unknown[0] if unknown else max((key for key, _ in found), key=len)
    where, name = _origin(key, origins, fallback), ".".join(key)
    if unknown:
        return ConfigError(f"{where}: unknown key {name}; {_nearest(cls, key)}")
    items = [item for position, item in found if position == key]
    first = items[0]
    value = first["input"]
    got = "got nothing" if value is None else f"got {reprlib.repr(value)} ({_kind(value)})"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return ConfigError(f"{where}: {'.'.join(key[:-1])}: {got}, expected more than {key[-1]} entries")
    if first["type"] in ("missing", "missing_argument"):
        return ConfigError(f"{where}: missing key {name}; set it in the file or on the command line ({name}=...)")
    if first["type"] in ("value_error", "assertion_error"):
        return ConfigError(f"{where}: {name + ': ' if name else ''}{first['msg'].split(', ', 1)[-1]}")
    choices = re.findall(r"'([^']*)'", " ".join(str(item.get("ctx", {}).get("expected")) for item in items))
    expected = " or ".join(dict.fromkeys(_expected(item["type"], item["msg"]) for item in items))
    return ConfigError(f"{where}: {name}: {got}, expected {expected}{did_you_mean(str(value), choices)}")


_EXPECTED = {
    "model_type": "a section (keys and values)",
    "dataclass_type": "a section (keys and values)",
    "dict_type": "keys and values",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
}


def _expected(kind: str, message: str) -> str:
    return _EXPECTED.get(kind) or re.sub(r"^\w+ should (be|have) | after validation, not .*$", "", message)


def _position(loc: tuple[int | str, ...], data: Any, kind: str) -> Key:
    """The keys of an error's location without the names of union members, which pydantic puts among them."""
    key: list[str] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (last and kind.startswith("missing")):
            continue
        key.append(str(part))
    return tuple(key)


def _origin(key: Key, origins: Mapping[Key, str], fallback: str) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return fallback


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a map"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _nearest(cls: type[Section], key: Key) -> str:
    level: list[Any] = [cls]
    for part in key[:-1]:
        level = [deeper for kind in level for deeper in _children(kind, part)]
    siblings = {(*key[:-1], name) for kind in level for name in _fields(kind)}
    for candidates in (siblings, set(_keys(cls, ()))):
        names = sorted({candidate[-1] for candidate in candidates})
        near = difflib.get_close_matches(key[-1], names, n=1)
        if near:
            same = [candidate for candidate in candidates if candidate[-1] == near[0]]
            path = max(sorted(same), key=lambda other: difflib.SequenceMatcher(None, other, key).ratio())
            return f"did you mean {'.'.join(path)}?"
    here = ".".join(key[:-1])
    return f"the keys {'of ' + here if here else 'here'} are: {', '.join(sorted(name for *_, name in siblings))}"


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, `Annotated` unwrapped."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif hasattr(annotation, "__metadata__"):
        yield from _members(annotation.__origin__)
    else:
        yield annotation


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return get_type_hints(kind) if isinstance(kind, type) and is_dataclass(kind) else {}


def _children(kind: Any, name: str) -> list[Any]:
    fields, inside = _fields(kind), [a for a in get_args(kind) if a is not Ellipsis]
    return list(_members(fields[name])) if name in fields else list(_members(inside[-1])) if inside else []


def _keys(kind: Any, prefix: Key) -> Iterator[Key]:
    for name, annotation in _fields(kind).items():
        yield (*prefix, name)
        for member in _members(annotation):
            if len(prefix) < 8:  # a section that contains itself must end somewhere
                yield from _keys(member, (*prefix, name))
