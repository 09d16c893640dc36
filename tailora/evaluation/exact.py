"""Whether the model's own greedy answer is the reply in the data, word for word after a stated normalisation."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailora.core.modes import evaluating
from tailora.data.shapes import Conversation, Pair
from tailora.data.tokenize import prompt_ids, reply_text
from tailora.errors import ConfigError, listing, nearest
from tailora.evaluation.generate import request, room
from tailora.evaluation.prompts import prompt_of
from tailora.train.subject import Subject

Normal = Callable[[str], str]
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
STEPS: dict[str, Normal] = {  # in this order, whatever the order they are asked for in
    "case": str.casefold,
    "punctuation": lambda text: text.translate(NO_PUNCTUATION),
    "space": lambda text: " ".join(text.split()),
    "strip": str.strip,
}
HALF_LETTER = "\ufffd"  # what a tokenizer writes for the first bytes of a letter


@dataclass(frozen=True, slots=True)
class Match:
    prompt: str
    expected: str
    answer: str  # as far as it was written: a wrong one is not written to its end
    hit: bool


def normaliser(names: Sequence[str]) -> Normal:
    """Applies these steps. Raises ConfigError for unknown ones."""
    if unknown := [name for name in names if name not in STEPS]:
        known = f"; there are {', '.join(STEPS)}, or none"
        raise ConfigError(listing([f"--normalize {name}: unknown{nearest(name, STEPS) or known}" for name in unknown]))
    steps = [step for name, step in STEPS.items() if name in names]

    def normal(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normal


def match(
    model: Subject,
    tokenizer: Any,
    sample: Conversation | Pair,
    normal: Normal,
    *,
    max_new_tokens: int,
    to_the_end: bool = False,
) -> Match | None:
    """None where the prompt leaves the model no positions for an answer.

    to_the_end: write the whole answer, though it went wrong; by default a wrong one ends with its first wrong word.
    """
    ids = prompt_ids(sample, tokenizer)
    if room(model, len(ids)) < 1:
        return None
    expected = normal(reply_text(sample))

    def said(output: Tensor) -> str:
        text: str = tokenizer.decode(
            output[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def wrong(output: Tensor, _scores: Any) -> Tensor:
        """Asked after every token: (1,)."""
        hopeless = not expected.startswith(normal(said(output).rstrip(HALF_LETTER)))
        return torch.full((1,), hopeless and not to_the_end, dtype=torch.bool, device=output.device)

    with evaluating(model), torch.no_grad():
        asked = request(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        answer = said(model.generate(**asked, stopping_criteria=[wrong]))
    return Match(
        prompt_of(sample, tokenizer).text, reply_text(sample).strip(), answer.strip(), normal(answer) == expected
    )
