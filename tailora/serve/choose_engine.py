"""Which engine runs a model: continuous batching where transformers supports it, padded batches otherwise."""

from collections.abc import Callable, Collection
from threading import Event
from typing import Literal

from tailora.core.adapter_set import AdapterSet
from tailora.quiet import silent_loggers
from tailora.serve.continuous_batching import ContinuousEngine, obstacle
from tailora.serve.engine_interface import Engine, Finish, Request, SamplingParams, Token
from tailora.serve.padded_batching import PaddedEngine

TRIAL_SECONDS = 120  # for two tokens of a large model on a CPU
EngineName = Literal["auto", "continuous", "padded"]


def make_engine(
    adapter_set: AdapterSet,
    eos_token_ids: Collection[int],
    kind: EngineName = "auto",
    *,
    max_positions: int,
    max_requests: int = 64,
    note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Returns an engine that has not been started. "auto" prefers continuous batching if a trial with it succeeds.

    note: called with the reason if "auto" falls back to padded batches.
    Raises ConfigError if `kind` is "continuous" and the model does not support it.
    """

    def new(engine: type[ContinuousEngine | PaddedEngine]) -> Engine:
        return engine(adapter_set, eos_token_ids, max_positions=max_positions, max_requests=max_requests)

    if kind == "auto":  # some models claim support that they do not have, so a short answer has to prove it
        problem = obstacle(adapter_set.base_model) or trial_error(new(ContinuousEngine))
        if problem:
            note(f"no continuous batching: {problem}")
        kind = "padded" if problem else "continuous"
    return new(ContinuousEngine if kind == "continuous" else PaddedEngine)


def trial_error(engine: Engine) -> str:
    """Returns why a short answer of the base model fails; "" if it succeeds. Stops the engine."""
    finish, ended = list[Finish](), Event()

    def handle(event: Token | Finish) -> None:
        if isinstance(event, Finish):
            finish.append(event)
            ended.set()

    with silent_loggers("ContinuousBatchingLogger"):  # transformers' logger, which prints a traceback
        try:
            engine.start()
            request = Request("trial", (1, 2, 3), None, SamplingParams(2, temperature=0.0, ignore_eos=True))
            engine.submit(request, handle)
            if not ended.wait(TRIAL_SECONDS):
                return f"no answer in {TRIAL_SECONDS} seconds"
        except (RuntimeError, ValueError, MemoryError) as error:  # from creating the cache for the model's shapes
            return str(error) or type(error).__name__
        finally:
            engine.stop(0)
    return finish[0].message if finish[0].reason == "error" else ""
