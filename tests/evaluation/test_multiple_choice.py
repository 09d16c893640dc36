"""Replies ranked by their log-likelihood, against transformers and by hand; replies that share a prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import chat_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers import MistralForCausalLM as Mistral

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.schemas import Choices, from_choices
from tailora.evaluation.multiple_choice import (
    compare_with_separate,
    log_likelihoods,
    right_is_likeliest,
    share_prompt,
    shared_prompt_losses,
    tokenize_choices,
)
from tailora.kernels.loss import FROZEN, OWN, WHOLE
from tailora.train.loss import BatchLayout, evaluate

Make = Callable[..., LlamaForCausalLM]
PADDED = BatchLayout(packed=False, loss="from the model's own logits", pad_id=0)
COLOURS = ["hello", "how are", "you today how"]


def asked(answer: int = 0, prompt: str = "how are you") -> Choices:
    return from_choices({"prompt": prompt, "choices": COLOURS, "answer": answer})


def plainly(model: LlamaForCausalLM, context: list[int], reply: list[int]) -> float:
    """log p(reply | context) by transformers alone, one token after the other."""
    total = 0.0
    for place, token in enumerate(reply):
        with torch.no_grad():
            logits = model(torch.tensor([context + reply[:place]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[token])
    return total


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_a_reply_has_the_likelihood_that_transformers_gives(
    tiny: Make, tokenizer: PreTrainedTokenizerFast, template: bool, share_prompts: bool
) -> None:
    if not template:
        tokenizer.chat_template = None
    model = LoRAModel(tiny().eval(), LoRAConfig(r=2))
    found = tokenize_choices([asked(), asked(2, "hello you")], tokenizer, 100)
    got = log_likelihoods(model, found, PADDED, token_budget=64, share_prompts=share_prompts)
    for question, prompt in enumerate(("how are you", "hello you")):
        for place, reply in enumerate(COLOURS):
            turn = [{"role": "user", "content": prompt}]
            if template:
                before, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), reply
            else:
                before, after = prompt, f" {reply}"
            context, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
            expected = plainly(tiny().eval(), context, ids)
            assert got[3 * question + place] == pytest.approx(expected, rel=1e-4)
    assert found.bytes.tolist() == [len(reply) for reply in COLOURS] * 2
    assert found.answers.tolist() == [0, 2]


def test_the_right_reply_counts_where_its_value_is_highest(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenize_choices([asked(1), asked(2), asked(0)], tokenizer, 100)
    values = np.array([-3.0, -1, -2, -3, -2, -1, -2, -2, -5])
    assert right_is_likeliest(found, values).tolist() == [True, True, True]  # of equal ones the first
    assert right_is_likeliest(found, -values).tolist() == [False, False, False]


@pytest.mark.slow
def test_a_model_that_was_taught_the_right_replies_picks_them(tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LoRAModel(tiny(), LoRAConfig(r=8)).eval()
    questions = [asked(place, prompt) for place, prompt in enumerate(("hello", "today", "user"))]
    found = tokenize_choices(questions, tokenizer, 100)
    right = [found.examples[int(start + answer)] for start, answer in zip(found.starts, found.answers, strict=False)]
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=5e-3)
    for _ in range(60):
        for example in right:
            ids, labels = (torch.tensor(part[None].astype(np.int64)) for part in (example.input_ids, example.labels))
            model(ids, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    taught = log_likelihoods(model, found, PADDED, token_budget=64)
    assert right_is_likeliest(found, taught).all()
    with model.disable_adapter():
        base = log_likelihoods(model, found, PADDED, token_budget=64)
    assert not right_is_likeliest(found, base).all()


def test_questions_with_a_reply_that_would_be_cut_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenize_choices([asked(), asked(1, "hello " * 60), asked(2)], tokenizer, 60)
    assert (found.left_out, found.answers.tolist(), len(found.examples)) == (1, [0, 2], 6)
    assert len(tokenize_choices([asked(1, "hello " * 60)], tokenizer, 60).examples) == 0


# ---- A prompt computed once for all its replies gives each what it has alone


RANDOM = np.random.default_rng(0)


def reply(prompt: Sequence[int], *ids: int) -> Example:
    whole = np.array([*prompt, *ids], dtype=np.int32)
    return Example.of_text(whole, np.arange(len(whole)) >= len(prompt))


def question(prompt: int, *replies: int) -> list[Example]:
    """Random ids: so many of the prompt, and of each reply."""
    start = RANDOM.integers(50, size=prompt).tolist()
    return [reply(start, *RANDOM.integers(50, size=length)) for length in replies]


QUESTIONS = [question(9, 1, 4, 2), question(1, 3, 3), question(5, 1, 1, 1, 1), question(30, 12, 7)]


def test_a_tree_has_the_prompt_once_and_a_place_for_every_prediction() -> None:
    tree = share_prompt([reply([7, 8, 9], 1, 2), reply([7, 8, 9], 3)])
    assert tree.ids.tolist() == [7, 8, 9, 1, 9]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2]
    assert tree.replies.tolist() == [-1, -1, 0, 0, 1]
    assert tree.targets.tolist() == [IGNORED, IGNORED, 1, 2, 3]
    parted = share_prompt([reply([7, 8, 9], 1), reply([7, 5, 9], 1)])  # prompts that differ from the second token on
    assert parted.ids.tolist() == [7, 8, 9, 7, 5, 9]
    assert parted.targets.tolist() == [IGNORED, IGNORED, 1, IGNORED, IGNORED, 1]


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def neox() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, max_position_embeddings=64, **sizes))


@pytest.mark.parametrize("make", [chat_model, gpt2, neox], ids=["llama", "gpt2", "neox"])
@pytest.mark.parametrize("form", [OWN, FROZEN, WHOLE])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.slow
def test_a_reply_has_the_loss_that_it_has_alone(make: Any, form: str, attention: str) -> None:
    model = LoRAModel(make().eval(), LoRAConfig(r=2))
    model.base_model.set_attn_implementation(attention)  # type: ignore[operator]
    rows = BatchLayout(packed=False, loss=OWN, pad_id=0)
    found = shared_prompt_losses(model, QUESTIONS, form, token_budget=40)
    for replies, nats in zip(QUESTIONS, found, strict=True):
        alone = evaluate(model, Examples.of(replies), layout=rows, token_budget=1).sums
        np.testing.assert_allclose(nats, alone, rtol=1e-4)
        assert compare_with_separate(model, replies, form, alone) is None


def test_what_cannot_branch_is_told() -> None:
    model = LoRAModel(chat_model().eval(), LoRAConfig(r=2))
    wrong = np.array([1.0, 2.0, 3.0])
    told = compare_with_separate(model, QUESTIONS[0], OWN, wrong)
    assert told is not None
    assert told.startswith("losses differ from separate rows by ")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    windowed = Mistral(MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=8, **sizes)).eval()
    assert (
        compare_with_separate(LoRAModel(windowed), QUESTIONS[0], OWN, wrong) == "the model uses a sliding window of 8"
    )
