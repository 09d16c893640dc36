"""PaddedEngine: padded batches, one after another, for any generative model. Each row is a request with its adapter.

Requests that arrive while a batch runs wait until it ends. The pixels of images are computed for the whole batch,
because processors pad them to a common shape.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import Condition, Lock, Thread
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from tailora.core.adapter_set import AdapterSet
from tailora.core.model_parts import language_model_path
from tailora.core.patterns import inside
from tailora.data.image_processor import accepted_inputs, image_inputs
from tailora.engine.interface import (
    PIXELS_OF_REQUEST,
    Engine,
    EventHandler,
    Finish,
    Request,
    pixel_count,
    positions_of_short_factors,
)
from tailora.engine.sampling import ChosenTokens, RunningRequest, next_tokens
from tailora.errors import AdapterError, DataError, RowsError, is_out_of_memory

# What a batch may raise: torch, and the Python code of models and processors
BATCH_ERRORS = (
    *(RowsError, DataError, RuntimeError, MemoryError),
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
)


class PaddedEngine(Engine):
    """Padded batches, one after another. See `Engine`. max_requests: maximum rows of a batch."""

    def __init__(
        self, adapter_set: AdapterSet, eos_token_ids: Collection[int], *, max_positions: int, max_requests: int = 64
    ) -> None:
        self.adapter_set, self.eos_token_ids = adapter_set, frozenset(eos_token_ids)
        self.max_positions, self.max_requests = max_positions, max_requests
        self._waiting: deque[RunningRequest] = deque()
        self._running: list[RunningRequest] = []
        self._changed = Condition()  # of _waiting, _running and _is_stopped
        self._model_lock = Lock()  # held while a batch runs
        self._is_stopped = False
        self._thread: Thread | None = None

    def start(self) -> None:
        self._thread = Thread(target=self._run, name="padded engine")
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            requests = [*self._waiting, *self._running]
        for running in requests:
            running.finish(Finish("cancelled"))
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, handle: EventHandler) -> None:
        if request.adapter is not None and request.adapter not in self.adapter_set.adapters:
            raise AdapterError(f"unknown adapter {request.adapter!r}")
        with self._changed:
            if self._is_stopped or self._thread is None:
                raise RuntimeError("the engine is not running")
            self._waiting.append(RunningRequest(request, handle))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            requests = [running for running in [*self._waiting, *self._running] if running.request.id == request_id]
            self._waiting = deque(running for running in self._waiting if running.request.id != request_id)
        for running in requests:
            running.finish(Finish("cancelled"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._model_lock:
            yield

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        with self._changed:
            return sum(not running.is_finished for running in self._running), len(self._waiting)

    # ---- In the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopped)
                if not self._waiting:
                    return
            try:
                with self._model_lock, torch.inference_mode():  # an adapter may be removed once its requests have ended
                    with self._changed:  # all that have come while the engine was paused
                        self._running = self._take_batch()
                    self._generate([running for running in self._running if not running.is_finished])
                for running in self._running:  # such as Janus, which has its own `generate`
                    running.finish(
                        Finish("error", "the model's generate ended without the answer; it is not supported")
                    )
            except BATCH_ERRORS as error:  # only of this batch; the next one may fit
                cause = "out of memory; use shorter prompts or responses" if is_out_of_memory(error) else str(error)
                for running in self._running:
                    running.finish(Finish("error", cause))
            with self._changed:
                self._running = []

    def _take_batch(self) -> list[RunningRequest]:
        """Takes requests from the queue: the first one and those that can run with it. Needs _changed."""
        batch: list[RunningRequest] = []
        others: deque[RunningRequest] = deque()
        pixels = 0
        for running in self._waiting:
            request = running.request
            if running.is_finished:
                continue
            fits = len(batch) < self.max_requests and self._have_positions([*batch, running])
            fits = fits and pixels + pixel_count(request.images) <= PIXELS_OF_REQUEST
            if not batch or (fits and self._whole(request.adapter) == self._whole(batch[0].request.adapter)):
                batch.append(running)
                pixels += pixel_count(request.images)
            else:
                others.append(running)
        self._waiting = others
        return batch

    def _have_positions(self, batch: Sequence[RunningRequest]) -> bool:
        """Whether all rows have positions until the last one ends: in `generate`, rows that have ended go on."""
        if not self._positions_end:
            return True
        requests = [running.request for running in batch]
        longest = max(len(request.prompt_ids) for request in requests)
        return longest + max(request.params.max_tokens for request in requests) <= self.max_positions

    @cached_property
    def _positions_end(self) -> bool:
        """Whether a position that is too high fails, or changes the other rows."""
        model: Any = self.adapter_set.base_model
        if positions_of_short_factors(model.config) is not None:
            return True
        count, inputs = getattr(model.config, "max_position_embeddings", 0) or 0, model.get_input_embeddings()
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not inputs]
        return any(count <= table.num_embeddings <= count + 2 for table in tables)  # some have an offset of 2

    def _whole(self, adapter: str | None) -> str | None:
        """Returns the adapter if all rows must have it, because it changes layers that get images instead of rows."""
        if adapter is None or self.processor is None:
            return None
        parts = self.adapter_set.adapters[adapter].parts
        is_text = self._decoder and all(inside(path, self._decoder) for path in parts)
        return None if is_text else adapter

    @cached_property
    def _decoder(self) -> str:
        return language_model_path(self.adapter_set.base_model)

    def _generate(self, requests: list[RunningRequest]) -> None:
        if not requests:
            return
        model: Any = self.adapter_set.base_model
        prompts = [torch.tensor(running.request.prompt_ids) for running in requests]
        ids, mask = (  # (prompts, longest)
            pad_sequence(rows, batch_first=True, padding_side="left")
            for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
        )
        config = GenerationConfig(
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[],  # the model's own would also end rows with ignore_eos
            max_new_tokens=max(running.request.params.max_tokens for running in requests),
        )
        arguments: dict[str, Any] = {
            "inputs": ids.to(model.device),
            "attention_mask": mask.to(model.device),
            "generation_config": config,
            "logits_processor": [ChosenTokens(lambda logits: next_tokens(logits, requests, self.eos_token_ids))],
            "stopping_criteria": [
                lambda *_, **__: torch.tensor([running.is_finished for running in requests], device=model.device)
            ],
        }
        if self.processor is not None:
            inputs = image_inputs(self.processor, ids, [running.request.images for running in requests])
            arguments |= {name: value.to(model.device) for name, value in accepted_inputs(model, inputs).items()}
        names = [running.request.adapter for running in requests]
        with self._activated(names), self.adapter_set.generation((), arguments):
            model.generate(**arguments)

    @contextmanager
    def _activated(self, names: list[str | None]) -> Iterator[None]:
        if (adapter := self._whole(names[0])) is None:
            with self.adapter_set.activated_by_row(names):
                yield
            return
        self.adapter_set.activate(adapter, training=False)
        try:
            yield
        finally:
            self.adapter_set.activate(None, training=False)
