"""Reward functions: `reward(prompts, completions, **columns) -> list[float | None]`, with TRL's signature.

    rewards.py:score          the function `score` of a file
    exact_match               1 if the completion is the row's answer
    regex:PATTERN             1 if the pattern matches the whole completion
    json_schema:FILE          1 if the completion is JSON of this schema
    max_length:CHARACTERS     1 if the completion is not longer
    math                      1 if the completion and the row's answer are the same number or formula (math-verify)

    REWARD=WEIGHT             multiplies its rewards; a final =NUMBER is always a weight, so write x=1 as regex:x[=]1

All functions run in one separate process, because a function that hangs can only be ended with its process.
"""

import inspect
import json
import logging
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from tailora.data.messages import listed, short_repr
from tailora.errors import ConfigError, DataError, listing, nearest, require_packages
from tailora.train.child_process import ChildProcess, command_of, connection_to_parent, messages_of_parent

RewardFunction = Callable[..., Sequence[float | None]]
OTHER_SCORES = ("reward", "best", "completion_tokens", "truncated", "kl")  # names that functions cannot have


@dataclass(frozen=True)
class Reward:
    source: str  # the text after --reward, without the weight
    weight: float = 1.0
    name: str = ""  # in metrics and reports


@dataclass(frozen=True)
class Completion:
    """One completion and the row that it belongs to. prompt, text: as the reward functions get them."""

    prompt: Any
    text: Any
    ids: list[int]
    columns: Mapping[str, Any]


def parse_rewards(trained: Sequence[str], judging: Sequence[str]) -> tuple[list[Reward], list[Reward]]:
    """Returns the rewards in texts like `rewards.py:score=0.5`, to train on and that only judge. Raises ConfigError."""
    rewards = [_parse_reward(value) for value in trained] + [_parse_reward(value, judges=True) for value in judging]
    sources = [reward.source for reward in rewards]
    if repeated := {source for source in sources if sources.count(source) > 1}:
        raise ConfigError(f"--reward, --metric: {', '.join(sorted(repeated))} appears twice; use each reward once")
    functions = Counter([*map(_function_name, sources), *OTHER_SCORES])
    named = [
        replace(reward, name=name if functions[name := _function_name(reward.source)] == 1 else reward.source)
        for reward in rewards
    ]
    return named[: len(trained)], named[len(trained) :]


def _parse_reward(value: str, judges: bool = False) -> Reward:
    source, equals, number = value.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:  # the = belongs to the source
        return Reward(value)
    if equals and judges:
        pattern = ", or write [=] if it belongs to the pattern" if source.startswith("regex:") else ""
        raise ConfigError(f"--metric {value}: metrics have no weight; remove ={number}{pattern}")
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(f"--reward {value}: expected a finite weight other than 0, got {number}")
    return Reward(source if equals else value, weight)


def _function_name(source: str) -> str:
    path, colon, function = source.rpartition(":")
    return function if colon and path.endswith(".py") else source


# ---- Functions


def load_reward(reward: Reward) -> RewardFunction:
    kind, colon, argument = reward.source.partition(":")
    if kind in BUILT_IN and bool(colon) == (kind in WITH_ARGUMENT):
        return BUILT_IN[kind](argument)
    path, _, name = reward.source.rpartition(":")
    if not path.endswith(".py"):
        forms = [f"{name}:{WITH_ARGUMENT[name]}" if name in WITH_ARGUMENT else name for name in BUILT_IN]
        known = f"{', '.join(forms)}, FILE.py:FUNCTION{'' if kind in BUILT_IN else nearest(kind, BUILT_IN)}"
        raise ConfigError(f"unknown --reward {reward.source!r}; expected one of {known}")
    if not Path(path).is_file():
        raise ConfigError(f"--reward {reward.source}: no such file: {path}")
    try:
        module = _module(Path(path).resolve())
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        raise ConfigError(f"--reward {reward.source}: {path} cannot be imported: {_last_line(error)}") from None
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"--reward {reward.source}: {path} has no function {name!r}{nearest(name, names)}")
    return function


@cache
def _module(path: Path) -> ModuleType:
    """Returns the module of a file, which runs once and can import files next to it, as a script can."""
    name = str(path.with_suffix("")).replace(".", "_")  # of no other module
    sys.path.insert(0, str(path.parent))
    module = sys.modules[name] = ModuleType(name)  # where dataclasses look it up
    module.__file__ = str(path)
    SourceFileLoader(name, str(path)).exec_module(module)
    return module


