"""Generates answers: prompts as token ids, the same decoding for every model, streamed replies.

In this order: a question becomes token ids, `generation_arguments` adds how to decode them, and `stream_reply` or
`transformers` runs the model. `train/answers.py` asks the base and the tuned model.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, ProcessorMixin, TextIteratorStreamer

from tailora.core.attach import evaluating
from tailora.data.chat_template import ChatTokenizer
from tailora.data.image_processor import accepted_inputs, image_inputs, text_tokenizer
from tailora.data.images import Image, images_of
from tailora.data.messages import Messages, Tools, text_of
from tailora.data.samples import Conversation, Pair, Sample, Text
from tailora.data.tokenize import last_reply, prompt_ids, stop_ids
from tailora.errors import DataError
from tailora.train.state import seeded

# ---- Prompts as token ids


TEXT_PROMPT_WORDS = 12  # the first words of a plain text are its prompt


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    text: str  # shown to the user: the last message before the answer
    ids: list[int]
    earlier_messages: int = 0  # also in the ids; without the system message
    images: tuple[Image, ...] = ()


def prompt_of(model: Any, question: str | Sample, tokenizer: Any) -> EncodedPrompt:
    """Returns the prompt for a question, or for the last reply of a sample. Raises DataError if the template fails."""
    earlier: Messages = []
    if isinstance(question, str):
        text, ids = question, chat_ids([{"role": "user", "content": question}], tokenizer)
    elif isinstance(question, Text):
        text = " ".join(question.text.split()[:TEXT_PROMPT_WORDS])
        ids = plain_ids(text, tokenizer)
    elif isinstance(question, Pair):
        text, ids = question.prompt, prompt_ids(question, tokenizer)
    else:
        *earlier, asked = question.messages[: last_reply(question)]
        text, ids = text_of(asked), prompt_ids(question, tokenizer)
    if is_seq2seq(model):  # an encoder's texts end with special tokens, and earlier messages are not among them
        return EncodedPrompt(text, encoder_ids(text, tokenizer))
    images = images_of(question.messages[: last_reply(question)]) if isinstance(question, Conversation) else ()
    return EncodedPrompt(text, ids, sum(message["role"] != "system" for message in earlier), images)


def is_seq2seq(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def image_obstacle(model: Any, tokenizer: Any) -> str:
    """Returns why chats with this model cannot contain images; "" if they can."""
    if not isinstance(tokenizer, ProcessorMixin):
        return "it reads only text"
    if is_seq2seq(model):
        return "it is an encoder-decoder, whose prompts are plain text"
    return "" if ChatTokenizer.of(tokenizer).template else "it has no chat template"


def encoder_ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def new_tokens(model: Any, output: Tensor, ids: list[int]) -> Tensor:
    """Returns the new tokens of `generate`, after the prompt's ids or after the start token of an encoder-decoder."""
    return output[1 if is_seq2seq(model) else len(ids) :]


def chat_ids(messages: Messages, tokenizer: Any, tools: Tools | None = None) -> list[int]:
    """Returns the ids of a chat up to its next reply; without a chat template, the ids of the plain text.

    Raises DataError if the template rejects the messages.
    """
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    if chat_tokenizer.template is None:
        return plain_ids(plain_text(messages), tokenizer)
    return chat_tokenizer.prompt_ids(messages, tools)


def plain_text(messages: Messages) -> str:
    return "\n".join(text_of(message) for message in messages)


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    return chat_tokenizer.bos_ids + chat_tokenizer.token_ids(text)


# ---- Decoding: the same for the base and the tuned model


GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults, not used


def generation_arguments(
    model: Any,
    tokenizer: Any,
    prompt: EncodedPrompt,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> dict[str, Any]:
    """Returns the arguments of `model.generate` that continue the prompt; temperature 0 is greedy decoding.

    The model's own generation settings are not used, apart from its end tokens.
    Raises DataError if the model has no positions left for an answer.
    """
    left = free_positions(model, len(prompt.ids))
    if left < 1:
        raise DataError(f"the prompt has {len(prompt.ids)} tokens, {1 - left} too many for this model to respond")
    ends, pad = stop_ids(model, tokenizer), text_tokenizer(tokenizer).pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature else GREEDY),
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=min(max_new_tokens, left),
        cache_implementation=cache_implementation(model, len(prompt.ids), min(max_new_tokens, left)),
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends or [0])[0],
    )
    ids = torch.tensor([prompt.ids])  # (1, length)
    inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(tokenizer, ProcessorMixin):
        inputs |= accepted_inputs(model, image_inputs(tokenizer, ids, [prompt.images]))
    return {name: value.to(model.device) for name, value in inputs.items()} | {"generation_config": config}


def cache_implementation(model: Any, length: int, new: int) -> str | None:
    """Returns "static" if transformers' static cache is faster, None for its default, which grows.

    The growing cache is copied for every token; the static one is read in full, unused rows included. Milliseconds per
    token of SmolLM2-135M in bfloat16 on one core, growing and static: 35 and 42 with 64 prompt tokens and 1,024 new
    ones, 67 and 44 with 1,024 and 256. On other devices, transformers would compile the model first.
    """
    if is_seq2seq(model):
        return None
    usable = getattr(model, "_can_compile_fullgraph", False) and model.device.type == "cpu"
    return "static" if usable and length >= new else None


def free_positions(model: Any, length: int) -> int:
    """Returns how many positions the model has after `length` tokens."""
    positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return positions - length


# ---- One reply, streamed


def stream_reply(
    model: Any,
    tokenizer: Any,
    prompt: Messages | str,
    *,
    tools: Tools | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yields pieces of the active adapters' answer to a chat, up to the end of the turn, or of a text's continuation.

    However it ends (the caller stops reading, Ctrl-C, an error in the model, which is raised here), the model's mode
    and torch's random state are restored.
    Raises DataError if the chat template rejects the messages, or they fill the model's positions.
    """
    if is_seq2seq(model):
        text = prompt if isinstance(prompt, str) else plain_text(prompt)
        asked = EncodedPrompt(text, encoder_ids(text, tokenizer))
    elif isinstance(prompt, str):
        asked = EncodedPrompt(prompt, plain_ids(prompt, tokenizer))
    else:
        asked = EncodedPrompt("", chat_ids(prompt, tokenizer, tools), images=images_of(prompt))
    arguments = generation_arguments(
        model, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    streamer = TextIteratorStreamer(text_tokenizer(tokenizer), skip_prompt=True, skip_special_tokens=True)
    stop_event = Event()

    def stop(ids: Tensor, _scores: Any) -> Tensor:
        """Is called after every token, and returns which sequences end here: (batch,)."""
        return torch.full((ids.shape[0],), stop_event.is_set(), dtype=torch.bool, device=ids.device)

    def generate() -> None:
        try:
            with seeded(seed):
                model.generate(**arguments, streamer=streamer, stopping_criteria=[stop])
        finally:
            streamer.end()

    with evaluating(model), ThreadPoolExecutor(1) as pool:
        generation = pool.submit(generate)
        try:
            yield from filter(None, streamer)
        finally:
            stop_event.set()
        generation.result()
