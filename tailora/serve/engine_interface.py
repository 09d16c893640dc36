"""Engine: the interface between the server and what runs the model.

The server gives an engine requests, each with the adapter that it is for, and gets the tokens one by one. There are
two: `ContinuousEngine` (serve/continuous_batching.py) and `PaddedEngine` (serve/padded_batching.py). `make_engine`
chooses one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Event
from typing import Literal

from tailora.core.adapter_set import AdapterSet
from tailora.quiet import silent_loggers


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    max_tokens: longest answer, in tokens.
    temperature: 0 takes always the likeliest token.
    top_p: take from the likeliest tokens with this total probability.
    top_k: take from this many of the likeliest tokens; 0 for all.
    seed: of this request alone: the tokens do not depend on the requests beside it.
    logprobs: how many of the likeliest tokens to return with each token; None for no log-probabilities.
    ignore_eos: generate max_tokens tokens, whatever they are.
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
    """A prompt, and the name that its adapter has in the engine's AdapterSet; None for the base."""

    id: str
    prompt_ids: tuple[int, ...]
    adapter: str | None
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    logprob: its log-probability under the model, before temperature, top_k and top_p change the distribution.
    top: the likeliest tokens and their log-probabilities, as many as `SamplingParams.logprobs`, the likeliest first.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer. It follows the last token, which may be an end-of-sequence token ("stop")."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""  # of an error


TRIAL_SECONDS = 120  # for the two tokens of a large model on a CPU
EngineName = Literal["auto", "continuous", "padded"]
EventHandler = Callable[[Token | Finish], None]


class Engine(ABC):
    """Runs requests in a thread of its own. All methods may be called from any thread.

    adapter_set: the base model and its adapters. Change it only within `paused`.
    eos_token_ids: tokens that end an answer.
    max_positions: longest prompt and answer together, in tokens.
    """

    adapter_set: AdapterSet
    eos_token_ids: frozenset[int]
    max_positions: int

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self, timeout: float) -> None:
        """Finishes the requests that it has, for at most `timeout` seconds; those left end with "cancelled"."""

    @abstractmethod
    def submit(self, request: Request, handle: EventHandler) -> None:
        """Adds a request. `handle` is called with every Token, at last with one Finish; in the engine's thread, or in
        the one that cancels.

        The caller has checked that the adapter exists, and that the request fits into `max_positions`.
        Raises AdapterError for an unknown adapter, RuntimeError if the engine is stopped.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Ends a request with "cancelled". Does nothing if it has ended."""

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """Within the block no forward runs, so that adapters can be added or removed; requests wait and are kept."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False if it does not answer requests any more."""

    @property
    @abstractmethod
    def load(self) -> tuple[int, int]:
        """The number of requests that run, and of those that wait."""


def make_engine(
    adapter_set: AdapterSet,
    eos_token_ids: Collection[int],
    kind: EngineName = "auto",
    *,
    max_positions: int,
    max_requests: int = 64,
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns the engine of this name, not started; "auto" is the continuous one if it answers with this model.

    note: is called with the reason why it was not chosen.
    """
    from tailora.serve.continuous_batching import ContinuousEngine, obstacle  # here, since both import this file
    from tailora.serve.padded_batching import PaddedEngine

    def new(engine: type[ContinuousEngine | PaddedEngine]) -> Engine:
        return engine(adapter_set, eos_token_ids, max_positions=max_positions, max_requests=max_requests)

    if kind == "auto":  # what a model says of itself is not always true, so the engine has to show it
        problem = obstacle(adapter_set.base_model) or trial_error(new(ContinuousEngine))
        if problem:
            note(f"no continuous batching: {problem}")
        kind = "padded" if problem else "continuous"
    return new(ContinuousEngine if kind == "continuous" else PaddedEngine)


def trial_error(engine: Engine) -> str:
    """Returns why a short answer of the base fails; "" if it does not. The engine is stopped afterwards."""
    finish, ended = list[Finish](), Event()

    def handle(event: Token | Finish) -> None:
        if isinstance(event, Finish):
            finish.append(event)
            ended.set()

    with silent_loggers("ContinuousBatchingLogger"):  # of transformers, which prints a traceback
        try:
            engine.start()
            request = Request("trial", (1, 2, 3), None, SamplingParams(2, temperature=0.0, ignore_eos=True))
            engine.submit(request, handle)
            if not ended.wait(TRIAL_SECONDS):
                return f"no answer in {TRIAL_SECONDS} seconds"
        except (RuntimeError, ValueError, MemoryError) as error:  # of the cache, which is made for the model's shapes
            return str(error) or type(error).__name__
        finally:
            engine.stop(0)
    return finish[0].message if finish[0].reason == "error" else ""
