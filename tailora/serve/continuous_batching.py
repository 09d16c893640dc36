"""ContinuousEngine: requests join and leave the batch at every step, each token with its own adapter.

transformers' continuous batching packs the tokens of all requests into one row and keeps their keys and values in a
paged cache. It knows nothing of adapters and has one seed for all requests. Three of its parts are ours:

    AdapterScheduler   tells which requests are in the next batch, sorted by adapter
    RequestSampler     is its only logits processor: chooses every token, and hands it on
    ErrorRouter        gets what it says about failed requests

Its cache must not share blocks between requests: equal prompts have other keys under another adapter.

On a CPU the attention is ours, too (`attention_by_request`).
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig, LogitsProcessor
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tailora.core.adapter_set import AdapterSet
from tailora.core.packed_batch import PackedBatch, segments_of
from tailora.errors import AdapterError, ConfigError
from tailora.serve.engine_interface import Engine, EventHandler, Finish, Request
from tailora.serve.sampling import RunningRequest, sample

PAGE_SIZE = 32  # tokens of a block of the cache
BATCH_TOKENS = 512  # of one forward; longer prompts take several
CACHE_TOKENS = 32_768  # of all running requests together
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class AdapterScheduler(FIFOScheduler):  # type: ignore[misc]
    """First in, first out; the requests of a batch are sorted by adapter, so that each is one slice of the tokens."""

    engine: "ContinuousEngine"

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        states, *rest = super().schedule_batch(token_budget, cache_budget)
        if states:
            states.sort(key=lambda future: self.engine.adapter_of(future.state.request_id) or "")
            self.engine.set_batch(states)
        return states, *rest


class RequestSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token of every request, and leaves the likeliest of the scores to be the one that it chose."""

    supports_continuous_batching = True

    def __init__(self, engine: "ContinuousEngine") -> None:
        self.engine = engine

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        chosen = torch.tensor([self.engine.next_tokens(scores)], device=scores.device)  # (1, requests)
        return torch.zeros_like(scores).scatter_(1, chosen.mT, 1)


class ErrorRouter(OutputRouter):  # type: ignore[misc]
    """Ends the requests that failed. Tokens do not come this way."""

    def __init__(self, engine: "ContinuousEngine") -> None:
        super().__init__()
        self.engine = engine

    def deliver(self, output: Any) -> None:
        if output.error is not None:
            self.engine.fail(output.request_id, output.error)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


def attention_by_request(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    sliding_window: int | None = None,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns the attention of each request's tokens to its own keys, (1, tokens, heads, d).

    transformers' function for "sdpa" lets all requests see all keys, and masks those of others.
    query: (1, heads, tokens, d).    key, value: (1, key heads, keys, d).
    cu_seq_lens_q, cu_seq_lens_k: where the tokens and keys of each request begin, and where the last ones end.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    outputs = []
    bounds = zip(pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist()), strict=True)
    for (first, stop), (first_key, stop_key) in bounds:
        queries, keys, values = query[:, :, first:stop], key[:, :, first_key:stop_key], value[:, :, first_key:stop_key]
        tokens, past = stop - first, stop_key - first_key - (stop - first)
        if tokens == 1:  # sees all keys; the heads that share keys are its rows
            grouped = queries.reshape(1, key_heads, heads // key_heads, -1)
            output = scaled_dot_product_attention(grouped, keys, values, scale=scaling).reshape(1, 1, heads, -1)
        else:
            mask = None
            if past or (sliding_window is not None and sliding_window < tokens):
                mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=query.device).tril(past)
                mask = mask if sliding_window is None else mask.triu(past - sliding_window + 1)
                mask = mask[None, None]
            output, _ = sdpa_attention_forward(
                module, queries, keys, values, mask, scaling=scaling, is_causal=is_causal, **kwargs
            )
        outputs.append(output)
    return torch.cat(outputs, 1), None


SCHEDULER_MAPPING["adapter"] = AdapterScheduler  # where transformers looks up `scheduler_type`
BY_REQUEST = "tailora_by_request"  # name of our attention
AttentionInterface.register(BY_REQUEST, attention_by_request)


