"""What a run shows while it goes on."""

import io
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tailora.cli.main import note, stderr
from tailora.cli.progress import StepCounter, counter, format_header, run_progress
from tailora.data.dataset import WARNINGS
from tailora.train.events import Evaluated, EvaluationProgress, Event, Note, Stepped

NOTHING_DROPPED = {**dict.fromkeys(WARNINGS, 0), "split_examples": 9000}
HEADER: dict[str, Any] = {
    "settings": {
        "model": "m",
        "data": "a.jsonl",
        "method": "lora",
        "dtype": "auto",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "streaming": False,
    },
    "data": {"train": 90, "eval": 10, "shape": "messages", **NOTHING_DROPPED},
    "device": "cuda:0",
    "device_name": "NVIDIA T4",
    "dtype": "bfloat16",
    "packed": True,
    "kernels": "decoder layers: those of transformers, because --fast off asks for them; "
    "attention: torch's SDPA for each document; loss: from the model's own logits",
    "processes": 1,
    "adapted_layers": 210,
    "trainable_parameters": 1_000_000,
    "total_parameters": 100_000_000,
    "max_steps": 12,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int) -> Stepped:
    counts = {"tokens": 100, "supervised_tokens": 40, "memory_bytes": 2_000_000_000}
    speed = {"seconds": 0.1, "tokens_per_second": 1234.0, "eta_seconds": 75.0}
    return Stepped(step=number, max_steps=50, loss=3.25, learning_rate=1e-3, grad_norm=1.0, **counts, **speed)


def shown_by(file: io.StringIO, events: list[Event]) -> str:
    with run_progress(Console(file=file, width=120)) as listener:
        for event in events:
            listener(event)
    return file.getvalue()


def test_without_a_terminal_quick_steps_share_a_line() -> None:
    text = shown_by(io.StringIO(), [step(number) for number in range(1, 51)])
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/50  loss 3.250  1,234 tokens/s  ETA 0:01:15  memory 2.00 GB"
    assert lines[1:] == [lines[0].replace("step 1/", "step 50/")]
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_and_a_pipe_with_forced_colour_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[2K" not in shown_by(io.StringIO(), [step(1), step(50)])
    text = shown_by(Terminal(), [step(1), step(49)])
    assert "\x1b[2K" in text
    assert "ETA 0:01:15" in text


def test_evaluations_and_notes_are_always_shown() -> None:
    text = shown_by(io.StringIO(), [Evaluated(step=7, loss=3.5, seconds=1.0, best=True), Note("padded, because")])
    assert "held-out loss after step 7: 3.5000 (best so far)" in text
    assert "note: padded, because" in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {},
            [
                "model m, 99M parameters, bfloat16 device cuda:0, NVIDIA T4",
                "210 layers, 1,000,000 trainable parameters (1.00%)",
                "data a.jsonl: 90 examples, 10 held out; format: messages",
                "12 steps of 8 examples",
            ],
        ),
        ({"settings": {**HEADER["settings"], "model": "demo"}}, ["model demo (SmolLM2-135M-Instruct), 99M"]),
        ({"settings": {**HEADER["settings"], "data": ["a.jsonl", "b.txt=2"]}}, ["data a.jsonl, b.txt=2: 90 examples"]),
        ({"processes": 2, "max_steps": 1, "start": "pissa"}, ["init pissa", "1 step of 16 examples"]),
        ({"data": None}, ["a.jsonl: streamed, none held out"]),
        (
            {"data": {**HEADER["data"], "eval_copies": 4}},
            ["10 held out; format", "copies 4 held-out rows are duplicates and are evaluated only once"],
        ),
    ],
)
def test_the_header_shows_what_is_trained_on_what(changes: dict[str, object], parts: list[str]) -> None:
    shown = " ".join(format_header({**HEADER, **changes}).split())
    assert [part for part in parts if part not in shown] == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "precision bfloat16, the fastest dtype on this machine"),
        ({"settings": {**HEADER["settings"], "dtype": "bfloat16"}}, "bfloat16, set by --dtype"),
        ({"packed": False}, "batches padded"),
        ({"kernels": HEADER["kernels"].replace("asks for them", "does; so")}, "because --fast off does; so attention"),
    ],
)
def test_only_a_verbose_header_shows_how_it_is_computed(changes: dict[str, object], part: str) -> None:
    header = {**HEADER, **changes}
    assert part in " ".join(format_header(header, verbose=True).split())
    assert part not in " ".join(format_header(header).split())


