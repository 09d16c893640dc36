"""A whole run: settings -> output folder -> model, data, adapter -> loop -> files."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from tailora.core.quantization import held_bytes
from tailora.data.prepare import PreparedData
from tailora.errors import CheckpointError, ConfigError
from tailora.kernels.flat_parameters import Flat, flattened
from tailora.train import checkpoint, run_log
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.dataloader import HeldOut, remarks
from tailora.train.evaluate import Evaluation
from tailora.train.events import Event, Finished, Listener, Note, Saved
from tailora.train.events import Prepared as Ready
from tailora.train.kernel_choice import running
from tailora.train.loss import Supervised
from tailora.train.memory import check_fits, explained, forget_peak, peak_bytes, remedies
from tailora.train.optim import adamw, groups, scheduled
from tailora.train.result import TrainResult
from tailora.train.resume import check_same_run, identity, take_up
from tailora.train.rng import seed_all, seeded
from tailora.train.setup import Kit, assemble, start_accelerator
from tailora.train.state import State
from tailora.train.stop import stop_signal
from tailora.train.subject import Subject, allocating, differences, folder_of, save, settle, trained
from tailora.train.trainer import Bench, train

RateAt = Callable[[int, int], float]  # step, of steps -> learning rate
OnReady = Callable[[Subject, PreTrainedTokenizerBase, PreparedData | None], None]


def run(
    config: TrainConfig,
    on_event: Listener | None = None,
    on_ready: OnReady | None = None,
    *,
    rate_at: RateAt | None = None,
    held_out: HeldOut | None = None,
    before: Evaluation | None = None,
) -> TrainResult:
    """Fine-tune as `config` says. `on_event` hears what happens; `on_ready` is called before the first step.

    rate_at, held_out: for studies, in place of the settings' schedule and of all held-out examples.
    before: the base on the held-out examples, where that is known; it is not evaluated again.

    Raises ConfigError, DataError, TargetError and CheckpointError before anything is trained; DivergedError,
    MemoryLimitError and Interrupted while it is.
    """
    started = time.perf_counter()
    output_dir = run_log.claim(config)
    saved = _checkpoint(config, output_dir)
    accelerator = start_accelerator(config)
    emit = _speaker(accelerator, on_event)
    forget_peak(accelerator.device)
    with ExitStack() as stack:
        stack.enter_context(run_log.held(output_dir) if accelerator.is_main_process else nullcontext())
        stack.enter_context(seeded(config.seed))
        kit = assemble(config, accelerator, lambda text: emit(Note(text)), saved, held_out)
        if before is not None and not np.array_equal(before.counts, held_out_counts(kit)):
            raise ConfigError(
                "the held-out examples are not those that the base was evaluated on: the data has changed"
            )
        kept = check_fits(kit.cost, kit.feed.largest, kit.feed.longest, accelerator.device)
        flats = stack.enter_context(flattened(groups(trained(kit.model), config)))
        bench, state = bench_of(config, output_dir, accelerator, kit, flats, saved, emit, rate_at or scheduled(config))
        state.before = state.before or before
        stack.callback(close, bench)
        header = {**_header(bench, kit), "estimated_activation_bytes": kept}
        _announce(bench, header)
        if on_ready is not None:
            on_ready(kit.model, kit.tokenizer, kit.feed.prepared)
        stack.enter_context(explained("training", lambda: remedies(kit.cost, kit.feed.largest, kit.feed.longest)))
        checkpointed = config.gradient_checkpointing
        with running(kit.base, kit.rows, kit.kernels, checkpointed=checkpointed), stop_signal() as wish:
            after = train(bench, state, wish)
        folder = _save(bench)
        # The files are there when any rank returns. And gloo's threads drop the last collective's tensors, for which
        # they need Python's lock: a rank that ended at once could hold that while joining them, for ever.
        accelerator.wait_for_everyone()
    result = _result(bench, kit, state, after, time.perf_counter() - started)
    if accelerator.is_main_process:
        run_log.write_run(output_dir, header, result.to_dict())
        run_log.write_examples(output_dir, state.before, after)
    for text in remarks(kit.feed, config.max_length):
        emit(Note(text))
    emit(Saved(result.best_step, folder))
    emit(Finished(result.to_dict()))
    return result


def held_out_counts(kit: Kit) -> Any:
    """Tokens that count of each held-out example."""
    return None if kit.feed.held_out is None else kit.feed.held_out.supervised


def _checkpoint(config: TrainConfig, output_dir: Path) -> Checkpoint | None:
    """The checkpoint to go on from, whole and verified, or None."""
    if config.resume_from_checkpoint is None:
        return None
    return checkpoint.load(checkpoint.locate(config.resume_from_checkpoint, output_dir))


def _speaker(accelerator: Accelerator, on_event: Listener | None) -> Listener:
    """Events reach the listener from the main process only."""

    def emit(event: Event) -> None:
        if on_event is not None and accelerator.is_main_process:
            on_event(event)

    return emit


def bench_of(
    config: TrainConfig,
    output_dir: Path,
    accelerator: Accelerator,
    kit: Kit,
    flats: list[Flat],
    saved: Checkpoint | None,
    emit: Listener,
    rate_at: RateAt,
) -> tuple[Bench, State]:
    """The loop's bench, and the state to start from: fresh, or the checkpoint's. Raises CheckpointError."""
    own = _identity(config, accelerator, kit)
    if saved is not None:
        check_same_run(saved.state["run"], own)
    optimizer = adamw(flats)
    rank = accelerator.process_index
    seed_all(config.seed + rank)  # each rank drops out other activations
    allocator = allocating(kit.model, optimizer, kit.feed.max_steps)
    state = State() if saved is None else take_up(saved, kit.model, optimizer, flats, rank, allocator)
    accelerator.init_trackers("tailora", config={name: str(value) for name, value in config.model_dump().items()})
    resumed_at = None if saved is None else state.step
    rows = kit.rows if kit.kept.fact else replace(kit.rows, prefix=None)
    losses = Supervised(kit.model, rows, accelerator.device)
    bench = Bench(
        config=config,
        accelerator=accelerator,
        model=kit.model,
        forward=accelerator.prepare_model(losses, device_placement=False),  # it is there: a copy leaves the buffers
        flats=flats,
        optimizer=optimizer,
        rows=kit.rows,
        steps=kit.feed.steps,
        max_steps=kit.feed.max_steps,
        held_out=kit.feed.held_out,
        token_budget=kit.feed.largest.tokens,
        output_dir=output_dir,
        identity=own,
        allocator=allocator,
        rate_at=rate_at,
        metrics=run_log.Metrics(output_dir, resumed_at=resumed_at) if accelerator.is_main_process else None,
        emit=emit,
    )
    return bench, state


def _identity(config: TrainConfig, accelerator: Accelerator, kit: Kit) -> dict[str, Any]:
    return identity(
        config,
        data=None if config.streaming or kit.feed.prepared is None else kit.feed.prepared.report.sha256,
        packed=kit.rows.packed,
        dtype=str(kit.base.dtype),
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        layer_kernels=kit.kernels.layers,
        prefix=kit.kept.fact,
    )


def close(bench: Bench) -> None:
    """Trackers and metrics have all they get."""
    bench.accelerator.end_training()
    if bench.metrics is not None:
        bench.metrics.close()


def _header(bench: Bench, kit: Kit) -> dict[str, Any]:
    """What run.json says about the run before it starts; the same goes to the listener."""
    summary = kit.model.summary()
    return {
        "settings": bench.config.model_dump(mode="json"),
        "model": kit.base.config.name_or_path,
        "device": str(bench.accelerator.device),
        "processes": bench.accelerator.num_processes,
        "dtype": str(kit.base.dtype).removeprefix("torch."),
        "base_bytes": held_bytes(kit.base),
        "packed": kit.rows.packed,
        "kernels": "; ".join(filter(None, [kit.kernels.words, kit.kept.words])),
        "start": kit.start,
        "adapted_layers": len(summary.rows),
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
        "max_steps": kit.feed.max_steps,
        "largest_forward_tokens": kit.feed.largest.tokens,
        "data": None if kit.feed.prepared is None else kit.feed.prepared.report.to_dict(),
        **run_log.environment(),
    }


def _announce(bench: Bench, header: dict[str, Any]) -> None:
    if bench.accelerator.is_main_process:
        run_log.write_settings(bench.output_dir, bench.config)
        run_log.write_run(bench.output_dir, header)
    bench.emit(Ready(header))


def _save(bench: Bench) -> Path:
    """Write what was trained, read it again and compare. Raises CheckpointError when they differ."""
    folder = folder_of(bench.model, bench.output_dir)
    settle(bench.model)
    if not bench.accelerator.is_main_process:
        return folder
    save(bench.model, bench.output_dir)
    if different := differences(bench.model, folder):
        raise CheckpointError(f"{folder} reads back different in {', '.join(different[:3])}; the disk may be failing")
    return folder


def _result(bench: Bench, kit: Kit, state: State, after: Evaluation | None, seconds: float) -> TrainResult:
    summary = kit.model.summary()
    return TrainResult(
        output_dir=str(bench.output_dir),
        steps=state.step,
        train_tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        tokens_per_second=state.tokens / state.seconds,
        eval_loss_before=state.before.loss if state.before else None,
        eval_loss_after=after.loss if after else None,
        best_step=state.best.step if state.best else state.step,
        trainable_parameters=summary.trainable_parameters,
        total_parameters=summary.total_parameters,
        peak_memory_bytes=peak_bytes(bench.accelerator.device),
        seconds=seconds,
        model=kit.model,
        tokenizer=kit.tokenizer,
        data=kit.feed.prepared,
        before=state.before,
        after=after,
    )