class ContinuousEngine(Engine):
    """Continuous batching with an adapter for every token. See `Engine`.

    max_requests: that run at once; others wait.    cache_tokens: tokens of all running requests together.
    Raises ConfigError for a model that `obstacle` names.
    """

    def __init__(
        self,
        adapter_set: AdapterSet,
        eos_token_ids: Collection[int],
        *,
        max_positions: int,
        max_requests: int = 64,
        cache_tokens: int = CACHE_TOKENS,
    ) -> None:
        if reason := obstacle(adapter_set.base_model):
            raise ConfigError(f"no continuous batching: {reason}; take the engine 'padded'")
        self.adapter_set, self.eos_token_ids = adapter_set, frozenset(eos_token_ids)
        self.max_positions = min(max_positions, cache_tokens)
        self.max_requests, self.cache_tokens = max_requests, cache_tokens
        self._requests: dict[str, RunningRequest] = {}
        self._lock = Lock()  # of _requests and _manager
        model: Any = adapter_set.base_model
        self._attention: str = model.config._attn_implementation
        self._batch = PackedBatch(model.get_output_embeddings() if model._supports_logits_to_keep() else None)
        self._new_tokens_of: list[RunningRequest | None] = []  # of the batch that runs, in the order of its logits
        self._manager: Any = None
        self._is_stopped = False

    # ---- What the server calls

    def start(self) -> None:
        self.adapter_set.attach_by_token(self._batch)
        self._manager = self._new_manager()

    def stop(self, timeout: float) -> None:
        self._is_stopped = True
        model: Any = self.adapter_set.base_model
        if self._manager is not None:
            if timeout and self._manager.is_running():  # with 0, transformers warns that it has not waited
                self._manager.stop(block=True, timeout=timeout, keep_for_next_session=True)
            if self._manager.is_running():
                self._manager.stop(block=True, timeout=None, keep_for_next_session=True, hard_stop=True)
            self._manager = None
        # stop() left it on the model, where the next engine would find it; so does a start that fails
        model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(self._attention)
        self.adapter_set.attach_by_token(None)
        for running in list(self._requests.values()):
            running.finish(Finish("cancelled"))
        self._requests.clear()

    def submit(self, request: Request, handle: EventHandler) -> None:
        if request.adapter is not None and request.adapter not in self.adapter_set.adapters:
            raise AdapterError(f"no adapter is called {request.adapter!r}")
        running = RunningRequest(request, handle)
        with self._lock:
            manager = self._running_manager()
            self._requests[request.id] = running
            eos = -1 if request.params.ignore_eos else sorted(self.eos_token_ids) or -1
            accepted = manager.add_request(
                list(request.prompt_ids), request.id, max_new_tokens=request.params.max_tokens, eos_token_id=eos
            )
        if accepted is None:
            self.fail(request.id, "the engine has stopped")

    def cancel(self, request_id: str) -> None:
        running = self._requests.pop(request_id, None)
        if running is not None:
            self._manager.cancel_request(request_id)
            running.finish(Finish("cancelled"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            manager = self._running_manager()
        with manager.pause():
            try:
                yield
            finally:
                self.adapter_set.attach_by_token(self._batch)

    @property
    def is_alive(self) -> bool:
        return self._manager is not None and not self._is_stopped  # a manager that an error ended is replaced

    @property
    def load(self) -> tuple[int, int]:
        requests = len(self._requests)
        processor = None if self._manager is None else self._manager.batch_processor
        active = 0 if processor is None else min(len(processor.scheduler.active_requests), requests)
        return active, requests - active

    # ---- What the manager's parts call, in its thread

    def adapter_of(self, request_id: str) -> str | None:
        """Returns the adapter; None for the base, and for a request that was cancelled."""
        running = self._requests.get(request_id)
        return None if running is None else running.request.adapter

    def set_batch(self, states: list[Any]) -> None:
        """Before a forward: which adapter each token has, and which requests get a token."""
        requests = [(self._requests.get(future.state.request_id), future) for future in states]
        self._new_tokens_of = [running for running, future in requests if future.has_new_token]
        adapters = [None if running is None else running.request.adapter for running, _ in requests]
        lengths = [future.query_length for future in states]
        tokens = segments_of(zip(adapters, lengths, strict=True))
        # The head has a row for every request: first those that get a token, then rows without meaning
        with_tokens = [adapter for adapter, future in zip(adapters, states, strict=True) if future.has_new_token]
        without = [None] * (len(states) - len(with_tokens))
        self._batch.set_tokens(tokens, segments_of((adapter, 1) for adapter in (*with_tokens, *without)))

    def next_tokens(self, logits: Tensor) -> list[int]:
        """Chooses a token for each request from its logits, (rows, vocabulary), and hands it on.

        Requests whose prompts are not read to their end have rows, too: the last ones, which mean nothing.
        """
        requests = self._new_tokens_of
        tokens = sample(logits[: len(requests)], requests)
        for running, token in zip(requests, tokens, strict=True):
            if running is not None:
                running.add(token, self.eos_token_ids)
                if running.is_finished:
                    self._requests.pop(running.request.id, None)
        return [token.id for token in tokens] + [0] * (len(logits) - len(requests))

    def fail(self, request_id: str, message: str) -> None:
        running = self._requests.pop(request_id, None)
        if running is not None:
            running.finish(Finish("cancelled") if self._is_stopped else Finish("error", message))

    # ---- transformers' manager

    def _running_manager(self) -> Any:
        """Returns the manager; a new one if an error in a forward, such as too little memory, has ended its thread."""
        if self._is_stopped or self._manager is None:
            raise RuntimeError("the engine is not running")
        if self._manager.background_thread_status.can_accept_new_requests() is not None:
            self._manager.join(time.perf_counter())  # it is about to end
        if not self._manager.is_running():
            self._manager = self._new_manager()
        return self._manager

    def _new_manager(self) -> Any:
        model: Any = self.adapter_set.base_model
        model.set_attn_implementation(self._attention)  # a manager takes only those that it knows
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=-(-self.cache_tokens // PAGE_SIZE),
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=self.max_requests,
                allow_block_sharing=False,
                scheduler_type="adapter",
                auto_switch_to_flash=False,
                use_async_batching=False,
                use_cuda_graph=False,
            ),
        )
        manager.output_router = ErrorRouter(self)
        manager.logit_processor.logits_processor.append(RequestSampler(self))
        manager.logit_processor.do_processing = True
        if self._attention == "sdpa" and model.device.type == "cpu":  # before the manager asks which masks are needed
            model.set_attn_implementation(BY_REQUEST)
        manager.warmup()  # makes the batch processor; with padding off it runs nothing
        manager.batch_processor.scheduler.engine = self
        with torch.inference_mode():  # the thread takes it over
            manager.start()
        return manager


def obstacle(model: Any) -> str:
    """Returns why this model cannot run with continuous batching; "" if it can."""
    name = type(model).__name__
    if not hasattr(model, "init_continuous_batching") or not model.can_generate():
        return f"{name} is no generating model of transformers"
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder"
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others or getattr(model, "_is_stateful", False):
        return f"{name} has layers without keys and values{': ' if others else ''}{', '.join(sorted(others))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not let transformers choose its attention"
    return ""
