"""What a search varies: which settings, and the values that each may take. Needs no torch.

--space r=4,8,16             these values
--space learning_rate=1e-4..1e-2   anything between, evenly in the logarithm; ranks in powers of two
--space lora_dropout=0.1     this one: not searched
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from tailora.core.config import ALIASES
from tailora.errors import ConfigError, listing, nearest
from tailora.train.config import TrainConfig

FIELDS = TrainConfig.model_fields
SHARED = {"model", "data", "eval_data", "output_dir", "seed", "split_seed", "validation_split", "field", "streaming"}
SHARED |= {"max_steps", "num_train_epochs", "samples", "report_to", "resume_from_checkpoint", "save_steps"}
SHARED |= {"save_total_limit", "eval_steps", "early_stopping_patience", "adapter", "method", "max_length", "quantize"}
SHARED |= {"dtype", "packing"}  # with which the base would be another one
SCALE = "scale"  # alpha/r, in place of alpha
TARGETS = ("all-linear", "attention", "mlp")  # words; what they mean is read off the model
OTHER_NAMES = {**ALIASES, "targets": "target_modules", "lr": "learning_rate", "dropout": "lora_dropout"}
LINEAR = {"lora_dropout", "weight_decay", "warmup_ratio"}  # may be 0
RANGE = re.compile(r"\s*([^,\s]+?)\s*\.\.\s*([^,\s]+)\s*")


@dataclass(frozen=True)
class Range:
    """Any number between two, evenly in the logarithm or not."""

    low: float
    high: float
    log: bool = True

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Axis = Range | tuple[Any, ...]
DEFAULT: dict[str, Axis] = {
    "learning_rate": Range(5e-5, 1e-2),
    "r": (2, 4, 8, 16, 32, 64),
    "lora_alpha": (8.0, 16.0, 32.0, 64.0),
    "target_modules": TARGETS,
    "lora_dropout": (0.0, 0.05, 0.1),
    "loraplus_lr_ratio": (1.0, 4.0, 16.0),
}


def read_space(given: Mapping[str, Any]) -> dict[str, Axis]:
    """Axes out of text, lists and numbers, as the command line, YAML and Python give them. Raises ConfigError."""
    axes: dict[str, Axis] = {}
    problems = []
    for written, values in given.items():
        name = OTHER_NAMES.get(written, written)
        if name in axes:
            problems.append(f"{name} is given twice")
        elif problem := _unfit(written, name):
            problems.append(problem)
        else:
            try:
                axes[name] = _axis(name, values)
            except ConfigError as error:
                problems.append(f"{written}={values}: {error}")
    if SCALE in axes and "lora_alpha" in axes:
        problems.append("scale is alpha/r: give one of scale and lora_alpha")
    if problems:
        raise ConfigError(listing([f"space: {problem}" for problem in problems]))
    return axes


def _unfit(written: str, name: str) -> str:
    if name in SHARED:
        return f"{name} is the same in all trials of a search"
    if name not in FIELDS and name != SCALE:
        return f"unknown setting {written!r}{nearest(written, {*FIELDS, *OTHER_NAMES, SCALE} - SHARED)}"
    if name not in FIELDS or get_origin(FIELDS[name].annotation) is not dict:
        return ""
    return f"{name} holds patterns, which cannot be searched"


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
        raise ConfigError("there is no value")
    return chosen


def _between(name: str, low: Any, high: Any) -> Axis:
    if not (isinstance(low, int | float) and isinstance(high, int | float)) or isinstance(low, bool):
        raise ConfigError("LOW..HIGH is for numbers; list the values")
    if not low < high:
        raise ConfigError(f"{low:g} is not below {high:g}")
    if _is_whole(name):
        powers = (2**exponent for exponent in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
        return tuple(dict.fromkeys((low, *powers, high)))
    if low <= 0 and name not in LINEAR:
        raise ConfigError(f"{low:g} has no logarithm; begin above 0")
    return Range(float(low), float(high), name not in LINEAR)


def _is_whole(name: str) -> bool:
    return name in FIELDS and int in (FIELDS[name].annotation, *get_args(FIELDS[name].annotation))


def _value(name: str, value: Any) -> Any:
    """One value, as the schema of a run has it. Raises ConfigError."""
    if name == "target_modules":
        return value if isinstance(value, str) else "+".join(value)
    if name == SCALE:
        return _scale(value)
    required = {"learning_rate": 1e-4} if name != "learning_rate" else {}
    return getattr(TrainConfig(**{**required, **_beside(name), name: value}), name)


def _beside(name: str) -> dict[str, Any]:
    """What a setting needs to be allowed at all."""
    allocation = {"tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
    return {"target_r": 1} if name in allocation else {}


def _scale(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"scale {value!r} is not a number") from None
    if not 0 < number < math.inf:
        raise ConfigError(f"a scale of {number:g} is not above 0")
    return number


def searched(given: Mapping[str, Axis], train: TrainConfig) -> dict[str, Axis]:
    """The default space with what was given in its place; settings of the run that have a value keep it.

    Raises ConfigError.
    """
    if train.method != "lora":
        raise ConfigError("a search is of adapters; `tailora compare` finds the learning rate of full fine-tuning")
    fixed = train.model_fields_set
    default = {"learning_rate": DEFAULT["learning_rate"]} if train.adapter else DEFAULT  # whose rank is what it is
    if both := sorted(given.keys() & fixed):
        raise ConfigError(f"{', '.join(both)}: given a value and a space; leave one of them out")
    if SCALE in given and "lora_alpha" in fixed:
        raise ConfigError("scale is alpha/r: leave out lora_alpha, or the space of scale")
    left_out = fixed | ({"lora_alpha"} if SCALE in given else set())
    space = {**{name: axis for name, axis in default.items() if name not in left_out}, **given}
    if all(not isinstance(axis, Range) and len(axis) < 2 for axis in space.values()):
        raise ConfigError("every setting has one value: there is nothing to search; give --space a second value")
    return space


def start(space: Mapping[str, Axis], train: TrainConfig) -> dict[str, Any]:
    """The settings that a search begins with: those of the run, as near as the space has them."""
    return {name: _nearest(axis, _own(name, train)) for name, axis in space.items()}


def _own(name: str, train: TrainConfig) -> Any:
    return train.lora_alpha / train.r if name == SCALE else getattr(train, name)


def _nearest(axis: Axis, own: Any) -> Any:
    if isinstance(axis, Range):
        return min(max(own, axis.low), axis.high)
    if own in axis or isinstance(own, bool) or not isinstance(own, int | float):
        return own if own in axis else axis[0]
    return min((value for value in axis if value is not None), key=lambda value: abs(value - own))


def settings(params: Mapping[str, Any], groups: Mapping[str, list[str] | str], train: TrainConfig) -> dict[str, Any]:
    """What a trial changes in the run's settings. groups: word -> names of layers, for target_modules."""
    values = dict(params)
    if SCALE in values:
        r = values.get("r", train.r)
        rslora = values.get("use_rslora", train.use_rslora)
        values["lora_alpha"] = values.pop(SCALE) * (math.sqrt(r) if rslora else r)
    if "target_modules" in values:
        word = values["target_modules"]
        values["target_modules"] = groups.get(word, word if word == "all-linear" else word.split("+"))
    return values


def at_edge(axis: Axis, value: Any) -> bool:
    """Whether a value lies within a tenth of the ends of its range. Of listed values the user knows."""
    if not (isinstance(axis, Range) and axis.log):
        return False
    low, high, at = (math.log(each) for each in (axis.low, axis.high, value))
    return not 0.1 < (at - low) / (high - low) < 0.9
