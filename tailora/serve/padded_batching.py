"""PaddedEngine: one batch of padded rows after another, each row with its own adapter, for any model that generates.

Requests that come while a batch runs wait for its end.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from tailora.core.adapter_set import AdapterSet
from tailora.errors import AdapterError, RowsError, is_out_of_memory
from tailora.serve.engine_interface import Engine, EventHandler, Finish, Request
from tailora.serve.sampling import RunningRequest, sample


class PaddedEngine(Engine):
    """Padded batches, one after another. See `Engine`. max_requests: rows of a batch."""

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

    def stop(self, timeout: float) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread is None:
            return
        self._thread.join(timeout)
        for running in [*self._waiting, *self._running]:
            running.finish(Finish("cancelled"))
        self._thread.join()

    def submit(self, request: Request, handle: EventHandler) -> None:
        if request.adapter is not None and request.adapter not in self.adapter_set.adapters:
            raise AdapterError(f"no adapter is called {request.adapter!r}")
        with self._changed:
            if self._is_stopped or self._thread is None:
                raise RuntimeError("the engine is not running")
            self._waiting.append(RunningRequest(request, handle))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            requests = [running for running in [*self._waiting, *self._running] if running.request.id == request_id]
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
                count = min(self.max_requests, len(self._waiting))
                self._running = [self._waiting.popleft() for _ in range(count)]
            requests = [running for running in self._running if not running.is_finished]
            try:
                with self._model_lock, torch.inference_mode():
                    self._generate(requests)
            except (RowsError, RuntimeError, MemoryError) as error:  # of this batch; the next one may fit
                cause = "the memory is too small for this batch" if is_out_of_memory(error) else str(error)
                for running in requests:
                    running.finish(Finish("error", cause))
            with self._changed:
                self._running = []

    def _generate(self, requests: list[RunningRequest]) -> None:
        if not requests:
            return
        model: Any = self.adapter_set.base_model
        prompts = [running.request.prompt_ids for running in requests]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # (rows, longest), padded on the left
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        arguments: dict[str, Any] = {
            "inputs": ids.to(model.device),
            "attention_mask": mask.to(model.device),
            "generation_config": GenerationConfig(
                do_sample=False,
                pad_token_id=0,
                eos_token_id=[],  # RowsFinished ends rows; the base's own would end those that go on behind it, too
                max_new_tokens=max(running.request.params.max_tokens for running in requests),
            ),
            "logits_processor": [RowSampler(requests, self.eos_token_ids)],
            "stopping_criteria": [RowsFinished(requests)],
        }
        names = [running.request.adapter for running in requests]
        with self.adapter_set.activated_by_row(names), self.adapter_set.generation((), arguments):
            model.generate(**arguments)


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token of every row, hands it on, and leaves the likeliest of the scores to be the one it chose."""

    def __init__(self, requests: list[RunningRequest], eos_token_ids: Collection[int]) -> None:
        self.requests, self.eos_token_ids = requests, eos_token_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        tokens = sample(scores, [None if running.is_finished else running for running in self.requests])
        for running, token in zip(self.requests, tokens, strict=True):
            running.add(token, self.eos_token_ids)
        chosen = torch.tensor([[token.id] for token in tokens], device=scores.device)  # (rows, 1)
        return torch.zeros_like(scores).scatter_(1, chosen, 1)


class RowsFinished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, requests: list[RunningRequest]) -> None:
        self.requests = requests

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        return torch.tensor([running.is_finished for running in self.requests], device=input_ids.device)
