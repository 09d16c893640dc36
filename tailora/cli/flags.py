"""Turns the fields of TrainConfig into flags; to add or change a flag such as `--learning-rate`, see train/config.py.

The help text, the default and the limits of a flag come from its field in `TrainConfig`. `compare` and `search` have
additional fields (study/config.py). A flag that only one command has is a parameter of its function.

    Flags: Any = train_flags()  # or flags_of(TrainConfig, ["field", "max_length"]) for a few settings

    def command(*, config: ConfigFile = None, json: Json = False, flags: Flags = None) -> int:
        run = merge_settings(flags, config)

The path of a value: flag or YAML -> plain Python -> `TrainConfig`, which validates it.
Flags override `--config run.yaml`, which overrides the defaults of the command.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from cyclopts import Group, Parameter
from pydantic.fields import FieldInfo

from tailora.cli.main import ADVANCED, log, note
from tailora.cli.models import base_model_name, find_adapter
from tailora.core.config import ALL_LAYERS, StrictModel
from tailora.core.setting_names import ALIASES, suggestion
from tailora.errors import ConfigError, listing
from tailora.formats.run_folder import recorded_settings
from tailora.train.config import ACCUMULATION, TrainConfig
from tailora.train.config_file import read_config_file

FIELDS = TrainConfig.model_fields
SECTIONS = {  # section of --help -> its settings; all other settings are advanced
    "Model and data": ("model", "data", "eval_data", "validation_split", "field", "max_length", "output_dir"),
    "Task": ("task", "reward"),
    "Adapter": ("method", "r", "lora_alpha", "target_modules", "adapter"),
    "Optimization": ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", ACCUMULATION),
    "Memory and devices": ("quantize", "gradient_checkpointing", "device", "fsdp"),
    "Evaluation and files": ("eval_steps", "resume_from_checkpoint"),
}
# Flags whose values may contain commas, so that they are repeated instead -> how --help shows their value
REPEATED = {"data": "DATA[=WEIGHT]", "reward": "REWARD[=WEIGHT]", "metric": "METRIC"}
NEXT_PAIR = re.compile(r",(?=[\w.-]+=)")  # a comma before the next KEY=; any other comma is part of a value
MODULE_NAMES = re.compile(r"[\w.,-]+")  # anything else is a regular expression

SWITCH = Parameter(negative=(), show_default=False)
Json = Annotated[bool, SWITCH, Parameter(help="print one JSON object as the last line of stdout")]
# Not for compare and search, which resume in their folder, nor for eval, which replaces its own report
Overwrite = Annotated[
    bool, SWITCH, Parameter(help="replace an existing result; the old one is deleted once the new one is complete")
]
NprocPerNode = Annotated[
    str | None, Parameter(help="number of processes to start; 'gpu' or 'auto' starts one per device")
]
ConfigFile = Annotated[Path | None, Parameter(help="YAML file with settings; flags override it")]


# ---- Flags of a schema's fields


def train_flags(*, without: Collection[str] = (), defaults: Mapping[str, Any] | None = None) -> Any:
    """Returns the type of a parameter with the settings of a run as flags, in the sections of --help.

    defaults: defaults of the command, shown in --help instead of the schema's.
    """
    common = {name for names in SECTIONS.values() for name in names}
    sections = {**SECTIONS, ADVANCED: [name for name in FIELDS if name not in common]}
    flags: dict[str, Any] = {}
    for title, names in sections.items():
        group = Group.create_ordered(title, sort_key=int(title == ADVANCED))  # last
        flags |= {name: _flag(name, FIELDS[name], group, defaults) for name in names if name not in without}
    return _type_of(flags)


def flags_of(schema: type[StrictModel], only: Collection[str] | None = None, section: str | None = None) -> Any:
    """Returns the type of a parameter with one flag per field of a schema, or per field in `only`."""
    group = Group.create_ordered(section, sort_key=0) if section else "Parameters"
    fields = schema.model_fields
    return _type_of({name: _flag(name, fields[name], group) for name in fields if only is None or name in only})


def _type_of(flags: dict[str, Any]) -> Any:
    """Returns the type of a parameter with optional flags. Its value is a dict of the flags in use."""
    hidden = Annotated[str, Parameter(show=False)]
    flags |= {alias: hidden for alias, name in ALIASES.items() if name in flags}
    return Annotated[TypedDict("Flags", flags, total=False) | None, Parameter(name="*")]  # type: ignore[operator]


def _flag(name: str, field: FieldInfo, group: Group | str, defaults: Mapping[str, Any] | None = None) -> Any:
    """Returns the annotation of one flag. Numbers remain text; the schema converts them."""
    first, default = _types(field)[0], (defaults or {}).get(name, field.default)
    value_type: Any = str
    metavar = None
    if first is bool or get_origin(first) is Literal:
        value_type = first
    elif get_origin(first) in (list, dict):
        value_type = list[str]
        metavar = REPEATED.get(name, "A,B" if get_origin(first) is list else "KEY=VALUE,...")
    else:
        metavar = first.__name__.upper()
    parameter = Parameter(
        name=f"--{name.replace('_', '-')}",
        help=field.description,
        show_default=str(default) if default not in (None, {}, []) and default is not False else False,
        metavar=metavar,
        negative=None if value_type is bool else (),
        group=group,
    )
    return Annotated[value_type, parameter]


def _types(field: FieldInfo) -> list[Any]:
    """Returns the types that a field accepts, without None."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    members = get_args(field.annotation) if is_union else (field.annotation,)
    return [member for member in members if member is not type(None)]


