"""`tailora train --task grpo` from the command line to the report: what the run shows about its rewards."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import call, check_refused, found, output

from tailora.cli.main import main
from tailora.errors import WORSE
from tailora.report.blocks import Figure, Table
from tailora.report.files import read_page
from tailora.report.pages.train import write_train_report
from tailora.train.answers import PROBE_TOKENS
from tailora.train.sampler import Sampler

REWARDS = """
def share(completions, **kwargs):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

def digits(completions, **kwargs):
    return [float(any(c.isdigit() for c in text)) for text in completions]
"""


@pytest.fixture(scope="module")
def line(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run whose completions should consist of digits."""
    folder = tmp_path_factory.mktemp("grpo")
    rewards, data = folder / "rewards.py", folder / "prompts.jsonl"
    rewards.write_text(REWARDS)
    data.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(24)))
    files = ["--model", tiny_model, "--data", data, "--output-dir", folder / "run"]
    sizes = ["--max-completion-length", 8, "--num-generations", 4, "--max-steps", 6, "--validation-split", 0.5]
    rewarded = ["--reward", f"{rewards}:share", "--metric", f"{rewards}:digits"]
    speed = ["--learning-rate=3e-2", "--samples", 0]
    return [str(word) for word in ("train", "--task", "grpo", *files, *sizes, *rewarded, *speed)]


