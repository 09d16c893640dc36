"""The search space: the settings to search and their possible values. Needs no torch.

--space r=4,8,16                   these values
--space learning_rate=1e-4..1e-2   a range, uniform in the logarithm; for ranks, its powers of two
--space lora_dropout=0.1           a fixed value

read_space      text, lists and numbers -> an axis for each setting
search_axes     the default space, updated with the given axes
fit_to_model    removes values that the model does not support
settings_of     values of a trial -> settings of its run
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from tailora.core.config import ALL_LAYERS, ALL_LINEAR, scaling_divisor
from tailora.core.setting_names import ALIASES, OUR_NAMES, suggestion
from tailora.errors import ConfigError, listing
from tailora.train.config import GRPO, GRPO_FIELDS, PREFERENCE_FIELDS, TrainConfig

FIELDS = TrainConfig.model_fields
# would select a step on the evaluation half
STEP_CHOICE = {"eval_steps", "early_stopping_patience", "metric_for_best_model"}
SHARED_BY_RUNS = STEP_CHOICE | {  # in any study
    *("model", "data", "eval_data", "output_dir", "seed", "split_seed", "validation_split", "streaming", "max_steps"),
    *("num_train_epochs", "samples", "report_to", "resume_from_checkpoint", "save_steps"),
    *("system", "assistant_only_loss", "completion_only_loss", "documents"),  # these would change the evaluation
    *("field", "max_length", "reward", "metric"),
    *("task", *PREFERENCE_FIELDS),  # their losses are not comparable
}
SHARED = SHARED_BY_RUNS | {"save_total_limit", "adapter", "method"}
SHARED |= {"quantize", "dtype", "packing"}  # would change the base
SCALE = "scale"  # alpha/r, instead of alpha
TARGETS = (ALL_LINEAR, "attention", "mlp")  # words whose meaning depends on the model
SHORT_NAMES = ("rank", "alpha", "lr", "dropout", "targets")  # also accepted, as a space is often typed by hand
OTHER_NAMES = {**ALIASES, **{name: OUR_NAMES[name] for name in SHORT_NAMES}}
LINEAR = {"lora_dropout", "weight_decay", "warmup_ratio"}  # may be 0
RANGE = re.compile(r"\s*([^,\s]+?)\s*\.\.\s*([^,\s]+)\s*")


@dataclass(frozen=True)
class Range:
    """All numbers between `low` and `high`; log: uniform in the logarithm."""

    low: float
    high: float
    log: bool = True

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Axis = Range | tuple[Any, ...]
DEFAULT_RANKS = (2, 4, 8, 16, 32, 64)
DEFAULT: dict[str, Axis] = {
    "learning_rate": Range(5e-5, 1e-2),
    "r": DEFAULT_RANKS,
    "lora_alpha": (8.0, 16.0, 32.0, 64.0),
    "target_modules": TARGETS,
    "lora_dropout": (0.0, 0.05, 0.1),
    "loraplus_lr_ratio": (1.0, 4.0, 16.0),
}


def read_space(given: Mapping[str, Any]) -> dict[str, Axis]:
    """Returns the axes given as text (command line), lists or numbers (YAML, Python). Raises ConfigError."""
    axes: dict[str, Axis] = {}
    problems = []
    for written, values in given.items():
        name = OTHER_NAMES.get(written, written)
        if name in axes:
            problems.append(f"{name} appears twice; remove one")
        elif name in SHARED:
            problems.append(f"{name} cannot be searched, because it must be the same for all trials; remove it")
        elif name not in FIELDS and name != SCALE:
            hint = suggestion(written, {*FIELDS, *OTHER_NAMES, SCALE} - SHARED)
            problems.append(f"unknown setting {written!r}{hint}")
        elif name != SCALE and get_origin(FIELDS[name].annotation) is dict:
            problems.append(f"{name} contains patterns and cannot be searched; remove it")
        else:
            try:
                axes[name] = _axis(name, values)
            except ConfigError as error:
                problems.append(f"{written}={values}: {str(error).removeprefix(f'{name} = {values!r}: ')}")
    if SCALE in axes and "lora_alpha" in axes:
        problems.append("scale is alpha/r, so use either scale or lora_alpha")
    if problems:
        raise ConfigError(listing([f"space: {problem}" for problem in problems]))
    return axes


def _axis(name: str, values: Any) -> Axis:
    if isinstance(values, Range):
        return values
    if isinstance(values, str) and (match := RANGE.fullmatch(values)):
        return _between(name, *(_value(name, end) for end in match.groups()))
    if isinstance(values, str):
        values = [part for part in values.split(",") if part]
    several = tuple(values) if isinstance(values, list | tuple) else (values,)
    chosen = tuple(dict.fromkeys(_value(name, value) for value in several))
    if not chosen:
        raise ConfigError("expected at least one value, got none")
    return chosen


def _between(name: str, low: Any, high: Any) -> Axis:
    if not (isinstance(low, int | float) and isinstance(high, int | float)) or isinstance(low, bool):
        raise ConfigError("LOW..HIGH needs numbers; use a list such as a,b,c instead")
    if not low < high:
        raise ConfigError(f"expected LOW below HIGH, but {low:g} is not below {high:g}")
    if name in FIELDS and int in (FIELDS[name].annotation, *get_args(FIELDS[name].annotation)):
        powers = (2**exponent for exponent in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
        return tuple(dict.fromkeys((low, *powers, high)))
    return Range(float(low), float(high), name not in LINEAR)


def _value(name: str, value: Any) -> Any:
    """Returns one value, validated by the schema of a run. Raises ConfigError."""
    if name == "target_modules":
        return value if isinstance(value, str) else "+".join(value)
    if name == SCALE:
        name = "lora_alpha"  # equal to the scale if r = 1
    required = {"task": GRPO, "reward": ["math"]} if name in GRPO_FIELDS else {}
    return getattr(TrainConfig(**{"learning_rate": 1e-4, **required, name: value}), name)


def search_axes(given: Mapping[str, Axis], train: TrainConfig) -> dict[str, Axis]:
    """Returns the default space updated with the given axes. Settings of the run are not searched.

    Raises ConfigError if a setting has both a value and an axis, or if there is nothing to search.
    """
    if train.method != "lora":
        raise ConfigError(
            f"search does not support --method {train.method}; use `tailora compare` to find a learning rate"
        )
    fixed = train.model_fields_set
    default = {"learning_rate": DEFAULT["learning_rate"]} if train.adapter else DEFAULT  # its rank is fixed
    if both := sorted(given.keys() & fixed):
        raise ConfigError(
            f"{', '.join(both)}: set to a fixed value and also listed in --space; use only one of the two"
        )
    if SCALE in given and "lora_alpha" in fixed:
        raise ConfigError("scale is alpha/r; keep only one of lora_alpha and scale in --space")
    omitted = fixed | ({"lora_alpha"} if SCALE in given else set())
    space = {**{name: axis for name, axis in default.items() if name not in omitted}, **given}
    if all(not isinstance(axis, Range) and len(axis) < 2 for axis in space.values()):
        raise ConfigError("nothing to search, because every setting has one value; add a second value with --space")
    return space


def first_values(space: Mapping[str, Axis], train: TrainConfig) -> dict[str, Any]:
    """Returns the values of the first trial: the run's own, or the nearest ones in the space."""
    values = {}
    for name, axis in space.items():
        scale = train.lora_alpha / scaling_divisor(train.r, train.use_rslora)
        current = scale if name == SCALE else getattr(train, name)
        if isinstance(axis, Range):
            values[name] = axis.middle if current is None else min(max(current, axis.low), axis.high)
        elif current in axis:
            values[name] = current
        elif isinstance(current, bool) or not isinstance(current, int | float):
            values[name] = axis[0]
        else:
            numbers = [value for value in axis if value is not None]
            values[name] = min(numbers, key=lambda value: abs(value - current))
    return values


