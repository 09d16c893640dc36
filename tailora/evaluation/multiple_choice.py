"""Multiple choice: which of several replies has the highest log-likelihood, as in lm-evaluation-harness.

log p(reply | prompt) is summed over the reply's own tokens, without the token that ends a turn. `accuracy` chooses the
reply with the highest log-likelihood, `accuracy_norm` the one with the highest log-likelihood per UTF-8 byte, so that
long replies are not at a disadvantage (acc and acc_norm there; acc_norm divides by characters).

The replies to a question can share one forward pass, in which their prompt is computed once (second part of this file).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailora.core.attach import evaluating
from tailora.core.inference import constant_adapters
from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.schemas import Choices
from tailora.data.tokenize import encode_samples, reply_text
from tailora.errors import DataError
from tailora.kernels.loss import FORMS, Batch
from tailora.train.kernel_comparison import tolerance
from tailora.train.loss import BatchLayout, batches_within, evaluate
from tailora.train.trainable import Trainable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
        examples += [_without_end_of_turn(result.example, chat_tokenizer) for result in encoded]
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


def _without_end_of_turn(example: Example, chat_tokenizer: ChatTokenizer) -> Example:
    last = int(np.flatnonzero(example.labels != IGNORED)[-1])
    while last and int(example.labels[last]) in chat_tokenizer.special_ids:
        last -= 1
    return example.beginning(last + 1)


def log_likelihoods(
    model: Trainable, choices: TokenizedChoices, layout: BatchLayout, *, token_budget: int, share_prompts: bool = False
) -> Floats:
    """Returns the log-likelihood of every reply given its prompt, in nats: (examples,).

    share_prompts: compute a prompt once for all its replies, which `reason_against_shared_prompts` must allow.
    """
    if not share_prompts:
        return -evaluate(model, choices.examples, layout=layout, token_budget=token_budget).sums
    questions = [[choices.examples[i] for i in range(*bounds)] for bounds in pairwise(choices.starts.tolist())]
    losses = shared_prompt_losses(model, questions, layout.loss, token_budget=token_budget)
    likelihoods: Floats = -np.concatenate([np.zeros(0), *losses])
    return likelihoods


def right_is_likeliest(choices: TokenizedChoices, values: Floats) -> NDArray[np.bool_]:
    """Returns True if the right reply has the highest value: (questions,). Of equal values the first one counts."""
    questions = zip(pairwise(choices.starts.tolist()), choices.answers, strict=True)
    return np.array([values[start:stop].argmax() == right for (start, stop), right in questions], dtype=np.bool_)


# ---- Replies that share their prompt
#
#   tokens     | prompt but its last token | last, reply 1 | last, reply 2 | ... | prompt of the next question | ...
#   positions  | 0 .. p-2                  | p-1, p, ...   | p-1, p, ...   |
#   attends to | what is before it         | the prompt, and what is before it in its own reply
#
# The last token of the prompt is repeated, so that every prediction has its own position. A reply attends to the same
# tokens as in a separate row, so its log-likelihood is the same, with less work: four replies of 8 tokens to a prompt
# of 100 take 135 tokens instead of 432.


MASKED_ATTENTION = ("sdpa", "eager")  # transformers' attention that takes a mask of (queries, keys)


@dataclass(frozen=True, eq=False, slots=True)
class SharedPrompt:
    """One question with its replies; all (tokens,)."""

    ids: Ints
    positions: Ints
    replies: Ints  # index of the reply that the token belongs to, -1 for the prompt
    targets: Ints  # the next token, or IGNORED


def share_prompt(replies: Sequence[Example]) -> SharedPrompt:
    """Returns the replies' common prompt once, followed by each reply."""
    prompt = min(int(np.flatnonzero(reply.labels != IGNORED)[0]) for reply in replies)  # tokens before the first label
    columns = zip(*(reply.input_ids[:prompt].tolist() for reply in replies), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns)) - 1  # without the last token
    parts = [(replies[0].input_ids[:shared], np.full(shared, IGNORED), 0, -1)]
    parts += [(reply.input_ids[shared:-1], reply.labels[shared + 1 :], shared, n) for n, reply in enumerate(replies)]
    return SharedPrompt(
        ids=np.concatenate([ids for ids, _, _, _ in parts]).astype(np.int64),
        positions=np.concatenate([np.arange(start, start + len(ids)) for ids, _, start, _ in parts]),
        replies=np.concatenate([np.full(len(ids), reply) for ids, _, _, reply in parts]),
        targets=np.concatenate([targets for _, targets, _, _ in parts]).astype(np.int64),
    )


