"""Multiple choice: which of several replies has the highest log-likelihood, as in lm-evaluation-harness.

log p(reply | prompt) is summed over the reply's own tokens, without the token that ends a turn. `accuracy` chooses the
reply with the highest log-likelihood, `accuracy_norm` the one with the highest log-likelihood per UTF-8 byte, so that
long replies are not at a disadvantage (acc and acc_norm there; acc_norm divides by characters). The empty thought that
templates such as Qwen 3's write before a reply is a part of its prompt.

On a CPU a packed row computes the prompt once for all its replies (`data.collate.shared_beginnings`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.samples import Choices
from tailora.data.tokenize import encode_samples, reply_text
from tailora.errors import DataError
from tailora.train.loss import BatchLayout, evaluate
from tailora.train.trainable import Trainable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True, eq=False)
class TokenizedChoices:
    """Questions with their replies as tokens: question q has examples[starts[q]:starts[q + 1]]."""

    examples: Examples  # prompt and reply; the labels are the reply's own tokens
    starts: Ints  # (questions + 1,)
    answers: Ints  # (questions,): index of the right reply within its question
    bytes: Ints  # (examples,): length of the reply's text
    left_out: int  # questions with a reply that max_length would truncate


def tokenize_choices(questions: Sequence[Choices], tokenizer: Any, max_length: int) -> TokenizedChoices:
    """Raises DataError if a reply cannot be encoded."""
    chat_tokenizer = ChatTokenizer.of(tokenizer, DataSettings(max_length=max_length))
    examples: list[Example] = []
    starts, answers, sizes = [0], [], []
    for question in questions:
        encoded = []
        for result in encode_samples(question.options, chat_tokenizer):
            if isinstance(result, DataError):
                raise result
            encoded += result
        if any(result.length > max_length for result in encoded):
            continue
        for example in (_without_empty_thought(result.example, tokenizer) for result in encoded):
            last = int(np.flatnonzero(example.labels != IGNORED)[-1])
            while last and int(example.labels[last]) in chat_tokenizer.special_ids:  # not the end of the turn
                last -= 1
            examples.append(example.beginning(last + 1))
        sizes += [len(reply_text(option, tokenizer).strip().encode()) for option in question.options]
        starts.append(len(examples))
        answers.append(question.answer)
    return TokenizedChoices(
        examples=Examples.of(examples),
        starts=np.array(starts, dtype=np.int64),
        answers=np.array(answers, dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
        left_out=len(questions) - len(answers),
    )


def _without_empty_thought(example: Example, tokenizer: Any) -> Example:
    """Returns the example without labels for the empty thought before its reply, if there is one."""
    positions = np.flatnonzero(example.labels != IGNORED)
    ids, labels = example.input_ids[positions].tolist(), example.labels.copy()
    if (thought := EMPTY_THOUGHT.match(tokenizer.decode(ids))) is None:
        return example
    lengths = (len(tokenizer.decode(ids[:count])) for count in range(len(ids)))
    labels[positions[: sum(1 for _ in takewhile(lambda length: length < thought.end(), lengths))]] = IGNORED
    return replace(example, labels=labels)


def log_likelihoods(model: Trainable, choices: TokenizedChoices, layout: BatchLayout, *, token_budget: int) -> Floats:
    """Returns the log-likelihood of every reply given its prompt, in nats: (examples,). Raises DataError for NaN."""
    values = -evaluate(model, choices.examples, layout=layout, token_budget=token_budget).sums
    if np.isnan(values).any():
        raise DataError("the model's log-likelihoods are not numbers; use --dtype float32 or bfloat16")
    return values


def right_is_likeliest(choices: TokenizedChoices, values: Floats) -> NDArray[np.bool_]:
    """Returns True if the right reply has the highest value: (questions,). Of equal values the first one counts."""
    questions = zip(pairwise(choices.starts.tolist()), choices.answers, strict=True)
    return np.array([values[start:stop].argmax() == right for (start, stop), right in questions], dtype=np.bool_)