def fit_to_model(
    space: Mapping[str, Axis], groups: Mapping[str, Any], given: Mapping[str, Axis]
) -> tuple[dict[str, Axis], list[str]]:
    """Returns the space without values that the model does not support, and messages about the removed ones.

    groups: `model_layout.target_groups` of the model.
    given: the user's axes, not the default ones.

    Raises ConfigError if a removed value was given by the user, or if an axis has no value left.
    """
    axes = dict(space)
    reasons = {
        "r": f"the model's smallest matrix only supports ranks up to {groups.get('largest_r')}",
        "target_modules": "attention and MLP cannot be recognized by the names of the model's layers; use layer names "
        "joined by +",
    }
    problems: list[str] = []
    notes: list[str] = []
    for name, axis in space.items():
        if isinstance(axis, Range) or not groups or name not in reasons:
            continue
        if name == "r":
            fitting = tuple(r for r in axis if r <= groups["largest_r"])
        else:
            fitting = tuple(word for word in axis if word not in TARGETS[1:] or word in groups)
        axes[name] = fitting
        if lost := [value for value in axis if value not in fitting]:
            text = f"{name} = {', '.join(map(str, lost))}: {reasons[name]}"
            (problems if name in given or not fitting else notes).append(text)
    if problems:
        raise ConfigError(listing([f"space: {problem}" for problem in problems]))
    return axes, [f"removed from the search space: {note}" for note in notes]


def settings_of(values: Mapping[str, Any], groups: Mapping[str, list[str] | str], train: TrainConfig) -> dict[str, Any]:
    """Returns the changes to the run's settings in a trial with these values.

    groups: "attention", "mlp" -> names of layers, for `target_modules`.
    """
    changes = dict(values)
    if SCALE in changes:
        given = (changes.get(name, getattr(train, name)) for name in ("r", "use_rslora"))
        changes["lora_alpha"] = changes.pop(SCALE) * scaling_divisor(*given)
    if "target_modules" in changes:
        word = changes["target_modules"]
        changes["target_modules"] = groups.get(word, word if word in ALL_LAYERS else word.split("+"))
    return changes


def format_values(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def is_at_edge(axis: Axis, value: Any) -> bool:
    """True if a value is within a tenth of an end of its range. The ends of listed values are deliberate."""
    if not (isinstance(axis, Range) and axis.log):
        return False
    low, high, position = (math.log(number) for number in (axis.low, axis.high, value))
    return not 0.1 < (position - low) / (high - low) < 0.9
