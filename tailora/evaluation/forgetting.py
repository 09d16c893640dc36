"""What training took away: how far the tuned model is from the base on text that the task did not ask for.

The text is the base's own unless the user gives another: sampled from it, so that KL(base || tuned) is estimated by
its definition, as an expectation over what the base would say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tailora.core.attach import evaluating
from tailora.data.demo import resolve
from tailora.data.prepare import prepare

TEXTS, LENGTH = 16, 64  # of the base's own


@dataclass(frozen=True)
class Forgetting:
    kl: float  # KL(base || tuned), nats per token
    loss_before: float  # nats per token of the text, by the base
    loss_after: float
    tokens: int


def own_texts(
    model: Any, tokenizer: Any, *, count: int = TEXTS, length: int = LENGTH, seed: int = 0
) -> list[list[int]]:
    """Texts that the model, its adapters off, writes by itself at temperature 1. The random state stays as it was."""
    start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.full((count, 1), start, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model), model.disable_adapter():
        torch.manual_seed(seed)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=start,
        )
    texts: list[list[int]] = written.tolist()
    return texts


def forgetting(model: Any, texts: Sequence[Sequence[int]]) -> Forgetting:
    """The active adapters, or what was trained whole, against the base on these texts, (ids of each).

    Raises ValueError when no text has two tokens.
    """
    known = [torch.tensor([list(ids)], device=model.device) for ids in texts if len(ids) > 1]
    if not known:
        raise ValueError("no text has two tokens")
    with torch.no_grad(), evaluating(model):
        with model.disable_adapter():
            base = [
                _log_probabilities(model, ids).to("cpu", torch.bfloat16 if len(known) > 64 else torch.float32)
                for ids in known
            ]
        kl, before, after, tokens = 0.0, 0.0, 0.0, 0
        for ids, old in zip(known, base, strict=True):
            new, wide = _log_probabilities(model, ids), old.to(ids.device).float()
            kl += float((wide.exp() * (wide - new)).sum())
            wanted = ids[0, 1:, None]
            before -= float(wide.gather(1, wanted).sum())
            after -= float(new.gather(1, wanted).sum())
            tokens += len(wanted)
    return Forgetting(kl / tokens, before / tokens, after / tokens, tokens)


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of each token after the first: (length - 1, vocabulary), float32."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return F.log_softmax(logits.float(), dim=-1)


def texts_of(source: str, model: Any, tokenizer: Any, *, count: int = 64, length: int = 256) -> list[list[int]]:
    """The first texts of a file or data set in any form that training reads, (ids of each). Raises DataError."""
    rows = model.get_input_embeddings().weight.shape[0]
    place = resolve(source, "eval_data")
    examples = prepare(place, tokenizer, eval_source=place, max_length=length, embedding_rows=rows).eval
    return [examples[i].input_ids.tolist() for i in range(min(count, len(examples)))]
