"""ContinuousEngine: requests join and leave the batch at every step, and each token has its own adapter.

`make_engine` uses it if transformers supports the model, and `PaddedEngine` otherwise.

transformers' continuous batching packs the tokens of all requests into one row and keeps their keys and values in a
paged cache. It has no support for adapters and a single seed for all requests. So we change four things in its
manager (`_new_manager`):

    the scheduler's batches   are sorted by adapter, so that each adapter has one segment of the row (`_set_batch`)
    the logits processor      chooses the token of every request and passes it on (`_next_tokens`)
    the output router         only reports failed requests (`_end_failed`)
    a forward that fails      ends the requests of its batch instead of the manager (`survive_failures`)

The cache must not share blocks between requests: equal prompts have different keys under different adapters.

`attention_by_request` replaces "sdpa", which attends to the keys of all requests and masks the irrelevant ones. It is
faster, and an overflow in one request cannot reach another: with "sdpa", a masked infinity becomes NaN.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, GenerationConfig, PretrainedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tailora.core.adapter_set import AdapterSet
from tailora.core.mixed_batch import MixedBatch
from tailora.engine.interface import Engine, EventHandler, Finish, Request, SamplingParams, Token
from tailora.engine.padded_batching import PaddedEngine
from tailora.engine.sampling import ChosenTokens, RunningRequest, next_tokens
from tailora.errors import AdapterError, ConfigError
from tailora.patches import add_scheduler, attention_of, report_failures, sort_batches, survive_failures
from tailora.quiet import silent_loggers

PAGE_SIZE = 32  # tokens in a block of the cache
BATCH_TOKENS = 512  # in one forward; longer prompts need several
CACHE_TOKENS = 32_768  # of all running requests together, at most
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
TRIAL_SECONDS = 120  # for two tokens of a large model on a CPU
TRIAL_TOKENS = 32  # of its prompt
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # nats, of a token
EngineName = Literal["auto", "continuous", "padded"]


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

    query: (1, heads, tokens, d).
    key, value: (1, key heads, keys, d).
    cu_seq_lens_q, cu_seq_lens_k: where the tokens and keys of each request begin, and where the last ones end.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    outputs = []
    tokens_of, keys_of = (ends.diff().tolist() for ends in (cu_seq_lens_q, cu_seq_lens_k))
    pairs = ((query, tokens_of), (key, keys_of), (value, keys_of))
    by_request = zip(*(torch.split(x, sizes, 2) for x, sizes in pairs), strict=True)
    for (queries, keys, values), tokens in zip(by_request, tokens_of, strict=True):
        past = keys.shape[2] - tokens
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


BY_REQUEST = "tailora_by_request"  # name of our attention in transformers
AttentionInterface.register(BY_REQUEST, attention_by_request)


class ContinuousEngine(Engine):
    """Continuous batching with an adapter for every token, for at most `max_requests` at once. See `Engine`."""

    def __init__(
        self, adapter_set: AdapterSet, eos_token_ids: Collection[int], *, max_positions: int, max_requests: int = 64
    ) -> None:
        if reason := obstacle(adapter_set.base_model):
            raise ConfigError(f"continuous batching is not possible: {reason}; use --engine padded")
        self.adapter_set, self.eos_token_ids = adapter_set, frozenset(eos_token_ids)
        self.cache_tokens = cache_tokens(max_positions, max_requests)
        self.max_positions = min(max_positions, self.cache_tokens)
        self.max_requests = max_requests
        self._requests: dict[str, RunningRequest] = {}
        self._lock = Lock()  # of _requests and _manager
        model: Any = adapter_set.base_model
        self._attention = attention_of(model.config)
        head = model.get_output_embeddings() if model._supports_logits_to_keep() else None
        self._batch = MixedBatch(is_packed=True, head=head)
        self._new_tokens_of: list[RunningRequest | None] = []  # of the running batch, in the order of its logits
        self._manager: Any = None
        self._is_stopped = False

    # ---- Called by the server

    def start(self) -> None:
        self.adapter_set.attach_by_token(self._batch)
        self._manager = self._new_manager()

    def stop(self) -> None:
        self._is_stopped = True
        model: Any = self.adapter_set.base_model
        if self._manager is not None and self._manager.is_running():
            sort_batches(self._manager, None)  # a cycle would keep the cache in memory
            self._manager.stop(block=True, timeout=None, keep_for_next_session=True, hard_stop=True)
        self._manager = None
        # stop() and a failed start leave it on the model, where the next engine would use it
        model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(self._attention)
        self.adapter_set.attach_by_token(None)
        for running in list(self._requests.values()):
            running.finish(Finish("cancelled"))
        self._requests.clear()

    def submit(self, request: Request, handle: EventHandler) -> None:
        self._add([(request, handle)])

    def submit_group(self, group: Sequence[tuple[Request, EventHandler]]) -> None:
        if len(group[0][0].prompt_ids) == 1:  # a request only shares what precedes its last token
            super().submit_group(group)
        else:
            self._add(group)

    def _add(self, group: Sequence[tuple[Request, EventHandler]]) -> None:
        """Adds a request to the manager, which forks it for the others once it has computed the prompt."""
        request, _ = group[0]
        if request.adapter is not None and request.adapter not in self.adapter_set.adapters:
            raise AdapterError(f"unknown adapter {request.adapter!r}")
        with self._lock:
            manager = self._running_manager()
            cache = manager.batch_processor.cache.cache_tensor
            if not cache.untyped_storage().size():  # after `free_cache`
                cache.untyped_storage().resize_(cache.nbytes)
            names = [request.id, *(fork_name(request.id, number) for number in range(len(group) - 1))]
            for name, (member, handle) in zip(names, group, strict=True):
                self._requests[name] = RunningRequest(member, handle, name)
            eos = -1 if request.params.ignore_eos else sorted(self.eos_token_ids) or -1
            manager.num_return_sequences = len(group)  # of the next request
            accepted = manager.add_request(
                list(request.prompt_ids), request.id, max_new_tokens=request.params.max_tokens, eos_token_id=eos
            )
        if accepted is None:
            self._end_failed(request.id, "the engine has stopped")

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

    def parameters_changed(self) -> None:
        self._batch.parameters_changed()

    def free_cache(self) -> None:
        if (processor := self._manager.batch_processor) is not None:
            processor.cache.cache_tensor.untyped_storage().resize_(0)

    @property
    def is_alive(self) -> bool:
        return self._manager is not None and not self._is_stopped  # a manager that ended with an error is replaced

    @property
    def load(self) -> tuple[int, int]:
        requests = len(self._requests)
        processor = None if self._manager is None else self._manager.batch_processor
        active = 0 if processor is None else min(len(processor.scheduler.active_requests), requests)
        return active, requests - active

    # ---- Called by transformers' manager, in its thread

    def _set_batch(self, states: list[Any]) -> None:
        """Sorts the requests of the next forward by adapter, and sets the adapter of each of their tokens."""
        pairs = [(self._requests.get(state.state.request_id), state) for state in states]  # None: has been cancelled
        pairs.sort(key=lambda pair: (pair[0] and pair[0].request.adapter) or "")
        states[:] = [state for _, state in pairs]
        self._new_tokens_of = [running for running, state in pairs if state.has_new_token]
        # The head has a row for every request: first those that get a token, then unused rows
        head = [running.request.adapter if running else None for running in self._new_tokens_of]
        head += [None] * (len(states) - len(head))
        tokens = [
            running.request.adapter if running else None for running, state in pairs for _ in range(state.query_length)
        ]
        self._batch.set_rows(tokens, head)

    def _next_tokens(self, logits: Tensor) -> list[int]:
        """Returns the next token of each request, and 0 for unused rows. logits: (rows, vocabulary)."""
        requests = self._new_tokens_of
        tokens = next_tokens(logits[: len(requests)], requests, self.eos_token_ids)
        for running in requests:  # a client that got its last token may have submitted the id again
            if running is not None and running.is_finished and self._requests.get(running.name) is running:
                self._requests.pop(running.name, None)  # unless `cancel` was faster
                if running.ends_early:
                    self._manager.cancel_request(running.name)
        return tokens + [0] * (len(logits) - len(requests))

    def _end_failed(self, name: str, message: str) -> None:
        """Ends a request and those that are to be forked from it."""
        for forked in [name, *(other for other in [*self._requests] if other.startswith(fork_name(name, "")))]:
            if (running := self._requests.pop(forked, None)) is not None:
                running.finish(Finish("cancelled") if self._is_stopped else Finish("error", message))

    # ---- transformers' manager

    def _running_manager(self) -> Any:
        """Returns the manager, or a new one if an error in a forward, such as out of memory, ended its thread."""
        if self._is_stopped or self._manager is None:
            raise RuntimeError("the engine is not running")
        if self._manager.background_thread_status.can_accept_new_requests() is not None:
            self._manager.join(time.perf_counter())  # it is about to end
        if not self._manager.is_running():
            self._free_manager()
            self._manager = self._new_manager()
        return self._manager

    def _free_manager(self) -> None:
        """Frees the cache of a manager that has ended, before the next one needs as much.

        The server has frozen all objects, so cycles are no longer collected; the error's traceback holds tensors, too.
        """
        sort_batches(self._manager, None)
        self._manager.batch_processor = None
        self._manager.background_thread_status.fatal_error = RuntimeError("the manager has ended")

    def _new_manager(self) -> Any:
        model: Any = self.adapter_set.base_model
        model.set_attn_implementation(self._attention)  # a manager only accepts transformers' own
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=self.cache_tokens // PAGE_SIZE,
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=self.max_requests,
                # transformers starts no request while 15% or less is free; a cache for all of them needs no such margin
                safety_margin=None if self.cache_tokens == CACHE_TOKENS else 0.0,
                allow_block_sharing=False,
                auto_switch_to_flash=False,
                use_async_batching=False,
                use_cuda_graph=False,
                scheduler_type=add_scheduler(),
            ),
        )
        report_failures(manager, self._end_failed)
        survive_failures(manager)
        manager.logit_processor.logits_processor.append(ChosenTokens(self._next_tokens))
        manager.logit_processor.do_processing = True
        if self._attention == "sdpa":  # before the manager asks which masks are needed
            model.set_attn_implementation(BY_REQUEST)
        manager.warmup()  # creates the batch processor; without padding it runs nothing
        sort_batches(manager, self._set_batch)
        with torch.inference_mode():  # the thread inherits it
            manager.start()
        return manager


def fork_name(request_id: str, number: int | str) -> str:
    """Returns the name that transformers gives to a request that it forks."""
    return f"{request_id}__child#{number}"


def cache_tokens(max_positions: int, max_requests: int) -> int:
    return min(CACHE_TOKENS, -(-max_positions // PAGE_SIZE) * PAGE_SIZE * max_requests)


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, max_positions: int, max_requests: int) -> int:
    """Returns the size of the cache of an engine for such a model."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = cache_tokens(max_positions, max_requests) + 2 * PAGE_SIZE  # transformers adds two blocks for unused rows
    numbers: int = 2 * text.num_hidden_layers * heads * width
    return numbers * dtype.itemsize * tokens


