"""Answers of the base and the tuned model to the same prompts, their clusters and scores."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import GROUPED
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import IGNORED, Example
from tailora.data.samples import Conversation, Pair, Text
from tailora.train.answers import (
    ComparedAnswer,
    Question,
    clusters_of,
    compare_answers,
    questions_of,
    score_answers,
    training_question,
)
from tailora.train.generate import EncodedPrompt, generation_arguments, stream_reply
from tailora.train.rewards import RewardError, parse_rewards
from tailora.train.sampler import Sampler

Make = Callable[..., LlamaForCausalLM]
REPLY = {"role": "assistant", "content": "how"}
METRIC = """
def length(completions, **kwargs):
    return [float(len(text[0]["content"])) for text in completions]

length.higher_is_better = False

def knows(prompts, completions, answer, level, **kwargs):
    assert [prompt[-1]["content"] for prompt in prompts] == ["hello", "hello", "you", "you"]
    return [None if kind == "hard" else float(right == "how") for right, kind in zip(answer, level)]

def fails(completions, **kwargs):
    raise ValueError("no idea")
"""


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def compared(model: Any, tokenizer: Any, samples: Any, new: int) -> list[ComparedAnswer]:
    return compare_answers(model, tokenizer, questions_of(model, tokenizer, samples), max_new_tokens=new)


def test_base_and_tuned_each_say_their_own(tuned: LoRAModel, tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model is left as it was. A text is continued from its opening."""
    tuned.train()
    state, questions = torch.get_rng_state(), ["hello", "how are you today", Text("hello how are you " * 10)]
    *answers, of_text = compared(tuned, tokenizer, questions, 12)
    assert tuned.active_adapters == ("default",)
    assert all(module.training for module in tuned.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert of_text.prompt == "hello how are you hello how are you hello how are you"
    assert not of_text.reference
    for question, answer in zip(["hello", "how are you today"], answers, strict=True):
        base = "".join(stream_reply(tiny(), tokenizer, asked(question), max_new_tokens=12)).strip()
        own = "".join(stream_reply(tuned, tokenizer, asked(question), max_new_tokens=12)).strip()
        assert (answer.prompt, answer.base, answer.tuned) == (question, base, own)
        assert base != own
        assert answer.before is not None
        assert (answer.before.tokens, answer.before.is_cut) == (12, True)


@pytest.mark.parametrize("config", [Gemma2Config, GPTNeoXConfig, MistralConfig])
def test_answers_are_those_of_generate(config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    sizes = {**GROUPED, "vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": 0}
    model = LoRAModel(AutoModelForCausalLM.from_config(config(**sizes)).eval(), LoRAConfig(r=4))
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    questions = questions_of(model, tokenizer, ["hello", "how are you today", "you"])
    for question, answer in zip(questions, compare_answers(model, tokenizer, questions, max_new_tokens=9), strict=True):
        for text, which in ((answer.tuned, True), (answer.base, False)):
            model.set_adapter(["default"] if which else [])
            arguments = generation_arguments(model, tokenizer, question.prompt, max_new_tokens=9)
            ids = model.generate(**arguments)[0, len(question.prompt.ids) :]
            assert text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        model.set_adapter(["default"])


def test_the_time_is_estimated_before_the_first_answer(
    tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 prompts are two batches; with a second for each token read and ten for each token added."""
    clock, said, questions = [0.0], list[str](), questions_of(tuned, tokenizer, ["hello"] * 70)
    answer = Sampler.answer

    def timed(self: Sampler, prompts: Any, tokens: int, **options: Any) -> Any:
        clock[0] += sum(len(prompt.ids) for prompt in prompts) + 10 * (tokens - 1)
        return answer(self, prompts, tokens, **options)

    monkeypatch.setattr(Sampler, "answer", timed)
    monkeypatch.setattr("tailora.train.answers.perf_counter", lambda: clock[0])
    done = lambda number, total: said.append(f"{number} of {total}")  # noqa: E731
    compare_answers(tuned, tokenizer, questions, max_new_tokens=8, note=said.append, progress=done)
    seconds = 2 * (70 * len(questions[0].prompt.ids) + 2 * 8 * 10)
    assert said[0].endswith(f"at most 8 new tokens each and {timedelta(seconds=seconds)} in total")
    assert said[1:] == [f"{number} of 140" for number in range(1, 141)]


def test_an_encoder_decoder_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes))
    model = LoRAModel(base, LoRAConfig(r=4, task_type="SEQ_2_SEQ_LM"))
    (answer,) = compared(model, tokenizer, [Pair("hello", "how are")], 5)
    assert answer.reference == "how are"
    assert answer.base == answer.tuned  # the adapter is new
    assert answer.after is not None
    assert 0 < answer.after.tokens <= 5


def test_a_sample_is_asked_for_its_last_reply(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [*asked("hello"), REPLY, *asked("are you")]
    sample = Conversation([*turns, {"role": "assistant", "content": "never seen"}])
    (question,) = questions_of(tuned, tokenizer, [sample], [{"level": 3}])
    assert (question.value, question.columns) == (turns, {"answer": "never seen", "level": 3})
    (answer,) = compare_answers(tuned, tokenizer, [question], max_new_tokens=12)
    assert (answer.prompt, answer.earlier_messages, answer.reference) == ("are you", 2, "never seen")
    assert answer.reference_tokens == len(tokenizer("never seen")["input_ids"])
    assert answer.tuned == "".join(stream_reply(tuned, tokenizer, turns, max_new_tokens=12)).strip()


def test_an_answer_that_ends_is_not_cut(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    (question,) = questions_of(tuned, tokenizer, ["hello"])
    with torch.no_grad():
        output = tuned.eval().generate(**generation_arguments(tuned, tokenizer, question.prompt, max_new_tokens=12))
    ids = output[0, len(question.prompt.ids) :].tolist()
    tuned.base_model.generation_config.eos_token_id = [ids[3]]  # the answer ends with its fourth token
    (whole,) = compared(tuned, tokenizer, ["hello"], 12)
    assert whole.after is not None
    assert whole.after.tokens == 1 + ids.index(ids[3])
    assert not whole.after.is_cut
    assert tokenizer.decode(ids, skip_special_tokens=True).strip().startswith(whole.tuned)


def test_a_pair_is_asked_for_its_completion(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    of_pair, of_text = compared(tuned, tokenizer, [Pair("hello", "never seen"), "hello"], 12)
    assert (of_pair.base, of_pair.tuned, of_pair.reference) == (of_text.base, of_text.tuned, "never seen")


def test_a_prompt_without_room_for_an_answer_is_left_out(tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    small = LoRAModel(tiny(positions=64), LoRAConfig(r=4))
    assert [answer.prompt for answer in compared(small, tokenizer, ["hello " * 100, "hello"], 4)] == ["hello"]


def test_a_training_prompt_ends_before_the_first_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = np.array([IGNORED, IGNORED, 7, 8, IGNORED, 9], dtype=np.int32)
    question = training_question(Example(np.array([5, 6, 7, 8, 4, 9], dtype=np.int32), labels), tokenizer)
    assert question.prompt.ids == [5, 6]
    assert question.reference == tokenizer.decode([7, 8], skip_special_tokens=True).strip()
    assert question.is_training


def question(text: str, **columns: Any) -> Question:
    return Question(EncodedPrompt(text, [ord(letter) for letter in text]), text, columns=columns)


def test_prompts_that_are_alike_or_in_one_group_are_one_cluster() -> None:
    story = "tell me the whole story of the seven brave sailors"
    questions = [question("a day", group=1), question(story), question("by night", group=1), question(f"{story}!")]
    questions += [question("a day"), question("nothing like it")]
    assert clusters_of(questions) == [0, 1, 0, 1, 0, 5]


def test_metrics_score_both_answers(tuned: LoRAModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(METRIC)
    samples = [Conversation([*asked(text), REPLY]) for text in ("hello", "you")]
    questions = questions_of(tuned, tokenizer, samples, [{"level": "easy"}, {"level": "hard"}])
    answers = compare_answers(tuned, tokenizer, questions, max_new_tokens=6)
    metrics = parse_rewards([], [f"{tmp_path}/m.py:length", f"{tmp_path}/m.py:knows"])[1]
    scored, directions = score_answers(answers, questions, metrics, 60)
    assert directions == {"length": False, "knows": True}
    for number, answer in enumerate(scored):
        assert answer.before is not None
        assert answer.after is not None
        known = None if number else 1.0
        assert answer.before.scores == {"length": len(answer.base), "knows": known}
        assert answer.after.scores == {"length": len(answer.tuned), "knows": known}
    with pytest.raises(RewardError, match="no idea"):
        score_answers(answers, questions, parse_rewards([], [f"{tmp_path}/m.py:fails"])[1], 60)
