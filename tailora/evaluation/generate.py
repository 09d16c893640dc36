"""How an answer is decoded: the same for base and tuned, and for every model."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from tailora.core.attach import evaluating
from tailora.data.chat_template import codec_of
from tailora.data.schemas import Conversation, Messages, Pair, Sample, Text
from tailora.data.tokenize import encode, prompt_ids
from tailora.errors import DataError
from tailora.train.checkpoint import seeded
from tailora.train.trainable import Trainable

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults: left unread


def request(
    model: Any, tokenizer: Any, ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> dict[str, Any]:
    """What `model.generate` is called with to go on from `ids`; temperature 0 takes the likeliest token.

    Raises DataError when the model's positions leave no room for an answer.
    """
    left = room(model, len(ids))
    if left < 1:
        raise DataError(f"the prompt has {len(ids)} tokens, {1 - left} more than the model can go on from: shorten it")
    ends = stop_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature else GREEDY),
        repetition_penalty=1.0,  # whatever the model's own settings say
        no_repeat_ngram_size=0,
        max_new_tokens=min(max_new_tokens, left),
        cache_implementation=cache_for(model, len(ids), min(max_new_tokens, left)),
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
    )
    prompt = torch.tensor([ids], device=model.device)  # (1, length)
    return {"inputs": prompt, "attention_mask": torch.ones_like(prompt), "generation_config": config}


def cache_for(model: Any, length: int, new: int) -> str | None:
    """transformers' static cache, where it is the faster one: "static", or None for the one that grows.

    The growing one is copied for every token, the static one is read whole, rows still empty included. Milliseconds a
    token of SmolLM2-135M in bfloat16 on one core, growing and static: 36 and 36 with 64 tokens of prompt and 64 asked
    for, 35 and 42 with 64 and 1,024, 41 and 37 with 256 and 256, 67 and 44 with 1,024 and 256. Elsewhere than on a CPU
    transformers compiles the model for it, which takes longer than an answer.
    """
    able = getattr(model, "_can_compile_fullgraph", False) and model.device.type == "cpu"
    return "static" if able and length >= new else None


def room(model: Any, length: int) -> int:
    """How many positions the model has after `length` tokens."""
    positions: int = getattr(model.config, "max_position_embeddings", sys.maxsize)
    return positions - length


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The model's own end tokens, the tokenizer's, and the one that training teaches at the end of a reply."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    found = {*own, tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return sorted(found - {None})


def _end_of_turn(tokenizer: Any) -> int | None:
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return int(encode(Conversation(turns), tokenizer, max_length=100_000).input_ids[-1])
    except DataError:  # a template that cannot be trained on can be talked to: the other end tokens stop it
        return None


# ---- From a question to the ids that the model goes on from.


OPENING = 12  # words of a plain text that stand as its prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str  # what a reader is shown: the last thing said before the answer
    ids: list[int]


def prompt_of(asked: str | Sample, tokenizer: Any) -> Prompt:
    """A question, or what stands before a sample's last reply. Raises DataError when the template refuses it."""
    if isinstance(asked, str):
        return Prompt(asked, chat_ids([{"role": "user", "content": asked}], tokenizer))
    if isinstance(asked, Text):
        opening = " ".join(asked.text.split()[:OPENING])
        return Prompt(opening, plain_ids(opening, tokenizer))
    return Prompt(_last_said(asked), prompt_ids(asked, tokenizer))


def chat_ids(messages: Messages, tokenizer: Any) -> list[int]:
    """The chat up to the reply that comes next; without a chat template the words alone, to be continued.

    Raises DataError when the template refuses the messages.
    """
    codec = codec_of(tokenizer)
    if codec.template is None:
        return plain_ids("\n".join(message["content"] for message in messages), tokenizer)
    return codec.ids(codec.render(messages, reply_next=True))


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    codec = codec_of(tokenizer)
    return codec.prefix + codec.ids(text)


def _last_said(sample: Conversation | Pair) -> str:
    if isinstance(sample, Pair):
        return sample.prompt
    replies = [place for place, message in enumerate(sample.messages) if message["role"] == "assistant"]
    return sample.messages[replies[-1] - 1]["content"] if replies else sample.messages[-1]["content"]


# ---- A reply, word by word.


def reply(
    model: Any,
    tokenizer: Any,
    messages: Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the answer to `messages`, by the active adapters; temperature 0 takes the likeliest token.

    Stops at the end of the turn. However the block ends (the caller stops reading, Ctrl-C, an error in the model, which
    is raised here), the model is left in the mode, and torch with the random state, that they were in.
    Raises DataError when the chat template refuses the messages or they fill the model's positions.
    """
    ids = chat_ids(messages, tokenizer)
    asked = request(model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = Event()

    def speak() -> None:
        try:
            with seeded(seed):
                model.generate(**asked, streamer=streamer, stopping_criteria=[lambda ids, _: stopped(ids, stop)])
        finally:
            streamer.end()

    with evaluating(model), ThreadPoolExecutor(1) as pool:
        speaking = pool.submit(speak)
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
        speaking.result()


def stopped(ids: Tensor, stop: Event) -> Tensor:
    """The answer of generate's question, asked after every token: which rows end here. (batch,)"""
    return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)


# ---- The same questions to the base and to the tuned model.


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: str
    base: str
    tuned: str


def answers(
    model: Trainable, tokenizer: Any, prompts: Sequence[str | Sample], *, max_new_tokens: int = 48
) -> list[Answer]:
    """Greedy answers of the base and of what was trained, side by side.

    A prompt is a question, or a sample whose last reply is asked for again; one that leaves the model no positions for
    an answer is left out. Raises DataError when the chat template refuses one.
    """
    asked = [prompt_of(prompt, tokenizer) for prompt in prompts]
    asked = [prompt for prompt in asked if room(model, len(prompt.ids)) > 0]
    ids = [prompt.ids for prompt in asked]
    with evaluating(model):
        tuned = greedy(model, tokenizer, ids, max_new_tokens)
        with model.disable_adapter():
            base = greedy(model, tokenizer, ids, max_new_tokens)
    shown = [prompt.text for prompt in asked]
    return [Answer(*texts) for texts in zip(shown, base, tuned, strict=True)]


def greedy(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """One by one: padding to a common length would change the rounding, and with it words."""
    texts = []
    for ids in prompts:
        output = model.generate(**request(model, tokenizer, ids, max_new_tokens=max_new_tokens))  # (1, length)
        texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
    return texts
