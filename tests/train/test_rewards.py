"""Reward functions: TRL's signature, the built-in ones, and every way in which a function can fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sacrebleu.metrics import CHRF

from tailora.errors import ConfigError
from tailora.train import rewards
from tailora.train.rewards import (
    Completion,
    Reward,
    RewardError,
    RewardProcess,
    load_reward,
    parse_rewards,
)

FILE = """
import time

def score(prompts, completions, answer, **kwargs):
    return [float(answer_ in text) if text else None for text, answer_ in zip(completions, answer)]

def of_messages(completions, **kwargs):
    return [len(messages[0]["content"]) for messages in completions]

def without_kwargs(completions):
    return [1] * len(completions)

def raises(completions, **kwargs):
    return [1 / (text != "bad") for text in completions]

def huge(completions, **kwargs):
    return [-1e308 if text == "bad" else -1e9 for text in completions]

def few(completions, **kwargs):
    return [1.0]

def hangs(completions, **kwargs):
    time.sleep(60)

def nothing(completions, **kwargs):
    pass

def other_column(completions, label):
    return label

def dies(completions, **kwargs):
    import os
    os._exit(3)

def writes(completions, **kwargs):
    import os, stat
    for number in range(3, 20):
        try:
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                os.write(number, b"some text")
        except OSError:
            pass
    return [1.0] * len(completions)

def hangs_on_bad(completions, **kwargs):
    while "bad" in completions:
        time.sleep(60)
    return [1] * len(completions)
