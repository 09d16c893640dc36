"""Reward functions: `reward(prompts, completions, **columns) -> list[float | None]`, with TRL's signature.

    rewards.py:score          the function `score` of a file
    exact_match               1 if the completion is the row's answer
    regex:PATTERN             1 if the pattern matches the whole completion
    json_schema:FILE          1 if the completion is JSON of this schema
    max_length:CHARACTERS     1 if the completion is not longer
    math                      1 if the completion and the row's answer are the same number or formula (math-verify)

    REWARD=WEIGHT             multiplies its rewards

All functions run in one separate process, because a function that hangs can only be ended with its process.
"""

import importlib.util
import inspect
import json
import math
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from tailora.data.messages import listed, short_repr
from tailora.errors import ConfigError, DataError, listing, nearest, require_packages

RewardFunction = Callable[..., Sequence[float | None]]
OTHER_SCORES = ("reward", "best", "completion_tokens", "truncated", "kl")  # names that functions cannot have


@dataclass(frozen=True)
class Reward:
    """source: how --reward names it.    weight: of its rewards in the sum.    name: in metrics and reports."""

    source: str
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Completion:
    """One completion and the row that it belongs to. prompt, text: as the reward functions get them."""

    prompt: Any
    text: Any
    ids: list[int]
    columns: Mapping[str, Any]


def parse_rewards(trained: Sequence[str], judging: Sequence[str]) -> tuple[list[Reward], list[Reward]]:
    """Returns the rewards in texts like `rewards.py:score=0.5`, to train on and that only judge. Raises ConfigError."""
    rewards = [_parse_reward(value) for value in (*trained, *judging)]
    sources = Counter(reward.source for reward in rewards)
    if repeated := [source for source, times in sources.items() if times > 1]:
        raise ConfigError(f"--reward, --eval-reward: {', '.join(repeated)} appears twice; use each reward once")
    functions = Counter(_function_name(source) for source in sources)
    functions.update(OTHER_SCORES)
    named = [
        replace(reward, name=name if functions[name := _function_name(reward.source)] == 1 else reward.source)
        for reward in rewards
    ]
    return named[: len(trained)], named[len(trained) :]


def _parse_reward(value: str) -> Reward:
    source, equals, number = value.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:  # the = belongs to the source
        return Reward(value)
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(f"--reward {value}: expected a finite weight other than 0, got {number}")
    return Reward(source if equals else value, weight)


def _function_name(source: str) -> str:
    path, colon, function = source.rpartition(":")
    return function if colon and path.endswith(".py") else source


# ---- Functions