# ---- From flags and file to a TrainConfig


def merge_settings(
    flags: Mapping[str, Any] | None,
    config_file: Path | None,
    *,
    defaults: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
) -> TrainConfig:
    """Returns the settings of a run; prints a note for each that has another tool's name.

    defaults: defaults of the command; None means not set.
    arguments: settings from positional arguments; None means not set.
    ignore: keys of the file that the caller reads itself.
    Raises ConfigError with all problems.
    """
    content = read_config_file(config_file) if config_file else {}
    in_file = {name: value for name, value in content.items() if name not in ignore}
    in_file = _with_our_names(in_file, f"--config {config_file}: ")
    typed = {name: _yaml_value(name, value) for name, value in _with_our_names(flags or {}).items()}
    typed |= {name: value for name, value in (arguments or {}).items() if value is not None}
    values = {name: value for name, value in (defaults or {}).items() if value is not None} | in_file | typed
    if values.get("data", "demo") == "demo" and not values.keys() & {"eval_data", "validation_split"}:
        values["eval_data"] = "demo"  # the demo has separate held-out data
    try:
        config = TrainConfig(**values)
        config.lora()
    except ConfigError as error:
        origin = f"--config {config_file}{' and the flags' if typed else ''}: " if in_file else ""
        raise ConfigError(f"{origin}{name_flags(str(error), typed)}") from None
    if config.adapter is None or "model" in config.model_fields_set:
        return config
    return config.replaced(model=base_model_name(None, [find_adapter(config.adapter)]))  # to train it further


def name_flags(text: str, typed: Iterable[str]) -> str:
    """Writes the typed settings of an error message as flags: r = '0' becomes --r '0'."""
    for name in typed:
        text = re.sub(rf"(?m)^((?:  - )?){name} = ", rf"\1--{name.replace('_', '-')} ", text)
    return text


def merge_with_run(
    flags: Mapping[str, Any] | None, adapter: Path | None, arguments: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Returns settings for reading data as in the adapter's run; `flags` override them. Raises ConfigError."""
    run = {} if adapter is None else recorded_settings(adapter)
    defaults = {name: run.get(name) or None for name in ("max_length", "system", "field")}
    return merge_settings(flags, None, defaults=defaults, arguments=arguments)


def log_columns(flags: Mapping[str, Any] | None, config: TrainConfig) -> None:
    """Prints which columns are read because training used them, and how to use the standard names instead."""
    if config.field and "field" not in (flags or {}):
        columns = ",".join(f"{ours}={theirs}" for ours, theirs in config.field.items())
        usual = ",".join(f"{ours}={ours}" for ours in config.field)
        log(f"using the column names from training: --field {columns}; for the standard names, use --field {usual}")


def parse_settings(text: str) -> dict[str, Any]:
    """Returns the settings in `key=value,key=value`, each parsed like its flag. Raises ConfigError."""
    pairs = parse_pairs(text, [text] if text else [], allowed=FIELDS)
    collections = {name for name in pairs if get_origin(_types(FIELDS[name])[0]) in (list, dict)}
    return {name: _yaml_value(name, [value] if name in collections else value) for name, value in pairs.items()}


def parse_pairs(
    name: str, tokens: list[str], *, split_last: bool = False, allowed: Collection[str] | None = None
) -> dict[str, str]:
    """Returns the pairs of `--name key=value,key=value` as text; values may contain commas. Raises ConfigError.

    split_last: split at the last '=', because keys such as regular expressions may contain '='.
    allowed: the possible keys; None: any.
    """
    cut = str.rpartition if split_last else str.partition
    parts = [cut(pair, "=") for token in tokens for pair in NEXT_PAIR.split(token)]
    problems = [f"{name}: expected key=value, got {''.join(part)}" for part in parts if not (part[0] and part[2])]
    keys = [key for key, _, value in parts if key and value]
    if allowed is not None:
        problems += [f"{name}: unknown setting {key!r}{suggestion(key, allowed)}" for key in keys if key not in allowed]
    problems += [f"{name}: {key} is set twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if problems:
        raise ConfigError(listing(problems))
    return {key: value for key, _, value in parts}


def _yaml_value(name: str, value: Any) -> Any:
    """Returns a flag's value as it would be in YAML: names split at commas, key=value pairs as a mapping."""
    types = _types(FIELDS[name])
    if get_origin(types[0]) is dict:
        words = [word for member in types[1:] for word in get_args(member)]  # allowed instead of pairs
        if len(value) == 1 and value[0] in words:
            return value[0]
        return parse_pairs(name, value, split_last=get_args(types[0])[1] is not str)
    if get_origin(types[0]) is not list:
        return value
    if name in REPEATED:
        return value[0] if len(value) == 1 and str in types else value
    if name == "target_modules" and value == ["none"]:
        return []
    if str in types and ((len(value) == 1 and value[0] in ALL_LAYERS) or not all(map(MODULE_NAMES.fullmatch, value))):
        if len(value) > 1:
            raise ConfigError(f"{name}: expected names or a single regular expression, got {', '.join(value)}")
        return value[0]
    return [part for token in value for part in token.split(",") if part]


def _with_our_names(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Replaces other tools' names of settings by ours, with a note. Raises ConfigError. where: start of its message."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        ours = ALIASES.get(name, name)
        if ours in settings:
            raise ConfigError(f"{where}two names of {ours} are set; use only {ours}")
        if ours != name:
            note(f"{name} is read as {ours}")
        settings[ours] = value
    return settings
