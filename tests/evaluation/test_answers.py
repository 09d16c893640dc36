from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel
from tailora.data.schemas import Conversation, Pair, Text
from tailora.evaluation.generate import Answer, compare_answers, stream_reply

Make = Callable[..., LlamaForCausalLM]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture
def tuned(model: LlamaForCausalLM) -> LoRAModel:
    tuned = LoRAModel(model, LoRAConfig(r=4, lora_dropout=0.5))
    generator = torch.Generator().manual_seed(1)
    for layer in tuned.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3, generator=generator)
    return tuned


def test_base_and_tuned_each_say_their_own(tuned: LoRAModel, tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = ["hello", "how are you today"]
    found = compare_answers(tuned, tokenizer, questions, max_new_tokens=12)
    for question, answer in zip(questions, found, strict=True):
        base = "".join(stream_reply(tiny(), tokenizer, asked(question), max_new_tokens=12)).strip()
        own = "".join(stream_reply(tuned, tokenizer, asked(question), max_new_tokens=12)).strip()
        assert answer == Answer(question, base, own)
        assert base != own


def test_an_untrained_adapter_changes_no_word(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (answer,) = compare_answers(LoRAModel(model, LoRAConfig(r=4)), tokenizer, ["hello"], max_new_tokens=12)
    assert answer.base == answer.tuned != ""


def test_company_changes_no_answer(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    together = compare_answers(tuned, tokenizer, ["hello", "how are you today, hello?"], max_new_tokens=12)
    assert together[:1] == compare_answers(tuned, tokenizer, ["hello"], max_new_tokens=12)


def test_the_model_is_left_as_it_was(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tuned.train()
    state = torch.get_rng_state()
    compare_answers(tuned, tokenizer, ["hello"], max_new_tokens=4)
    assert tuned.active_adapters == ("default",)
    assert all(module.training for module in tuned.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_is_asked_for_its_last_reply(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [*asked("hello"), {"role": "assistant", "content": "how"}, *asked("are you")]
    sample = Conversation([*turns, {"role": "assistant", "content": "never seen"}])
    (answer,) = compare_answers(tuned, tokenizer, [sample], max_new_tokens=12)
    assert answer.prompt == "are you"
    assert answer.tuned == "".join(stream_reply(tuned, tokenizer, turns, max_new_tokens=12)).strip()


@pytest.mark.parametrize("template", [True, False])
def test_a_pair_is_asked_for_its_completion(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, template: bool
) -> None:
    if not template:
        tokenizer.chat_template = None
    found = compare_answers(tuned, tokenizer, [Pair("hello", "never seen"), "hello"], max_new_tokens=12)
    assert found[0] == found[1]


def test_a_text_is_continued_from_its_opening(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    (answer,) = compare_answers(tuned, tokenizer, [Text("hello how are you " * 10)], max_new_tokens=4)
    assert answer.prompt == "hello how are you hello how are you hello how are you"


def test_a_prompt_without_room_for_an_answer_is_left_out(tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    small = LoRAModel(tiny(positions=64), LoRAConfig(r=4))
    found = compare_answers(small, tokenizer, ["hello " * 100, "hello"], max_new_tokens=4)
    assert [answer.prompt for answer in found] == ["hello"]