@pytest.fixture(scope="module")
def finished(line: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and what it printed with --json."""
    result = found(*line, "--eval-steps", 3)
    return Path(result["output_dir"]), result


def test_json_has_rewards_with_intervals_and_what_to_make_of_them(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    for when in ("before", "after", "change"):
        low, high = result[f"eval_reward_{when}_95"]
        assert low <= result[f"eval_reward_{when}"] <= high
    assert result["eval_reward_change"] == pytest.approx(result["eval_reward_after"] - result["eval_reward_before"])
    assert 0 <= result["eval_digits_after"] <= result["eval_pass@4/digits_after"] <= 1
    assert result["eval_kl_before"] == pytest.approx(0, abs=1e-5)
    assert abs(result["eval_kl_after"]) > 1e-3
    assert result["forgetting"]["kl"] > 0
    assert 0 < result["drift_mean"] < result["drift_max"] < 1e-4
    assert 0 <= result["equal_groups"] <= 1
    assert "held-out reward" in result["verdict"]
    assert not any("loss" in name for name in result)
    logged = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = {numbers["step"]: numbers for numbers in logged if "eval_reward" in numbers}
    assert [*evaluations] == [0, 3, 6]
    assert evaluations[result["best_step"]]["eval_kl"] == pytest.approx(result["eval_kl_after"])
    assert all(numbers["eval_reward_std_error"] > 0 for numbers in evaluations.values())


def test_the_page_shows_samples_over_time_and_large_advantages(finished: tuple[Path, dict[str, Any]]) -> None:
    page = read_page(finished[0])
    sections = {section.title: section for section in page.sections}
    tables = [block for block in sections["Samples over time"].blocks if isinstance(block, Table)]
    assert [[row[0] for row in table.rows] for table in tables] == [["0", "3", "6"]] * 4
    (groups,) = (block for block in sections["Largest advantages"].blocks if isinstance(block, Table))
    assert all(float(row[1]) > 0 for row in groups.rows)
    (curve,) = (block for block in sections["Reward"].blocks if isinstance(block, Figure))
    result = finished[1]
    assert f"Held-out reward from {result['eval_reward_before']:.3f}" in curve.alt
    html = (finished[0] / "report.html").read_text()
    assert "Largest advantages" in html
    assert "Loss" not in sections


def test_a_long_run_shows_some_evaluations_and_the_largest_group_of_each_part(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.report.pages.train.MOST_SHOWN", 2)
    lines = [json.loads(text) for text in (finished[0] / "completions.jsonl").read_text().splitlines()]
    groups = [line for line in lines if "advantage" in line]
    assert len(groups) == 6
    largest = [max(part, key=lambda line: line["advantage"])["step"] for part in (groups[:3], groups[3:])]
    sections = {section.title: section for section in read_page(finished[0]).sections}
    (table,) = (block for block in sections["Largest advantages"].blocks if isinstance(block, Table))
    assert [int(row[0]) for row in table.rows] == largest
    samples = [block for block in sections["Samples over time"].blocks if isinstance(block, Table)]
    assert [[row[0] for row in table.rows] for table in samples] == [["0", "6"]] * 4


def test_full_fine_tuning_has_no_kl_and_says_so(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [*line, "--method", "full", "--json"]
    for flag, value in {"--output-dir": str(tmp_path), "--max-steps": "2"}.items():
        full[full.index(flag) + 1] = value
    assert main([word.replace("rate=3e-2", "rate=3e-3") for word in full]) == 0
    out, err = capsys.readouterr()
    result: dict[str, Any] = json.loads(out)
    assert "eval_kl_after" not in result
    assert result["forgetting"]["kl"] > 0
    assert "without an adapter, KL from the base is not measured on held-out completions" in " ".join(err.split())


@pytest.mark.parametrize(("equal", "starts"), [(1.0, True), (0.5, False)])
def test_a_run_whose_groups_all_had_equal_rewards_says_that_it_trained_nothing(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, equal: float, starts: bool
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "equal_groups": 1.0} if "loss" in line else line for line in lines]
    next(line for line in lines if "loss" in line)["equal_groups"] = equal
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict = write_train_report(folder)["verdict"]
    assert verdict.startswith("Nothing was trained: in every step, all completions of each prompt") == starts


def test_without_held_out_prompts_the_training_reward_is_shown_and_judges_are_refused(
    line: list[str], tmp_path: Path
) -> None:
    line = line[: line.index("--samples")]
    for flag, value in {"--output-dir": tmp_path / "run", "--validation-split": 0, "--max-steps": 2}.items():
        line[line.index(flag) + 1] = str(value)
    problem = (
        "--metric scores answers to held-out prompts, but there are none; use --eval-data, or a --validation-split"
    )
    check_refused(problem, *line)
    judge = line.index("--metric")
    text = output(*line[:judge], *line[judge + 2 :])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["reward"]
    assert re.search(rf"training reward +{last:.3f} +of the last step", text)
    assert "unknown without held-out data" in " ".join(text.split())
    assert "nswers" not in text


def test_a_run_on_chats_prints_commands_and_files_that_fit_rewards(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, limits = tmp_path / "chats.jsonl", list[int]()
    chats = [[{"role": "system", "content": "Count."}, {"role": "user", "content": f"To {i}."}] for i in range(24)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    answer = Sampler.answer

    def limited(sampler: Sampler, prompts: Any, max_new_tokens: int, **options: Any) -> Any:
        limits.extend([max_new_tokens] * len(prompts))
        return answer(sampler, prompts, max_new_tokens, **options)

    monkeypatch.setattr(Sampler, "answer", limited)
    line = [*line]
    files = {"--output-dir": tmp_path / "run", "--data": data}
    rewards = {"--reward": "regex:[a-m]", "--metric": "max_length:9"}
    for flag, value in {**files, **rewards, "--samples": 2, "--max-steps": 2}.items():
        line[line.index(flag) + 1] = str(value)
    code, text, progress = call(*line)
    assert code in (0, WORSE), progress
    # --max-completion-length, after a few tokens to estimate the time
    assert [limit for limit in limits if limit > PROBE_TOKENS] == [8] * 4
    commands = [words.split()[1] for words in text.partition("\nNext\n")[2].splitlines() if words]
    assert commands == ["chat", "predict", "export"]
    assert re.search(r"metrics.jsonl +reward, learning rate", text)
    assert re.search(r"examples.jsonl +reward of each held-out example", text)
    header = " ".join(progress.split())
    assert ": 12 prompts, 12 held out; format: prompts steps 2 steps of 8 prompts with 4 completions each" in header


@pytest.mark.parametrize(("cut", "is_said"), [(0.95, True), (0.9, False)])
def test_completions_that_are_nearly_all_truncated_need_a_higher_limit(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, cut: float, is_said: bool
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    rows = [json.loads(text) for text in (folder / "examples.jsonl").read_text().splitlines()]
    for row in rows:
        row["scores_after"]["truncated"] = [cut] * 4
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = write_train_report(folder)["verdict"]
    assert "held-out reward" in verdict
    assert verdict.endswith(" 95% of the completions reached --max-completion-length; raise it.") == is_said
    assert ("--max-completion-length" in verdict) == is_said


def test_drift_has_no_exponent_unless_it_is_tiny(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    report["result"] |= {"drift_mean": 0.03604, "drift_max": 0.4899}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (drift,) = (number for number in read_page(tmp_path).numbers if number.label == "drift")
    assert (drift.value, drift.note.rpartition(" ")[2]) == ("0.036", "0.49")
