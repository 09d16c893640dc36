"""A reply, word by word."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from tailora.core.modes import evaluating
from tailora.data.shapes import Messages
from tailora.evaluation.generate import request
from tailora.evaluation.prompts import chat_ids
from tailora.train.rng import seeded


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