def text_of_completion(completion: Any) -> str:
    """Returns the text of a completion, which is a list with one message if the prompt has messages."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _score_texts(score: Callable[[str], bool]) -> RewardFunction:
    def function(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [float(score(text_of_completion(completion))) for completion in completions]

    return function


def _compare_answers(is_right: Callable[[str, str], bool]) -> RewardFunction:
    """is_right: of a completion and the row's answer."""

    def function(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [float(is_right(text_of_completion(completion), str(right))) for completion, right in pairs]

    return function


def _exact_match(_: str) -> RewardFunction:
    return _compare_answers(lambda text, right: text.strip() == right.strip())


def _regex(pattern: str) -> RewardFunction:
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(f"--reward regex:{pattern}: {error}") from None
    return _score_texts(lambda text: compiled.fullmatch(text.strip(), timeout=1.0) is not None)


def _json_schema(path: str) -> RewardFunction:
    require_packages("jsonschema", extra="rewards")
    import jsonschema

    try:
        validator = jsonschema.validators.validator_for(schema := json.loads(Path(path).read_text("utf-8")))(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise ConfigError(f"--reward json_schema:{path}: {error}") from None

    def is_valid(text: str) -> bool:
        with suppress(ValueError, RecursionError):
            return bool(validator.is_valid(json.loads(text)))
        return False

    return _score_texts(is_valid)


def _max_length(limit: str) -> RewardFunction:
    if not limit.isdecimal():
        raise ConfigError(f"--reward max_length:{limit}: expected a number of characters")
    return _score_texts(lambda text: len(text) <= int(limit))


def _math(_: str) -> RewardFunction:
    require_packages("math_verify", extra="rewards")
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit
    # its own time limits use signals, which only work in the main thread; the whole call has one
    parsed = partial(parse, parsing_timeout=None)
    return _compare_answers(lambda text, right: verify(parsed(right), parsed(text), timeout_seconds=None))


BUILT_IN: dict[str, Callable[[str], RewardFunction]] = {
    "exact_match": _exact_match,
    "regex": _regex,
    "json_schema": _json_schema,
    "max_length": _max_length,
    "math": _math,
}
WITH_ARGUMENT = {"regex": "PATTERN", "json_schema": "FILE", "max_length": "CHARACTERS"}


# ---- The process that runs them


class RewardError(DataError):
    """A reward function failed: its name, a prompt and a completion are in the message."""


@dataclass(frozen=True)
class Problem:
    """Why a function has no rewards."""

    text: str
    row: int | None = 0  # number of the completion with the problem; None if unknown


class RewardProcess:
    """Runs reward functions with a time limit. Use it as a context manager. seconds: limit for one call."""

    def __init__(self, rewards: Sequence[Reward], seconds: float) -> None:
        self.rewards, self.seconds = rewards, seconds

    def __enter__(self) -> "RewardProcess":
        self._child = ChildProcess(command_of(serve))
        reply = self._ask(self.rewards, None)
        if isinstance(reply, Problem):
            self._child.end()
            raise ConfigError(reply.text)
        self.higher_is_better: list[bool] = reply
        return self

    def __exit__(self, *_: object) -> None:
        self._child.end()

    def score(self, completions: Sequence[Completion]) -> npt.NDArray[np.float64]:
        """Returns (completions, rewards), NaN where a function returns None. Raises RewardError."""
        scores = np.empty((len(completions), len(self.rewards)))
        for column in range(len(self.rewards) if completions else 0):
            reply = self._ask((column, completions), self.seconds)
            if isinstance(reply, Problem):
                raise self._failed(column, completions, reply)
            scores[:, column] = reply
        return scores

    def _ask(self, message: Any, seconds: float | None) -> Any:
        """Returns the reply to a message, or a Problem if there is none."""
        try:
            self._child.send(message)
            return self._child.receive(seconds)
        except TimeoutError:
            return Problem(f"it did not return within {seconds:g} seconds; use a higher --reward-seconds")
        except (EOFError, OSError):
            return Problem(f"the process of the reward functions ended with exit code {self._child.process.wait()}")

    def _failed(self, column: int, completions: Sequence[Completion], problem: Problem) -> RewardError:
        """Returns an error that names the completion. Bisection finds it with few calls, which may be slow or paid."""
        while problem.row is None and len(completions) > 1:
            first, second = completions[: len(completions) // 2], completions[len(completions) // 2 :]
            reply = self._ask((column, first), self.seconds)
            completions, problem = (first, reply) if isinstance(reply, Problem) else (second, problem)
        completion = completions[problem.row or 0]
        return RewardError(
            f"reward {self.rewards[column].source}: {problem.text}\n  prompt: {short_repr(completion.prompt)}\n  "
            f"completion: {short_repr(completion.text)}"
        )


def serve() -> None:
    """Runs in the separate process until it is killed, or the parent is gone."""
    messages, parent = messages_of_parent(), connection_to_parent()
    functions, problems = list[RewardFunction](), list[str]()
    for reward in messages.recv():
        try:
            functions.append(load_reward(reward))
        except ConfigError as error:
            problems.append(str(error))
    are_higher_better = [bool(getattr(function, "higher_is_better", True)) for function in functions]
    parent.send(Problem(listing(problems)) if problems else are_higher_better)
    while True:
        column, completions = messages.recv()
        try:
            reply = _values(functions[column], completions)
        except Exception as error:  # noqa: BLE001  # whatever the user's code raises
            reply = Problem(_last_line(error), row=None)
        parent.send(reply)


def _values(function: RewardFunction, completions: Sequence[Completion]) -> list[float] | Problem:
    """Returns a number for each completion, NaN for None. Functions get the columns that they accept."""
    names = dict.fromkeys(name for completion in completions for name in completion.columns)
    arguments: dict[str, Any] = {
        **{name: [completion.columns.get(name) for completion in completions] for name in names},
        "prompts": [completion.prompt for completion in completions],  # instead of columns with these names
        "completions": [completion.text for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
    }
    parameters = inspect.signature(function).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [key for key, value in parameters.items() if value.default is value.empty and value.kind not in variable]
    if missing := " and ".join(name for name in needed if name not in arguments):
        return Problem(f"it needs {missing}, but the rows have no such column (they have {listed(names)})")
    values: Any = function(**arguments)
    values = values.tolist() if hasattr(values, "tolist") else values  # of numpy and torch
    if not isinstance(values, list | tuple):
        return Problem(f"expected a list with a number or None for each completion, got {short_repr(values)}")
    if len(values) != len(completions):
        return Problem(f"expected {len(completions)} rewards, one for each completion, got {len(values)}")
    numbers = [value.item() if hasattr(value, "item") else value for value in values]
    for row, value in enumerate(numbers):
        if value is not None and (type(value) not in (int, float, bool) or not math.isfinite(value)):
            return Problem(f"expected a finite number or None, got {short_repr(value)}", row)
    return [math.nan if value is None else value for value in numbers]


def _last_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
