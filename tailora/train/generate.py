"""Generates answers: prompts as token ids, the same decoding for every model, streamed replies, base against tuned.

In this order: a question becomes token ids, `generation_arguments` adds how to decode them, and `stream_reply` or
`compare_answers` runs the model.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
from tailora.data.tokenize import last_reply, prompt_ids, reply_text, stop_ids
from tailora.errors import DataError
from tailora.train.parallel import is_sharded
from tailora.train.state import seeded
from tailora.train.trainable import Trainable

# ---- Prompts as token ids


TEXT_PROMPT_WORDS = 12  # the first words of a plain text are its prompt
ANSWER_TOKENS = 48  # of an answer before and after training


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


# ---- The same prompts to the base and the tuned model


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    prompt: str
    base: str
    tuned: str
    earlier_messages: int = 0  # before the prompt
    reference: str = ""  # the reply in the data; "" if there is none
    images: tuple[Image, ...] = ()  # of the prompt and the messages before it


def compare_answers(
    model: Trainable,
    tokenizer: Any,
    questions: Sequence[str | Sample],
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[ComparedAnswer]:
    """Returns greedy answers of the base and the tuned model. With a sharded model, all ranks must call it.

    For a sample, its last reply is generated again. Prompts that leave the model no positions for an answer are
    skipped. Raises DataError if the chat template rejects a prompt.
    progress: called with the number of finished answers and their total.
    """
    asked = [(prompt_of(model, question, tokenizer), question) for question in questions]
    asked = [(prompt, question) for prompt, question in asked if free_positions(model, len(prompt.ids)) > 0]
    prompts = [prompt for prompt, _ in asked]
    references = [_reference(question, tokenizer) for _, question in asked]
    texts: list[list[str]] = []  # of the tuned model, then of the base
    with evaluating(model):
        for which in (nullcontext(), model.disable_adapter()):
            texts.append([])
            with which:
                for prompt in prompts:
                    texts[-1].append(_greedy_answer(model, tokenizer, prompt, max_new_tokens))
                    progress(sum(map(len, texts)), 2 * len(prompts))
    return [
        ComparedAnswer(prompt.text, base, tuned, prompt.earlier_messages, reference, prompt.images)
        for prompt, tuned, base, reference in zip(prompts, *texts, references, strict=True)
    ]


def _reference(question: str | Sample, tokenizer: Any) -> str:
    """Returns the reply in the data; "" if there is none."""
    if isinstance(question, str | Text) or (isinstance(question, Conversation) and not question.replies):
        return ""
    return reply_text(question, tokenizer)


def _greedy_answer(model: Any, tokenizer: Any, prompt: EncodedPrompt, max_new_tokens: int) -> str:
    """Returns the answer, with … at the end if it is truncated.

    Prompts are answered one by one: padding to a common length would change the rounding, and thus the text.
    """
    arguments = generation_arguments(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
    output = model.generate(**arguments, synced_gpus=is_sharded(model))  # then no rank stops before the others
    new = new_tokens(model, output[0], prompt.ids)  # (length,)
    is_cut = int(new[-1]) not in (arguments["generation_config"].eos_token_id or [])
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip() + ("…" if is_cut else "")
