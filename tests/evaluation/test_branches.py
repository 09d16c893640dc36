"""A prompt computed once for all its replies gives each what it has alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny import chat_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.evaluation.multiple_choice import compare_with_separate, share_prompt, shared_prompt_losses
from tailora.kernels.loss import FROZEN, OWN, WHOLE
from tailora.train.loss import BatchLayout, evaluate

RANDOM = np.random.default_rng(0)


def reply(prompt: Sequence[int], *ids: int) -> Example:
    whole = np.array([*prompt, *ids], dtype=np.int32)
    labels = whole.copy()
    labels[: len(prompt)] = IGNORED
    return Example(whole, labels)


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
    assert compare_with_separate(LoRAModel(windowed), QUESTIONS[0], OWN, wrong) == "its attention has a window of 8"
