"""Reads and writes YAML files of settings: run.yaml of `--config`, config.yaml of a run, best.yaml of a search.

YAML 1.2 is read, where `1e-4` is a number and `on` is text. Files are untrusted input: their size and depth
are limited, and anchors, aliases and tags such as `!!int` are refused. Needs no torch.
"""

import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent
from ruamel.yaml.reader import ReaderError

from tailora.data.messages import SURROGATE
from tailora.errors import ConfigError, value_type

MAX_BYTES, MAX_DEPTH, MAX_SCALAR, MAX_VALUES = 100_000, 20, 3_000, 5_000

REMEDY = "write lines such as `max_steps: 100`"


class _Constructor(SafeConstructor):
    """Dates and a single `=` are text, as in the core schema of YAML 1.2."""


for _name in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_name}", SafeConstructor.construct_yaml_str)


def read_config_file(path: Path) -> dict[str, Any]:
    """Returns the settings of a YAML file; keys may be written `max-steps` or `max_steps`. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; use a readable YAML file") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"--config {path} is larger than {MAX_BYTES:,} bytes; use a settings file, not a data file")
    text = _decoded(content, path)
    try:
        _check_limits(text)
        settings = _yaml().load(text)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = text.splitlines()[mark.line][mark.column :].partition(":")[0].strip()
        raise ConfigError(f"--config {path}{_line(error)}: {key} is set twice; keep only one of the lines") from None
    except MarkedYAMLError as error:
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"--config {path}{_line(error)} cannot be read as YAML: {reason}; {REMEDY}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character U+{error.character:04X} is not allowed"
        raise ConfigError(f"--config {path}, line {line} cannot be read as YAML: {reason}; {REMEDY}") from None
    except (YAMLError, ValueError, OverflowError) as error:  # 0x_, which looks like a number; "\\UFFFFFFFF"
        raise ConfigError(f"--config {path} cannot be read as YAML: {error}; {REMEDY}") from None
    except TypeError:  # ruamel.yaml puts the key into a dict
        raise ConfigError(f"--config {path}: expected a setting's name, got a list or a mapping; {REMEDY}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: expected a mapping of settings, got {value_type(settings)}; {REMEDY}")
    keys: dict[str, Any] = {}  # name of the setting -> the key as it is written
    for key in settings:
        name = str(key).replace("-", "_")
        if name in keys:
            raise ConfigError(f"--config {path}: {name} is set twice, as {keys[name]} and as {key}; keep only one")
        keys[name] = key
    return {name: settings[key] for name, key in keys.items()}


def config_text(settings: Mapping[str, Any]) -> str:
    """Returns the YAML text of these settings. Values are written so that YAML 1.1 and 1.2 read them alike."""
    return "".join(f"{name}: {_value_text(value)}\n" for name, value in settings.items())


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    yaml.Constructor = _Constructor
    return yaml


def _decoded(content: bytes, path: Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 with a byte order mark. Raises ConfigError."""
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"--config {path}, line {line} is not valid UTF-8; save the file as UTF-8") from None


def _check_limits(text: str) -> None:
    """Raises MarkedYAMLError for what could exhaust memory or the stack, before any value is made of it."""
    depth = values = 0  # mappings and lists around the current event; scalars so far
    for event in _yaml().parse(text):
        values += isinstance(event, ScalarEvent)
        problem = ""
        match event:
            case CollectionEndEvent():
                depth -= 1
            case NodeEvent() if event.anchor is not None:
                problem = f"anchors and aliases ({event.anchor}) are not supported, so write out the values"
            case ScalarEvent() | CollectionStartEvent() if event.tag is not None:
                problem = f"tags ({event.tag}) are not supported, so write the value without one"
            case ScalarEvent() if len(event.value) > MAX_SCALAR:
                problem = f"a value has more than {MAX_SCALAR:,} characters"
            case ScalarEvent() if SURROGATE.search(event.value):
                problem = "half of a surrogate pair is not a valid character"
            case ScalarEvent() if values > MAX_VALUES:
                problem = f"more than {MAX_VALUES:,} values are too many for a file of settings"
            case CollectionStartEvent() if depth >= MAX_DEPTH:
                problem = f"values are nested more than {MAX_DEPTH} levels deep"
            case CollectionStartEvent():
                depth += 1
        if problem:
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _line(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f", line {mark.line + 1}"


def _value_text(value: Any) -> str:
    match value:
        case str():  # in quotes: YAML 1.1 takes `on` and `12:30` for a boolean and a number
            text = json.dumps(value, ensure_ascii=False)
            return re.sub("[^ -~]", lambda character: f"\\U{ord(character[0]):08x}", text)
        case float():  # YAML 1.1 takes 1e-05 for text, and 1.0e-05 for a number
            return repr(value) if "." in repr(value) else repr(value).replace("e", ".0e")
        case dict():
            return "{" + ", ".join(f"{_value_text(str(key))}: {_value_text(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_value_text, value)) + "]"
        case _:
            return json.dumps(value)
