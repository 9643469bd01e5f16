# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: YAML files and command-line overrides in, one frozen tree of `Section`s out.

A configuration file may start from another one (`base: other.yaml`) and use the environment (`${NAME}`,
`${NAME:-default}`, `$${` for a literal `${`). Whatever is wrong with it is one `ConfigError` of one line that names
the key.
"""

import functools
import logging
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from igae.errors import COMMAND_LINE, UNKNOWN, Key, did_you_mean, expand_home, explain, kind_of, origin_of, sections_at
from igae.errors import ConfigError as ConfigError

log = logging.getLogger("igae")


def shipped(folder: str) -> Path:
    """A folder that comes with igae (configs, launch, data_tools): of the source tree, or of the installed package."""
    package = Path(__file__).resolve().parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


SEARCH = (Path("configs"), shipped("configs"))


def entry_point(kind: str, name: str) -> EntryPoint:
    """The entry point that an installed package has of this name in the group ``igae.KIND``. ValueError: none has."""
    group = f"igae.{kind}"
    found = {point.value: point for point in entry_points(group=group, name=name)}
    if len(found) != 1:
        what = f"{len(found)} installed packages have" if found else "no installed package has"
        way = "uninstall all but one" if found else "install the one that it comes from"
        raise ValueError(f"{what} an entry point {name[:80]} in the group {group}: {way}")
    return next(iter(found.values()))


@functools.cache  # losses are asked for at each step
def plug_in(kind: str, name: str) -> Any:
    """What an installed package offers under a name, of autoencoders, losses, formats or fields.

    Names may be anybody's: nothing else is imported. ValueError: no package has it, or it can't be imported.
    """
    point = entry_point(kind, name)
    try:
        return point.load()
    except Exception as error:  # of others' code
        what = f"{point.value}, the entry point {name} in the group igae.{kind},"
        raise ValueError(f"{what} can't be imported ({type(error).__name__}: {error})") from error


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
    REMOVED: ClassVar[Mapping[str, Any]] = {}
    """Keys of the last version -> what they always mean now. With that value they are accepted, too; with any, where it
    is `...`: these changed no result."""

    @cached_property
    def origins(self) -> Mapping[Key, str]:
        """Of a configuration that was loaded: where its keys come from, a file or the command line. Not a setting."""
        return {}

    @cached_property
    def changes(self) -> Mapping[str, tuple[Any, Any]]:
        """Of a configuration that was loaded: dotted keys of its overrides -> values of the file ("(default)" where
        it has none) and of the overrides, as they are written. Not a setting."""
        return {}

    @cached_property
    def source(self) -> str:
        """Of a configuration that was loaded: the file that was named. Not a setting."""
        return ""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        for key, value in cls.REMOVED.items() if isinstance(data, dict) else ():
            if key in data:
                if value not in (..., data[key]):
                    raise ValueError(f"{key} is always {value} now: leave it out, and use a new experiment=NAME")
                log.warning("the key %s %s: remove it", key, "is gone" if value is ... else f"is always {value} now")
                del data[key]  # and is not told again
        return {_current([cls], key): value for key, value in data.items()} if isinstance(data, dict) else data

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return expand_home(value) if isinstance(value, str) and "/" in value else value

    @field_validator("*", mode="wrap")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        result = handler(value)
        if isinstance(value, bool) and type(result) in (int, float):
            raise ValueError(f"got {value}, expected a number")
        if type(result) is int and abs(result) >= 1 << 63:
            raise ValueError(f"got {reprlib.repr(result)}, expected a number of at most 18 digits")
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
        saved: text that :func:`dump` wrote, instead of a file; `source` names it. It is data, somebody else's perhaps:
            it has no `base`, and sees nothing of the environment.

    Raises:
        ConfigError: anything wrong with the file, the overrides or the values.
    """
    origins: dict[Key, str] = {}
    path = str(source if saved is not None else _find(str(source), list(search)))
    data: dict[str, Any] = {}
    if saved is None:
        data = _read(cls, Path(path), search, origins)
    else:
        _merge(cls, data, _parse_keys(saved, path), (), origins, path)
    changes = {}
    for override in overrides:
        key, before, now = _override(cls, data, override, origins)
        changes[".".join(key)] = (before, now)
    if saved is None:
        data = _interpolate(data, origins, path)
    else:
        data = _map_strings(data, lambda text, _: text.replace("$${", "${"))
    if complete is not None:
        _refuse_unknown_keys(cls, data, origins, path)  # at once: completing may read files from far away
        complete(data)
    try:
        section = cls.model_validate(data)
    except ValidationError as error:
        raise explain(error, cls, data, origins, path) from None
    section.__dict__.update(origins=origins, changes=changes, source=str(source))
    return section


def _refuse_unknown_keys(cls: type[Section], data: dict[str, Any], origins: Mapping[Key, str], path: str) -> None:
    try:
        cls.model_validate(data)
    except ValidationError as error:
        if any(item["type"] in UNKNOWN for item in error.errors(include_url=False)):
            raise explain(error, cls, data, origins, path) from None


def dump(section: Section) -> str:
    """YAML text of the whole section, defaults included; loading it gives an equal section."""
    tree = _map_strings(section.model_dump(mode="json"), lambda text, _: text.replace("${", "$${"))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120)


