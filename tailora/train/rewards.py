"""Rewards and metrics: `reward(prompts, completions, **columns) -> list[float | None]`, with TRL's signature.

A reward is trained on, a metric is only reported. Higher is better, unless a function has `higher_is_better = False`.

    rewards.py:score          the function `score` of a file
    exact_match               1 if the completion, without a thought in <think>, is the row's answer;
                              exact_match:ignore=case+punctuation+space ignores these
    contains                  1 if the completion contains the row's answer
    regex:PATTERN             1 if the pattern matches the whole completion
    json_schema:FILE          1 if the completion is JSON of this schema
    max_length:CHARACTERS     1 if the completion is not longer
    math                      1 if the completion and the row's answer are the same number or formula (math-verify)
    chrf, rouge_l             similarity to the row's answer: chrF (sacrebleu, 0 to 100), ROUGE-L (rouge-score, 0 to 1)

    REWARD=WEIGHT             multiplies its rewards; a final =NUMBER is always a weight, so write x=1 as regex:x[=]1

Functions run in separate processes, because a function that hangs can only be ended with its process.
"""

import inspect
import json
import logging
import math
import re
import signal
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from subprocess import TimeoutExpired
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import regex

from tailora.data.messages import listed, short_repr
from tailora.errors import ConfigError, DataError, listing, nearest, require_packages
from tailora.train.child_process import (
    ChildProcess,
    PipeError,
    command_of,
    connection_to_parent,
    messages_of_parent,
)
from tailora.train.config import JUDGE

if sys.platform != "win32":
    import resource

RewardFunction = Callable[..., Sequence[float | None]]
ARGUMENTS = ("prompts", "completions", "completion_ids")  # of functions, besides the columns
# names that functions cannot have
OTHER_SCORES = (
    "loss",
    "perplexity",
    "accuracy",
    "accuracy_norm",
    "reward",
    "best",
    "completion_tokens",
    "truncated",
    "over_limit",
    "kl",
    JUDGE,
)

LARGEST = 1e9  # reward, and weight: the square of their product fits into float32
BUILT_IN_SECONDS = 2.0  # of the processor that a built-in reward gets for a completion, and memory
BUILT_IN_BYTES = 2**30
LOADING_SECONDS = 300.0  # for the import of a file, which may load a model; a higher --reward-seconds replaces it
SECONDS_TO_EXIT = 10.0  # for a process that has closed its pipe
MOST_TRIED = 16  # completions, until a function that hangs on more than half of them ends the run


@dataclass(frozen=True)
class Reward:
    source: str  # the text after --reward, without the weight
    weight: float = 1.0
    name: str = ""  # in metrics and reports
    flag: str = "--reward"  # or --metric, in messages

    @property
    def label(self) -> str:
        """For messages: what it is, and its source."""
        return f"{self.flag.removeprefix('--')} {self.source}"

    @property
    def is_judge(self) -> bool:
        """Whether it is a language model, not a function."""
        return self.source.startswith(f"{JUDGE}:")


@dataclass(frozen=True)
class Completion:
    """One completion and the row that it belongs to. prompt, text: as the reward functions get them."""

    prompt: Any
    text: Any
    ids: list[int]
    columns: Mapping[str, Any]


def parse_rewards(trained: Sequence[str], metrics: Sequence[str]) -> tuple[list[Reward], list[Reward]]:
    """Returns the rewards in texts like `rewards.py:score=0.5`, to train on and to report. Raises ConfigError."""
    rewards = [_parse_reward(value) for value in trained]
    rewards += [_parse_reward(value, flag="--metric") for value in metrics]
    sources = [reward.source for reward in rewards]
    if repeated := {source for source in sources if sources.count(source) > 1}:
        raise ConfigError(f"--reward, --metric: {', '.join(sorted(repeated))} appears twice; use each one once")
    rewards = [replace(reward, name=JUDGE) if reward.is_judge else reward for reward in rewards]
    functions = Counter([*map(_function_name, sources), *OTHER_SCORES])
    named = [
        reward
        if reward.name
        else replace(reward, name=name if functions[name := _function_name(reward.source)] == 1 else reward.source)
        for reward in rewards
    ]
    return named[: len(trained)], named[len(trained) :]


