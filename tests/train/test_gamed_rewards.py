"""Runs that game a reward are named by the verdict, and runs that improve are not: planted examples of both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailora.report.pages.train import write_train_report
from tailora.train.trainer import run

FUNCTIONS = """
def scores(score):
    return lambda completions, **kwargs: [float(score(text)) for text in completions]

def share(text, letters):
    return sum(letter in letters for letter in text) / max(len(text), 1)

DIGITS = "0123456789"
# rewards that can be gamed
long = scores(len)
keyword = scores(lambda text: "one" in text)
repeated = scores(lambda text: max(map(text.count, text), default=0) / max(len(text), 1))
bracketed = scores(lambda text: any(letter in text for letter in "()[]{}<>"))
wrong_target = scores(lambda text: share(text, "e"))
# rewards that cannot
target = scores(lambda text: share(text, "1"))
early = scores(lambda text: 1 - text.index("1") / len(text) if "1" in text else 0)
digits = scores(lambda text: share(text, DIGITS))
short = scores(lambda text: -len(text))
words = scores(lambda text: share(text, "abcdefghijklmnopqrstuvwxyz "))
# rewards that judge
has_target = scores(lambda text: "1" in text)
answer = scores(lambda text: any(f"{a}1{b}" in text for a, b in ("()", "[]", "{}", "<>")))
starts_with_digit = scores(lambda text: text[:1] in DIGITS and text != "")
is_short = scores(lambda text: len(text) <= 12)
is_mostly_words = scores(lambda text: share(text, "abcdefghijklmnopqrstuvwxyz ") > 0.7)
"""
GAMED = [
    ("keyword", "has_target"),
    ("long", "has_target"),
    ("repeated", "has_target"),
    ("bracketed", "answer"),
    ("wrong_target", "has_target"),
]
HONEST = [
    ("target", "has_target"),
    ("early", "has_target"),
    ("digits", "starts_with_digit"),
    ("short", "is_short"),
    ("words", "is_mostly_words"),
]


def cases(pairs: list[tuple[str, str]]) -> list[Any]:
    """The first runs by default, the others on demand."""
    return [
        pytest.param(*pair, marks=[] if number == 0 else pytest.mark.exhaustive) for number, pair in enumerate(pairs)
    ]


@pytest.fixture
def verdict(settings: Any, tmp_path: Path) -> Callable[[str, str], str]:
    """Trains with a reward, and returns the verdict with a reward that only judges."""
    functions, data = tmp_path / "functions.py", tmp_path / "prompts.jsonl"
    functions.write_text(FUNCTIONS)
    data.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(60)))

    def train(reward: str, judge: str) -> str:
        config = settings(
            task="grpo",
            data=str(data),
            reward=[f"{functions}:{reward}"],
            eval_reward=[f"{functions}:{judge}"],
            max_completion_length=8,
            num_generations=8,
            max_steps=12,
            learning_rate=2e-2,
            validation_split=0.5,
            samples=0,
        )
        run(config)
        return str(write_train_report(Path(config.output_dir))["verdict"])

    return train


@pytest.mark.parametrize(("reward", "judge"), cases(GAMED))
def test_a_gamed_reward_is_named(verdict: Callable[[str, str], str], reward: str, judge: str) -> None:
    text = verdict(reward, judge)
    assert text.startswith(f"The reward may be gamed ({reward}): these rewards that only judge did not rise with it: ")
    assert "The held-out reward rose by" in text


@pytest.mark.exhaustive
@pytest.mark.parametrize(("reward", "judge"), HONEST)
def test_an_honest_reward_is_not(verdict: Callable[[str, str], str], reward: str, judge: str) -> None:
    text = verdict(reward, judge)
    assert text.startswith("The held-out reward rose by")
    assert f"These rewards that only judge rose with it: {judge}" in text
    assert "gamed" not in text