def shown(value: Any) -> str:
    """A value as it is written on one line of YAML."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1 << 20).removesuffix("...\n").strip()


# ---- YAML: the scalars of YAML 1.2 (PyYAML's are those of 1.1, where 1e-4 is a string and `no` a boolean)

_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
]


MAX_YAML = 256 << 10
"""Bytes of a configuration, which may be somebody else's. Its values are bounded as well: aliases can stand for any
number of them, and each of the others takes a tenth of a millisecond."""
MAX_VALUES, MAX_DEPTH = 10_000, 32


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    _depth = _values = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[Any, int] = {}  # of those that are read: none is in itself

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        if getattr(event, "tag", None) not in (None, "!", "tag:yaml.org,2002:str"):
            problem = f"could not determine a constructor for the tag {event.tag!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        self._depth, self._values = self._depth + 1, self._values + 1
        node = super().compose_node(parent, index) if self._depth <= MAX_DEPTH else None
        if isinstance(event, yaml.AliasEvent):
            self._values += self._sizes.get(node, MAX_VALUES) - 1
        if node is None or self._values > MAX_VALUES:
            problem = f"has more than {MAX_VALUES} values, aliases written out, or more than {MAX_DEPTH} levels"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth, self._sizes[node] = self._depth - 1, self._values - before
        return node

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
    if len(text) > 24:
        raise yaml.constructor.ConstructorError(None, None, f"{text[:24]}... has too many digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _tag, _pattern, _first in _SCALARS:
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, where: str) -> Any:
    """The values of a YAML text of bounded size, as they are written: without `base`, and without the environment.

    Raises:
        ConfigError: it is no YAML, or too large; ``where`` names it.
    """
    if len(text) > MAX_YAML:
        raise ConfigError(f"{where}: has {len(text)} characters, more than the {MAX_YAML} of a configuration")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} {error.problem or error.context}; mend the YAML") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: this is not YAML: {error}") from None


def _parse_keys(text: str, where: str) -> dict[Any, Any]:
    data = parse(text, where)
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values at the top, got {kind_of(data)}")
    return data or {}


# ---- Files, overrides, environment


def _find(name: str, folders: Sequence[Path]) -> Path:
    for path in (Path(name), *(folder / name for folder in folders)):
        if path.is_file():
            return path
    names = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    hint = did_you_mean(Path(name).name, names) or f"; there are: {', '.join(names) or 'none'}"
    raise ConfigError(f"{name}: no such configuration, neither as a path nor in {', '.join(map(str, folders))}{hint}")


def _read(
    cls: type[Section], path: Path, search: Sequence[Path], origins: dict[Key, str], above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    try:
        data = _parse_keys(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    above = (*above, path.resolve())
    base = data.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: got {reprlib.repr(base)}, expected the name of one configuration file")
        found = _find(base, [path.parent, *search]) if not (path.parent / base).is_file() else path.parent / base
        if found.resolve() in above:
            raise ConfigError(f"{path}: base: {base} starts from this file again; break the circle")
        merged = _read(cls, found, search, origins, above)
    _merge(cls, merged, data, (), origins, str(path))
    return merged


def _merge(
    cls: type[Section], into: dict[str, Any], data: Mapping[Any, Any], prefix: Key, origins: dict[Key, str], origin: str
) -> None:
    for name, value in data.items():
        key = _renamed(cls, (*prefix, str(name)))
        origins[key] = origin
        if isinstance(value, dict):
            if not isinstance(into.get(key[-1]), dict):
                into[key[-1]] = {}
            _merge(cls, into[key[-1]], value, key, origins, origin)
        else:
            into[key[-1]] = value


def _override(cls: type[Section], data: dict[str, Any], override: str, origins: dict[Key, str]) -> tuple[Key, Any, Any]:
    """Returns the key with the values before and after."""
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise ConfigError(f"command line: {override!r} is not an override; write section.key=value")
    key = _renamed(cls, key)
    for depth, name in enumerate(key[:-1], start=1):
        if data.get(name) is None:
            data[name] = {}
            origins[key[:depth]] = COMMAND_LINE
        data = data[name]
        if not isinstance(data, dict):
            raise ConfigError(
                f"command line: {dotted}: {'.'.join(key[:depth])} is {kind_of(data)}, not a section; set it as a whole"
            )
    before, data[key[-1]] = data.get(key[-1], "(default)"), parse(text, f"command line: {dotted}")
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = COMMAND_LINE
    return key, before, data[key[-1]]


def _renamed(cls: type[Section], key: Key) -> Key:
    """The key with the names that it has in this version."""
    for i, name in enumerate(key):
        key = (*key[:i], _current(sections_at(cls, key[:i]), name), *key[i + 1 :])
    return key


def _current(kinds: Sequence[Any], name: str) -> str:
    """What a key of sections is called now; with a warning where that is another name."""
    new: str = next((kind.RENAMED[name] for kind in kinds if name in getattr(kind, "RENAMED", {})), name)
    if new != name:
        log.warning("the key %s is called %s now: rename it", name, new)
    return new


_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")


def _interpolate(data: Any, origins: Mapping[Key, str], fallback: str) -> Any:
    def replace(match: re.Match[str], key: Key) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        where = f"{origin_of(key, origins, fallback)}: {'.'.join(key)}"
        if name is None:
            raise ConfigError(f"{where}: '${{' must be followed by a variable name and '}}'; write '$${{' for the text")
        if default is not None:
            return os.environ.get(name) or default
        if name not in os.environ:
            raise ConfigError(f"{where}: the environment variable {name} is not set; set it or this key")
        return os.environ[name]

    return _map_strings(data, lambda text, key: _VARIABLE.sub(lambda match: replace(match, key), text))


def _map_strings(value: Any, change: Callable[[str, Key], str], key: Key = ()) -> Any:
    if isinstance(value, dict):
        return {k: _map_strings(v, change, (*key, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(v, change, (*key, str(i))) for i, v in enumerate(value)]
    return change(value, key) if isinstance(value, str) else value
