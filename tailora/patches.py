"""What tailora uses of transformers and torch that is not public, in one file: each with its reason.

    before_loading              `PreTrainedModel._load_pretrained_model` is replaced
    attention_of                reads `config._attn_implementation`
    compiled_call               reads and sets `Module._compiled_call_impl`
    add_scheduler, report_failures,
    survive_failures            subclasses for transformers' continuous batching

Each checks that what it needs is still there, and raises ConfigError otherwise. `tests/test_patches.py` tests them with
the installed transformers, and with `-m network` also with the oldest and the newest supported one.
"""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from tailora.errors import ConfigError

SCHEDULER = "tailora"  # name of our scheduler in transformers


def _check(package: str, name: str, holds: bool) -> None:
    if not holds:
        version = importlib.metadata.version(package)
        raise ConfigError(
            f"{package} {version} has changed {name}, which tailora relies on; install a version that pyproject.toml "
            f"of tailora names, or update tailora"
        )


@contextmanager
def before_loading(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Within the block, `from_pretrained` calls this with every model on meta, before it reads the weights.

    FSDP2 must shard a model there, so that each rank reads only its own rows. There is no public hook in between.
    """
    from transformers import PreTrainedModel

    name, owner = "_load_pretrained_model", cast(Any, PreTrainedModel)
    load: Any = getattr(owner, name, None)
    _check("transformers", name, load is not None and next(iter(inspect.signature(load).parameters), "") == "model")

    def prepare_and_load(model: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(model)
        return load(model, *args, **kwargs)

    setattr(owner, name, staticmethod(prepare_and_load))
    try:
        yield
    finally:
        setattr(owner, name, staticmethod(load))


def attention_of(config: Any) -> str | None:
    """Returns the name of a model's attention. `set_attn_implementation` is public, but nothing reads it."""
    _check("transformers", "_attn_implementation", hasattr(config, "_attn_implementation"))
    name: str | None = config._attn_implementation
    return name


def leave_attention_open(config: Any) -> None:
    """Lets a part of a model choose its attention, as before `set_attn_implementation`, which accepts only names."""
    config._attn_implementation = None


def compiled_call(module: Any) -> Any:
    """Returns what a module calls in place of its forward since `Module.compile`, or None."""
    return module._compiled_call_impl


def set_compiled_call(module: Any, call: Any) -> None:
    """Lets a module call this in place of its forward.

    `Module.compile` would compile each layer anew. Layers of one kind share our compiled function. Unlike an own
    `forward`, the attribute stays out of copies and pickles.
    """
    _check("torch", "_compiled_call_impl", hasattr(module, "_compiled_call_impl"))
    module._compiled_call_impl = call


@cache
def add_scheduler() -> str:
    """Registers the scheduler that `sort_batches` needs; returns its name for `ContinuousBatchingConfig`."""
    from transformers.generation.continuous_batching import scheduler

    parameters = [*inspect.signature(scheduler.FIFOScheduler.schedule_batch).parameters]
    _check("transformers", "FIFOScheduler.schedule_batch", parameters == ["self", "token_budget", "cache_budget"])

    class SortedScheduler(scheduler.FIFOScheduler):  # type: ignore[misc]
        """Passes each batch to `sort`: each adapter needs one segment of a batch, which has no public order."""

        sort: Callable[[list[Any]], None] | None = None

        def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
            batch = super().schedule_batch(token_budget, cache_budget)
            if batch[0] and self.sort is not None:
                self.sort(batch[0])
            return batch

    scheduler.SCHEDULER_MAPPING[SCHEDULER] = SortedScheduler
    return SCHEDULER


def sort_batches(manager: Any, sort: Callable[[list[Any]], None] | None) -> None:
    """Sets what sorts the batches of a manager after its warm-up. None: nothing, which also ends a cycle of objects."""
    processor = manager.batch_processor
    if processor is not None:
        _check("transformers", "scheduler", type(processor.scheduler).__name__ == "SortedScheduler")
        processor.scheduler.sort = sort


def report_failures(manager: Any, report: Callable[[str, str], None]) -> None:
    """Lets a manager report failed requests, with their names and errors, and nothing else, before its warm-up.

    Its own router also collects every token in a queue, or calls handlers in an event loop.
    """
    from transformers.generation.continuous_batching import continuous_api

    names = ("deliver", "deliver_batch", "fail_and_deliver")
    _check("transformers", "OutputRouter", all(hasattr(continuous_api.OutputRouter, name) for name in names))
    _check("transformers", "output_router", hasattr(manager, "output_router"))

    class FailureRouter(continuous_api.OutputRouter):  # type: ignore[misc]
        def deliver(self, output: Any) -> None:
            if output.error is not None:
                report(output.request_id, output.error)

        def deliver_batch(self, outputs: list[Any]) -> None:
            for output in outputs:
                self.deliver(output)

    manager.output_router = FailureRouter()


def survive_failures(manager: Any) -> None:
    """Lets a forward that fails end only the requests of its batch. By itself, a manager ends with all its requests."""
    from transformers.generation.continuous_batching import continuous_api

    owner = continuous_api.ContinuousBatchingManager
    parameters = [*inspect.signature(getattr(owner, "_generation_step", _check)).parameters]
    _check("transformers", "_generation_step", parameters == ["self"] and type(manager) is owner)

    class SurvivingManager(continuous_api.ContinuousBatchingManager):  # type: ignore[misc]
        def _generation_step(self) -> None:
            try:
                super()._generation_step()
            except Exception as error:  # noqa: BLE001  # whatever the code of a model raises
                processor = self.batch_processor
                processor.handle_batch_error(error)
                processor.scheduler._requests_to_fork.clear()
                processor.inputs_and_outputs.requests_in_batch = []  # which `update_batch` reads next

    manager.__class__ = SurvivingManager  # an attribute would make a cycle, which keeps the cache in memory
