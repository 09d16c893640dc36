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
from tailora.evaluation.generate import prompt_of

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