def shared_prompt_losses(
    model: Trainable, questions: Sequence[Sequence[Example]], form: str, *, token_budget: int
) -> list[Floats]:
    """Returns the loss of every reply in nats, by question: a list of (replies,).

    form: how the loss is computed, a key of FORMS.
    token_budget: most tokens in one forward pass; a longer question runs alone.
    """
    shared = [share_prompt(replies) for replies in questions]
    lengths = np.array([len(question.ids) for question in shared], dtype=np.int64)
    losses: list[Floats] = [np.zeros(0)] * len(shared)
    with torch.no_grad(), evaluating(model), constant_adapters(model.base_model):
        for batch in batches_within(token_budget, lengths, packed=True):
            for i, nats in zip(batch, _batch_losses(model, [shared[i] for i in batch], form), strict=True):
                losses[i] = nats
    return losses


def _batch_losses(model: Trainable, questions: Sequence[SharedPrompt], form: str) -> list[Floats]:
    """Returns the loss of every reply, by question, from one forward pass."""
    parameter = next(model.parameters())
    ids, positions, replies, targets = (
        np.concatenate([getattr(question, name) for question in questions])  # (tokens,)
        for name in ("ids", "positions", "replies", "targets")
    )
    question_of = np.repeat(np.arange(len(questions)), [len(question.ids) for question in questions])  # (tokens,)
    owners, reply_of = (torch.from_numpy(array).to(parameter.device) for array in (question_of, replies))
    attends = _attention_mask(owners, reply_of, parameter.dtype)  # (tokens, tokens)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": attends[None, None],
    }
    batch = Batch.of(inputs, targets[None], replies[None]).to(parameter.device)
    losses = FORMS[form](model, batch).cpu().double().numpy()  # (learned,)
    ends = np.cumsum([int((question.targets != IGNORED).sum()) for question in questions])[:-1]
    by_question = zip(np.split(batch.owners, ends), np.split(losses, ends), strict=True)
    return [np.bincount(reply, nats).astype(np.float64) for reply, nats in by_question]


def _attention_mask(questions: Tensor, replies: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where the row's token attends to the column's, the lowest number elsewhere: (tokens, tokens)."""
    order = torch.arange(len(questions), device=questions.device)
    attends = (questions[:, None] == questions) & (order[:, None] >= order)
    attends &= (replies == -1) | (replies[:, None] == replies)
    return torch.zeros(attends.shape, dtype=dtype, device=attends.device).masked_fill_(~attends, torch.finfo(dtype).min)


def reason_against_shared_prompts(
    model: Trainable, choices: TokenizedChoices, layout: BatchLayout, *, token_budget: int
) -> str | None:
    """Returns why this model cannot share prompts, tried on the first question; None if it can."""
    replies = choices.examples.select(range(int(choices.starts[1])))
    separate = evaluate(model, replies, layout=layout, token_budget=token_budget).sums
    return compare_with_separate(model, list(replies), layout.loss, separate)


def compare_with_separate(model: Trainable, replies: Sequence[Example], form: str, separate: Floats) -> str | None:
    """Returns why these replies cannot share their prompt; None if their losses equal `separate`."""
    config = cast(Any, model.base_model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None:
        return f"the model uses a sliding window of {window}"
    if config._attn_implementation not in MASKED_ATTENTION:
        return f"the model uses {config._attn_implementation}"
    shared: Floats = np.full(len(replies), np.inf)
    with torch.no_grad(), evaluating(model), suppress(TypeError):  # a forward that takes no position_ids or mask
        shared = _batch_losses(model, [share_prompt(replies)], form)[0]
    error = float(np.linalg.norm(shared - separate) / np.linalg.norm(separate))
    allowed = tolerance("loss", next(model.base_model.parameters()).dtype)
    return None if error <= allowed else f"losses differ from separate rows by {error:.1e} (allowed {allowed:.0e})"