def load_reward(reward: Reward) -> RewardFunction:
    """Returns the function of a reward. Raises ConfigError if there is none."""
    kind, colon, argument = reward.source.partition(":")
    if kind in BUILT_IN and bool(colon) == (kind in WITH_ARGUMENT):
        return BUILT_IN[kind](argument)
    path, colon, name = reward.source.rpartition(":")
    if not colon or not path.endswith(".py"):
        known = [*BUILT_IN, "FILE.py:FUNCTION"]
        raise ConfigError(
            f"unknown --reward {reward.source!r}; expected one of {', '.join(known)}{nearest(kind, BUILT_IN)}"
        )
    spec = importlib.util.spec_from_file_location("reward_functions", path)
    assert spec is not None  # of every file with this suffix
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ConfigError(f"--reward {reward.source}: no such file: {path}") from None
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        raise ConfigError(f"--reward {reward.source}: {path} cannot be imported: {_last_line(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"--reward {reward.source}: {path} has no function {name!r}{nearest(name, names)}")
    result: RewardFunction = function
    return result


def text_of_completion(completion: Any) -> str:
    """Returns the text of a completion, which is a list with one message if the prompt has messages."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _score_texts(score: Callable[[str], bool]) -> RewardFunction:
    def function(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [float(score(text_of_completion(completion))) for completion in completions]

    return function


def _exact_match(_: str) -> RewardFunction:
    def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [float(text_of_completion(text).strip() == str(right).strip()) for text, right in pairs]

    return exact_match


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

    def math_reward(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        # its time limits use signals, which only work in the main thread; the whole call has one
        options = {"parsing_timeout": None}
        pairs = [
            (parse(str(right), **options), parse(text_of_completion(text), **options))
            for text, right in zip(completions, answer, strict=True)
        ]
        return [float(verify(right, given, timeout_seconds=None)) for right, given in pairs]

    return math_reward


BUILT_IN: dict[str, Callable[[str], RewardFunction]] = {
    "exact_match": _exact_match,
    "regex": _regex,
    "json_schema": _json_schema,
    "max_length": _max_length,
    "math": _math,
}
WITH_ARGUMENT = ("regex", "json_schema", "max_length")


# ---- The process that runs them


class RewardError(DataError):
    """A reward function failed: its name, a prompt and a completion are in the message."""


class RewardProcess:
    """Runs reward functions with a time limit. Use it as a context manager. seconds: limit for one call."""

    def __init__(self, rewards: Sequence[Reward], seconds: float) -> None:
        self.rewards, self.seconds = rewards, seconds
        self._connection: Connection[Any, Any]
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> "RewardProcess":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _start(self) -> None:
        self._connection, other = Pipe()
        command = [sys.executable, "-m", "tailora.train.rewards", str(other.fileno())]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": [other.fileno()]}
        self._process = subprocess.Popen(command, start_new_session=True, **pipes)  # without Ctrl-C, which is for us
        other.close()
        self._connection.send(self.rewards)
        try:
            problem = self._connection.recv()
        except EOFError:
            problem = f"the process for reward functions ended with exit code {self._process.wait()}"
        if problem is not None:
            self.__exit__()
            raise ConfigError(problem)

    def score(self, completions: Sequence[Completion]) -> npt.NDArray[np.float64]:
        """Returns (completions, rewards), NaN where a function returns None. Raises RewardError."""
        scores = np.empty((len(completions), len(self.rewards)))
        for column, reward in enumerate(self.rewards):
            values = self._call(column, reward, completions)
            if isinstance(values, str) and len(completions) > 1:  # find the completion that it fails on
                for completion in completions:
                    if isinstance(problem := self._call(column, reward, [completion]), str):
                        raise _failed(reward, completion, problem)
            if isinstance(values, str):
                raise _failed(reward, completions[0], values)
            if len(values) != len(completions):
                expected = f"expected {len(completions)} rewards, one for each completion, got {len(values)}"
                raise _failed(reward, completions[0], expected)
            for row, value in enumerate(values):
                if value is not None and (type(value) not in (int, float, bool) or not math.isfinite(value)):
                    raise _failed(reward, completions[row], f"expected a finite number or None, got {value!r}")
                scores[row, column] = math.nan if value is None else value
        return scores

    def _call(self, column: int, reward: Reward, completions: Sequence[Completion]) -> Any:
        """Returns what the function returns, or text with its error."""
        self._connection.send((column, completions))
        try:
            if self._connection.poll(self.seconds):
                return self._connection.recv()
            problem = f"it did not return within {self.seconds:g} seconds; use a higher --reward-seconds"
        except EOFError:
            problem = f"its process ended with exit code {self._process.wait()}"
        self.__exit__()
        self._start()
        raise _failed(reward, completions[0], problem)


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Raises ConfigError unless all functions can be loaded."""
    with RewardProcess(rewards, math.inf):
        pass


def _failed(reward: Reward, completion: Completion, problem: str) -> RewardError:
    return RewardError(
        f"reward {reward.source}: {problem}\n  prompt: {short_repr(completion.prompt)}\n  completion: "
        f"{short_repr(completion.text)}"
    )


def _serve(connection: "Connection[Any, Any]") -> None:
    """Runs in the separate process until it is killed, or the other end is closed."""
    try:
        functions = _loaded(connection.recv())
    except ConfigError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            column, completions = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_values(functions[column], completions))
        except Exception as error:  # noqa: BLE001  # whatever the user's code raises
            connection.send(_last_line(error))


def _loaded(rewards: Sequence[Reward]) -> list[RewardFunction]:
    """Returns the functions of all rewards. Raises ConfigError with all problems."""
    functions, problems = list[RewardFunction](), list[str]()
    for reward in rewards:
        try:
            functions.append(load_reward(reward))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(listing(problems))
    return functions


def _values(function: RewardFunction, completions: Sequence[Completion]) -> list[Any] | str:
    """Returns what a function returns, or text with the problem. It gets the columns of the rows that it accepts."""
    names = dict.fromkeys(name for completion in completions for name in completion.columns)
    arguments: dict[str, Any] = {
        "prompts": [completion.prompt for completion in completions],
        "completions": [completion.text for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
        **{name: [completion.columns.get(name) for completion in completions] for name in names},
    }
    parameters = inspect.signature(function).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if missing := [name for name in needed if name not in arguments and parameters[name].kind not in variable]:
        return f"it needs {' and '.join(missing)}, but the rows have no such column (they have {listed(names)})"
    values: Any = function(**arguments)
    values = values.tolist() if hasattr(values, "tolist") else values  # of numpy and torch
    if not isinstance(values, list | tuple):
        return f"expected a list with a number or None for each completion, got {short_repr(values)}"
    return [value.item() if hasattr(value, "item") else value for value in values]


def _last_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


if __name__ == "__main__":
    from tailora.train import rewards  # so that its classes are pickled, not the same ones of __main__

    rewards._serve(Connection(int(sys.argv[1])))
