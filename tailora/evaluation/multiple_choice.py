"""Replies to one prompt in one forward: the prompt is computed once, and every reply goes on from it.

    row        | prompt but its last token | last, reply 1 | last, reply 2 | ... | prompt of the next question | ...
    positions  | 0 .. p-2                  | p-1, p, ...   | p-1, p, ...   |
    sees       | what is before it         | the prompt, and what is before it in its own branch

The last token of the prompt is repeated, so that every prediction has a place of its own. What a reply is given is what
it is given alone, so log-likelihoods are those of one row each, with less work: four replies of 8 tokens to 100 take
135 tokens instead of 432.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailora.core.attach import evaluating
from tailora.data.chat_template import Codec, codec_of
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.schemas import Choices
from tailora.data.tokenize import Encoded, encode_all, reply_text
from tailora.errors import DataError
from tailora.kernels.loss import FORMS, HALF_TOLERANCE, TOLERANCE, Batch
from tailora.train.loss import BatchLayout, budgeted, evaluate
from tailora.train.trainable import Trainable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MASKED = ("sdpa", "eager")  # attention of transformers that takes a mask of (queries, keys)


@dataclass(frozen=True, eq=False, slots=True)
class Tree:
    """One question with its replies, (length,) each."""

    ids: Ints
    positions: Ints
    branches: Ints  # which reply, -1 for the prompt
    targets: Ints  # of the next token, or -100


def grown(replies: Sequence[Example]) -> Tree:
    """The replies' common prompt once, and a branch for each."""
    first = min(int(np.flatnonzero(each.labels != IGNORED)[0]) for each in replies)
    columns = zip(*(each.input_ids[:first].tolist() for each in replies), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns)) - 1  # without the last
    parts = [(replies[0].input_ids[:shared], np.full(shared, IGNORED), 0, -1)]
    parts += [(each.input_ids[shared:-1], each.labels[shared + 1 :], shared, n) for n, each in enumerate(replies)]
    return Tree(
        ids=np.concatenate([ids for ids, _, _, _ in parts]).astype(np.int64),
        positions=np.concatenate([np.arange(start, start + len(ids)) for ids, _, start, _ in parts]),
        branches=np.concatenate([np.full(len(ids), branch) for ids, _, _, branch in parts]),
        targets=np.concatenate([targets for _, targets, _, _ in parts]).astype(np.int64),
    )


def branch_losses(model: Trainable, trees: Sequence[Tree], form: str, device: torch.device) -> list[Floats]:
    """Nats of every reply, by question, in one forward."""
    ids, positions, branches, targets = (
        torch.from_numpy(np.concatenate([getattr(tree, name) for tree in trees])).to(device)
        for name in ("ids", "positions", "branches", "targets")
    )
    sizes = [len(tree.ids) for tree in trees]
    questions = torch.repeat_interleave(torch.arange(len(trees)), torch.tensor(sizes)).to(device)
    wanted = targets != IGNORED
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "attention_mask": _mask(questions, branches, next(model.parameters()).dtype)[None, None],
    }
    losses = FORMS[form](model, Batch(inputs, wanted[None], targets[wanted])).cpu().double().numpy()
    owners = branches[wanted].cpu().numpy()
    ends = np.cumsum([int((tree.targets != IGNORED).sum()) for tree in trees])[:-1]
    parts = zip(np.split(owners, ends), np.split(losses, ends), strict=True)
    return [np.bincount(owner, nats).astype(np.float64) for owner, nats in parts]


def _mask(questions: Tensor, branches: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token sees another, the lowest number where not: (tokens, tokens)."""
    order = torch.arange(len(questions), device=questions.device)
    seen = (questions[:, None] == questions) & (order[:, None] >= order)
    seen &= (branches == -1) | (branches[:, None] == branches)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def obstacle_to_branches(model: Trainable, replies: Sequence[Example], form: str, alone: Floats) -> str | None:
    """Why this model cannot be given branches, or None: these replies, with nats `alone`, come out the same."""
    config = cast(Any, model.base_model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None:
        return f"its attention has a window of {window}"
    if config._attn_implementation not in MASKED:
        return f"its attention is {config._attn_implementation}"
    together: Floats = np.full(len(replies), np.inf)
    with torch.no_grad(), evaluating(model), suppress(TypeError):  # forward takes no such keyword
        together = branch_losses(model, [grown(replies)], form, next(model.parameters()).device)[0]
    apart = float(np.linalg.norm(together - alone) / np.linalg.norm(alone))
    allowed = TOLERANCE.get(next(model.base_model.parameters()).dtype, HALF_TOLERANCE)
    return None if apart <= allowed else f"replies come out otherwise (by {apart:.1e}, allowed {allowed:.0e})"


def branched(model: Trainable, questions: Sequence[Sequence[Example]], form: str, *, token_budget: int) -> list[Floats]:
    """Nats of every reply to every question, with no forward above `token_budget` tokens but of a single question."""
    trees = [grown(replies) for replies in questions]
    lengths = np.array([len(tree.ids) for tree in trees], dtype=np.int64)
    found: list[Floats] = [np.zeros(0)] * len(trees)
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for batch in budgeted(lengths, token_budget, packed=True):
            nats = branch_losses(model, [trees[i] for i in batch], form, device)
            for i, each in zip(batch, nats, strict=True):
                found[i] = each
    return found


# ---- Which of several replies the model holds for the likeliest, as lm-evaluation-harness asks it.
#
# log p(reply | prompt) is summed over the reply's own tokens; the token that ends a turn is not counted. `accuracy`
# takes the likeliest reply, `accuracy_norm` the one with the highest log-likelihood per UTF-8 byte, so that long ones
# have a chance (acc and acc_norm there, which divides by characters).


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


def log_likelihoods(
    model: Trainable, asked: Options, *, rows: BatchLayout, token_budget: int, branches: bool = False
) -> Floats:
    """Nats of every reply given its prompt: (examples,).

    branches: a prompt is computed once for all its replies, where `obstacle_to_sharing` sees none.
    """
    if not branches:
        return -evaluate(model, asked.examples, rows=rows, token_budget=token_budget).sums
    places = zip(asked.starts, asked.starts[1:], strict=False)
    questions = [[asked.examples[place] for place in range(start, stop)] for start, stop in places]
    return -np.concatenate([np.zeros(0), *branched(model, questions, rows.loss, token_budget=token_budget)])


def obstacle_to_sharing(model: Trainable, asked: Options, *, rows: BatchLayout, token_budget: int) -> str | None:
    """Why this model's prompts cannot be computed once, tried on the first question; None if they can."""
    replies = asked.examples.select(range(int(asked.starts[1])))
    alone = evaluate(model, replies, rows=rows, token_budget=token_budget).sums
    return obstacle_to_branches(model, list(replies), rows.loss, alone)


def picked(asked: Options, likelihoods: Floats) -> NDArray[np.bool_]:
    """Whether the right reply was the one with the highest value: (questions,). The first of equal ones is taken."""
    parts = zip(asked.starts, asked.starts[1:], asked.answers, strict=False)
    return np.array([likelihoods[start:stop].argmax() == right for start, stop, right in parts], dtype=np.bool_)
