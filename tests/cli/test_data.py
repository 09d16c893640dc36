"""`tailora data`."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import call, check_refused, found, output
from tiny_vision import save_image, save_tiny_llava

from tailora.cli.main import main
from tailora.evaluation.statistics import FEW_EXAMPLES, TOO_FEW


def test_it_shows_mapping_counts_lengths_and_share_and_without_colour_the_learned_text_in_brackets(
    chats: Path, tiny_model: Path
) -> None:
    shown = output("data", chats, "--model", tiny_model, "--validation-split", "0.25", "--rows", "1")
    assert re.search(r"read as +messages", shown)
    assert re.search(r"rows +24: 18 to train on, 6 held out", shown)
    assert re.search(r"tokens +\d+, \d+ trained \(\d+%\)", shown)
    assert re.search(r"\d+ +\d+ +#+", shown)
    assert "\x1b" not in shown
    learned = re.findall(r"\[\[(It is \w+\.<\|im_end\|>)\]\]", shown)
    assert len(learned) == 1
    assert "[[<|im_start|>user" not in shown


@pytest.mark.parametrize("no_color", [False, True])
def test_with_colour_the_learned_text_is_green_and_no_color_wins_over_force_color(
    no_color: bool, chats: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    _, shown, _ = call("data", chats, "--model", tiny_model, "--rows", 1)
    assert ("\x1b[32mIt is " in shown) == (not no_color)
    assert ("[[It is " in shown) == no_color


def test_without_a_file_it_says_that_the_data_is_the_demos(
    chats: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tailora.train.dataloader.resolve_demo", lambda *_: str(chats))
    assert main(["data", "--model", str(tiny_model), "--validation-split", "0.2"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("note: this is the demo's data; to see yours")
    assert re.search(r"^read as +messages$", shown.out, re.MULTILINE)
    assert main(["data", str(chats), "--model", str(tiny_model)]) == 0
    assert not capsys.readouterr().err


def test_a_table_of_texts_and_categories_is_recognised_as_labelled_data(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "tickets.csv"
    path.write_text("body,category\n" + "".join(f"ticket {i},{'ab'[i % 2]}\n" for i in range(8)))
    options = ["--task", "sequence-classification", "--field", "text=body", "--field", "label=category"]
    check_refused(f"For rows with labels, use {' '.join(options)}", "data", path, "--model", tiny_model)
    report = found("data", path, "--model", tiny_model, *options, "--validation-split", 0)
    assert report["labels"] == {"a": 4, "b": 4}


@pytest.mark.parametrize(("rows", "distinct", "held_out"), [(60, 20, 12), (500, 500, 25)])
def test_data_and_the_run_agree_on_what_is_enough_to_judge_by(
    tmp_path: Path, tiny_model: Path, rows: int, distinct: int, held_out: int
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i % distinct}", "completion": "a"}) + "\n" for i in range(rows)))
    shown = " ".join(output("data", path, "--model", tiny_model).partition("Next")[2].split())
    assert "--validation-split" not in shown
    kept = held_out * distinct // rows
    assert found("data", path, "--model", tiny_model)["eval"] == kept
    assert (f"It holds out {kept} examples. {TOO_FEW}" in shown) == (kept < FEW_EXAMPLES)


def test_the_next_command_repeats_the_flags(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"q{number}", "a": f"a{number}", "\ud800": 1} for number in range(8)]
    Path("my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text("r: 4\n")
    flags = ["--model", str(tiny_model), "--field", "prompt=q", "--field", "completion=a", "--validation-split", "0.3"]
    *_, command = output("data", "my rows.jsonl", *flags, "--config", "run.yaml").strip().splitlines()
    words = shlex.split(command)
    assert words[:6] == ["tailora", "train", "--data", "my rows.jsonl", "--config", "run.yaml"]
    expected = ["--model", str(tiny_model), "--field", "prompt=q,completion=a", "--validation-split", "0.3"]
    assert words[6:] == [*expected, "--output-dir", "outputs/my-rows"]


@pytest.mark.slow
def test_the_next_command_runs_as_it_stands(
    chats: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/chats", "outputs/chats-2"):  # the second would be that of an earlier run
        shown = output("data", chats.name, "--model", tiny_model)
        words = shlex.split(shown.strip().splitlines()[-1])
        assert words[-2:] == ["--output-dir", folder]
        if folder == "outputs/chats":
            assert "held-out loss after" in output(*words[1:], "--max-steps", "1")


def test_the_settings_of_what_is_learned_are_shown_and_repeated(chats: Path, tiny_model: Path) -> None:
    flags = ["--system", "be brief", "--no-assistant-only-loss"]
    shown = output("data", chats, "--model", tiny_model, "--rows", "1", *flags)
    assert "<|im_start|>[[system\nbe brief<|im_end|>\n<|im_start|>user" in shown
    assert shlex.split(shown.strip().splitlines()[-1])[-5:-2] == flags
    hint = "--completion-only-loss only applies to completions, but the data has messages rows"
    check_refused(hint, "data", chats, "--model", tiny_model, "--completion-only-loss")


def test_roles_tools_and_calls_are_counted_and_shown(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"name": "colour_of", "arguments": {"thing": 7}}
    messages = [
        {"role": "user", "content": "What colour?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "It is red.", "train": False},
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": [{"name": "colour_of", "parameters": {}}]}) + "\n")
    command = ["data", str(path), "--model", str(model), "--validation-split", "0"]
    shown = " ".join(output(*command).split())
    assert "messages 1 user, 2 assistant, 1 tool, 1 tool calls, 1 not to be trained, 1 tools" in shown
    (learned,) = re.findall(r"\[\[(.*?)\]\]", shown.partition("example 1")[2].partition("]]")[2])
    assert '"arguments": {"thing": 7}' in learned
    main(["data", str(path), "--model", str(tiny_model), "--validation-split", "0"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "tools 1 conversations have tools that the chat template does not support; the tools are written as" in shown


def test_a_mixture_is_shown_by_source(
    chats: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    notes = tmp_path / "notes, lr=2.txt"
    notes.write_text("What colour? " * 200)
    line = ["data", f"{chats}=2", notes, "--model", tiny_model, "--validation-split", 0, "--max-length", 64]
    line += ["--documents", "concatenated"]
    sources = [(part["name"], part["weight"], part["rows"]) for part in found(*line)["sources"]]
    assert sources == [(str(chats), 2, 24), (str(notes), 1, 1)]
    _, shown, _ = call(*line)
    assert f"{chats}: 24 rows (messages), 24 training examples, 48 per epoch" in shown
    words = shlex.split(shown.strip().splitlines()[-1])
    assert words[:6] == ["tailora", "train", "--data", f"{chats}=2", "--data", str(notes)]


def test_bad_rows_are_skipped_on_request_and_listed(chats: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(chats.read_text() + '{"messages": []}\n')
    check_refused("chats.jsonl:25: messages: expected a list", "data", path, "--model", tiny_model)
    code, shown, notes = call("data", path, "--model", tiny_model, "--skip-bad-rows")
    assert code == 0
    assert f"skipped {path}:25: messages: expected a list of messages, got []" in notes
    assert re.search(r"^skipped +1 rows cannot be used: chats.jsonl:25$", shown, re.MULTILINE)
    assert "--skip-bad-rows" in shown.partition("Next")[2]


def test_examples_with_images_are_shown_and_have_a_page_with_thumbnails(tmp_path: Path) -> None:
    model, report = save_tiny_llava(tmp_path / "model"), tmp_path / "report"
    save_image(tmp_path / "red.png", "red", (640, 480))
    chat = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": chat, "image": "red.png"}, {"messages": [{**chat[0], "content": "Hi"}, chat[1]]}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", file, "--model", model, "--validation-split", 0]
    shown = output(*arguments, "--output-dir", report)
    assert "[image 640x480]Which?<|im_end|>" in shown
    assert "<image>" not in shown
    page = (report / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 1
    assert "<mark>red&lt;|im_end|&gt;</mark>" in page
    described = {"name": "red.png", "width": 640, "height": 480}
    (images, none) = found(*arguments)["example_images"]
    assert {name: images[0][name] for name in described} == described
    assert none == []
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "chats.jsonl")
    flags = [moved, "--image-folder", tmp_path]
    assert found("data", *flags, "--model", model)["messages"]["images"] == 1
    check_refused("red.png: No such file", "eval", "--model", model, "--data", moved)
    assert found("eval", "--model", model, "--data", *flags)["metrics"]["loss"]
    (tmp_path / "red.png").unlink()
    output("report", report)
    assert "red.png (the file has changed)" in (report / "report.html").read_text()
    check_refused("already exists", "data", moved, "--output-dir", report)
