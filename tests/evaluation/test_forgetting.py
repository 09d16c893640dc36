"""KL from the base and its loss on other text, against the definition."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_model, chat_tokenizer
from torch.nn import functional as F

from tailora import LoRAConfig, LoRAModel
from tailora.errors import DataError
from tailora.evaluation.forgetting import forgetting, read_texts, sample_texts


@pytest.fixture
def model() -> LoRAModel:
    return LoRAModel(chat_model(initializer_range=0.3), LoRAConfig(r=4))


def stirred(model: LoRAModel, size: float) -> LoRAModel:
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=size)
    return model


def test_it_is_the_mean_over_tokens_of_the_definition(model: LoRAModel) -> None:
    stirred(model, 0.3)
    texts: list[list[int]] = [[1, 2, 3, 4], [9, 8, 7, 6, 5]]
    kl = before = after = 0.0
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad():
            new = F.log_softmax(model(ids).logits[0, :-1].double(), -1)
            with model.disable_adapter():
                old = F.log_softmax(model(ids).logits[0, :-1].double(), -1)
        kl += float(F.kl_div(new, old, log_target=True, reduction="sum"))
        before += float(F.nll_loss(old, ids[0, 1:], reduction="sum"))
        after += float(F.nll_loss(new, ids[0, 1:], reduction="sum"))
    found = forgetting(model, texts)
    assert found.kl == pytest.approx(kl / 7, rel=1e-4)
    assert found.kl > 0.01
    assert (found.loss_before, found.loss_after) == pytest.approx((before / 7, after / 7), rel=1e-4)


def test_the_base_writes_the_same_texts_whatever_is_trained(model: LoRAModel) -> None:
    tokenizer: Any = chat_tokenizer(["red green"], eos_token="<|im_end|>")
    texts = sample_texts(model, tokenizer, count=3, length=9)
    assert [len(text) for text in texts] == [10, 10, 10]
    assert len(set(map(tuple, texts))) == 3
    stirred(model, 0.3)
    state = torch.random.get_rng_state()
    assert sample_texts(model, tokenizer, count=3, length=9) == texts
    assert torch.equal(torch.random.get_rng_state(), state)


def test_texts_of_one_token_say_nothing(model: LoRAModel) -> None:
    with pytest.raises(DataError, match="two tokens"):
        forgetting(model, [[1], []])


def test_of_long_texts_the_beginnings_are_read(tmp_path: Path) -> None:
    texts = [f"{word} " * 40 for word in ("red", "green", "blue")]
    tokenizer = chat_tokenizer(texts, eos_token="<|im_end|>", pad_token="<|im_end|>")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = read_texts(str(path), chat_model(vocab_size=len(tokenizer)), tokenizer, count=2, length=8)
    assert found == [tokenizer(text)["input_ids"][:8] for text in texts[:2]]