def _parse_reward(value: str, flag: str = "--reward") -> Reward:
    source, equals, number = value.rpartition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:  # the = belongs to the source
        return Reward(value, flag=flag)
    if equals and flag == "--metric":
        pattern = ", or write [=] if it belongs to the pattern" if source.startswith("regex:") else ""
        raise ConfigError(f"--metric {value}: metrics have no weight; remove ={number}{pattern}")
    if not 0 < abs(weight) <= LARGEST:
        raise ConfigError(f"--reward {value}: expected a weight from -{LARGEST:g} to {LARGEST:g}, not 0, got {number}")
    return Reward(source if equals else value, weight, flag=flag)


def _function_name(source: str) -> str:
    path, colon, function = source.rpartition(":")
    return function if colon and path.endswith(".py") else source


# ---- Functions


def is_built_in(reward: Reward) -> bool:
    kind, colon, _ = reward.source.partition(":")
    return kind in BUILT_IN and (kind in MAY_HAVE_ARGUMENT or bool(colon) == (kind in WITH_ARGUMENT))


def load_reward(reward: Reward) -> RewardFunction:
    kind, _, argument = reward.source.partition(":")
    if is_built_in(reward):
        try:
            return BUILT_IN[kind](argument)
        except ConfigError as error:
            raise ConfigError(f"{reward.flag} {error}") from None
    path, _, name = reward.source.rpartition(":")
    if not path.endswith(".py"):
        forms = [f"{name}:{WITH_ARGUMENT[name]}" if name in WITH_ARGUMENT else name for name in BUILT_IN]
        known = f"{', '.join(forms)}, FILE.py:FUNCTION{'' if kind in BUILT_IN else nearest(kind, BUILT_IN)}"
        raise ConfigError(f"unknown {reward.flag} {reward.source!r}; expected one of {known}")
    if not Path(path).is_file():
        raise ConfigError(f"{reward.flag} {reward.source}: no such file: {path}")
    try:
        module = _module(Path(path).resolve())
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        raise ConfigError(f"{reward.flag} {reward.source}: {path} cannot be imported: {_last_line(error)}") from None
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"{reward.flag} {reward.source}: {path} has no function {name!r}{nearest(name, names)}")
    return function


@cache
def _module(path: Path) -> ModuleType:
    """Returns the module of a file, which runs once and can import files next to it, as a script can."""
    name = str(path.with_suffix("")).replace(".", "_")  # of no other module
    packages = sysconfig.get_path("purelib")
    # after Python's own modules, which a file such as random.py must not replace
    sys.path.insert(sys.path.index(packages) if packages in sys.path else len(sys.path), str(path.parent))
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


