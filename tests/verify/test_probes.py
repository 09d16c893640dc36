"""The probes of a passport, and the base in 4 bits."""

import copy

import pytest
import torch
from tiny import tiny_model
from verified_server import TOKENIZER, adapted, base_model, store_in_q4_0, through_gguf

from tailora import LoRAConfig, LoRAModel
from tailora.data.chat_template import ChatTokenizer
from tailora.errors import DataError
from tailora.verify.passport import ADAPTER
from tailora.verify.probes import ProbeText, _spots, make_passport, q4_0, rounded_to_4_bits


def test_q4_0_is_that_of_llama_cpp() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    assert torch.equal(q4_0(weight), through_gguf(weight))


def test_conv1d_is_rounded_along_its_inputs_and_the_head_is_not() -> None:
    model = tiny_model("GPT2LMHeadModel", initializer_range=0.3).eval()
    ids = torch.arange(20)[None]
    exact = model(ids).logits
    with rounded_to_4_bits(model):
        rounded = model(ids).logits
    expected = store_in_q4_0(model)(ids).logits
    torch.testing.assert_close(rounded, expected, rtol=1e-3, atol=1e-3)
    assert (rounded - exact).abs().max() > 0.1


@pytest.mark.parametrize(("rounded_at", "expected"), [(None, {8, 11}), (8, {11, 14})])
def test_plain_completions_end_where_the_adapter_changes_most(rounded_at: int | None, expected: set[int]) -> None:
    """Compared with what weights in Q4_0 change."""
    text = ProbeText(tuple(TOKENIZER("a good morning to you and to the cat")["input_ids"]), 3)
    assert len(text.ids) > 15

    def compute(positions: list[range], scale: float, *, on_q4_0: bool = False) -> torch.Tensor:
        logits = torch.zeros(len(text.ids), len(TOKENIZER))
        if scale == ADAPTER:
            for position, change in {8: 8.0, 11: 7.0, 14: 6.0}.items():
                logits[position, 9] = 0.0 if on_q4_0 and position == rounded_at else change
        return logits[positions[0].start :].log_softmax(-1)

    spots = _spots([text], compute, ChatTokenizer.of(TOKENIZER))
    assert {spot.position for spot in spots} == expected
    for spot in spots:
        assert TOKENIZER(spot.words)["input_ids"] == [*text.ids[: spot.position + 1]]


def test_chats_begin_with_the_system_message_of_the_training() -> None:
    """A server that knows it adds it to chats without one, so that the same prompts have to be compared."""
    system = {"role": "system", "content": "a good cat"}
    for given, expected in (("a good cat", [system]), (None, [])):
        passport = make_passport(adapted(0), TOKENIZER, system=given)
        chats = [probe.messages for probe in passport.probes if probe.messages]
        assert chats
        assert all(messages[:-1] == expected for messages in chats)


def test_an_adapter_that_changes_nothing_or_diverged_has_no_passport() -> None:
    """A server could only be told from it wrongly."""
    model = LoRAModel(base_model(), LoRAConfig(r=4))
    with pytest.raises(DataError, match="the adapter changes no log-probability"):
        make_passport(model, TOKENIZER)
    for layer in model.adapter().low_rank.values():
        torch.nn.init.constant_(layer.lora_B, torch.nan)
    with pytest.raises(DataError, match=r"not finite: the adapter has diverged"):
        make_passport(model, TOKENIZER)


def test_a_model_without_chat_template_gets_probes_of_plain_texts() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    passport = make_passport(adapted(0), tokenizer)
    assert passport.probes
    assert all(probe.messages is None for probe in passport.probes)
    for probe in passport.probes:
        assert len(tokenizer(probe.text)["input_ids"]) == probe.prompt_tokens


def test_a_model_with_few_positions_gets_none() -> None:
    model = adapted(0)
    model.config.max_position_embeddings = 64
    with pytest.raises(DataError, match="needs a context of at least 200 tokens, got 64"):
        make_passport(model, TOKENIZER)


def test_a_special_token_that_the_model_lacks_is_no_obstacle() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert len(tokenizer) > base_model().config.vocab_size
    assert make_passport(adapted(0), tokenizer).probes


def test_probes_leave_the_model_and_random_numbers_as_they_are() -> None:
    model = adapted(0)
    ids, before = torch.arange(12)[None], torch.get_rng_state()
    expected = model(input_ids=ids).logits
    shown: list[tuple[int, int]] = []
    passport = make_passport(model, TOKENIZER, progress=lambda done, total: shown.append((done, total)))
    assert [done for done, _ in shown] == list(range(shown[0][1]))
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert make_passport(model, TOKENIZER) == passport != make_passport(model, TOKENIZER, seed=1)
    assert not any(module._forward_hooks for module in model.modules())
