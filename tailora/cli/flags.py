"""The flags of `train`, `demo` and `data`, made from `TrainConfig`: names, help and defaults are written once, there.

A value goes  flag or YAML -> plain Python -> `TrainConfig`, which alone decides what is valid.
Later wins: the command's own defaults, then `--config run.yaml`, then flags.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from cyclopts import Group, Parameter
from pydantic.fields import FieldInfo

from tailora.core.config import ALIASES, StrictModel
from tailora.errors import ConfigError, listing, nearest
from tailora.train.config import TrainConfig

# ---- YAML 1.2 scalars: `1e-4` is a number and `packing: on` is a word. PyYAML's own rules are those of 1.1.


SCALARS = [  # tag, what it looks like, how it may begin; the first match wins
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first)


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, `max-steps` and `max_steps` alike.

    Raises ConfigError for a file that is missing, is not a mapping, or says something twice.
    """
    try:
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        content: Any = {} if node is None else loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected `name: value` lines, found a {type(content).__name__}")
    keys = [str(key.value).replace("-", "_") for key, _ in node.value] if node else []
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"--config {path}: given twice: {', '.join(twice)}")
    return dict(zip(keys, content.values(), strict=True))


# ----


FIELDS = TrainConfig.model_fields
OTHER_NAMES = {other: ours for other, ours in ALIASES.items() if ours in FIELDS}
SECTIONS = {  # the field that opens a section of --help
    "model": "Model and data",
    "r": "Adapter",
    "field": "Data",
    "learning_rate": "Optimisation",
    "eval_steps": "Evaluation and files",
}
NEXT_PAIR = re.compile(r",(?=[\w.]+=)")  # a comma within a pattern or a column's name is not followed by KEY=
NAMES_ONLY = re.compile(r"[\w.,-]+")  # module names; anything else is a regular expression

Json = Annotated[bool, Parameter(negative=(), help="the last line on stdout is one JSON object", show_default=False)]
ConfigFile = Annotated[Path | None, Parameter(name="--config", help="YAML file with the settings below; flags win")]


@dataclass(frozen=True)
class Settings:
    config: TrainConfig
    notes: list[str]


def flags_of(defaults: Mapping[str, Any], only: Collection[str] = FIELDS.keys()) -> type[Any]:
    """A dataclass with one optional flag for every field of `TrainConfig`; what was not given is None."""
    columns: list[tuple[str, Any, Any]] = []
    group = None
    for name, field in FIELDS.items():
        group = Group.create_ordered(SECTIONS[name]) if name in SECTIONS else group
        if name in only:
            columns.append((name, _flag(name, field, defaults.get(name, field.default), group), None))
    hidden = Annotated[str | None, Parameter(show=False)]
    columns += [(other, hidden, None) for other, ours in OTHER_NAMES.items() if ours in only]
    return _made(columns)


def flags_beside(model: type[StrictModel], title: str, only: Collection[str]) -> type[Any]:
    """The same for fields of another schema, in one section of --help."""
    group = Group.create_ordered(title)
    return _made(
        [(name, _flag(name, model.model_fields[name], model.model_fields[name].default, group), None) for name in only]
    )


def given(flags: Any) -> dict[str, Any]:
    """What was typed."""
    values = {field.name: getattr(flags, field.name) for field in fields(flags)}
    return {name: value for name, value in values.items() if value is not None}


def _made(columns: list[tuple[str, Any, Any]]) -> type[Any]:
    made = make_dataclass("Flags", columns, kw_only=True, frozen=True)
    made.__module__ = __name__  # cyclopts takes a class of the standard library for a plain value
    return made


def settings(
    flags: Any,
    config_file: Path | None,
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    others: Collection[str] = (),
) -> Settings:
    """Merges what was given; `arguments` were typed without a flag. Raises ConfigError for all that is wrong.

    others: keys of the file that are not of a run, and read elsewhere.
    """
    written = read_mapping(config_file) if config_file else {}
    written = {name: value for name, value in written.items() if name not in others}
    typed = given(flags)
    notes = [f"{name} is read as {OTHER_NAMES[name]}" for name in (*written, *typed) if name in OTHER_NAMES]
    typed = {name: _plain(name, value) for name, value in _ours(typed).items()}
    typed |= arguments or {}
    values = {**defaults, **_ours(written, f"--config {config_file}: "), **typed}
    if complaint := _complaint(values):
        raise ConfigError(_origin(complaint, {**defaults, **typed}, config_file) + complaint)
    return Settings(TrainConfig(**_with_held_out(values)), notes)


