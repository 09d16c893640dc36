"""Multiple choice: which of several replies has the highest log-likelihood, as in lm-evaluation-harness.

log p(reply | prompt) is summed over the reply's own tokens, without the token that ends a turn. `accuracy` takes the
reply with the highest log-likelihood, `accuracy_norm` the one with the highest log-likelihood per UTF-8 byte, so that
long replies are not at a disadvantage (acc and acc_norm there; acc_norm divides by characters).

The prompt of a question can be computed once for all its replies (second part of this file).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tailora.core.attach import evaluating
from tailora.core.inference import constant_adapters
from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.data.schemas import Choices
from tailora.data.tokenize import encode_samples, reply_text
from tailora.errors import DataError
from tailora.kernels.loss import FORMS, Batch
from tailora.train.kernel_comparison import tolerance
from tailora.train.loss import BatchLayout, evaluate
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
    left_out: int  # questions with a reply that max_length would cut


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
    bounds = pairwise(choices.starts.tolist())
    losses = [shared_prompt_losses(model, [choices.examples[i] for i in range(*ends)], layout.loss) for ends in bounds]
    likelihoods: Floats = -np.concatenate(losses)
    return likelihoods


def right_is_likeliest(choices: TokenizedChoices, values: Floats) -> NDArray[np.bool_]:
    """True where the right reply has the highest value: (questions,). Of equal values the first one counts."""
    questions = zip(pairwise(choices.starts.tolist()), choices.answers, strict=True)
    return np.array([values[start:stop].argmax() == right for (start, stop), right in questions], dtype=np.bool_)


# ---- Replies that share their prompt
#
# The prompt but its last token is computed once. Then every reply is a row that attends to the cached prompt and begins
# with that token, which predicts the reply's first: four replies of 8 tokens to a prompt of 100 take 131 tokens instead
# of 432.


def shared_prompt_losses(model: Trainable, replies: Sequence[Example], form: str) -> Floats:
    """Returns the loss of every reply to one question in nats: (replies,).

    form: how the loss is computed, a key of FORMS.
    """
    prompt = min(int(np.flatnonzero(reply.labels != IGNORED)[0]) for reply in replies)  # tokens before the first label
    columns = zip(*(reply.input_ids[:prompt].tolist() for reply in replies), strict=False)
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = max(alike - 1, 0)  # without the last token
    rows = [torch.from_numpy(reply.input_ids[shared:-1]).long() for reply in replies]
    ids = pad_sequence(rows, batch_first=True)  # (replies, longest)
    targets = np.full(ids.shape, IGNORED, dtype=np.int64)
    for row, reply in zip(targets, replies, strict=True):
        row[: len(reply.labels) - shared - 1] = reply.labels[shared + 1 :]
    owners = np.broadcast_to(np.arange(len(replies))[:, None], ids.shape)
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), constant_adapters(model.base_model):
        inputs: dict[str, Any] = {"input_ids": ids}
        if shared:
            start = torch.from_numpy(replies[0].input_ids[:shared]).long()[None].to(device)
            parameters = signature(model.base_model.forward).parameters
            name = "cache" if "cache" in parameters else "past_key_values"  # in earlier versions of transformers
            inputs[name] = model(input_ids=start, use_cache=True, logits_to_keep=1)[name]
            inputs[name].batch_repeat_interleave(len(replies))
        batch = Batch.of(inputs, targets, owners).to(device)
        nats = FORMS[form](model, batch).double().cpu().numpy()
    return np.bincount(batch.owners, nats).astype(np.float64)


def reason_against_shared_prompts(
    model: Trainable, choices: TokenizedChoices, layout: BatchLayout, *, token_budget: int
) -> str | None:
    """Returns why this model cannot share prompts, tried on the first question; None if it can."""
    replies = choices.examples.select(range(int(choices.starts[1])))
    separate = evaluate(model, replies, layout=layout, token_budget=token_budget).sums
    try:
        shared = shared_prompt_losses(model, list(replies), layout.loss)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):  # of a cache of another kind
        return "its cache cannot be shared"
    error = float(np.linalg.norm(shared - separate) / np.linalg.norm(separate))
    allowed = tolerance("loss", next(model.base_model.parameters()).dtype)
    return None if error <= allowed else f"losses differ from separate rows by {error:.1e} (allowed {allowed:.0e})"
