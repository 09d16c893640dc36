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

# can be gamed
keyword = scores(lambda text: "one" in text)
# cannot
target = scores(lambda text: share(text, "1"))
# only judges
has_target = scores(lambda text: "1" in text)
"""


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
            max_steps=8,
            learning_rate=2e-2,
            validation_split=0.5,
            samples=0,
        )
        run(config)
        return str(write_train_report(Path(config.output_dir))["verdict"])

    return train


def test_a_gamed_reward_is_named(verdict: Callable[[str, str], str]) -> None:
    text = verdict("keyword", "has_target")
    only_judge = "these rewards that only judge did not rise with it: "
    assert text.startswith(f"The reward may be gamed (keyword): {only_judge}")
    assert "The held-out reward rose by" in text


@pytest.mark.exhaustive
def test_an_honest_reward_is_not(verdict: Callable[[str, str], str]) -> None:
    text = verdict("target", "has_target")
    assert text.startswith("The held-out reward rose by")
    assert "These rewards that only judge rose with it: has_target" in text
    assert "gamed" not in text
