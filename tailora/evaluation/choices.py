"""Which of several replies the model holds for the likeliest, as lm-evaluation-harness asks it.

log p(reply | prompt) is summed over the reply's own tokens; the token that ends a turn is not counted. `accuracy` takes
the likeliest reply, `accuracy_norm` the one with the highest log-likelihood per UTF-8 byte, so that long ones have a
chance (acc and acc_norm there, which divides by characters).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailora.data.codec import Codec, codec_of
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.shapes import Choices
from tailora.data.tokenize import Encoded, encode_all, reply_text
from tailora.errors import DataError
from tailora.evaluation.multiple_choice import branched, obstacle_to_branches
from tailora.train.evaluate import evaluate
from tailora.train.loss import Rows
from tailora.train.subject import Subject

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Options:
    """Several questions with their replies, as tokens: question q has the examples starts[q] to starts[q + 1]."""

    examples: Examples  # the reply's tokens are the labels
    starts: NDArray[np.int64]  # (questions + 1,)
    answers: NDArray[np.int64]  # (questions,), place of the right one
    bytes: NDArray[np.int64]  # (examples,), of the reply's text
    left_out: int  # questions with a reply that is cut at max_length


def options(questions: Sequence[Choices], tokenizer: Any, max_length: int) -> Options:
    """Raises DataError where a reply cannot be written."""
    codec = codec_of(tokenizer)
    examples: list[Example] = []
    starts, answers, sizes = [0], [], []
    for question in questions:
        encoded = [_whole(each) for each in encode_all(question.options, codec, max_length)]
        if any(each.length > max_length for each in encoded):
            continue
        examples += [_reply_alone(each.example, codec) for each in encoded]
        sizes += [len(reply_text(option).strip().encode()) for option in question.options]
        starts.append(len(examples))
        answers.append(question.answer)
    return Options(
        examples=Examples.of(examples),
        starts=np.array(starts, dtype=np.int64),
        answers=np.array(answers, dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
        left_out=len(questions) - len(answers),
    )


def _whole(encoded: Encoded | DataError) -> Encoded:
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def _reply_alone(example: Example, codec: Codec) -> Example:
    """Without what ends the turn, and whatever follows the reply."""
    last = int(np.flatnonzero(example.labels != IGNORED)[-1])
    while last and int(example.labels[last]) in codec.special_ids:
        last -= 1
    return Example(example.input_ids[: last + 1], example.labels[: last + 1])


def log_likelihoods(model: Subject, asked: Options, *, rows: Rows, token_budget: int, branches: bool = False) -> Floats:
    """Nats of every reply given its prompt: (examples,).

    branches: a prompt is computed once for all its replies, where `obstacle_to_sharing` sees none.
    """
    if not branches:
        return -evaluate(model, asked.examples, rows=rows, token_budget=token_budget).sums
    places = zip(asked.starts, asked.starts[1:], strict=False)
    questions = [[asked.examples[place] for place in range(start, stop)] for start, stop in places]
    return -np.concatenate([np.zeros(0), *branched(model, questions, rows.loss, token_budget=token_budget)])


def obstacle_to_sharing(model: Subject, asked: Options, *, rows: Rows, token_budget: int) -> str | None:
    """Why this model's prompts cannot be computed once, tried on the first question; None if they can."""
    replies = asked.examples.select(range(int(asked.starts[1])))
    alone = evaluate(model, replies, rows=rows, token_budget=token_budget).sums
    return obstacle_to_branches(model, list(replies), rows.loss, alone)


def picked(asked: Options, likelihoods: Floats) -> NDArray[np.bool_]:
    """Whether the right reply was the one with the highest value: (questions,). The first of equal ones is taken."""
    parts = zip(asked.starts, asked.starts[1:], asked.answers, strict=False)
    return np.array([likelihoods[start:stop].argmax() == right for start, stop, right in parts], dtype=np.bool_)
