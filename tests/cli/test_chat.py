"""`tailora chat`, and what `tailora predict` answers."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, check_refused, found, save_random_adapter
from transformers import LlamaForCausalLM

from tailora.cli.main import main
from tailora.cli.models import load_model, parse_adapters
from tailora.errors import ConfigError
from tailora.formats.run_folder import write_system_message
from tailora.train.generate import stream_reply


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `run` whose adapter changes what the model says."""
    run = tmp_path_factory.mktemp("chat") / "run"
    save_random_adapter(run / "adapter", tiny_model, std=0.2, lora_alpha=64)
    return run


def talk(lines: list[str], tokens: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--temperature", "0", "--max-new-tokens", "6", *tokens])


def test_replies_go_to_stdout_and_switching_changes_them(
    tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["hello", "/reset", "/adapter run 0", "hello", "/reset", "/adapter run", "hello"]
    assert talk(steps, ["--model", str(tiny_model), "--adapter", str(adapter)], monkeypatch) == 0
    shown = capsys.readouterr()
    tuned, base, back = shown.out.split("\n")[:3]
    assert base != tuned == back
    assert "adapter run at 0" in shown.err


def test_base_answers_with_and_without_the_adapter_and_the_conversation_goes_on_with_it(
    tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ["--model", str(tiny_model), "--adapter", str(adapter)]

    def answers(*lines: str) -> list[str]:
        assert talk([*lines], tokens, monkeypatch) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    first, second, third = answers("hello", "which colour?", "hello")
    base = answers("/adapter run 0", "hello")[0]
    assert answers("hello", "/base", "which colour?", "hello") == [first, first, base, second, third]


MISTAKES = {
    "/adapter rum": "did you mean run",
    "/adapter": "available: run",
    "/adapter run nan": "STRENGTH: expected one number such as 0.7",
    "/adapter run 1 2": "STRENGTH: expected one number such as 0.7",
    "/adpater run": "did you mean /adapter",
    "/help": "/base",
    "/base": "/base answers the last message again; send a message first",
}


def test_a_mistaken_command_is_told_and_the_chat_goes_on(
    tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk([*MISTAKES, "hello"], ["--model", str(tiny_model), "--adapter", str(adapter)], monkeypatch) == 0
    shown = capsys.readouterr()
    assert [hint for hint in MISTAKES.values() if hint not in shown.err] == []
    assert shown.out.strip()


def test_a_message_that_cannot_be_answered_is_dropped_and_the_chat_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(["hello", "x" * 600, "hello"], ["--model", str(tiny_model)], monkeypatch) == 0
    shown = capsys.readouterr()
    assert "too many for this model to respond" in shown.err
    assert "/reset" in shown.err
    assert talk(["hello", "hello"], ["--model", str(tiny_model)], monkeypatch) == 0
    assert shown.out == capsys.readouterr().out


def test_a_chat_goes_on_when_memory_ends(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, fails = LlamaForCausalLM.generate, iter([True, False])

    def once_too_much(*arguments: Any, **named: Any) -> Any:
        if next(fails):
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        return generate(*arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", once_too_much)
    assert talk(["hello", "hello"], ["--model", str(tiny_model)], monkeypatch) == 0
    shown = capsys.readouterr()
    assert "out of memory while answering: DefaultCPUAllocator" in shown.err
    assert "--max-new-tokens" in shown.err
    assert len(shown.out.splitlines()) == 1


def test_the_chat_ends_before_the_rest_is_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(["/base", "/exit", "hello"], ["--model", str(tiny_model)], monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no adapter is loaded; restart with --adapter FOLDER" in shown.err


def test_predict_answers_every_prompt_in_order(tiny_model: Path, adapter: Path) -> None:
    tokens = ["predict", "--model", tiny_model, "--max-new-tokens", "4", "--prompt", "a", "--prompt", "b"]
    tuned = found(*tokens, "--adapter", f"mine={adapter}")
    assert tuned["adapters"] == ["mine"]
    assert [row["prompt"] for row in tuned["predictions"]] == ["a", "b"]
    assert found("predict", adapter, *tokens[1:])["predictions"] == tuned["predictions"]
    assert found(*tokens)["predictions"] != tuned["predictions"]
    assert call(*tokens, "--adapter", adapter)[1].splitlines() == [row["answer"] for row in tuned["predictions"]]


@pytest.mark.parametrize(
    ("piped", "tokens", "prompts"),
    [
        ("two\nlines\n", ["--prompt", "-"], ["two\nlines"]),
        ("two\n\nlines\n", ["-"], ["two", "lines"]),
        ('{"prompt": "a"}\n{"prompt": "b", "id": 3}\n', ["--data", "-"], ["a", "b"]),
    ],
)
def test_predict_reads_stdin(
    piped: str, tokens: list[str], prompts: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    predictions = found("predict", tiny_model, *tokens, "--max-new-tokens", 4)["predictions"]
    assert [row["prompt"] for row in predictions] == prompts


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        (["--adapter", "RUN", "--adapter", "RUN"], "two adapters are named run"),
        (["RUN", "--data", "x.jsonl"], "--prompt and --data x.jsonl cannot be combined"),
        (["--temperature", "-1"], "--temperature. Must be >= 0"),
        (["--seed", str(2**70)], "--seed. Must be < "),
        (["--system", "be brief", "--ignore-chat-template"], "--system needs the chat template"),
    ],
)
def test_mistakes_of_predict_exit_with_2(tokens: list[str], hint: str, tiny_model: Path, adapter: Path) -> None:
    given = [adapter if token == "RUN" else token for token in tokens]
    check_refused(hint, "predict", *given, "--model", tiny_model, "--prompt", "a")


def test_an_adapter_is_called_as_asked_or_as_its_run(adapter: Path, tmp_path: Path) -> None:
    inside = adapter / "adapter"
    assert parse_adapters([str(adapter)]) == {"run": inside}
    assert parse_adapters([str(inside)]) == {"run": inside}
    assert parse_adapters([f"law={inside}"]) == {"law": inside}
    (tmp_path / "a=b").mkdir()
    assert parse_adapters([str(tmp_path / "a=b")]) == {"a=b": tmp_path / "a=b"}
    with pytest.raises(ConfigError, match="2 problems"):
        parse_adapters(["nowhere", "x=nowhere"])


def test_the_system_message_of_the_training_is_used_and_said(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        shutil.copytree(adapter, folder)
    write_system_message(run / "adapter", "be brief\nand kind")
    model = ["--model", str(tiny_model), "--adapter"]
    tokens = ["predict", *model, str(run), "--max-new-tokens", "6", "--prompt", "hello"]
    asked, without = (call(*tokens, "--system", text)[1] for text in ("be brief\nand kind", ""))
    code, answer, err = call(*tokens)
    assert (code, answer) == (0, asked)
    assert answer != without
    assert "run uses its system message from training: be brief and kind" in err
    assert "system message" not in call(*tokens, "--ignore-chat-template")[2]
    chat = [*model, str(run), "--adapter", str(other)]
    assert (
        talk(["hello", "/reset", "/adapter other", "hello", "/reset", "/adapter run", "hello"], chat, monkeypatch) == 0
    )
    assert capsys.readouterr().out == asked + without + asked
    code, answer, err = call(*tokens, "--adapter", str(other))
    assert "different system messages, so none is used" in err
    (run / "adapter" / "system_message.txt").write_bytes(b"\xff")
    assert "save it as UTF-8 text" in call(*tokens)[2]


def test_a_system_message_that_was_not_stored_is_reported(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run")
    tokens = ["predict", "--model", tiny_model, "--adapter", tmp_path / "run", "--max-new-tokens", 2, "--prompt", "x"]
    for count in (5, 0):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"data": {"messages": {"user": 5, "system": count}}}))
        assert ("have different system messages" in call(*tokens)[2]) == bool(count)


def test_predict_continues_a_text_without_the_chat_template(tiny_model: Path) -> None:
    tokens = ["predict", "--model", tiny_model, "--max-new-tokens", 6, "--prompt", "hello"]
    _, answer, _ = call(*tokens, "--ignore-chat-template")
    loaded = load_model(str(tiny_model), {})
    assert answer == "".join(stream_reply(loaded.model, loaded.tokenizer, "hello", max_new_tokens=6)) + "\n"
    assert call(*tokens)[1] != answer


def test_prompts_of_a_file_are_answered_into_a_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello\n\nwhat colour?\n")
    output = tmp_path / "out" / "answers.jsonl"
    tokens = ["predict", "--model", tiny_model, "--max-new-tokens", 4]
    to_file = [*tokens, "--data", tmp_path / "prompts.txt", "--output", output]
    code, out, err = call(*to_file)
    assert (code, out) == (0, "")
    assert f"2 predictions written to {output}" in err
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in written] == ["hello", "what colour?"]
    prompts = found(*tokens, "--prompt", "hello", "--prompt", "what colour?")["predictions"]
    assert [row["answer"] for row in written] == [row["answer"] for row in prompts]
    check_refused("already exists; use a different file, or --overwrite", *to_file)
    assert call(*to_file, "--overwrite")[0] == 0
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.txt", b"\n \n", "no rows to predict"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "not JSON"),
        ("absent.txt", None, "absent.txt: no such file"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_before_the_model_is_loaded(
    name: str, content: bytes | None, hint: str, tiny_model: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "new" / "answers.jsonl"
    check_refused(hint, "predict", "--model", tiny_model, "--data", tmp_path / name, "--output", output)
    assert not output.parent.exists()


def test_answers_so_far_stay_in_a_partial_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = torch.OutOfMemoryError("CUDA out of memory")
    generate, calls = LlamaForCausalLM.generate, iter([None, None, KeyboardInterrupt(), memory])

    def fails_later(*arguments: Any, **named: Any) -> Any:
        if (problem := next(calls, None)) is not None:
            raise problem
        return generate(*arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails_later)
    output = tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    prompts = [part for text in "abc" for part in ("--prompt", text)]
    tokens = ["predict", "--model", str(tiny_model), "--max-new-tokens", "4", *prompts, "--output", str(output)]
    assert main(tokens) == 130
    said = capsys.readouterr().err
    assert f"the answers so far are in {partial}" in said
    assert "Traceback" not in said
    assert [json.loads(line)["prompt"] for line in partial.read_text().splitlines()] == ["a", "b"]
    check_refused(f"{partial} already exists; use a different file, or --overwrite", *tokens)
    assert main([*tokens, "--overwrite"]) == 1  # the first prompt fails: there is nothing to keep
    assert list(tmp_path.iterdir()) == []
    assert main(tokens) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
