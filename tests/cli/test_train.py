"""`tailora train` and `tailora demo` from the command line to the files."""

import json
import re
import shlex
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, check_refused, found, output
from judge_server import KEY, fake_judge

from tailora.cli.main import main
from tailora.cli.train import first_prompt, next_commands
from tailora.data.dataset import Example, Examples
from tailora.evaluation.forgetting import KL_TOKENS, kl_texts
from tailora.formats.run_folder import ADAPTER, PASSPORT
from tailora.report.format import duration
from tailora.report.pages.train import Result, _numbers
from tailora.report.run_advice import remedy_of
from tailora.report.run_verdict import effect_of, run_verdict
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file
from tailora.train.trainer import Trainer

PROMISED = """
    output_dir steps train_tokens supervised_tokens tokens_per_second eval_loss_before eval_loss_after best_step
    trainable_parameters total_parameters peak_memory_bytes seconds
""".split()  # noqa: SIM905
FILES = "adapter samples.json metrics.jsonl run.json config.yaml examples.jsonl report.json report.html"


def training_flags(model: Path, data: Path, output_dir: Path) -> dict[str, str]:
    """Two steps of training that hold a quarter of the rows out."""
    return {
        "--model": str(model),
        "--data": str(data),
        "--output-dir": str(output_dir),
        "--max-steps": "2",
        "--validation-split": "0.25",
        "--learning-rate": "1e-2",
        "--metric-examples": "0",
    }


@pytest.fixture
def flags(chats: Path, tiny_model: Path, tmp_path: Path) -> dict[str, str]:
    return training_flags(tiny_model, chats, tmp_path / "run")


def line(flags: dict[str, str], changes: dict[str, str] | None = None, command: str = "train") -> list[str]:
    """The command line with these flags."""
    return [command, *(part for flag in {**flags, **(changes or {})}.items() for part in flag)]


