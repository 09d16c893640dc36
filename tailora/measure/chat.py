"""A reply, word by word."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from tailora.data.codec import Messages
from tailora.measure.prompts import chat_ids, stop_ids
from tailora.train.evaluate import evaluating


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
    Raises DataError when the chat template refuses the messages.
    """
    prompt = torch.tensor([chat_ids(messages, tokenizer)], device=model.device)  # (1, length)
    config = decoding(model, tokenizer, max_new_tokens, temperature, top_p)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = Event()

    def speak() -> None:
        try:
            with seeded(seed, model.device):
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, _scores: stopped(ids, stop)],
                )
        finally:
            streamer.end()

    with evaluating(model), ThreadPoolExecutor(1) as pool:
        speaking = pool.submit(speak)
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
        speaking.result()


def decoding(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> GenerationConfig:
    """Settings that leave nothing to the model's own, so that base and tuned, today and tomorrow, are decoded alike."""
    ends = stop_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # values that transformers ignores
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    return GenerationConfig(
        **(sampling or greedy),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


def stopped(ids: Tensor, stop: Event) -> Tensor:  # (batch,)
    return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random state starts from `seed` within the block and is afterwards what it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
