"""Prompts for reinforcement learning, and what is shown of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import CHATML
from transformers import PreTrainedTokenizerFast

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.prepare import prepare, read_eval_data
from tailora.data.readers import Source
from tailora.errors import DataError
from tailora.report.pages.data import facts_of
from tailora.train.generate import prompt_of

SETTINGS = DataSettings(task="grpo")
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


@pytest.mark.parametrize(
    ("template", "row"), [(CHATML, {"messages": CHAT}), (CHATML, {"prompt": "one"}), (None, {"prompt": "one two"})]
)
def test_answers_before_and_after_training_get_the_tokens_of_the_prompt(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast],
    template: str | None,
    row: dict[str, object],
    tmp_path: Path,
) -> None:
    """Also if the prompt contains earlier replies, or the tokenizer has no chat template."""
    file, tokenizer = tmp_path / "prompts.jsonl", bytes_tokenizer(template)
    file.write_text(json.dumps(row) + "\n")
    (prompt,) = prepare(str(file), tokenizer, SETTINGS, eval_source=str(file)).eval_samples
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    assert prompt_of(model, prompt.chat, tokenizer).ids == prompt.ids


def test_held_out_prompts_that_are_also_trained_on_are_counted(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    for name, words in (("train", ["one", "two"]), ("more", ["three"]), ("held_out", ["two", "four"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{word}"}}\n' for word in words))
    sources = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("train", "more")]
    report = prepare(sources, bytes_tokenizer(CHATML), SETTINGS, eval_source=str(tmp_path / "held_out.jsonl")).report
    assert (report.flagged["duplicates"], report.train, report.eval) == (1, 3, 2)
    assert report.rows_of["duplicates"][0].endswith("held_out.jsonl:1")
    assert [Path(source.name).stem for source in report.sources] == ["train", "more"]


def test_prompts_with_other_columns_for_rewards_are_different_rows(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """But they stay on one side of the split."""
    file, tokenizer = tmp_path / "prompts.jsonl", bytes_tokenizer(CHATML)
    rows = [{"prompt": f"Say {i // 2}", "wanted": str(i)} for i in range(20)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, *rows[:3]]))
    data = prepare(str(file), tokenizer, replace(SETTINGS, validation_split=0.5))
    wanted = [{str(prompt.columns["wanted"]) for prompt in side} for side in (data.prompts, data.eval_samples)]
    assert wanted[0] | wanted[1] == {row["wanted"] for row in rows}
    assert not {int(name) // 2 for name in wanted[0]} & {int(name) // 2 for name in wanted[1]}
    assert len(data.eval_samples) == len(data.eval) == data.report.eval == len(wanted[1])
    flagged = data.report.flagged
    assert (flagged["repeated"] + flagged["eval_copies"], flagged["duplicates"]) == (3, 0)
    (tmp_path / "other.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "wanted": "x"}))
    report = prepare(str(file), tokenizer, SETTINGS, eval_source=str(tmp_path / "other.jsonl")).report
    assert (report.eval, report.flagged["duplicates"]) == (2, 1)


@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize("kind", ["completion", "chat", "choices", "preference"])
def test_an_evaluation_knows_the_prompts_of_reinforcement_learning(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], as_chat: bool, kind: str, tmp_path: Path
) -> None:
    def message(text: str, role: str = "user") -> dict[str, str]:
        return {"role": role, "content": text}

    def row(text: str) -> dict[str, object]:
        return {
            "completion": {"prompt": text, "completion": "ok"},
            "chat": {"messages": [message(text), message("ok", "assistant")]},
            "choices": {"prompt": text, "choices": ["yes", "no"], "answer": 0},
            "preference": {"prompt": text, "chosen": "yes", "rejected": "no"},
        }[kind]

    prompts, other, tokenizer = tmp_path / "prompts.jsonl", tmp_path / "other.jsonl", bytes_tokenizer(CHATML)
    rows = [{"prompt": [message(f"Say {i}")] if as_chat else f"Say {i}", "answer": i} for i in range(6)]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = prepare(str(prompts), tokenizer, replace(SETTINGS, validation_split=0.0))
    other.write_text("".join(f"{json.dumps(row(text))}\n" for text in ("Say 3", "Say 5", "Say 7")))
    chat_tokenizer = ChatTokenizer.of(tokenizer, DataSettings(for_evaluation=True))
    report, _ = read_eval_data(str(other), chat_tokenizer, trained_rows=data.trained_rows)
    assert report.trained_on == 2


@pytest.mark.parametrize(("field", "read_as"), [({}, "prompts (prompt)"), ({"prompt": "q"}, "prompts (prompt = q)")])
def test_columns_for_rewards_are_shown(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], field: dict[str, str], read_as: str, tmp_path: Path
) -> None:
    file, settings = tmp_path / "prompts.jsonl", replace(SETTINGS, field=field)
    file.write_text(json.dumps({field.get("prompt", "prompt"): "one", "want": 1}) + "\n")
    facts = facts_of(prepare(str(file), bytes_tokenizer(CHATML), settings, eval_source=str(file)).report.to_dict())
    assert (facts["read as"], facts["for rewards"]) == (read_as, "want")
    assert facts["format"] == "the model's chat template"
    assert "messages" not in facts


def test_prompts_with_a_column_weight_are_not_weighted(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "weight": "12 kg"}\n')
    prepared = prepare(str(file), bytes_tokenizer(CHATML), SETTINGS, eval_source=str(file))
    assert [prompt.columns for prompt in prepared.prompts] == [{"weight": "12 kg"}]
    assert prepared.train.weights.tolist() == [1]


def test_a_key_that_prompts_do_not_have_is_refused(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "answer": "1"}\n')
    settings = replace(SETTINGS, field={"completion": "answer"})
    with pytest.raises(DataError, match="match no known schema of --task grpo with --field completion=answer"):
        prepare(str(file), bytes_tokenizer(CHATML), settings)
