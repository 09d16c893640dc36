"""Replies ranked by their log-likelihood, against transformers and by hand; replies that share a prompt."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import IGNORED
from tailora.data.samples import Choices
from tailora.data.schemas import from_choices
from tailora.evaluation.multiple_choice import log_likelihoods, right_is_likeliest, tokenize_choices
from tailora.kernels.attention import CPU
from tailora.kernels.loss import OWN
from tailora.train.loss import BatchLayout

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


@pytest.mark.parametrize("template", [True, False])
def test_a_reply_has_the_likelihood_that_transformers_gives(
    tiny: Make, tokenizer: PreTrainedTokenizerFast, template: bool
) -> None:
    if not template:
        tokenizer.chat_template = None
    model = LoRAModel(tiny().eval(), LoRAConfig(r=2))
    found = tokenize_choices([asked(), asked(2, "hello you")], tokenizer, 100)
    got = log_likelihoods(model, found, PADDED, token_budget=64)
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


def test_the_empty_thought_of_a_template_is_no_part_of_a_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    """As Qwen 3's, which writes one before the last reply, but not into the prompt of a generation."""
    plain = tokenize_choices([asked()], tokenizer, 100)
    reply = "{{ message['content']"
    assert tokenizer.chat_template.count(reply) == 1
    thought = "{{ '<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(reply, thought + reply)
    found = tokenize_choices([asked()], tokenizer, 100)
    for with_thought, without in zip(found.examples, plain.examples, strict=True):
        assert len(with_thought.input_ids) > len(without.input_ids)
        own = [example.labels[example.labels != IGNORED].tolist() for example in (with_thought, without)]
        assert own[0] == own[1]
    assert found.bytes.tolist() == plain.bytes.tolist()


def test_the_right_reply_counts_where_its_value_is_highest(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenize_choices([asked(1), asked(2), asked(0)], tokenizer, 100)
    values = np.array([-3.0, -1, -2, -3, -2, -1, -2, -2, -5])
    assert right_is_likeliest(found, values).tolist() == [True, True, True]  # of equal ones the first
    assert right_is_likeliest(found, -values).tolist() == [False, False, False]


def test_questions_with_a_reply_that_would_be_cut_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenize_choices([asked(), asked(1, "hello " * 60), asked(2)], tokenizer, 60)
    assert (found.left_out, found.answers.tolist(), len(found.examples)) == (1, [0, 2], 6)
    assert len(tokenize_choices([asked(1, "hello " * 60)], tokenizer, 60).examples) == 0


def test_a_prompt_is_computed_once_for_all_its_replies(tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LoRAModel(tiny().eval(), LoRAConfig(r=2))
    found = tokenize_choices([asked(), asked(2, "hello you")], tokenizer, 100)
    alone = log_likelihoods(model, found, PADDED, token_budget=64)
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    sharing = BatchLayout(True, OWN, 0, CPU, shares_beginnings=True)
    np.testing.assert_allclose(log_likelihoods(model, found, sharing, token_budget=1000), alone, rtol=1e-4)
    assert sum(lengths) < sum(found.examples.lengths) / 2