def changes(text: str) -> dict[str, Any]:
    """Settings written as `key=value,key=value`, each as its flag would read it. Raises ConfigError."""
    pairs = [pair.partition("=") for pair in NEXT_PAIR.split(text) if pair]
    problems = [f"expected key=value, got {''.join(pair)}" for pair in pairs if not (pair[0] and pair[2])]
    names = [name for name, _, value in pairs if name and value]
    problems += [f"unknown setting {name!r}{nearest(name, FIELDS)}" for name in names if name not in FIELDS]
    problems += [f"{name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(f"{text}: {listing(problems)}")
    several = {name for name in names if get_origin(_members(FIELDS[name])[0]) in (list, dict)}
    return {name: _plain(name, [value] if name in several else value) for name, _, value in pairs}


def pairs(name: str, tokens: list[str]) -> dict[str, str]:
    """What `--name key=value,key=value` says, as text. A comma within a value is kept. Raises ConfigError."""
    return _pairs(name, tokens, split_last=False)


def _complaint(values: dict[str, Any]) -> str:
    """All that is wrong with the settings, the adapter's own checks included; '' when nothing is."""
    try:
        TrainConfig(**_with_held_out(values)).lora()
    except ConfigError as error:
        return str(error)
    return ""


def _origin(complaint: str, without_file: dict[str, Any], config_file: Path | None) -> str:
    """The file, as a prefix, where the complaint would be another one without it."""
    own = _complaint(without_file)
    return "" if own == complaint else f"--config {config_file} and the flags: " if own else f"--config {config_file}: "


def _with_held_out(values: dict[str, Any]) -> dict[str, Any]:
    """The demo's data comes with conversations to hold out."""
    own = "eval_data" in values or "validation_split" in values
    return values if own or values.get("data", "demo") != "demo" else {**values, "eval_data": "demo"}


def _flag(name: str, field: FieldInfo, default: Any, group: Group | None) -> Any:
    kind, metavar = _taken(field)
    parameter = Parameter(
        name=f"--{name.replace('_', '-')}",
        help=field.description,
        show_default=str(default) if default not in (None, {}, []) and default is not False else False,
        metavar=metavar,
        negative=None if kind is bool else (),
        group=group,
    )
    return Annotated[kind | None, parameter]


def _taken(field: FieldInfo) -> tuple[Any, str | None]:
    """The type that a flag takes, and the word for it in --help. Numbers stay text: `TrainConfig` reads them."""
    first = _members(field)[0]
    if first is bool or get_origin(first) is Literal:
        return first, None
    if get_origin(first) in (list, dict):
        return list[str], "A,B" if get_origin(first) is list else "KEY=VALUE,..."
    return str, first.__name__.upper()


def _members(field: FieldInfo) -> list[Any]:
    """The types that a field accepts, None left out."""
    if get_origin(field.annotation) not in (Union, UnionType):
        return [field.annotation]
    return [member for member in get_args(field.annotation) if member is not type(None)]


def _ours(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Other tools' names replaced by ours. Raises ConfigError that begins with `where`."""
    names = {name: OTHER_NAMES.get(name, name) for name in values}
    asked = {ours: [name for name in names if names[name] == ours] for ours in names.values()}
    twice = [f"{' and '.join(given)} are the same setting: give one" for given in asked.values() if len(given) > 1]
    if twice:
        raise ConfigError(where + listing(twice))
    return {names[name]: value for name, value in values.items()}


def _plain(name: str, value: Any) -> Any:
    """What was typed, as YAML would have it: names split at commas, key=value pairs as a mapping."""
    members = _members(FIELDS[name])
    if get_origin(members[0]) is dict:
        return _pairs(name, value, split_last=get_args(members[0])[1] is not str)
    if get_origin(members[0]) is not list:
        return value
    if name == "target_modules" and value == ["none"]:
        return []
    if str in members and (value == ["all-linear"] or not all(map(NAMES_ONLY.fullmatch, value))):
        return _expression(name, value)
    return [part for token in value for part in token.split(",") if part]


def _expression(name: str, tokens: list[str]) -> str:
    if len(tokens) > 1:
        raise ConfigError(f"{name}: give names, or one regular expression, not both: {', '.join(tokens)}")
    return tokens[0]


def _pairs(name: str, tokens: list[str], split_last: bool) -> dict[str, str]:
    """key=value,key=value; a pattern's key may itself hold '=', so a pattern is split at the last one."""
    cut = str.rpartition if split_last else str.partition
    parts = [cut(pair, "=") for token in tokens for pair in NEXT_PAIR.split(token)]
    keys = [key for key, _, _ in parts]
    problems = [f"{name}: expected key=value, got {''.join(part)}" for part in parts if not (part[0] and part[2])]
    problems += [f"{name}: {key} is given twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if problems:
        raise ConfigError(listing(problems))
    return {key: value for key, _, value in parts}
