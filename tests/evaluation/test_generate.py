"""Prompts, decoding, streamed replies, and answers next to the base's."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import GROUPED
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast

from tailora import LoRAModel
from tailora.data.samples import Conversation
from tailora.errors import DataError
from tailora.train.generate import (
    EncodedPrompt,
    cache_implementation,
    chat_ids,
    generation_arguments,
    prompt_of,
    stop_ids,
    stream_reply,
)

HELLO = [{"role": "user", "content": "hello"}]
Make = Callable[..., LlamaForCausalLM]


def likeliest(model: Any, ids: list[int], count: int) -> list[int]:
    """The greedy answer without a cache: the whole text again for every token."""
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_greedy_pieces_add_up_to_the_likeliest_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = likeliest(model, chat_ids(HELLO, tokenizer), 20)
    pieces = list(stream_reply(model, tokenizer, HELLO, max_new_tokens=20))
    assert not set(expected) & set(stop_ids(model, tokenizer))
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert "" not in pieces


def test_texts_and_chats_without_a_template_are_continued_as_they_stand(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = likeliest(model, tokenizer("hello")["input_ids"], 10)
    assert expected != likeliest(model, chat_ids(HELLO, tokenizer), 10)
    assert "".join(stream_reply(model, tokenizer, "hello", max_new_tokens=10)) == tokenizer.decode(expected)
    tokenizer.chat_template = None
    assert "".join(stream_reply(model, tokenizer, HELLO, max_new_tokens=10)) == tokenizer.decode(expected)


def test_the_token_that_ends_a_turn_stops_it_though_it_is_not_eos(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert stop_ids(model, tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_it_stops_where_the_model_says(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = likeliest(model, chat_ids(HELLO, tokenizer), 20)
    place = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
    model.generation_config.eos_token_id = [tokens[place]]
    stopped = "".join(stream_reply(model, tokenizer, HELLO, max_new_tokens=20))
    assert stopped.startswith(tokenizer.decode(tokens[:place]))
    assert len(stopped) < len(tokenizer.decode(tokens))


def test_the_models_own_sampling_settings_change_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = list(stream_reply(model, tokenizer, HELLO, max_new_tokens=20))
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    assert list(stream_reply(model, tokenizer, HELLO, max_new_tokens=20)) == plain


def test_the_seed_decides_what_is_sampled(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def sampled(**how: Any) -> str:
        return "".join(stream_reply(model, tokenizer, HELLO, max_new_tokens=12, **how))

    assert sampled(temperature=1.0, seed=1) == sampled(temperature=1.0, seed=1)
    assert sampled(temperature=1.0, seed=1) != sampled(temperature=1.0, seed=2)
    assert sampled(temperature=1.0, top_p=1e-6, seed=1) == sampled()


@pytest.mark.parametrize("end", ["left", "Ctrl-C"])
def test_everything_is_left_as_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, threads = torch.get_rng_state(), threading.active_count()
    speaking = stream_reply(model, tokenizer, HELLO, max_new_tokens=200, temperature=1.0)
    next(speaking)
    if end == "left":
        speaking.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            speaking.throw(KeyboardInterrupt)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads


def test_words_come_while_it_speaks_and_leaving_ends_the_work(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(time.sleep(0.005)))
    speaking = stream_reply(model, tokenizer, HELLO, max_new_tokens=200)
    next(speaking)
    speaking.close()
    assert len(calls) < 150


def test_an_error_in_the_model_is_the_callers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("seven")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="seven"):
        list(stream_reply(model, tokenizer, HELLO))


def test_a_chat_longer_than_the_model_is_refused_with_its_length(
    tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    length = len(chat_ids(HELLO, tokenizer))
    with pytest.raises(DataError, match=f"{length} tokens, 1 too many"):
        list(stream_reply(tiny(positions=length), tokenizer, HELLO))


def test_an_answer_ends_with_the_models_positions(tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chat_ids(HELLO, tokenizer)
    model = tiny(positions=len(ids) + 3)
    assert "".join(stream_reply(model, tokenizer, HELLO)) == tokenizer.decode(likeliest(model, ids, 3))


def test_a_template_that_refuses_is_quoted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(DataError, match="no system message, please"):
        list(stream_reply(model, tokenizer, HELLO))


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_messages_before_the_prompt_are_counted_without_the_system_message(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    reply = {"role": "assistant", "content": "how"}
    system = {"role": "system", "content": "be kind"}
    for messages, expected in (
        ([*asked("hello"), reply], ("hello", 0)),
        ([system, *asked("hello"), reply], ("hello", 0)),
        ([system, *asked("hello"), reply, *asked("you"), reply], ("you", 2)),
    ):
        prompt = prompt_of(tuned, Conversation(messages), tokenizer)
        assert (prompt.text, prompt.earlier_messages) == expected


@pytest.mark.parametrize(
    ("length", "new", "expected"), [(64, 64, "static"), (64, 65, None), (500, 20, "static"), (1, 0, "static")]
)
def test_the_static_cache_is_for_prompts_as_long_as_the_answer(
    tiny: Callable[..., LlamaForCausalLM], length: int, new: int, expected: str | None
) -> None:
    assert cache_implementation(tiny(), length, new) == expected


def test_both_caches_give_the_same_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**GROUPED, initializer_range=0.3, sliding_window=6)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(300, (12,)).tolist()
    asked = generation_arguments(model, tokenizer, EncodedPrompt("", ids), max_new_tokens=10)
    static = model.generate(**asked)
    asked["generation_config"].cache_implementation = None
    assert torch.equal(static, model.generate(**asked))
