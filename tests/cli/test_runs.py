"""`tailora runs`: the list of runs and studies, and two runs compared on what both were evaluated on."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import check_refused, found, output
from filelock import FileLock
from scipy import stats

from tailora.formats.run_folder import SUMMARY_BYTES, write_report
from tailora.report.run_records import record_of, records_in
from tailora.train.run_log import HOLDER, LOCK, lock, set_aside

ENDED = {"eval_loss_before": 2.0, "eval_loss_after": 1.5, "seconds": 80.0, "higher_is_better": {"right": True}}
REPORT = {"verdict": "Better.", "finding": "better", "metrics": [{"name": "right", "before": 0.1, "after": 0.7}]}


def write_run(
    folder: Path, *, report: bool = True, result: Any = ENDED, unit: str = "nats per token", **settings: Any
) -> Path:
    folder.mkdir(parents=True)
    content = {"settings": {"model": "x/m", "data": "d/a.jsonl", **settings}, "loss_unit": unit, "diverged": False}
    (folder / "run.json").write_text(json.dumps({**content, "finished": bool(result), "result": result}))
    if report:
        write_report(folder, "train", {**REPORT, "result": result})
    return folder


def write_evaluations(folder: Path, losses: Any, tokens: Any, right: Any, prompts: Any) -> None:
    rows = [{"text": p, "tokens": t, "after": x * t} for p, t, x in zip(prompts, tokens, losses, strict=True)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = [{"tokens": 3, "is_cut": False, "scores": {"right": float(value)}} for value in right]
    answers = [
        {"prompt": p, "base": "b", "tuned": f"{folder.name} {p}", "before": f, "after": f, "cluster": number}
        for number, (p, f) in enumerate(zip(prompts, facts, strict=True))
    ]
    (folder / "samples.json").write_text(json.dumps(answers))
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 4, "eval_loss": 1.5}\n{"st')


def states(folder: Path) -> dict[str, str]:
    return {record.name: record.state for record in records_in(folder)}


def test_each_run_has_its_state_and_a_study_hides_its_own_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "done")
    write_run(tmp_path / "old", report=False)
    write_run(tmp_path / "resumed", result=None)  # the summary of an earlier result is out of date
    write_run(tmp_path / "stopped", result=None, report=False)
    (tmp_path / "stopped" / HOLDER).write_text("a process that was killed")
    (tmp_path / "stopped" / LOCK).touch()
    write_run(tmp_path / "deep" / "study" / "runs" / "lora" / "run")
    (tmp_path / "deep" / "study" / "compare.json").write_text('{"train": {"model": "m", "data": "d"}}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.json").write_text("{}")  # of another program
    write_run(tmp_path / "other" / "inside")
    write_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_text('{"kind": 3}')
    write_run(tmp_path / "undated")
    (tmp_path / "undated" / "summary.json").write_text('{"kind": "train", "date": "last week"}')
    write_run(tmp_path / "cut")
    (tmp_path / "cut" / "run.json").write_text('{"sett')
    expected = {"done": "finished", "old": "finished", "resumed": "interrupted", "stopped": "interrupted"}
    expected |= {"deep/study": "unfinished", "other/inside": "finished"}
    expected |= dict.fromkeys(("damaged", "undated", "cut"), "damaged")
    assert states(tmp_path) == expected
    with lock(tmp_path / "stopped"):
        assert states(tmp_path) == {**expected, "stopped": "running"}
    with FileLock(tmp_path / "deep" / "study" / LOCK):
        assert states(tmp_path) == {**expected, "deep/study": "running"}
    write_report(tmp_path / "deep" / "study", "compare", {"verdict": "Use lora.", "seconds": 9.0})
    study = record_of(tmp_path / "deep" / "study", "study")
    assert study is not None
    assert (study.state, study.summary.kind, study.summary.verdict) == ("finished", "compare", "Use lora.")
    check_refused("undated/summary.json has unexpected content", "runs", tmp_path / "undated", tmp_path / "done")
    assert "undated" in output("runs", tmp_path)
    old = record_of(tmp_path / "old", "old")
    assert old is not None
    assert (old.result, old.summary.verdict, old.summary.seconds) == ("loss 2 → 1.5", "", 80.0)
    assert check_refused("run.json is not JSON", "runs", tmp_path / "done", tmp_path / "cut")


def test_a_list_has_the_settings_that_differ_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, rate in enumerate((1e-3, 1e-4)):
        folder = write_run(tmp_path / f"{number}", learning_rate=rate, seed=3, output_dir=str(number))
        os.utime(folder / "run.json", (number, number))
        write_report(folder, "train", {**REPORT, "result": ENDED})
    listed = found("runs", tmp_path)["runs"]
    assert [run["name"] for run in listed] == ["1", "0"]  # the newest first
    assert [run["settings"] for run in listed] == [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}]
    assert (listed[0]["finding"], listed[0]["model"], listed[0]["data"]) == ("better", "m", "a.jsonl")
    monkeypatch.setenv("COLUMNS", "80")
    text = output("runs", tmp_path)
    assert max(map(len, text.splitlines())) <= 80
    assert all(
        part in text for part in ("2 runs", "right 0.1 → 0.7", "All: verdict better, model m, data a.jsonl", "1e-4")
    )


def test_500_runs_take_a_second(tmp_path: Path) -> None:
    for number in range(500):
        settings = {f"setting_{place}": (number + place) % 3 for place in range(90)}
        folder = write_run(tmp_path / f"run-{number}", report=False, **settings)
        (folder / "summary.json").write_text(
            json.dumps({"kind": "train", "date": "2026-01-01T00:00:00+00:00", **REPORT})
        )
    started = time.process_time()
    assert len(records_in(tmp_path)) == 500
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("name", "told"), [("none", "does not exist"), ("file", "is a file"), ("", "No runs in")], ids=str
)
def test_a_folder_without_runs(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if name:
        check_refused(told, "runs", tmp_path / name)
        check_refused("expected the folder of a run", "runs", tmp_path / name, tmp_path)
    else:
        assert told in output("runs", tmp_path)


def test_a_summary_is_small_and_belongs_to_its_run(tmp_path: Path) -> None:
    metrics = [{"name": f"m{number}", "before": float("nan"), "after": 1.0} for number in range(99)]
    write_run(tmp_path / "run", report=False)
    write_report(tmp_path / "run", "train", {**REPORT, "verdict": "word " * 999, "metrics": metrics, "result": ENDED})
    content = (tmp_path / "run" / "summary.json").read_bytes()
    assert SUMMARY_BYTES / 2 < len(content) <= SUMMARY_BYTES
    assert json.loads(content)["metrics"][0] == {"name": "m0", "before": None, "after": 1.0}
    write_report(tmp_path, "eval", {"seconds": 1})
    assert not (tmp_path / "summary.json").exists()
    aside = set_aside(tmp_path / "run")  # as --overwrite does
    assert aside is not None
    assert (aside / "summary.json").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_runs_are_compared_on_what_both_were_evaluated_on(tmp_path: Path) -> None:
    rng, tokens = np.random.default_rng(0), [7] * 40
    losses, right = rng.normal(2, 0.3, (2, 40)), rng.random((2, 40)) < np.array([[0.2], [0.8]])
    folders = [write_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 1e-4))]
    for number, folder in enumerate(folders):
        shown = slice(10 * number, 30 + 10 * number)  # 20 prompts in both
        prompts = [f"prompt {place}" for place in range(40)][shown]
        write_evaluations(folder, losses[number][shown], tokens[shown], right[number][shown], prompts)
    compared = found("runs", *folders)
    both = slice(10, 30)
    moved = losses[1][both] - losses[0][both]
    test = stats.ttest_rel(losses[1][both], losses[0][both])
    change = compared["loss"]["change"]
    assert change["value"] == pytest.approx(moved.mean())
    assert (change["low"], change["high"]) == pytest.approx(tuple(test.confidence_interval()), abs=1e-3)
    gained, lost = int((right[1] & ~right[0])[both].sum()), int((right[0] & ~right[1])[both].sum())
    metric = compared["metrics"]["right"]
    assert metric["flips"] == {"became_right": gained, "became_wrong": lost}
    assert metric["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert (metric["examples"], len(compared["flipped"])) == (20, gained + lost)
    assert all(row["first"].startswith("a ") and row["second"].startswith("b ") for row in compared["flipped"])
    assert compared["curves"] == [[[0, 2.0], [4, 1.5]]] * 2
    assert [run["settings"] for run in compared["runs"]] == [{"learning_rate": 1e-3}, {"learning_rate": 1e-4}]
    swapped = found("runs", *folders[::-1])
    assert swapped["loss"]["change"]["value"] == pytest.approx(-change["value"])
    text = output("runs", *folders)
    assert all(part in text for part in ("learning_rate", "second is", "Another score by right", "Held-out loss"))


@pytest.mark.parametrize("judge", ["http://a/v1 small", "http://b/v1 small"])
def test_verdicts_of_different_judges_are_not_compared(judge: str, tmp_path: Path) -> None:
    folders = []
    for name, of_run in (("a", "http://a/v1 small"), ("b", judge)):
        url, model = of_run.split()
        ended = {**ENDED, "higher_is_better": {"judge": True, "right": True}}
        folder = write_run(tmp_path / name, result=ended, metric=[f"judge:{url}", "right"], judge_model=model)
        write_evaluations(folder, [1.0] * 9, [5] * 9, [0] * 9, [f"prompt {place}" for place in range(9)])
        text = (folder / "samples.json").read_text()
        (folder / "samples.json").write_text(text.replace('{"right": 0.0}', '{"right": 0.0, "judge": 0.5}'))
        folders.append(folder)
    expected = {"right", "judge"} if judge == "http://a/v1 small" else {"right"}
    assert found("runs", *folders)["metrics"].keys() == expected


@pytest.mark.parametrize("cause", ["prompts", "tokens", "beta", "unit", "files"])
def test_losses_that_are_not_comparable_are_not_compared(cause: str, tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", beta=0.1),
        write_run(
            tmp_path / "b", beta=0.2 if cause == "beta" else 0.1, unit="x" if cause == "unit" else "nats per token"
        ),
    ]
    for number, folder in enumerate(folders):
        prompts = [f"{number if cause == 'prompts' else ''} prompt {place}" for place in range(9)]
        tokens = [5] * 8 + [6 if cause == "tokens" and number else 5]
        if cause != "files":
            write_evaluations(folder, [1.0 + number] * 9, tokens, [number] * 9, prompts)
    compared = found("runs", *folders)
    assert compared["loss"] is None
    assert ("right" in compared["metrics"]) == (cause in ("tokens", "beta", "unit"))
    assert "Results" in output("runs", *folders)
