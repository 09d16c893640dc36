"""`tailora runs`: the list of runs and studies, and two runs next to each other."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import call, check_refused, found, output
from filelock import FileLock

from tailora.formats.run_folder import write_report


def make_run(
    folder: Path, *, settings: dict[str, Any] | None = None, shift: float = 0.0, right: int = 4, kind: str = "train"
) -> Path:
    """A finished run on 8 held-out prompts, of which it answers the first `right` ones correctly."""
    folder.mkdir(parents=True)
    settings = {"model": "base/tiny", "data": ["a/chats.jsonl"], "r": 16, "output_dir": str(folder), **(settings or {})}
    result = {"eval_loss_before": 2.0, "eval_loss_after": 1.0 + shift, "total_seconds": 12.0, "metrics": {}}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "result": result, "diverged": False}))
    verdict = "Held-out loss went down by 1. More words."
    write_report(folder, kind, {"settings": settings, "result": result, "verdict": verdict, "run": {}})
    lines = [
        {"tokens": 2, "before": 4.0, "after": 2.0 + 2 * shift + n / 100 * shift, "text": f"t{n}"} for n in range(8)
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [
        {
            "prompt": f"p{n}",
            "reference": "r",
            "base": "x",
            "tuned": f"{folder.name} {n}",
            "after": {"tokens": 1, "is_cut": False, "scores": {"right": float(n < right)}},
        }
        for n in range(8)
    ]
    (folder / "samples.json").write_text(json.dumps(answers))
    curve = [{"step": n, "eval_loss": 2.0 - n / 4} for n in (0, 2, 4)] + [{"step": 1, "loss": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return folder


def test_runs_and_studies_are_listed_with_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make_run(tmp_path / "first")
    make_run(tmp_path / "deep" / "second", settings={"r": 8})
    study = make_run(tmp_path / "study", kind="compare")
    make_run(study / "runs" / "lora")  # not listed
    for name, content in {"unfinished": {"settings": {"r": 16}, "result": None}, "lost": {"diverged": True}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    runs = {run["name"]: run for run in found("runs", tmp_path)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "first": "finished",
        "deep/second": "finished",
        "study": "finished",
        "unfinished": "interrupted",
        "lost": "diverged",
        "broken": "damaged",
    }
    assert runs["study"]["kind"] == "compare"
    assert (runs["first"]["eval_loss_after"], runs["first"]["seconds"]) == (1.0, 12.0)
    shown = output("runs", tmp_path)
    assert max(map(len, shown.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "160")
    shown = " ".join(output("runs", tmp_path).split())
    for text in ("6 runs", "deep/second", "loss 2.000 → 1.000", "compare, finished", "r 8", "loss went down by 1"):
        assert text in shown, text
    with FileLock(tmp_path / "unfinished" / ".lock"):
        assert "running" in output("runs", tmp_path)


def test_a_run_without_a_summary_is_listed(tmp_path: Path) -> None:
    (make_run(tmp_path / "old") / "summary.json").unlink()
    (run,) = found("runs", tmp_path)["runs"]
    assert (run["state"], run["eval_loss_after"], run["settings"]["r"]) == ("finished", 1.0, 16)


def test_two_runs_are_compared_on_what_both_were_evaluated_on(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", settings={"r": 8}, shift=0.5, right=8)
    both = found("runs", first, second)
    assert both["metrics"]["right"]["value"] == 0.5
    assert [answer["prompt"] for answer in both["flipped"]] == ["p4", "p5", "p6", "p7"]
    assert both["flipped"][0] | {"first_score": 0.0, "second_score": 1.0} == both["flipped"][0]
    assert both["loss"]["value"] == pytest.approx(0.5 + 3.5 / 200 / 2)
    assert both["loss"]["finding"] == "worse"
    assert both["curves"] == [{"0": 2.0, "2": 1.5, "4": 1.0}] * 2
    shown = " ".join(output("runs", first, second).split())
    assert "r 16 8" in shown
    assert "4 answers with another score" in shown
    for path in ("samples.json", "examples.jsonl"):
        (second / path).unlink()
    assert "share no held-out examples" in output("runs", first, second)


def test_mistakes_are_named(tmp_path: Path) -> None:
    check_refused("no such folder", "runs", tmp_path / "absent")
    run = make_run(tmp_path / "run")
    check_refused(f"no run in {tmp_path}", "runs", run, tmp_path)
    (run / "examples.jsonl").write_text("{\n")
    code, _, said = call("runs", run, run)
    assert code == 2
    assert "examples.jsonl is not JSON" in " ".join(said.split())
    (tmp_path / "empty").mkdir()
    assert "No runs in" in output("runs", tmp_path / "empty")


def test_a_folder_of_many_runs_is_listed_in_a_second(tmp_path: Path) -> None:
    one = make_run(tmp_path / "0")
    content = (one / "summary.json").read_text()
    assert len(content) < 4096
    for number in range(1, 500):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "summary.json").write_text(content)
    from tailora.report.run_records import records_in

    started = time.process_time()
    assert len(records_in(tmp_path)) == 500
    assert time.process_time() - started < 1
