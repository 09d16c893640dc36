"""Sampling: each request has its own settings and seed, independent of the rest of the batch.

`json_matcher` turns a JSON schema into a grammar that restricts the tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailora.engine.interface import EventHandler, Finish, Request, SamplingParams, Token
from tailora.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIKELIEST = 1024  # tokens to try for top_p, which seldom needs more; sorting the vocabulary takes 20 times as long
WHITESPACE = r"(\n {0,20}| )?"  # in JSON; without a limit, some models write endless whitespace
LOWEST_LOGPROB = -9999.0  # instead of minus infinity, which JSON lacks; OpenAI's number
OVERFLOW = "the logits overflowed; use a smaller scale"


@dataclass(eq=False)
class RunningRequest:
    """A request in an engine and its progress. `handle` is called under `lock`, and never after Finish."""

    request: Request
    handle: EventHandler
    name: str = ""  # of the request in transformers' manager
    generator: torch.Generator = field(init=False)
    lock: Lock = field(default_factory=Lock)
    tokens: int = 0
    is_finished: bool = False
    ends_early: bool = False  # before max_tokens, without an end-of-sequence token

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.params.seed)

    def add(self, token: Token, eos_token_ids: Collection[int]) -> None:
        """Passes a token to `handle`, and Finish after the last one."""
        params = self.request.params
        with self.lock:
            if self.is_finished:
                return
            self.tokens += 1
            self.handle(token)
            grammar = self.request.grammar
            if token.id in eos_token_ids and not params.ignore_eos:
                self._finish(Finish("stop"))
            elif grammar is not None and grammar.consume_token(token.id) and grammar.is_stopped():
                self.ends_early = True
                self._finish(Finish("stop"))
            elif self.tokens >= params.max_tokens:
                self._finish(Finish("length"))

    def fail(self, message: str) -> None:
        self.ends_early = True
        self.finish(Finish("error", message))

    def finish(self, finish: Finish) -> None:
        with self.lock:
            if not self.is_finished:
                self._finish(finish)

    def _finish(self, finish: Finish) -> None:
        self.is_finished = True
        self.handle(finish)


class ChosenTokens:
    """A logits processor of transformers with the tokens of `choose`, (rows, vocabulary) -> the token of each row."""

    supports_continuous_batching = True

    def __init__(self, choose: Callable[[Tensor], list[int]]) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        chosen = torch.tensor(self.choose(scores), device=scores.device)
        return torch.zeros_like(scores).scatter_(1, chosen[:, None], 1)


def next_tokens(logits: Tensor, requests: Sequence[RunningRequest | None], eos_token_ids: Collection[int]) -> list[int]:
    """Chooses the next token of each request, passes it to the request, and returns the ids.

    logits: (requests, vocabulary). None is a request that has ended; its token is arbitrary. A request whose logits
    are not finite ends with an error.
    """
    best, likeliest = logits.max(-1)
    ids: list[int] = likeliest.tolist()
    for row, (running, is_finite) in enumerate(zip(requests, best.isfinite().tolist(), strict=True)):
        if running is None or running.is_finished:
            continue
        if not is_finite:
            running.fail(OVERFLOW)
            continue
        params, grammar, allowed = running.request.params, running.request.grammar, logits[row]
        if grammar is not None:
            allowed = allow_only(allowed, grammar)
            ids[row] = int(allowed.argmax())
            if grammar.is_error():
                running.fail(grammar.get_error())
                continue
        if params.temperature:
            ids[row] = sample_token(allowed, params, running.generator)
        token = Token(ids[row])
        if params.logprobs is not None:
            scale = params.temperature if params.at_temperature else 1.0
            logprobs = (logits[row].float() / scale).log_softmax(-1).clamp(min=LOWEST_LOGPROB)
            values, top = (part.tolist() for part in logprobs.topk(min(params.logprobs, len(logprobs))))
            token = Token(token.id, float(logprobs[token.id]), tuple(zip(top, values, strict=True)))
        running.add(token, eos_token_ids)
    return ids


def sample_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Returns a token by inverting the cumulative distribution. logits: (vocabulary,)."""
    logits = logits.double()
    distribution = ((logits - logits.max()) / params.temperature).softmax(-1)  # the largest is 0, whatever divides it
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


# ---- JSON


def json_matcher(schema: dict[str, Any], tokenizer: "LLTokenizer") -> "LLMatcher":
    """Returns a matcher for JSON of a schema. Raises ConfigError if it is invalid, unsupported or too complex."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise ConfigError(matcher.get_error())
    matcher.compute_logit_bias()
    if matcher.is_error():  # no token may come first
        raise ConfigError("no JSON value matches the schema; check $ref, which must not refer to itself alone")
    return matcher


def allow_only(logits: Tensor, matcher: "LLMatcher") -> Tensor:
    """Returns the logits with minus infinity for tokens that the grammar does not allow next. (vocabulary,)."""
    allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8).bool()
    allowed = F.pad(allowed, (0, len(logits) - len(allowed)))  # the head may have more rows than there are tokens
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)
