"""How an engine chooses tokens: each request by its own settings and seed, whatever runs beside it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from tailora.serve.engine_interface import EventHandler, Finish, Request, SamplingParams, Token

LIKELIEST = 1024  # of the vocabulary; top_p seldom needs more, and sorting all takes 20 times as long


@dataclass(eq=False)
class RunningRequest:
    """A request that an engine has, and how far it is. `handle` is called under `lock`, and not after Finish."""

    request: Request
    handle: EventHandler
    generator: torch.Generator = field(init=False)
    lock: Lock = field(default_factory=Lock)
    tokens: int = 0
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.params.seed)

    def add(self, token: Token, eos_token_ids: Collection[int]) -> None:
        """Hands on a token, and the end of the answer after the last one."""
        params = self.request.params
        with self.lock:
            if self.is_finished:
                return
            self.tokens += 1
            self.handle(token)
            if token.id in eos_token_ids and not params.ignore_eos:
                self._finish(Finish("stop"))
            elif self.tokens >= params.max_tokens:
                self._finish(Finish("length"))

    def finish(self, finish: Finish) -> None:
        with self.lock:
            if not self.is_finished:
                self._finish(finish)

    def _finish(self, finish: Finish) -> None:
        self.is_finished = True
        self.handle(finish)


def sample(logits: Tensor, requests: Sequence[RunningRequest | None]) -> list[Token]:
    """Returns the next token of each request from its logits, (requests, vocabulary); None stands for an ended one."""
    likeliest = logits.argmax(-1).tolist()
    tokens = []
    for row, running, first in zip(logits, requests, likeliest, strict=True):
        if running is None:
            tokens.append(Token(first))
            continue
        params = running.request.params
        chosen = first if params.temperature == 0 else sample_token(row, params, running.generator)
        tokens.append(Token(chosen) if params.logprobs is None else with_logprobs(row, chosen, params.logprobs))
    return tokens


def sample_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Returns a token by the inverse of the distribution function. logits: (vocabulary,)."""
    distribution = (logits.double() / params.temperature).softmax(-1)
    probabilities, ids = distribution, None
    if params.top_k or params.top_p < 1:
        probabilities, ids = distribution.topk(min(params.top_k or LIKELIEST, len(logits)))
        if not params.top_k and probabilities.sum() < params.top_p:
            probabilities, ids = distribution.sort(descending=True)
        before = probabilities.cumsum(0) - probabilities
        share = probabilities.sum() if params.top_k else 1  # top_p is a share of what top_k leaves
        probabilities = probabilities * (before < params.top_p * share)
    cumulative = probabilities.cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64).to(cumulative.device) * cumulative[-1]
    position = torch.searchsorted(cumulative, point, right=True).clamp(max=len(cumulative) - 1)
    return int(position if ids is None else ids[position])


def with_logprobs(logits: Tensor, chosen: int, count: int) -> Token:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(chosen, float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
