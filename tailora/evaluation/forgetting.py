"""Forgetting: how far the tuned model is from the base on text that is not about the task.

By default the text is sampled from the base, so KL(base || tuned) is estimated by its definition, as an expectation
over the base's own text. Users can also provide text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tailora.core.attach import evaluating
from tailora.core.inference import constant_adapters
from tailora.data.chat_template import DataSettings
from tailora.data.dataset import Examples
from tailora.data.demo import resolve_demo
from tailora.data.image_processor import text_tokenizer
from tailora.data.prepare import check_vocabulary, prepare
from tailora.errors import DataError
from tailora.train.state import seeded

KL_TEXTS, KL_TOKENS = 16, 2048  # most held-out conversations, and most of their tokens, to measure KL on
SAMPLES, SAMPLE_LENGTH = 16, 64  # texts written by the base, and their tokens


@dataclass(frozen=True)
class Forgetting:
    kl: float  # KL(base || tuned), nats per token
    loss_before: float  # nats per token of the text, by the base
    loss_after: float
    tokens: int


def sample_texts(
    model: Any, tokenizer: Any, *, count: int = SAMPLES, length: int = SAMPLE_LENGTH, seed: int = 0
) -> list[list[int]]:
    """Returns token ids sampled at temperature 1 from the model without adapters. Random states do not change."""
    tokenizer = text_tokenizer(tokenizer)
    start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.full((count, 1), start, device=model.device)
    with seeded(seed), torch.no_grad(), evaluating(model), model.disable_adapter():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=start,
        )  # (count, 1 + length)
    texts: list[list[int]] = output.tolist()
    return texts


def kl_texts(held_out: Examples) -> list[list[int]]:
    """Returns the first tokens of the first examples; few, since all log-probabilities are kept for each token."""
    texts: list[list[int]] = []
    left = KL_TOKENS
    for i in range(min(len(held_out), KL_TEXTS)):
        texts.append(held_out[i].sequences[0].input_ids[:left].tolist())
        left -= len(texts[-1])
        if left < 2:  # the first token of a text is not predicted
            break
    return texts


def read_texts(source: str, model: Any, tokenizer: Any, *, count: int = 64, length: int = 256) -> list[list[int]]:
    """Returns token ids of the beginnings of the first texts in a file or data set, as training reads them.

    Raises DataError.
    """
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    data = resolve_demo(source, "eval_data")
    examples = prepare(data, tokenizer, DataSettings(max_length=length), eval_source=data, split="validation").eval
    first_blocks = np.unique(examples.source_indices, return_index=True)[1]
    return [examples[int(i)].sequences[0].input_ids.tolist() for i in first_blocks[:count]]


def forgetting(model: Any, texts: Sequence[Sequence[int]]) -> Forgetting:
    """Compares the active adapters, or a fully fine-tuned model, with the base on these texts (token ids).

    Raises DataError if no text has two tokens.
    """
    batches = [torch.tensor([list(ids)], device=model.device) for ids in texts if len(ids) > 1]  # (1, length) each
    if not batches:
        raise DataError("measuring forgetting needs texts of at least two tokens; use longer texts")
    with torch.no_grad(), evaluating(model):
        with model.disable_adapter():
            base = [_log_probabilities(model, ids).cpu() for ids in batches]
        kl, before, after, tokens = 0.0, 0.0, 0.0, 0
        with constant_adapters(model.base_model):
            for ids, kept in zip(batches, base, strict=True):
                new, old = _log_probabilities(model, ids), kept.to(ids.device)  # (length - 1, vocabulary)
                kl += float((old.exp() * (old - new)).sum())
                targets = ids[0, 1:, None]
                before -= float(old.gather(1, targets).sum())
                after -= float(new.gather(1, targets).sum())
                tokens += len(targets)
    return Forgetting(kl / tokens, before / tokens, after / tokens, tokens)


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Returns the log-probabilities of each token after the first: (length - 1, vocabulary), float32."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return F.log_softmax(logits.float(), dim=-1)
