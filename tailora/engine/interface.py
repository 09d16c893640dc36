"""The interface of the engines that run the model, for the server and for training: requests, tokens and methods.

`ContinuousEngine` (engine/continuous_batching.py) and `PaddedEngine` (engine/padded_batching.py) implement it. They
turn requests into the rows of a batch. `make_engine` in engine/continuous_batching.py chooses one for a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import ProcessorMixin

from tailora.core.adapter_set import AdapterSet
from tailora.data.images import Image

if TYPE_CHECKING:
    from llguidance import LLMatcher

PIXELS_OF_REQUEST = 64_000_000  # of all images of a request, and of a batch; decoded, they need 192 MB


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample the tokens of an answer.

    logprobs: how many of the most likely tokens to return with each token; None for no log-probabilities.
    at_temperature: return log-probabilities of the distribution that is sampled from, before top_k and top_p.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 always chooses the most likely token
    top_p: float = 1.0  # sample from the most likely tokens with this total probability
    top_k: int = 0  # sample from this many of the most likely tokens; 0 for all
    seed: int = 0  # the same seed gives the same tokens, whatever other requests run at the same time
    logprobs: int | None = None
    at_temperature: bool = False
    ignore_eos: bool = False  # generate max_tokens tokens, including any end-of-sequence tokens


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the name of its adapter in the engine's AdapterSet; None for the base model. Ids are not reused.

    images: in the order of their placeholders in the prompt. Only `PaddedEngine` supports them.
    """

    id: str
    prompt_ids: tuple[int, ...]
    adapter: str | None
    params: SamplingParams
    grammar: "LLMatcher | None" = None  # for the answer, not shared with other requests; None for any text
    images: tuple[Image, ...] = ()


def positions_of_short_factors(config: Any) -> int | None:
    """Returns the positions up to which requests may share a batch; None for all models but those with longrope.

    For longer requests, transformers changes the frequencies of the whole batch.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def pixel_count(images: Iterable[Image]) -> int:
    return sum(image.width * image.height for image in images)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    logprob: its log-probability under the model, before top_k and top_p change the distribution, and before
        temperature unless `SamplingParams.at_temperature`.
    top: the `SamplingParams.logprobs` most likely tokens and their log-probabilities, in descending order.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Follows the last token of an answer. "stop": it is an end-of-sequence token, or completes the grammar."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""  # for an error


EventHandler = Callable[[Token | Finish], object]


class Engine(ABC):
    """Runs requests in its own thread. All methods may be called from any thread.

    processor: of a vision-language model, not used by other threads; None if requests have no images.
    """

    adapter_set: AdapterSet  # the base model and its adapters. Only change it within `paused`.
    eos_token_ids: frozenset[int]
    max_positions: int  # maximum length of prompt plus answer, in tokens
    processor: ProcessorMixin | None = None

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None:
        """Ends all requests with "cancelled"."""

    @abstractmethod
    def submit(self, request: Request, handle: EventHandler) -> None:
        """Adds a request, which must fit into `max_positions`.

        handle: called with every Token and then one Finish, in the engine's thread or the one that calls `cancel`.
        Raises AdapterError for an unknown adapter, RuntimeError if the engine is not running.
        """

    def submit_group(self, group: "Sequence[tuple[Request, EventHandler]]") -> None:
        """Adds requests that differ only in id and seed, so that their prompt is computed once. See `submit`.

        They cannot be cancelled one by one: others wait for the prompt that the first one computes.
        """
        for request, handle in group:
            self.submit(request, handle)

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Ends a request with "cancelled". Does nothing if it has already ended."""

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """No forward runs within the block, so adapters can be added and removed. Requests wait."""

    def parameters_changed(self) -> None:  # noqa: B027  # an engine need not keep anything
        """Forgets what was computed from the adapters' parameters. Call it within `paused` after training them."""

    def free_cache(self) -> None:  # noqa: B027  # an engine need not have one
        """Frees the memory of the cache until the next request. Call it within `paused`, without requests."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False once it no longer answers requests."""

    @property
    @abstractmethod
    def load(self) -> tuple[int, int]:
        """The number of running and of waiting requests."""
