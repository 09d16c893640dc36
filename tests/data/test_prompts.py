"""data.prompts: prompts for rewards, and what is shown of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import CHATML
from transformers import PreTrainedTokenizerFast

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.prompts import prepare_prompts
from tailora.data.readers import Source
from tailora.errors import DataError
from tailora.evaluation.generate import prompt_of
from tailora.report.pages.data import facts_of

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
    prompts = prepare_prompts([Source(str(file))], ChatTokenizer.of(tokenizer, DataSettings()), str(file))
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    (sample,) = prompts.prepared.eval_samples
    assert prompt_of(model, sample, tokenizer).ids == prompts.held_out[0].ids


def test_held_out_prompts_that_are_also_trained_on_are_counted(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    for name, words in (("train", ["one", "two"]), ("more", ["three"]), ("held_out", ["two", "four"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{word}"}}\n' for word in words))
    sources = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("train", "more")]
    tokenizer = ChatTokenizer.of(bytes_tokenizer(CHATML), DataSettings())
    report = prepare_prompts(sources, tokenizer, str(tmp_path / "held_out.jsonl")).prepared.report
    assert (report.flagged["duplicates"], report.train, report.eval) == (1, 3, 2)
    assert report.rows_of["duplicates"][0].endswith("held_out.jsonl:1")
    assert report.sources[0].name.endswith("more.jsonl")


@pytest.mark.parametrize(("field", "read_as"), [({}, "prompts"), ({"prompt": "q"}, "prompts (prompt = q)")])
def test_columns_for_rewards_are_shown(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast], field: dict[str, str], read_as: str, tmp_path: Path
) -> None:
    file, tokenizer = tmp_path / "prompts.jsonl", ChatTokenizer.of(bytes_tokenizer(CHATML), DataSettings(field=field))
    file.write_text(json.dumps({field.get("prompt", "prompt"): "one", "want": 1}) + "\n")
    report = prepare_prompts([Source(str(file))], tokenizer, str(file)).prepared.report
    facts = facts_of(report.to_dict())
    assert (facts["read as"], facts["for rewards"]) == (read_as, "2 rows with want")
    assert "messages" not in facts


@pytest.mark.parametrize(
    ("weight", "field", "message"),
    [
        (3.0, {}, "prompts do not support weights; remove the weight"),
        (1.0, {"completion": "answer"}, "--field completion: expected messages or prompt"),
    ],
)
def test_settings_that_prompts_do_not_have_are_refused(
    bytes_tokenizer: Callable[..., PreTrainedTokenizerFast],
    weight: float,
    field: dict[str, str],
    message: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "answer": "1"}\n')
    tokenizer = ChatTokenizer.of(bytes_tokenizer(CHATML), DataSettings(field=field))
    with pytest.raises(DataError, match=message):
        prepare_prompts([Source(str(file), weight)], tokenizer, str(file))
