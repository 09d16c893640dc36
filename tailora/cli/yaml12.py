"""YAML 1.2 scalars: `1e-4` is a number and `packing: on` is a word. PyYAML's own rules are those of 1.1."""

import re
from pathlib import Path
from typing import Any

import yaml

from tailora.errors import ConfigError

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