@dataclass(frozen=True)
class FinishedRun:
    flags: dict[str, str]
    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def finished(tiny_model: Path, chats_text: str, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The run of `flags`, with two samples; tests leave its folder as it is."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "chats.jsonl").write_text(chats_text)
    flags = {**training_flags(tiny_model, folder / "chats.jsonl", folder / "run"), "--metric-examples": "2"}
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(line(flags)) == 0
    return FinishedRun(flags, folder / "run", out.getvalue(), err.getvalue())


@pytest.mark.slow
def test_it_ends_with_what_changed_and_what_comes_next(finished: FinishedRun) -> None:
    for part in ("held-out loss before", "perplexity", "over 6 held-out examples). These are too few", "tuned"):
        assert part in finished.out
    title, verdict = finished.out.splitlines()[:2]
    assert title.endswith(f"fine-tuned: {finished.folder}")
    assert verdict.startswith("Held-out loss went ")  # the result comes first, and once
    assert finished.out.count(verdict) == 1
    assert "step 2/2" in finished.err
    assert "18 examples, 6 held out" in " ".join(finished.err.split())
    assert {path.name for path in finished.folder.iterdir()} >= {*FILES.split()}


def test_samples_are_held_out_prompts_answered_by_both(finished: FinishedRun) -> None:
    answers = json.loads((finished.folder / "samples.json").read_text())
    samples = [sample for sample in answers if not sample["is_training"]]
    assert (len(samples), len(answers)) == (2, 20)  # as few are held out, training prompts are answered, too
    assert all(sample["prompt"].startswith("What colour is thing") for sample in samples)
    chats = [json.loads(line)["messages"] for line in Path(finished.flags["--data"]).read_text().splitlines()]
    replies = {prompt["content"]: reply["content"] for prompt, reply in chats}
    assert all(sample["reference"] == replies[sample["prompt"]] for sample in samples)
    assert f"→ {samples[0]['reference']}" in finished.out
    held_out = [json.loads(line)["messages"] for line in (finished.folder / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 6
    assert {sample["prompt"] for sample in samples} < {prompt["content"] for prompt, _ in held_out}
    assert all(message in chats for message in held_out)
    assert f"fine-tuned: {finished.folder}" in finished.out


@pytest.mark.slow
def test_the_written_config_repeats_the_run_and_its_json_is_the_only_line_on_stdout(
    finished: FinishedRun, tmp_path: Path
) -> None:
    config = finished.folder / "config.yaml"
    out = output("train", "--config", config, "--output-dir", tmp_path / "again", "--json")
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result.keys() >= {*PROMISED}
    low, high = result["eval_loss_change_95"]
    assert low <= result["eval_loss_change"] <= high
    assert result["eval_loss_change"] == pytest.approx(result["eval_loss_after"] - result["eval_loss_before"])
    first, second = (
        folder / "adapter" / "adapter_model.safetensors" for folder in (finished.folder, tmp_path / "again")
    )
    assert first.read_bytes() == second.read_bytes()
    assert read_config_file(config)["learning_rate"] == 1e-2


@pytest.mark.slow
def test_a_demo_goes_on_in_its_folder_and_does_not_replace_another(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    del flags["--output-dir"]
    assert main(line(flags, {"--save-steps": "1"}, command="demo")) == 0
    assert (tmp_path / "outputs" / "demo" / "report.json").exists()
    check_refused("outputs/demo contains an adapter", *line(flags, command="demo"))
    assert main(line(flags, {"--resume-from-checkpoint": "latest"}, command="demo")) == 0


def test_memory_that_ends_while_answers_are_compared_leaves_the_adapter(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("tailora.train.sampler.Sampler.answer", too_much)
    assert main(line(flags, {"--metric-examples": "1"})) == 1
    said = capsys.readouterr().err
    assert "out of memory while comparing answers: DefaultCPUAllocator" in said
    assert "--metric-examples 0" in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    ["report.html", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("samples.json", "report.json"))],
)
def test_a_report_that_cannot_be_written_is_a_note_and_not_a_failure(
    flags: dict[str, str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    assert main(line(flags)) == 0
    shown = capsys.readouterr()
    assert "the adapter, in PEFT format" in shown.out  # without a report, the files are shown
    assert "tailora chat" in shown.out
    assert (
        f"note: the trained weights were saved, but the report was not: cannot write {tmp_path / 'run' / name}"
        in shown.err
    )
    assert f"tailora report {tmp_path / 'run'}" in shown.err
    (tmp_path / "run" / name).rmdir()
    assert main(["report", str(tmp_path / "run")]) == 0


def test_what_was_cut_of_a_stream_is_told_at_the_end_and_that_nothing_was_held_out(flags: dict[str, str]) -> None:
    more = {"--max-length": "28", "--max-steps": "4", "--per-device-train-batch-size": "8", "--validation-split": "0"}
    code, shown, told = call(*line(flags, more), "--streaming")  # 32 examples: more than the 24 there are
    assert code == 0
    assert re.search(r"note: \d+ of 24 streamed rows were longer than --max-length 28 and truncated", told)
    assert "without held-out data: use --eval-data FILE" in shown


@pytest.mark.parametrize(
    ("more", "hint"),
    [([], "contains an adapter of an earlier run"), (["--overwrite"], "no run.json from a tailora run")],
)
def test_a_taken_folder_is_refused_before_torch_is_loaded(
    flags: dict[str, str], more: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    monkeypatch.setattr("tailora.cli.train.run_progress", pytest.fail)  # torch is loaded within it
    check_refused(hint, *line(flags), *more)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_printed_command_goes_on(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    class InterruptedAtFirstStep(StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step 1/"):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    with redirect_stderr(InterruptedAtFirstStep()) as err:
        assert main([*line(flags, {"--max-steps": "4"}), "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 130
    assert "step 4/4" not in err.getvalue()
    words = err.getvalue().splitlines()[-1].split()
    assert words[:2] == ["tailora", "train"]
    assert words[-2] == "--resume-from-checkpoint"
    assert found(*words[1:])["steps"] == 4


def test_what_comes_next_fits_the_run(finished: FinishedRun) -> None:
    _, _, following = finished.out.partition("\nNext\n")
    folder = str(finished.folder)
    prompt = json.loads((finished.folder / "samples.json").read_text())[0]["prompt"]
    assert [shlex.split(line) for line in following.splitlines() if line] == [
        ["tailora", "chat", "--adapter", folder],
        ["tailora", "predict", folder, "--prompt", prompt],
        ["tailora", "eval", folder, "--data", f"{folder}/held_out.jsonl"],
        ["tailora", "export", folder, "--to", "llama-server", "--output", f"{folder}-llama"],
    ]


@pytest.mark.slow
def test_without_samples_nothing_is_said_of_answers_but_of_time_and_memory(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tailora.train.memory.peak_bytes", lambda _: 10**12)  # at the end of the command
    started = time.monotonic()
    assert main(line(flags)) == 0  # with --metric-examples 0
    waited = time.monotonic() - started
    shown = capsys.readouterr().out
    assert "nswers" not in shown
    assert "samples.json" not in shown
    assert "Answers before and after" not in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "samples.json").exists()
    assert not (tmp_path / "run" / ADAPTER / PASSPORT).exists()
    result = json.loads((tmp_path / "run" / "report.json").read_text())["result"]
    assert result["peak_memory_bytes"] == 10**12
    assert result["seconds"] < result["total_seconds"] < waited  # the second is the wait of the user, but for the page
    assert re.search(rf"^time +{duration(result['total_seconds'])} +.* in training steps", shown, re.MULTILINE)


def test_a_run_that_made_the_model_worse_says_so_and_what_to_try(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def after_a_better_base(trainer: Trainer, *arguments: Any, result: Any = Trainer.result) -> Any:
        before = trainer.state.before
        assert before is not None
        trainer.state.before = replace(before, sums=before.sums / 2)
        return result(trainer, *arguments)

    monkeypatch.setattr(Trainer, "result", after_a_better_base)
    assert main(line(flags)) == 5
    shown = capsys.readouterr().out
    verdict = "Worse than before training. Held-out loss went UP by"
    assert f"\n{verdict}" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["verdict"].startswith(verdict)
    assert " ".join(report["remedy"]) in report["verdict"]
    again = ["tailora", "train", "--config", str(tmp_path / "run" / "config.yaml"), *report["remedy"]]
    assert shown.split("Next")[1].split("\n\n")[0].split() == [*again, "--output-dir", str(tmp_path / "run-better")]


@pytest.mark.parametrize(
    ("losses", "method", "rate", "flags", "cause"),
    [
        ([4.0, 9.0, 9.0], "lora", 2.0, ["--learning-rate", "5e-4"], "the learning rate 2 is too high"),
        ([4.0, 9.0, 9.0], "full", 1e-4, ["--learning-rate", "1e-5"], "is too high"),
        ([4.0, 9.0, 9.0], "full", 1e-2, ["--learning-rate", "5e-5"], "is too high"),
        ([4.0, *[3.0] * 39], "lora", 1e-3, ["--eval-steps", "4"], "the model overfits"),
    ],
)
def test_what_to_try_after_a_run_that_made_the_model_worse(
    losses: list[float], method: str, rate: float, flags: list[str], cause: str
) -> None:
    text, found = remedy_of({"learning_rate": rate, "method": method}, losses)
    assert found == flags
    assert cause in text
    assert " ".join(flags) in text


def test_the_time_in_steps_of_a_resumed_run_is_no_part_of_its_last_command() -> None:
    numbers = {"eval_loss_before": None, "eval_loss_after": None, "best_step": 2, "peak_memory_bytes": 10**9}
    counts = {"steps": 2, "train_tokens": 3850, "trainable_parameters": 1, "total_parameters": 2}
    result = Result(**counts, **numbers, tokens_per_second=100.0, seconds=30.0, total_seconds=36.4)
    whole, resumed = (_numbers(result, "nats per token", is_resumed=flag)[1] for flag in (False, True))
    assert (whole.value, whole.note) == ("36.4 s", "38.5 s of it in training steps, 100 tokens/s")
    assert resumed.note == "since it was resumed; in total 38.5 s in training steps, 100 tokens/s"


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        ((1.2, 1.1, 1.1, 1.3, 1.2, 1.2), True),
        ((1.2, 1.1, 1.1, 1.3, 1.2), False),  # too few
        ((0.9, 1.1, 1.1, 1.3, 1.2, 0.9), False),
        ((0.8, 0.9, 0.8, 0.9, 0.8, 0.8), False),
    ],
)
def test_the_verdict_is_worse_if_it_is_not_chance(after: tuple[float, ...], worse: bool) -> None:
    effect = effect_of({}, [{"before": 1.0, "after": loss, "tokens": 1} for loss in after], [], {})
    result = {"eval_loss_before": 1.0, "eval_loss_after": float(np.mean(after))}
    verdict = run_verdict({}, {"learning_rate": 1e-3}, result, [{"loss": 1.0}], effect)
    assert verdict.text.startswith("Worse than before training.") == bool(verdict.remedy) == worse
    assert (verdict.finding == "worse") == worse


def test_a_long_prompt_is_shortened_to_one_line(tmp_path: Path) -> None:
    assert first_prompt(tmp_path) == "Hello!"
    for prompt, shown in {
        "it's\n two": "it's two",
        "word " * 40: "word " * 11 + "word",
        "x" * 90: "x" * 60,
        "[image]a": "a",
    }.items():
        (tmp_path / "samples.json").write_text(json.dumps([{"prompt": prompt, "base": "", "tuned": ""}]))
        assert first_prompt(tmp_path) == shown


def test_next_commands_name_the_held_out_data_and_its_columns(tmp_path: Path) -> None:
    columns = {"prompt": "my question", "completion": "answer"}
    settings = {"data": "a.jsonl", "eval_data": "b.jsonl", "field": columns, "learning_rate": 1e-4}
    commands = next_commands(TrainConfig(**settings), tmp_path)
    assert commands[2][3:] == ["--data", "b.jsonl"]  # eval finds the columns in the run
    commands = next_commands(TrainConfig(**settings, method="full"), tmp_path)
    assert commands[2][-3:] == ["b.jsonl", "--field", "prompt=my question,completion=answer"]
    full = next_commands(TrainConfig(method="full", learning_rate=1e-4), tmp_path)
    assert full[0] == ["tailora", "chat", "--model", str(tmp_path / "model")]
    assert full[2] == ["tailora", "eval", "--model", str(tmp_path / "model"), "--data", "HELD_OUT.jsonl"]
    assert full[3] == ["tailora", "data", "YOUR_DATA.jsonl", "--model", "demo"]
    for method, knows in (
        ("lora", [False, False, False]),
        ("full", [False, False, True]),
    ):  # it is stored with what was trained; eval reads it of an adapter's run
        commands = next_commands(TrainConfig(method=method, learning_rate=1e-4, system="be brief"), tmp_path)
        assert ["be brief" in command for command in commands[:3]] == knows
    config = TrainConfig(data="a.jsonl", image_folder="images")
    assert next_commands(config, tmp_path)[2][-2:] == ["--image-folder", "images"]


def test_an_adapter_of_a_model_for_images_is_merged_because_servers_do_not_load_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"parts": ["language model"]}))
    commands = next_commands(TrainConfig(data="a.jsonl"), tmp_path)
    assert commands[3] == ["tailora", "export", str(tmp_path), "--to", "merged", "--output", f"{tmp_path}-merged"]


@pytest.mark.parametrize("length", [7, 5000])
def test_kl_is_measured_on_few_tokens(length: int) -> None:
    """Their log-probabilities of a vocabulary of 150,000 would take 10 GB with 16 conversations of 1,024 tokens."""
    ids = np.arange(length, dtype=np.int32)
    texts = kl_texts(Examples.of([Example.of_text(ids)] * 20))
    assert sum(map(len, texts)) == min(KL_TOKENS, 16 * length)
    assert texts[0] == ids[:KL_TOKENS].tolist()


@pytest.mark.parametrize(
    ("settings", "commands"),
    [
        ({"task": "seq2seq", "data": "a.jsonl"}, ["predict", "eval", "predict"]),
        ({"task": "grpo", "reward": ["math"]}, ["chat", "predict", "export", "data"]),
    ],
)
def test_what_comes_next_fits_the_task(settings: dict[str, Any], commands: list[str], tmp_path: Path) -> None:
    assert [command[1] for command in next_commands(TrainConfig(**settings), tmp_path)] == commands


METRICS = """
def needs_level(completions, level, **kwargs):
    return [1.0] * len(completions)

def raises(completions, **kwargs):
    raise ValueError("no idea")

def fails_later(completions, answer, **kwargs):
    if all(chat[0]["content"] == right for chat, right in zip(completions, answer)):
        return [1.0] * len(completions)  # in the trial on replies of the data
    raise ValueError("no idea")
"""


@pytest.mark.parametrize(
    ("metric", "more", "hint"),
    [
        ("needs_level", {}, "it needs level, but the rows have no such column"),
        ("raises", {}, "ValueError: no idea"),
        (
            "raises",
            {"--validation-split": "0"},
            "but there are none; use --eval-data FILE",
        ),
        ("absent", {}, "m.py has no function 'absent'"),
    ],
)
def test_metrics_are_tried_before_the_model_is_loaded(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, more: dict[str, str], hint: str
) -> None:
    (tmp_path / "m.py").write_text(METRICS)
    monkeypatch.setattr("tailora.train.setup.load_base", None)
    check_refused(hint, *line(flags, {"--metric": f"{tmp_path}/m.py:{metric}", **more}))


def test_a_metric_that_fails_on_an_answer_leaves_the_run_without_a_verdict(
    flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.py").write_text(METRICS)
    assert main(line(flags, {"--metric": f"{tmp_path}/m.py:fails_later", "--metric-examples": "2"})) == 0
    shown = capsys.readouterr()
    assert "the answers have no scores: metric" in shown.err
    assert "Cannot tell: the answers have no scores by the metrics." in " ".join(shown.out.split())


def test_a_judge_decides_the_verdict_and_its_key_is_in_no_file(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags |= {"--judge-model": "fake", "--metric-examples": "2"}
    with fake_judge(monkeypatch) as server:
        flags["--metric"] = f"judge:{server.url}"
        assert main([*line(flags), "--json"]) == 0
        shown = capsys.readouterr()
        result, sent = json.loads(shown.out.splitlines()[-1]), len(server.requests)
        check_refused("a judge never chooses settings", *line(flags, command="search"))
    metric = result["metrics"]["judge"]
    assert (metric["before"], metric["after"], metric["order_changed"]) == (0.5, 0.5, 1.0)  # it says A
    assert result["judge"] == {"requests": sent - 1, "cached": 0}
    assert result["verdict"].startswith(
        "Cannot tell: the judge preferred the tuned answers to 50% of 2 held-out prompts"
    )
    assert "one request now" in shown.err
    assert f"sending {sent - 1} requests with prompts and answers" in shown.err
    assert KEY not in shown.out + shown.err
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
