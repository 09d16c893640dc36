"""How an answer is decoded: the same for base and tuned, and for every model."""

import sys
from typing import Any

import torch
from transformers import GenerationConfig

from tailora.data.shapes import Conversation
from tailora.data.tokenize import encode
from tailora.errors import DataError

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
