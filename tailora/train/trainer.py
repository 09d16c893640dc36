"""The loop: step, evaluate, save, in an order that a checkpoint can be continued from, on a CPU to the bit.

A GPU's attention adds its gradients in no fixed order.

    wait for the step's examples -> count its tokens over all ranks -> forward and backward of each micro-batch
    -> finite? -> clip -> AdamW -> due: evaluate, keep the best -> due: checkpoint -> wished: stop

Loss of a step = summed loss / supervised tokens, over all micro-batches and ranks. DDP averages gradients over ranks,
so every rank multiplies its part by their number.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Wish
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tailora.core.adalora import RankAllocator
from tailora.core.quantization import held_bytes
from tailora.data.dataset import Examples
from tailora.data.prepare import PreparedData
from tailora.errors import CheckpointError, ConfigError, DivergedError
from tailora.kernels.flat_parameters import Flat, flattened
from tailora.train import checkpoint, run_log
from tailora.train.checkpoint import Best, Checkpoint, State, check_same_run, identity, seed_all, seeded, take_up
from tailora.train.config import TrainConfig
from tailora.train.dataloader import HeldOut, MicroBatch, remarks
from tailora.train.divergence import REMEDIES, broken_gradients, broken_loss
from tailora.train.events import (
    Evaluated,
    Event,
    Finished,
    Interrupted,
    Listener,
    Note,
    Saved,
    Stepped,
    TrainResult,
    stop_signal,
)
from tailora.train.events import Prepared as Ready
from tailora.train.kernel_choice import running
from tailora.train.loss import BatchLayout, Evaluation, Supervised, evaluate
from tailora.train.memory import check_fits, explained, forget_peak, peak_bytes, remedies
from tailora.train.optim import adamw, clip, groups, scheduled, take_step
from tailora.train.run_log import Metrics
from tailora.train.setup import Kit, assemble, start_accelerator
from tailora.train.trainable import (
    Trainable,
    allocating,
    differences,
    folder_of,
    publish,
    save,
    settings_of,
    settle,
    trained,
)
from tailora.train.trainable import save as save_subject


@dataclass(frozen=True, eq=False)
class Bench:
    """What the loop works with; none of it is replaced while it runs."""

    config: TrainConfig
    accelerator: Accelerator
    model: Trainable
    forward: nn.Module  # `Supervised`, as accelerate prepared it
    flats: list[Flat]  # all that is trained
    optimizer: torch.optim.Optimizer
    rows: BatchLayout
    steps: Callable[[int], Iterator[list[MicroBatch]]]  # from a step on
    max_steps: int
    held_out: Examples | None
    token_budget: int  # of an evaluation's forward
    output_dir: Path
    identity: dict[str, Any]  # what a checkpoint of this run must agree with
    allocator: RankAllocator | None  # of AdaLoRA
    rate_at: Callable[[int, int], float]  # step, of steps -> learning rate
    metrics: Metrics | None  # of the main process
    emit: Callable[[Event], None]


def train(bench: Bench, state: State, wish: Wish) -> Evaluation | None:
    """Train until the last step or until evaluations stop improving; returns the held-out loss of what is kept.

    Raises Interrupted when `wish` is set, after saving; DivergedError when a loss or gradient is not finite.
    """
    if state.before is None:
        fresh = bench.config.adapter is None  # then the base alone is the same model, and faster
        with bench.model.disable_adapter() if fresh else nullcontext():
            state.before = held_out_loss(bench, state, keep=False)
        if state.before is not None and not math.isfinite(state.before.loss):
            raise DivergedError(f"the held-out loss is {state.before.loss} before any training; {REMEDIES}")
    good = [flat.whole.detach().clone() for flat in bench.flats]
    steps = bench.steps(state.step)
    while state.step < bench.max_steps and not _patience_spent(bench.config, state):
        batches = next(steps)
        tokens, supervised, stop = _over_ranks(bench, batches, wish)
        if stop:
            raise Interrupted(save_checkpoint(bench, state))
        started = time.perf_counter()
        loss, norm, rate = step(bench, state.step, batches, supervised, good)
        _count(state, tokens, supervised, time.perf_counter() - started)
        _report(
            bench,
            state,
            Stepped(
                step=state.step,
                max_steps=bench.max_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                supervised_tokens=supervised,
                seconds=time.perf_counter() - started,
                tokens_per_second=state.tokens / state.seconds,
                eta_seconds=state.seconds / state.step * (bench.max_steps - state.step),
                memory_bytes=peak_bytes(bench.accelerator.device),
            ),
        )
        if _due(bench.config.eval_steps, state.step) or (bench.config.eval_steps and state.step == bench.max_steps):
            judge(bench, state, good)
        if _due(bench.config.save_steps, state.step):
            save_checkpoint(bench, state)
    if not all(bool(flat.whole.isfinite().all()) for flat in bench.flats):
        raise give_up(bench, f"in step {state.step}: it left weights that are not finite", good)
    if _patience_spent(bench.config, state):
        bench.emit(Note(f"stopped early: {state.since_best} evaluations in a row without gain"))
    if state.best is None:
        return _finite(bench, state, held_out_loss(bench, state, keep=False), good)
    checkpoint.set_parameters(trained(bench.model), state.best.tensors)
    publish(bench.model)
    return state.best.evaluation


def step(
    bench: Bench, number: int, batches: Sequence[MicroBatch], supervised: int, good: list[Tensor]
) -> tuple[float, float, float]:
    """One optimiser step: loss before it, gradient norm before clipping, learning rate.

    `good` holds, afterwards, the parameters before the step, whose loss and gradient were finite.
    """
    config = bench.config
    mean = accumulate(bench.forward, batches, supervised, bench.accelerator)
    loss = float(bench.accelerator.reduce(mean, reduction="sum"))
    norm = clip(bench.flats, config.max_grad_norm)
    rate = bench.rate_at(number, bench.max_steps)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise _diverged(bench, number, batches, loss, rate, good)
    for before, flat in zip(good, bench.flats, strict=True):
        before.copy_(flat.whole.detach())
    take_step(bench.optimizer, rate)
    publish(bench.model)
    return loss, norm, rate


def accumulate(forward: nn.Module, batches: Sequence[MicroBatch], supervised: int, accelerator: Accelerator) -> Tensor:
    """Add up the gradients of a step's micro-batches; returns this rank's part of the step's loss, 0-dimensional.

    forward: examples, the gradient that their losses will get -> losses and owners; as accelerate prepared it.
    supervised: tokens that the whole step learns from, over all micro-batches and ranks.
    """

    def backward(batch: MicroBatch) -> Tensor:  # a function, so that no batch's graph outlives it
        share = batch.weight / supervised
        losses, _ = forward(batch.examples, share * accelerator.num_processes)
        part: Tensor = losses.sum() * share
        accelerator.backward(part * accelerator.num_processes)
        return part.detach()

    *others, last = batches
    with accelerator.no_sync(forward):
        parts = [backward(batch) for batch in others]
    return torch.stack([*parts, backward(last)]).sum()


def judge(bench: Bench, state: State, good: list[Tensor]) -> None:
    """Evaluate, and keep the adapter when it is the best so far; with AdaLoRA, of those of the final ranks."""
    within_budget = bench.allocator is None or bench.allocator.final
    evaluation = _finite(bench, state, held_out_loss(bench, state, keep=within_budget), good)
    if evaluation is None or not within_budget:
        return
    if not _is_best(state, evaluation):
        state.since_best += 1
        return
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in trained(bench.model).state_dict().items()}
    state.best, state.since_best = Best(state.step, evaluation, tensors), 0
    if bench.accelerator.is_main_process:
        save_subject(bench.model, bench.output_dir)


def held_out_loss(bench: Bench, state: State, *, keep: bool) -> Evaluation | None:
    """Evaluate every rank's share of the held-out examples and put the shares together. None without any.

    keep: the adapter is kept when this is its best loss, and the listener is told so.
    """
    if bench.held_out is None or len(bench.held_out) == 0:
        return None
    started, accelerator = time.perf_counter(), bench.accelerator
    mine = np.arange(accelerator.process_index, len(bench.held_out), accelerator.num_processes)
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(len(bench.held_out), dtype=wide, device=accelerator.device)
    if len(mine):
        part = evaluate(
            bench.model,
            bench.held_out.select(mine),
            rows=bench.rows,
            token_budget=bench.token_budget,
            device=accelerator.device,
        )
        sums[torch.from_numpy(mine).to(sums.device)] = torch.from_numpy(part.sums).to(sums)
    together = accelerator.reduce(sums, reduction="sum").cpu().double().numpy()
    evaluation = Evaluation(together, bench.held_out.supervised.astype(np.int64))
    best = keep and _is_best(state, evaluation)
    state.history.append((state.step, evaluation.loss))
    _report(bench, state, Evaluated(state.step, evaluation.loss, time.perf_counter() - started, best))
    return evaluation


def save_checkpoint(bench: Bench, state: State) -> Path:
    """Write checkpoint-N, then drop the oldest beyond the limit; returns its folder."""
    folder = bench.output_dir / f"checkpoint-{state.step}"
    states = gather_object([checkpoint.capture()])
    if bench.accelerator.is_main_process:
        tensors = {
            "adapter": trained(bench.model).state_dict(),
            "optimizer": checkpoint.moments(bench.optimizer, bench.flats),
            **{f"random-{rank}": random for rank, random in enumerate(states)},
            **({"evaluations": kept} if (kept := state.evaluations()) else {}),
            **({"best": state.best.tensors} if state.best else {}),
            **({"allocation": bench.allocator.state_dict()} if bench.allocator else {}),
        }
        content = {"progress": state.counters(), "run": bench.identity, **settings_of(bench.model)}
        checkpoint.save(folder, checkpoint.Checkpoint(content, tensors))
        checkpoint.prune(bench.output_dir, bench.config.save_total_limit)
    bench.accelerator.wait_for_everyone()
    bench.emit(Saved(state.step, folder))
    return folder


def _over_ranks(bench: Bench, batches: Sequence[MicroBatch], wish: Wish) -> tuple[int, int, bool]:
    """Tokens and supervised tokens of the step, and whether any rank was asked to stop."""
    own = [sum(batch.tokens for batch in batches), sum(batch.supervised for batch in batches), int(wish.is_set())]
    tokens, supervised, stop = bench.accelerator.reduce(
        torch.tensor(own, device=bench.accelerator.device), reduction="sum"
    ).tolist()
    return tokens, supervised, stop > 0


def _count(state: State, tokens: int, supervised: int, seconds: float) -> None:
    state.step += 1
    state.tokens += tokens
    state.supervised_tokens += supervised
    state.seconds += seconds


def _report(bench: Bench, state: State, event: Stepped | Evaluated) -> None:
    """The same numbers to metrics.jsonl, to the trackers and to the listener."""
    if isinstance(event, Stepped):
        values = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": event.tokens_per_second,
            "memory_bytes": event.memory_bytes,
        }
    else:
        values = {"eval_loss": event.loss}
    if bench.metrics is not None:
        bench.metrics.write(step=event.step, **values)
    bench.accelerator.log(values, step=event.step)
    bench.emit(event)


def _diverged(
    bench: Bench, number: int, batches: Sequence[MicroBatch], loss: float, rate: float, good: list[Tensor]
) -> DivergedError:
    """The cause of a step whose loss or gradient is not finite."""
    where = f"in step {number + 1} (learning rate {rate:.3g})"
    if math.isfinite(loss):  # so the weights are good as they are
        trained = {name: parameter for flat in bench.flats for name, parameter in flat.parts.items()}
        return give_up(bench, f"{where}: {broken_gradients(trained)}", None)
    cause = broken_loss(bench.model.base_model, batches, bench.rows, bench.accelerator.device)
    return give_up(bench, f"{where}: {cause}", good)


def give_up(bench: Bench, what: str, good: list[Tensor] | None) -> DivergedError:
    """Put the last good parameters back, save them unless a best adapter is kept, and say what happened."""
    if good is not None:
        for before, flat in zip(good, bench.flats, strict=True):
            flat.whole.detach().copy_(before)
        publish(bench.model)
    folder = folder_of(bench.model, bench.output_dir)
    kept = f"{folder} keeps the best adapter so far"
    if not folder.exists():
        kept = f"{folder} keeps the last weights with a finite loss"
        if bench.accelerator.is_main_process:
            save_subject(bench.model, bench.output_dir)
    return DivergedError(f"training diverged {what}. {kept}; {REMEDIES}")


def _finite(bench: Bench, state: State, evaluation: Evaluation | None, good: list[Tensor]) -> Evaluation | None:
    if evaluation is None or math.isfinite(evaluation.loss):
        return evaluation
    raise give_up(bench, f"in step {state.step}: the held-out loss after it is {evaluation.loss}", good)


def _is_best(state: State, evaluation: Evaluation) -> bool:
    return state.best is None or evaluation.loss < state.best.evaluation.loss


def _patience_spent(config: TrainConfig, state: State) -> bool:
    return 0 < config.early_stopping_patience <= state.since_best


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


# ---- A whole run: settings -> output folder -> model, data, adapter -> loop -> files.


RateAt = Callable[[int, int], float]  # step, of steps -> learning rate
OnReady = Callable[[Trainable, PreTrainedTokenizerBase, PreparedData | None], None]


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
    losses = Supervised(kit.model, kit.rows, accelerator.device)
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
        "kernels": kit.kernels.words,
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
