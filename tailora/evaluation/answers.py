"""The same questions to the base and to the tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailora.core.modes import evaluating
from tailora.data.shapes import Sample
from tailora.evaluation.generate import request, room
from tailora.evaluation.prompts import prompt_of
from tailora.train.subject import Subject


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: str
    base: str
    tuned: str


def answers(
    model: Subject, tokenizer: Any, prompts: Sequence[str | Sample], *, max_new_tokens: int = 48
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