def _compare_answers(compare: Callable[[str, str], float]) -> RewardFunction:
    """compare: scores a completion; its second argument is the row's answer."""

    def function(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [
            None
            if right is None or not str(right).strip()
            else float(compare(text_of_completion(completion), str(right)))
            for completion, right in pairs
        ]

    return function


THOUGHT = re.compile(r"\A\s*<think>.*?(</think>\s*|\Z)", re.DOTALL)  # before the answer
# not the sign of a number, nor what stands between its digits, except for commas of thousands
PUNCTUATION = re.compile(r"(?!(?<!\w)[-\u2212](?=\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)(?!,\d{3}(?!\d))[^\w\s](?=\d))[^\w\s]")
IGNORE: dict[str, Callable[[str], str]] = {  # applied in this order
    "case": str.casefold,
    "punctuation": partial(PUNCTUATION.sub, ""),
    "space": lambda text: " ".join(text.split()),
}


def _exact_match(argument: str) -> RewardFunction:
    ignored = argument.removeprefix("ignore=").split("+") if argument else []
    if unknown := [name for name in ignored if name not in IGNORE]:
        problem = f"exact_match:{argument}: expected ignore= with {', '.join(IGNORE)}, joined by +"
        raise ConfigError(f"{problem}; got {', '.join(unknown)}")

    def normalized(text: str) -> str:
        text = THOUGHT.sub("", text)
        for name, apply in IGNORE.items():
            text = apply(text) if name in ignored else text
        return text.strip()

    return _compare_answers(lambda text, right: normalized(text) == normalized(right))


def _contains(_: str) -> RewardFunction:
    return _compare_answers(lambda text, right: right.strip() in text)


def _chrf(_: str) -> RewardFunction:
    require_packages("sacrebleu", extra="rewards")
    from sacrebleu import sentence_chrf

    return _compare_answers(lambda text, right: sentence_chrf(text, [right]).score)


def _rouge_l(_: str) -> RewardFunction:
    require_packages("rouge_score", extra="rewards")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return _compare_answers(lambda text, right: scorer.score(right, text)["rougeL"].fmeasure)


def _regex(pattern: str) -> RewardFunction:
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(f"regex:{pattern}: {error}") from None
    return _score_texts(lambda text: compiled.fullmatch(text.strip()) is not None)


def _json_schema(path: str) -> RewardFunction:
    require_packages("jsonschema", extra="rewards")
    import jsonschema

    try:
        validator = jsonschema.validators.validator_for(schema := json.loads(Path(path).read_text("utf-8")))(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise ConfigError(f"json_schema:{path}: {error}") from None

    def is_valid(text: str) -> bool:
        with suppress(ValueError, RecursionError):
            return bool(validator.is_valid(json.loads(text, parse_float=_finite, parse_constant=_finite)))
        return False

    return _score_texts(is_valid)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _max_length(limit: str) -> RewardFunction:
    if not limit.isdecimal():
        raise ConfigError(f"max_length:{limit}: expected a number of characters")
    return _score_texts(lambda text: len(text) <= int(limit))


def _math(_: str) -> RewardFunction:
    require_packages("math_verify", extra="rewards")
    from math_verify import parse, verify

    # its own time limits do not end a single long computation; the process has one that does
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about that
    parsed = partial(parse, parsing_timeout=None)
    return _compare_answers(lambda text, right: verify(parsed(right), parsed(text), timeout_seconds=None))


BUILT_IN: dict[str, Callable[[str], RewardFunction]] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "regex": _regex,
    "json_schema": _json_schema,
    "max_length": _max_length,
    "math": _math,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
WITH_ARGUMENT = {"regex": "PATTERN", "json_schema": "FILE", "max_length": "CHARACTERS"}
MAY_HAVE_ARGUMENT = {"exact_match": "ignore=..."}


# ---- The process that runs them


class RewardError(DataError):
    """A reward function failed: its name, a prompt and a completion are in the message."""


@dataclass(frozen=True)
class Problem:
    """Why a function has no rewards."""

    text: str
    row: int | None = 0  # number of the completion with the problem; None if unknown
    is_lost: bool = False  # there was no reply, and the process was killed


class RewardProcess:
    """Runs reward functions with limits. Use it as a context manager.

    Built-in rewards judge each completion with a limit of time and memory. Functions of files get all completions at
    once, and each one alone if that hangs. Both have their own process, which is replaced after a call without reply.

    seconds: limit for one call of a function.
    columns: of the rows, which functions can use; by default those that the completions of a call have.
    note: reports completions that are not scored.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        seconds: float,
        columns: Collection[str] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.rewards, self.seconds, self.columns, self.note = rewards, seconds, columns, note
        self.over_limit: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # completions of the last call of `score`
        self._children: dict[bool, ChildProcess] = {}  # is_built_in -> the process of these rewards
        self._directions: dict[Reward, bool] = {}  # whether higher is better

    def __enter__(self) -> "RewardProcess":
        try:
            if problems := [problem for built_in in (True, False) for problem in self._start(built_in)]:
                raise ConfigError(listing(problems))
        except BaseException:  # also Ctrl-C
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.end()

    @property
    def higher_is_better(self) -> list[bool]:
        return [self._directions[reward] for reward in self.rewards]

    def score(self, completions: Sequence[Completion]) -> npt.NDArray[np.float64]:
        """Returns (completions, rewards), NaN where a function returns None or hangs. Raises RewardError."""
        scores = np.full((len(completions), len(self.rewards)), np.nan)
        self.over_limit = np.zeros(len(completions), dtype=np.bool_)
        for column in range(len(self.rewards) if completions else 0):
            reply = None if is_built_in(self.rewards[column]) else self._call(column, completions)
            if isinstance(reply, Problem) and not reply.is_lost:
                raise self._failed(column, completions, reply)
            if reply is None or isinstance(reply, Problem):
                scores[:, column] = self._score_each(column, completions, reply)
            else:
                scores[:, column] = reply
        return scores

    def _score_each(
        self, column: int, completions: Sequence[Completion], problem: "Problem | None"
    ) -> npt.NDArray[np.float64]:
        """Scores the completions one by one. problem: of a function that did not reply to all of them at once.

        Raises RewardError if a function has no reply to more than half of them, or of the first 16 in random order.
        """
        reward, values = self.rewards[column], np.full(len(completions), np.nan)
        if problem is not None and len(completions) > 1:
            text = f"{problem.text}. It is called again for each of {len(completions)} completions"
            self.note(f"{reward.label}: {text}")
        lost = list[int]()
        for called, row in enumerate(np.random.default_rng(0).permutation(len(completions)).tolist(), start=1):
            reply = self._call(column, [completions[row]])
            if not isinstance(reply, Problem):
                values[row] = reply[0]
            elif is_built_in(reward) and reply.row is None:
                values[row], self.over_limit[row] = (0.0 if reward.flag == "--reward" else np.nan), True
            else:
                lost.append(row)
                if not reply.is_lost or 2 * len(lost) > max(called, min(len(completions), MOST_TRIED)):
                    raise self._error(column, completions[row], reply)
        if lost:
            self.over_limit[lost] = True
            shown = short_repr(completions[lost[0]].text)
            self.note(f"{reward.label}: {len(lost)} completions without a reply are not scored, such as {shown}")
        return values

    def _start(self, built_in: bool) -> list[str]:
        """Starts the process of the built-in rewards, or of the others. Returns why they cannot be used."""
        rewards = [reward for reward in self.rewards if is_built_in(reward) == built_in]
        if not rewards:
            return []
        self._children[built_in] = ChildProcess(command_of(serve))
        limits = (BUILT_IN_SECONDS, BUILT_IN_BYTES) if built_in else None
        reply = self._ask(built_in, (rewards, self.columns, limits), max(self.seconds, LOADING_SECONDS))
        if isinstance(reply, Problem):
            return [
                f"{rewards[0].flag} {', '.join(reward.source for reward in rewards)} cannot be loaded: {reply.text}"
            ]
        problems: list[str]
        problems, directions = reply
        self._directions |= dict(zip(rewards, directions, strict=False))
        return problems

    def _call(self, column: int, completions: Sequence[Completion]) -> "list[float] | Problem":
        built_in = is_built_in(self.rewards[column])
        if built_in not in self._children and (problems := self._start(built_in)):
            return Problem(listing(problems))
        number = sum(is_built_in(reward) == built_in for reward in self.rewards[:column])
        reply: list[float] | Problem = self._ask(built_in, (number, completions), self.seconds)
        return reply

    def _ask(self, built_in: bool, message: Any, seconds: float) -> Any:
        """Returns the reply to a message, or a Problem if there is none. Then the process is killed."""
        child = self._children[built_in]
        try:
            child.send(message)
            return child.receive(seconds)
        except TimeoutError:
            text = f"it did not return within {seconds:g} seconds; use a higher --reward-seconds"
        except PipeError as error:
            text = str(error)
        except (EOFError, OSError):
            with suppress(TimeoutExpired):
                child.process.wait(SECONDS_TO_EXIT)
            text = f"the process of the reward functions ended with exit code {child.process.returncode}"
        child.end()
        del self._children[built_in]
        return Problem(text, None, is_lost=True)

    def _failed(self, column: int, completions: Sequence[Completion], problem: Problem) -> RewardError:
        """Returns an error that names the completion. Bisection finds it with few calls, which may be slow or paid."""
        while problem.row is None and len(completions) > 1:
            first, second = completions[: len(completions) // 2], completions[len(completions) // 2 :]
            reply = self._call(column, first)
            completions, problem = (first, reply) if isinstance(reply, Problem) else (second, problem)
        return self._error(column, completions[problem.row or 0], problem)

    def _error(self, column: int, completion: Completion, problem: Problem) -> RewardError:
        return RewardError(
            f"{self.rewards[column].label}: {problem.text}\n  prompt: {short_repr(completion.prompt)}\n  "
            f"completion: {short_repr(completion.text)}"
        )


def serve() -> None:
    """Runs in the separate process until it is killed, or the parent is gone."""
    messages, parent = messages_of_parent(), connection_to_parent()
    rewards, columns, limits = messages.recv()
    functions, problems = list[RewardFunction](), list[str]()
    for reward in rewards:
        try:
            functions.append(load_reward(reward))
        except ConfigError as error:
            problems.append(str(error))
            continue
        if columns is not None and (missing := _missing(functions[-1], columns)):
            problems.append(f"{reward.flag} {reward.source}: {missing}")
    parent.send((problems, [bool(getattr(function, "higher_is_better", True)) for function in functions]))
    seconds, most_bytes = limits or (0.0, None)
    if most_bytes is not None and sys.platform == "linux":
        most_bytes += psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with suppress(EOFError, ConnectionError):
        while True:
            number, completions = messages.recv()
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process; 0: no limit
            try:
                reply = _values(functions[number], completions, columns)
            except Exception as error:  # noqa: BLE001  # whatever the user's code raises
                reply = Problem(_last_line(error), row=None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            parent.send(reply)


def _missing(function: RewardFunction, columns: Collection[str]) -> str:
    """Returns what to say if a function needs a column that the rows lack; "" otherwise."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.items()
    needed = [key for key, value in parameters if value.default is value.empty and value.kind not in variable]
    missing = " and ".join(name for name in needed if name not in {*columns, *ARGUMENTS})
    names = f"they have {listed(columns)}" if columns else "they have no others than the prompt"
    return f"it needs {missing}, but the rows have no such column ({names})" if missing else ""


def _values(
    function: RewardFunction, completions: Sequence[Completion], columns: Collection[str] | None
) -> list[float] | Problem:
    """Returns a number for each completion, NaN for None. Functions get the columns that they accept."""
    names = columns or dict.fromkeys(name for completion in completions for name in completion.columns)
    if missing := _missing(function, names):
        return Problem(missing)
    arguments: dict[str, Any] = {
        **{name: [completion.columns.get(name) for completion in completions] for name in names},
        "prompts": [completion.prompt for completion in completions],  # instead of columns with these names
        "completions": [completion.text for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
    }
    parameters = inspect.signature(function).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    values: Any = function(**arguments)
    values = values.tolist() if hasattr(values, "tolist") else values  # of numpy and torch
    if not isinstance(values, list | tuple):
        return Problem(f"expected a list with a number or None for each completion, got {short_repr(values)}")
    if len(values) != len(completions):
        return Problem(f"expected {len(completions)} rewards, one for each completion, got {len(values)}")
    numbers = [value.item() if hasattr(value, "item") else value for value in values]
    for row, value in enumerate(numbers):
        if value is not None and (type(value) not in (int, float, bool) or not abs(value) <= LARGEST):
            return Problem(f"expected None or a number from -{LARGEST:g} to {LARGEST:g}, got {short_repr(value)}", row)
    return [math.nan if value is None else value for value in numbers]


def _last_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
