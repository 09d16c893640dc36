"""Comparisons and searches of reinforcement learning speak of rewards: higher is better."""

import json
from pathlib import Path
from typing import Any

import pytest
from report.contents import CONTENTS
from tiny_run import write_rows

from tailora.report.blocks import Figure, Page, Table
from tailora.report.files import page_of
from tailora.study.compare import compare
from tailora.study.config import CompareConfig
from tailora.study.results import converted, measure_of
from tailora.study.trial import run_here
from tailora.train.config import TrainConfig

REWARDS = """
def digits(completions, **kwargs):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


def texts(page: Page) -> str:
    """Returns everything that a page says, and what its figures are drawn with."""
    parts = [page.lead, *(text for number in page.numbers for text in (number.label, number.note))]
    for section in page.sections:
        parts += [section.title, section.text]
        for block in section.blocks:
            if isinstance(block, Figure):
                parts += [block.alt, block.caption]
            elif isinstance(block, Table) and not block.title.startswith("Settings"):
                parts += [block.title, block.note, *(column.name for column in block.columns)]
    return "\n".join(filter(None, parts))


@pytest.mark.parametrize("kind", ["compare", "search"])
def test_pages_of_rewards_do_not_mention_losses(kind: str) -> None:
    losses = json.loads(json.dumps(CONTENTS[kind]())) | {"verdict": ""}
    keys = measure_of("reward").keys
    rewards = converted(losses, keys, -1) | {"loss_unit": "reward"}
    assert rewards["base_reward"] == -losses["base_loss"]
    back = converted(rewards, {new: old for old, new in keys.items()}, -1)
    assert json.loads(json.dumps(back)) == losses | {"loss_unit": "reward"}
    page = page_of(rewards, "report.json")
    assert "loss" not in texts(page).lower().replace("rise of loss", "").replace("rise of the loss", "")
    assert any(number.label.startswith("held-out reward") for number in page.numbers)
    best = [figure for section in page.sections for figure in section.blocks if isinstance(figure, Figure)]
    assert all(figure.alt for figure in best)
    shown = {number.label: number.value for number in page.numbers}
    assert shown["held-out reward, base"] == f"{-losses['base_loss']:.3f}"


@pytest.mark.slow
def test_a_comparison_reports_rewards(small_run: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Count to {i}."} for i in range(30)])
    changes: dict[str, Any] = {"reward": [f"{tmp_path}/rewards.py:digits"], "max_completion_length": 6}
    changes |= {"metric": ["max_length:20"]}
    train = small_run.replaced(
        task="grpo", data=str(data), num_generations=4, max_steps=6, output_dir=str(tmp_path / "study"), **changes
    )
    arms = {"r1": {"r": 1, "learning_rate": 3e-2}, "none": {"r": 1, "learning_rate": 1e-9}}
    lines: list[str] = []
    study = CompareConfig(seeds=1, rate_tries=1, arms=arms)
    result = compare(train, study, log=lines.append, run_trial=run_here)
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    trained, untrained = report["arms"]
    assert trained["eval_reward"] > untrained["eval_reward"] >= 0
    assert trained["interval"][0] <= trained["eval_reward"] <= trained["interval"][1]
    assert untrained["difference"]["value"] == pytest.approx(untrained["eval_reward"] - trained["eval_reward"])
    assert untrained["difference"]["low"] < untrained["difference"]["high"]
    assert max(map(max, trained["train_rewards"])) > 0
    assert f"none - r1 = {untrained['difference']['value']:+.3f} reward" in report["verdict"]
    assert all("held-out reward 0." in line for line in lines if "learning rate" in line)
    assert report == json.loads(json.dumps({"kind": "compare", **result.to_dict()}))
    assert trained["forgetting"]["kl"] > 0
    numbers = {number.label: number.value for number in page_of(report, "report.json").numbers}
    assert numbers["held-out reward, r1"] == f"{trained['eval_reward']:.3f}"