# ---- The engine for a model


def make_engine(
    adapter_set: AdapterSet,
    eos_token_ids: Collection[int],
    name: EngineName = "auto",
    *,
    max_positions: int,
    max_requests: int = 64,
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns an engine that has not been started. "auto" uses continuous batching if a trial run succeeds.

    note: called with the reason if "auto" falls back to padded batches.
    Raises ConfigError if `name` is "continuous" and the model does not support it.
    """

    def new(engine: type[ContinuousEngine | PaddedEngine], requests: int = max_requests) -> Engine:
        return engine(adapter_set, eos_token_ids, max_positions=max_positions, max_requests=requests)

    if name == "auto":
        problem = obstacle(adapter_set.base_model) or trial_obstacle(new(ContinuousEngine, 1), new(PaddedEngine, 1))
        if problem:
            note(f"using padded batches: continuous batching is not possible ({problem})")
        name = "padded" if problem else "continuous"
    return new(ContinuousEngine if name == "continuous" else PaddedEngine)


def trial_obstacle(continuous: Engine, padded: Engine) -> str:
    """Generates two tokens with both engines; returns why the first cannot be used, or "".

    Some models claim support that they do not have: they fail, or they compute something else, such as RoBERTa's
    kin, which count positions from the padding token on.
    """
    actual, expected = trial(continuous), trial(padded)
    if isinstance(actual, str) or isinstance(expected, str):
        return actual if isinstance(actual, str) else ""  # what ends padded batches is shown by requests
    largest = LARGEST_DIFFERENCE.get(cast(Any, continuous.adapter_set.base_model).dtype, 1e-3)
    for mine, other in zip(actual, expected, strict=True):
        if abs(mine.logprob - other.logprob) > largest:
            return f"its log-probabilities are off by {abs(mine.logprob - other.logprob):.2g}"
        if mine.id != other.id:  # a tie, after which the contexts differ
            break
    return ""


def trial(engine: Engine) -> list[Token] | str:
    """Returns two tokens of the base model, or why there are none. Stops the engine."""
    tokens, finish, ended = list[Token](), list[Finish](), Event()

    def handle(event: Token | Finish) -> None:
        if isinstance(event, Token):
            tokens.append(event)
        else:
            finish.append(event)
            ended.set()

    with silent_loggers("ContinuousBatchingLogger"):  # transformers' logger, which prints a traceback
        try:
            engine.start()
            ids = tuple(range(1, min(TRIAL_TOKENS, engine.max_positions - 1)))
            engine.submit(Request("trial", ids, None, SamplingParams(2, 0.0, logprobs=0, ignore_eos=True)), handle)
            if not ended.wait(TRIAL_SECONDS):
                return f"no response within {TRIAL_SECONDS} seconds"
        except (RuntimeError, ValueError, MemoryError) as error:  # from creating the cache for the model's shapes
            return str(error) or type(error).__name__
        finally:
            engine.stop()
    return finish[0].message if finish[0].reason == "error" else tokens


def obstacle(model: Any) -> str:
    """Returns why this model does not support continuous batching; "" if it does."""
    name = type(model).__name__
    if not hasattr(model, "init_continuous_batching") or not model.can_generate():
        return f"{name} is not a generative transformers model"
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder"
    if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return f"{name} reads images"
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others or getattr(model, "_is_stateful", False):
        return f"{name} has layers without a key-value cache{': ' if others else ''}{', '.join(sorted(others))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not support transformers' attention interface"
    if attention_of(model.config) == "eager":  # in transformers' batches also without soft caps
        return f"{name} uses eager attention, which does not keep requests separate"
    return ""
