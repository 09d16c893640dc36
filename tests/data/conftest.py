"""Tiny tokenizers of the two families, trained here, and files to read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "hello how are you today",
    "what is the weather like in the north",
    "system user assistant [INST] hi [/INST] fine, thanks </s>",
    "one two three four five six seven eight nine ten",
]


def trained(model: Any, pre_tokenizer: Any, decoder: Any, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """As GPT-2, SmolLM2, Qwen: byte-level, no BOS, pad = EOS = <|im_end|>."""

    def make(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
        backend = trained(
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"],
        )
        names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def words_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """As Llama 2: white space in front of words, <s> written before every text, pad = EOS = </s>."""

    def make(template: str | None = None) -> PreTrainedTokenizerFast:
        backend = trained(
            models.BPE(unk_token="<unk>"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
            ["<unk>", "<s>", "</s>"],
        )
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows, one JSON text a line, and return the file's path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def chatml() -> str:
    return CHATML
