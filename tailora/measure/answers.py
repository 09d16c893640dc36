"""The same questions to the base and to the tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tailora.data.shapes import Sample
from tailora.measure.chat import decoding
from tailora.measure.prompts import prompt_of
from tailora.model import LoRAModel
from tailora.train.evaluate import evaluating


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: str
    base: str
    tuned: str


def answers(
    model: LoRAModel, tokenizer: Any, prompts: Sequence[str | Sample], *, max_new_tokens: int = 48
) -> list[Answer]:
    """Greedy answers of the base and of the active adapters, side by side.

    A prompt is a question, or a sample whose last reply is asked for again. Raises DataError when the chat template
    refuses one.
    """
    asked = [prompt_of(prompt, tokenizer) for prompt in prompts]
    ids = [prompt.ids for prompt in asked]
    with evaluating(model):
        tuned = greedy(model, tokenizer, ids, max_new_tokens)
        with model.disable_adapter():
            base = greedy(model, tokenizer, ids, max_new_tokens)
    return [Answer(prompt.text, *pair) for prompt, *pair in zip(asked, base, tuned, strict=True)]


def greedy(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """One by one: padding to a common length would change the rounding, and with it words."""
    config = decoding(model, tokenizer, max_new_tokens)
    texts = []
    for ids in prompts:
        prompt = torch.tensor([ids], device=model.device)  # (1, length)
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
    return texts