def test_the_header_has_a_line_for_what_was_dropped_and_for_nothing_else() -> None:
    counts = {"truncated": 1234, "split_rows": 12, "duplicates": 5}
    dropped = {**HEADER, "data": {**HEADER["data"], **counts}}
    before, after = (
        [" ".join(each.split()) for each in format_header(header).splitlines()] for header in (HEADER, dropped)
    )
    added = [each for each in after if each not in before]
    assert len(added) == len(after) - len(before) == 3
    for line in (
        "truncated 1,234 examples are longer than --max-length",
        "split 12 conversations became 9,000 examples",
        "LEAKAGE 5 held-out rows are also in the training data",
    ):
        assert any(each.startswith(line) for each in added)


def test_the_header_says_what_an_epoch_has_of_each_source() -> None:
    source = {"name": "a.jsonl", "weight": 2, "shape": "messages", "rows": 60, "train": 50, "eval": 10, "epoch": 100}
    several = {**HEADER["data"], "sources": [source, {**source, "name": "b.txt", "weight": 1, "epoch": 50}]}
    text = " ".join(format_header({**HEADER, "data": several}).split())
    assert "sources a.jsonl: 60 rows (messages), 50 training examples, 100 per epoch; b.txt: 60 rows" in text
    one = {**HEADER["data"], "sources": [{**source, "weight": 1}]}
    assert format_header({**HEADER, "data": one}) == format_header(HEADER)


def test_the_header_breaks_lines_between_words_only() -> None:
    lines = format_header(HEADER, 60, verbose=True).splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == " ".join(format_header(HEADER, 1000, verbose=True).split())
    assert [line.split()[0] for line in lines if not line.startswith(" ")][-3:] == ["decoder", "attention", "loss"]


def test_streamed_data_is_not_counted_though_the_held_out_is() -> None:
    data = {**HEADER["data"], "duplicates": 10}
    text = format_header({**HEADER, "data": data, "settings": {**HEADER["settings"], "streaming": True}})
    assert "streamed, 10 held out" in text
    assert "LEAKAGE" not in text


def test_a_note_stands_above_the_bar_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    with counter(stderr(), "rows") as progress:
        progress(1, 2)
        console = stderr()
        note("choices are computed one by one")
    assert stderr() is not console
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\r\x1b\[2K(\x1b\[[\d;]*m)*note: choices are computed", text)  # the bar is erased before the note


@pytest.mark.parametrize(("file", "is_drawn"), [(Terminal(), True), (io.StringIO(), False)])
def test_an_evaluation_has_a_bar_of_its_own_on_a_terminal(file: io.StringIO, is_drawn: bool) -> None:
    shown = shown_by(file, [EvaluationProgress(30, 90), EvaluationProgress(90, 90)])
    assert ("held-out examples" in shown) == is_drawn
    assert ("90 of 90" in shown) == is_drawn


def test_after_the_last_step_the_bar_says_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.cli.progress.SECONDS_BETWEEN_LINES", 0)
    said = "training finished; evaluating and saving"
    step = Stepped(11, 12, 2.0, 1e-3, 1.0, 8, 8, 1.0, 8.0, 1.0, 10**9)
    assert said not in shown_by(io.StringIO(), [step])
    assert said in shown_by(io.StringIO(), [replace(step, step=12)])


def test_elsewhere_long_work_says_how_far_it_is_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = iter([0.0, 9.0, 11.0, 11.0, 12.0, 22.0, 22.0]), io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr("tailora.cli.progress.SECONDS_BETWEEN_LINES", 10)
        patched.setattr("tailora.cli.progress.monotonic", now.__next__)
        with counter(Console(file=file), "answers") as progress:
            for done in range(1, 5):
                progress(done, 6)
    assert file.getvalue() == "2 of 6 answers\n4 of 6 answers\n"
    monkeypatch.setattr("tailora.cli.progress.SECONDS_BETWEEN_LINES", 0)
    file = io.StringIO()
    assert "30 of 90 held-out examples" in shown_by(file, [EvaluationProgress(30, 90)])


def test_a_trial_that_has_failed_leaves_the_line() -> None:
    file = Terminal()
    progress = StepCounter(Console(file=file, width=120, no_color=True, highlight=False), workers=2)
    progress.step(3, 9, "loss 2.500", worker=1)
    progress.step(1, 9, "loss 3.500", worker=2)
    assert "1: step 3/9  loss 2.500   2: step 1/9  loss 3.500" in file.getvalue().split("\r")[-2]
    progress.end(worker=1)
    assert "  2: step 1/9  loss 3.500" in file.getvalue().split("\r")[-2]
    assert "step 3/9" not in file.getvalue().split("\r")[-2]