"""

SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
import helper

print("the file runs")

@dataclass
class Score:
    value: float

def first(completions, **kwargs):
    return [Score(helper.ONE).value for _ in completions]

def second(completions, **kwargs):
    return [2] * len(completions)

def own_class(completions, **kwargs):
    return [Score(1.0) for _ in completions]

def prints_calls(completions, **kwargs):
    print(f"{len(completions)} completions")
    return [1 / (text != "bad") for text in completions]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that needs what Python does for a script."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    path.with_name("helper.py").write_text("ONE = 1.0")
    return path


def completions(*texts: Any, answer: str = "7") -> list[Completion]:
    return [Completion("How many?", text, [1, 2], {"answer": answer}) for text in texts]


def test_a_function_gets_what_trl_passes(file: Path) -> None:
    """Also if a column has the name of an argument. Without completions there is no call."""
    functions = [Reward(f"{file}:{name}") for name in ("score", "of_messages", "without_kwargs")]
    columns = dict.fromkeys(("prompts", "completions", "completion_ids"), "of the row")
    chat = [{"role": "assistant", "content": "four"}]
    with RewardProcess(functions[:1], seconds=30) as process:
        rows = [replace(row, columns=row.columns | columns) for row in completions("It is 7.", "8", "")]
        np.testing.assert_equal(process.score(rows)[:, 0], [1.0, 0.0, np.nan])
    with RewardProcess(functions[1:], seconds=30) as process:
        np.testing.assert_equal(process.score(completions(chat, chat)), [[4.0, 1.0]] * 2)
        assert process.score([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "problem", "completion"),
    [
        ("raises", "ZeroDivisionError: division by zero (rewards.py, line 14)", "bad"),
        ("huge", "expected None or a number from -1e+09 to 1e+09, got -1e+308", "bad"),
        ("few", "expected 2 rewards, one for each completion, got 1", "good"),
        ("hangs", "it did not return within 0.5 seconds; use a higher --reward-seconds", "bad"),
        ("dies", "the process of the reward functions ended with exit code 3", "bad"),
        ("writes", "it wrote to the pipe of its process; write to a file or to stdout", "bad"),
        ("nothing", "expected a list with a number or None for each completion, got None", "good"),
        ("other_column", "it needs label, but the rows have no such column (they have answer)", "good"),
    ],
)
def test_a_failure_names_the_function_and_the_completion(file: Path, name: str, problem: str, completion: str) -> None:
    with RewardProcess([Reward(f"{file}:{name}")], seconds=0.5) as process, pytest.raises(RewardError) as raised:
        process.score(completions("good", "bad"))
    assert f"reward {file}:{name}: {problem}" in str(raised.value)
    assert f"\n  prompt: 'How many?'\n  completion: '{completion}'" in str(raised.value)


def test_a_file_is_run_once_and_as_a_script(
    script: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed must not depend on it
    with RewardProcess([Reward(f"{script}:first"), Reward(f"{script}:second")], seconds=30) as process:
        np.testing.assert_array_equal(process.score(completions("a", "b")), [[1, 2], [1, 2]])
    printed = capfd.readouterr()
    assert printed.err.count("the file runs") == 1
    assert not printed.out  # where --json prints its result


def test_few_calls_find_the_completion_that_a_function_fails_on(
    script: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [f"good {i}" for i in range(8)]
    texts[5] = "bad"
    functions, message = [Reward(f"{script}:prints_calls")], r"ZeroDivisionError(.|\n)*completion: 'bad'"
    with RewardProcess(functions, seconds=30) as process, pytest.raises(RewardError, match=message):
        process.score(completions(*texts))
    calls = [int(line.split()[0]) for line in capfd.readouterr().err.splitlines() if line.endswith(" completions")]
    assert calls == [8, 4, 2, 1]


def test_objects_of_the_file_are_refused_as_rewards(script: Path) -> None:
    functions, message = [Reward(f"{script}:own_class")], r"number from -1e\+09 to 1e\+09, got <?Score"
    with RewardProcess(functions, seconds=30) as process, pytest.raises(RewardError, match=message):
        process.score(completions("a"))


def test_a_process_that_died_between_calls_is_replaced(file: Path) -> None:
    with RewardProcess([Reward(f"{file}:score")], seconds=30) as process:
        process._children[False].end()
        assert process.score(completions("It is 7.", "8")).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("bad", [1, 2])
def test_completions_on_which_a_function_hangs_are_not_scored_unless_they_are_most(file: Path, bad: int) -> None:
    notes, texts = list[str](), ["good", "bad", "fine"] if bad == 1 else ["bad", "good", "bad"]
    with RewardProcess([Reward(f"{file}:hangs_on_bad")], 0.6, note=notes.append) as process:
        if bad == 2:
            with pytest.raises(RewardError, match=r"hangs_on_bad: it did not return(.|\n)*completion: 'bad'"):
                process.score(completions(*texts))
            return
        np.testing.assert_equal(process.score(completions(*texts)), [[1.0], [np.nan], [1.0]])
        assert process.over_limit.tolist() == [False, True, False]
        np.testing.assert_equal(process.score(completions("good")), [[1.0]])
        assert process.over_limit.tolist() == [False]
    assert notes[0].endswith("use a higher --reward-seconds. It is called again for each of 3 completions")
    assert notes[1:] == [f"reward {file}:hangs_on_bad: 1 completions without a reply are not scored, such as 'bad'"]


HOSTILE = {  # reward -> a completion that takes too much time or memory, or raises an error
    "math": "9**9**9**9",
    "regex:(a|aa)+$": "a" * 100 + "b",
    'json_schema:{"uniqueItems": true}': json.dumps([{str(i): i} for i in range(20_000)]),
}
HARMLESS = {  # completions that the same rewards judge
    "math": [("7", 1), ("(" * 5000 + "7" + ")" * 5000, 0), ("1e999", 0)],
    "regex:(a|aa)+$": [("aaa", 1), ("b" * 100_000, 0)],
    'json_schema:{"multipleOf": 0.5}': [("1.5", 1), ("NaN", 0), ("1e999", 0), ("1" * 5000, 0), ("[" * 100_000, 0)],
}


def in_file(source: str, folder: Path) -> str:
    kind, _, schema = source.partition(":")
    if kind != "json_schema":
        return source
    (folder / f"{len(schema)}.json").write_text(schema)
    return f"{kind}:{folder}/{len(schema)}.json"


@pytest.mark.parametrize("source", {**HOSTILE, **HARMLESS})
def test_a_built_in_reward_of_a_hostile_completion_is_0(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rewards, "BUILT_IN_SECONDS", 0.3)
    cases = [(HOSTILE[source], 0, True)] if source in HOSTILE else []
    cases += [(text, value, False) for text, value in HARMLESS.get(source, [("[1]", 1)])]
    with RewardProcess([Reward(in_file(source, tmp_path))], seconds=30) as process:
        scores = process.score(completions(*(text for text, *_ in cases)))
        assert [*zip(scores[:, 0], process.over_limit, strict=True)] == [(value, over) for _, value, over in cases]
    assert not capfd.readouterr().err


def test_memory_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "BUILT_IN_SECONDS", 60.0)
    monkeypatch.setattr(rewards, "BUILT_IN_BYTES", 2**26)
    with RewardProcess([Reward("regex:.*")], seconds=30) as process:
        assert process.score(completions("a", "a" * 2**25, "b")).tolist() == [[1.0], [0.0], [1.0]]
        assert process.over_limit.tolist() == [False, True, False]


def test_files_next_to_a_reward_replace_no_standard_module(script: Path) -> None:
    script.with_name("colorsys.py").write_text("raise SystemExit('the wrong module')")
    script.with_name("uses.py").write_text("import colorsys, helper\ndef one(completions):\n    return [helper.ONE]")
    with RewardProcess([Reward(f"{script.with_name('uses.py')}:one")], seconds=30) as process:
        assert process.score(completions("a")) == 1


def test_columns_are_checked_when_the_process_starts(file: Path) -> None:
    functions = [Reward(f"{file}:other_column"), Reward("exact_match")]
    message = r"2 problems:(.|\n)*exact_match: it needs answer(.|\n)*other_column: it needs label, but the rows"
    with pytest.raises(ConfigError, match=message), RewardProcess(functions, 30, ["level"]):
        pass
    with RewardProcess(functions, 30, ["answer", "label"]) as process:
        row = Completion("How many?", "7", [1], {"label": 2})
        rows = [row, replace(row, columns={"answer": "7", "label": 3})]
        np.testing.assert_equal(process.score(rows), [[2, np.nan], [3, 1]])


def test_an_import_has_a_limit_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.setattr(rewards, "LOADING_SECONDS", 0.5)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    message = "rewards.py:score cannot be loaded: it did not return within 0.5 seconds"
    with pytest.raises(ConfigError, match=message), RewardProcess([Reward(f"{tmp_path}/rewards.py:score")], 0.1):
        pass
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_built_in_rewards(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["a"]}))
    for source, right, wrong in [
        ("exact_match", " 7\n", "7."),
        ("exact_match", "<think>6 + 1</think>\n7", "<think>7"),
        ("exact_match:ignore=punctuation+case", "7.\n", "7 7"),
        ("exact_match:ignore=space+punctuation", " 7 .", "7 7"),
        ("contains", "It is 7.", "It is 6."),
        (r"regex:\d+", "42", "42 apples"),
        (f"json_schema:{schema}", '{"a": 1}', '{"b": 1}'),
        ("max_length:3", "abc", "abcd"),
    ]:
        function = load_reward(Reward(source))
        assert function(completions=[right, wrong], answer=["7", "7"]) == [1.0, 0.0], source


@pytest.mark.parametrize(
    ("right", "same", "different"),
    [
        ("-5", "(-5).", "5"),
        ("3.14", "3.14!", "314"),
        ("1000", "$1,000", "1,00"),
        ("1/2", "'1/2'", "12"),
    ],
)
def test_ignored_punctuation_is_not_that_of_numbers(right: str, same: str, different: str) -> None:
    function = load_reward(Reward("exact_match:ignore=punctuation"))
    assert function(completions=[same, different], answer=[right, right]) == [1.0, 0.0]


def test_similarities_are_those_of_their_definitions() -> None:
    pairs = [("the cat sat on the mat", "a cat was on the mat"), ("Arrr!", "Arrr! Eat oats."), ("x", "y")]
    texts, answer = map(list, zip(*pairs, strict=True))
    chrf = [CHRF().sentence_score(text, [right]).score for text, right in pairs]
    assert load_reward(Reward("chrf"))(completions=texts, answer=answer) == pytest.approx(chrf)
    # ROUGE-L of words: 4 of 6 and 6, 1 of 1 and 3
    assert load_reward(Reward("rouge_l"))(completions=texts, answer=answer) == pytest.approx([4 / 6, 1 / 2, 0])


def test_a_metric_says_whether_higher_is_better(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        "def errors(completions, **kwargs):\n    return [0] * len(completions)\nerrors.higher_is_better = False"
    )
    with RewardProcess([Reward(f"{file}:errors"), Reward("exact_match")], 60) as process:
        assert process.higher_is_better == [False, True]


def test_math_compares_values(caplog: pytest.LogCaptureFixture) -> None:
    completions, answer = ["\\boxed{7}", "0.5", "It is 7.", "\\boxed{8}", "0.25"], ["7", "1/2", 7, "7", "1/2"]
    assert load_reward(Reward("math"))(completions=completions, answer=answer) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert not caplog.records


def test_weights_and_names() -> None:
    trained, judging = parse_rewards(
        ["rewards.py:score=0.5", "exact_match", "regex:a=b", "a.py:same"], ["b.py:same", "rewards.py:reward"]
    )
    assert [(reward.name, reward.weight) for reward in trained] == [
        ("score", 0.5),
        ("exact_match", 1.0),
        ("regex:a=b", 1.0),
        ("a.py:same", 1.0),
    ]
    assert [reward.name for reward in judging] == ["b.py:same", "rewards.py:reward"]  # "reward" is the sum
    for weight in ("1e300", "-1.1e9", "0", "nan"):
        with pytest.raises(ConfigError, match=rf"weight from -1e\+09 to 1e\+09, not 0, got {weight}$"):
            parse_rewards([f"math={weight}"], [])
    with pytest.raises(ConfigError, match="exact_match appears twice"):
        parse_rewards(["exact_match=2"], ["exact_match"])
    trained, _ = parse_rewards(["regex:x=2", "regex:x[=]2", "json_schema:a.json=0.5"], [])
    assert [(reward.source, reward.weight) for reward in trained] == [
        ("regex:x", 2),
        ("regex:x[=]2", 1),
        ("json_schema:a.json", 0.5),
    ]
    assert load_reward(trained[1])(completions=["x=2", "x"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "advice"),
    [("math=2", "remove =2"), ("regex:x=1", r"remove =1, or write \[=\] if it belongs to the pattern")],
)
def test_metrics_have_no_weight(value: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"--metric {value}: metrics have no weight; {advice}$"):
        parse_rewards(["exact_match"], [value])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "exact",
            "unknown --reward 'exact'; expected one of exact_match, contains, regex:PATTERN, json_schema:FILE, "
            "max_length:CHARACTERS, math, chrf, rouge_l, FILE.py:FUNCTION; did you mean exact_match?",
        ),
        ("regex", "unknown --reward 'regex'; expected one of exact_match, contains, regex:PATTERN"),
        ("exact_match:ignore=cases", "expected ignore= with case, punctuation, space, joined by"),
        ("rewards.py", "unknown --reward 'rewards.py'; expected one of"),
        ("missing.py:score", "no such file: missing.py"),
        ("regex:(", "missing )"),
        ("max_length:many", "expected a number of characters"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_reward(Reward(source))
    assert message in str(raised.value)


def test_an_import_that_does_not_find_a_file_is_not_a_missing_reward_file(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("open('words.txt')")
    message = r"cannot be imported: FileNotFoundError: .*'words.txt' \(rewards.py, line 1\)"
    with pytest.raises(ConfigError, match=message):
        load_reward(Reward(f"{path}:score"))
