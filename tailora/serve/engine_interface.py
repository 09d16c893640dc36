"""What the server asks of an engine, which runs the model: the requests, the tokens of the answers, and the methods.

`ContinuousEngine` (serve/continuous_batching.py) and `PaddedEngine` (serve/padded_batching.py) implement it. They turn
requests into the rows of a batch. `make_engine` (in the first of these) chooses one of them for a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher

from tailora.core.adapter_set import AdapterSet


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen.

    max_tokens: longest answer, in tokens.    temperature: 0 always chooses the likeliest token.
    top_p: choose among the likeliest tokens with this total probability.
    top_k: choose among this many of the likeliest tokens; 0 for all.
    seed: the same seed gives the same tokens, whatever other requests run at the same time.
    logprobs: how many of the likeliest tokens to return with each token; None for no log-probabilities.
    ignore_eos: generate max_tokens tokens, including any end-of-sequence tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the name of its adapter in the engine's AdapterSet; None for the base model. Ids are not reused.

    grammar: llguidance's matcher of what the answer may be, for this request alone; None for any text.
    """

    id: str
    prompt_ids: tuple[int, ...]
    adapter: str | None
    params: SamplingParams
    grammar: LLMatcher | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    logprob: its log-probability under the model, before temperature, top_k and top_p change the distribution.
    top: the `SamplingParams.logprobs` likeliest tokens and their log-probabilities, likeliest first.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer. It follows the last token: for "stop" an end-of-sequence one or the last of a grammar."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""  # of an error


EventHandler = Callable[[Token | Finish], None]


class Engine(ABC):
    """Runs requests in its own thread. All methods may be called from any thread.

    adapter_set: the base model and its adapters. Only change it within `paused`.
    eos_token_ids: tokens that end an answer.    max_positions: maximum length of prompt plus answer, in tokens.
    """

    adapter_set: AdapterSet
    eos_token_ids: frozenset[int]
    max_positions: int

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self, timeout: float) -> None:
        """Gives its requests up to `timeout` seconds to finish; the others end with "cancelled"."""

    @abstractmethod
    def submit(self, request: Request, handle: EventHandler) -> None:
        """Adds a request, which must fit into `max_positions`.

        handle: called with every Token and finally with one Finish, in the engine's thread or in the one that cancels.
        Raises AdapterError for an unknown adapter, RuntimeError if the engine is not running.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Ends a request with "cancelled". Does nothing if it has already ended."""

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """No forward runs within the block, so adapters can be added and removed. Requests wait."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False once it no longer answers requests."""

    @property
    @abstractmethod
    def load(self) -> tuple[int, int]:
        """The number of running and of waiting requests."""
