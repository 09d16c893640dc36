"""`tailora report`: the page of a run made again, and what a run says that cannot make one."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import call, check_refused, found

from tailora.cli.main import main
from tailora.report import files


@pytest.fixture(scope="module")
def finished(chats_text: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two steps of training."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "chats.jsonl").write_text(chats_text)
    line = f"train --model {tiny_model} --data {folder / 'chats.jsonl'} --output-dir {folder / 'run'} --max-steps 2"
    assert main([*line.split(), "--dtype", "float32", "--validation-split", "0.25", "--learning-rate", "1e-2"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def quick_figures() -> None:
    """Figures are complete here."""


@pytest.mark.slow
def test_a_page_is_made_again_of_what_the_run_left(run: Path) -> None:
    content, page = (run / "report.json").read_bytes(), (run / "report.html").read_bytes()
    for name in ("report.json", "report.html"):
        (run / name).unlink()
    assert found("report", run) == {"report": str(run / "report.html"), "data": str(run / "report.json")}
    assert (run / "report.json").read_bytes() == content
    assert (run / "report.html").read_bytes() == page


def test_the_numbers_are_those_of_the_run(run: Path) -> None:
    content = json.loads((run / "report.json").read_text())
    result = json.loads((run / "run.json").read_text())["result"]
    held = content["held_out"]
    assert content["kind"] == "train"
    assert [step["step"] for step in content["steps"]] == [1, 2]
    assert result.pop("higher_is_better") == {}
    assert {name: content["result"][name] for name in result} == result
    assert sum(held["after"]) / sum(held["tokens"]) == pytest.approx(result["eval_loss_after"])
    assert content["samples"] == json.loads((run / "samples.json").read_text())
    low, high = content["result"]["eval_loss_after_95"]
    assert low < result["eval_loss_after"] < high


def test_a_run_that_is_not_finished_has_a_page(run: Path) -> None:
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**header, "finished": False, "result": None}))
    (run / "examples.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # as a run that is writing leaves it
    code, out, _ = call("report", run)
    assert (code, out) == (0, f"{run / 'report.html'}\n")
    assert "has not finished" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "told"),
    [("none", "is not a folder; expected the output folder of a run or a study"), (".", "contains no report.json")],
)
def test_what_is_no_run_is_refused(name: str, told: str, tmp_path: Path) -> None:
    check_refused(told, "report", tmp_path / name)


def test_without_the_extra_a_command_says_how_to_get_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    assert files.write_page_if_possible(tmp_path).endswith(f"pip install 'tailora[study]' && tailora report {tmp_path}")
