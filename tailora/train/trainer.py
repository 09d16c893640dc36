"""A fine-tuning run, from its settings to the files that it leaves.

`Trainer.train` is the run, from top to bottom:

    setup     data -> model -> adapter -> batch layout -> kernels -> memory -> optimizer
    loop      forward and backward of each micro-batch -> clip -> AdamW -> evaluate -> save a checkpoint
    finish    best adapter -> write it, read it back -> run.json

The loss of a step is the summed loss of all micro-batches and ranks, divided by the number of supervised tokens (or by
what the task counts). Ranks add up their gradients once a step (`train.parallel`).

On a device the host queues a step before it reads the loss of the one before, so that the device never waits. What
depends on numbers is decided there (`FiniteUpdates`). The queue is empty whenever something is evaluated or saved.

On a CPU, a resumed run gives bitwise the same result as an uninterrupted one. On a GPU the backward of attention
adds gradients in no fixed order.
"""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tailora.core.device import AsyncCopy, as_current, copies_by_itself, device_name, wide_dtype
from tailora.core.quantization import stored_bytes
from tailora.data.dataset import Examples
from tailora.data.prepare import PreparedData
from tailora.errors import CheckpointError, ConfigError, DivergedError, WriteError
from tailora.formats.fingerprint import model_fingerprint
from tailora.formats.run_folder import checkpoints_in
from tailora.kernels.flat_parameters import flattened
from tailora.kernels.loss import Batch
from tailora.model import LoRAModel
from tailora.train import checkpoint, events, launch, run_log, setup, trainable
from tailora.train.checkpoint import Best, Checkpoint, TrainState
from tailora.train.config import TrainConfig
from tailora.train.dataloader import (
    ChooseHeldOut,
    CollatedStep,
    ReadData,
    Step,
    one_ahead,
    read_data,
    stream_notes,
)
from tailora.train.divergence import REMEDIES, broken_gradients, broken_loss
from tailora.train.failures import Interrupted, StopSignals, fail_together
from tailora.train.kernel_choice import Work, choose_kernels, has_dropout, share_kept_instead, use_kernels
from tailora.train.loss import (
    BatchLayout,
    Evaluation,
    ModelWithLoss,
    Scores,
    Sums,
    batches_within,
    evaluate,
    make_batch,
)
from tailora.train.memory import (
    check_fits,
    explain_out_of_memory,
    keep_freed_memory,
    peak_bytes,
    remedies,
    reset_peak,
)
from tailora.train.model_loading import load_base
from tailora.train.optimizer import (
    OPTIMIZERS,
    FiniteUpdates,
    LossScale,
    LRSchedule,
    clip_gradients,
    lr_schedule,
    parameter_groups,
)
from tailora.train.parallel import Sharding, own_process_group, send_from_first_rank, sum_over_ranks
from tailora.train.random_state import random_state, seed_all, seeded
from tailora.train.trainable import Trainable, sync_parameters, trained_module

OnReady = Callable[[Trainable, PreTrainedTokenizerBase, PreparedData | None], None]
LOADING_REMEDIES = (
    "what helps: --quantize nf4 (a quarter of bfloat16's bytes), --dtype bfloat16 (half the bytes of float32), "
    "a smaller --model, closing other programs"
)


def run(
    config: TrainConfig,
    on_event: events.Listener | None = None,
    on_ready: OnReady | None = None,
    *,
    rate_at: LRSchedule | None = None,
    held_out: ChooseHeldOut | None = None,
    before: Evaluation | None = None,
    overwrite: bool = False,
) -> events.TrainResult:
    """Fine-tunes as `config` says: `Trainer(...).train()`, with the same arguments."""
    return Trainer(
        config, on_event, on_ready, rate_at=rate_at, held_out=held_out, before=before, overwrite=overwrite
    ).train()


@dataclass(frozen=True, eq=False)
class QueuedStep:
    """A step whose results were not read yet."""

    step: CollatedStep
    rate: float
    started: float  # time.perf_counter
    results: AsyncCopy  # loss, norm of the gradient, loss scale, whether skipped, diverged, asked to stop


class Trainer:
    """One fine-tuning run. `train()` runs it; `setup()` and `step()` alone measure what a few steps take.

    on_event: called with every event of `train.events`, in the main process.
    on_ready: called with the model, the tokenizer and the data before the first step.
    rate_at: step, number of steps -> learning rate; by default the schedule that `config` names.
    held_out: number of held-out examples -> indices of those to evaluate; by default all.
    before: the losses of the base model on them, if known; then they are not computed again.
    read: reads the data.
    overwrite: replaces an earlier run in the output folder. It is moved to earlier-run in that folder when everything
        is loaded, and deleted when the new adapter is whole.

    After `setup`: `base`, `tokenizer`, `data`, `model` (the adapter around the base, or the base trained in full),
    `layout` (packed or padded batches), `base_fingerprint` (of the adapted weights), `kernels`, `cost` (memory of a
    forward), `compiled_share` (of it, what compiled layers could keep), `buffers` (all trained parameters),
    `optimizer`, `updates` (its steps, and the last good parameters), `allocator` (of AdaLoRA), `forward` (the model
    with its loss, as accelerate prepared it), `identity`, `state`, `queue` (steps whose results were not read yet) and
    `metrics`.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_event: events.Listener | None = None,
        on_ready: OnReady | None = None,
        *,
        rate_at: LRSchedule | None = None,
        held_out: ChooseHeldOut | None = None,
        before: Evaluation | None = None,
        read: ReadData = read_data,
        overwrite: bool = False,
    ) -> None:
        self.config, self.on_event, self.on_ready, self.overwrite = config, on_event, on_ready, overwrite
        self.rate_at, self.held_out, self.before, self.read = rate_at or lr_schedule(config), held_out, before, read

    def train(self) -> events.TrainResult:
        """Runs until the last step or until evaluations stop improving.

        Raises ConfigError, DataError, TargetError and CheckpointError before anything is trained; while training,
        DivergedError if a loss or gradient is not finite, MemoryLimitError, and Interrupted after Ctrl-C or SIGTERM.
        """
        started = time.perf_counter()
        with StopSignals(launch.world_size()) as signals, ExitStack() as stack:
            self.setup(stack)
            config, state, max_steps = self.config, self.state, self.data.max_steps
            self.header = self.write_header()
            if self.on_ready is not None:
                self.on_ready(self.model, self.tokenizer, self.data.prepared)
            stack.enter_context(explain_out_of_memory("training", self.memory_remedies))
            with self.use_kernels():
                self.compute_reference()
                signals.handle()  # until here there is nothing to save, and Ctrl-C ends the run at once
                self.evaluate_before_training()
                steps = stack.enter_context(self.collated_steps())
                while self.queued_steps < max_steps and not self.is_out_of_patience():
                    step = next(steps)
                    if self.stops if self.accelerator.num_processes > 1 else signals.stop.is_set():
                        raise Interrupted(self.save_checkpoint())
                    self.step(step, signals.stop.is_set())
                    done = self.queued_steps
                    if config.eval_steps and (done % config.eval_steps == 0 or done == max_steps):
                        self.evaluate_and_keep_best()
                    if config.save_steps and done % config.save_steps == 0:
                        self.save_checkpoint()
                after = self.restore_best()
                self.accept_checkpoint()
            signals.restore()
            folder = self.save_trained()
            if self.accelerator.is_main_process:
                run_log.delete_earlier(self.output_dir)
            # the files exist when any rank returns
            self.accelerator.wait_for_everyone()
        result = self.result(after, time.perf_counter() - started)
        self.header["diverged"] = False  # also if it was resumed after it had
        if self.accelerator.is_main_process:
            try:
                run_log.write_run(self.output_dir, self.header, result.to_dict())
                task, held_out = self.layout.task, self.data.held_out
                targets = None if held_out is None else task.targets(held_out)
                run_log.write_examples(self.output_dir, state.before, after, task.score_names, targets)
            except WriteError as error:  # what was trained is whole, so the run has not failed
                self.note(str(error))
        for text in stream_notes(self.data, config.max_length):
            self.note(text)
        self.report(events.Saved(result.best_step, folder))
        self.report(events.Finished(result.to_dict()))
        return result

    # ---- Setup

    def setup(self, stack: ExitStack) -> None:
        """Makes everything ready for the first step. Leaving `stack` restores the caller's state and the model."""
        config = self.config
        self.output_dir = Path(config.output_dir)
        stack.enter_context(own_process_group(until_exit=True))
        self.accelerator = accelerator = setup.start_accelerator(config)
        stack.callback(self.end_trackers)
        stack.enter_context(fail_together(accelerator, partial(launch.how_to_go_on, self.output_dir)))
        device, rank = accelerator.device, accelerator.process_index
        stack.enter_context(as_current(device))
        reset_peak(device)
        keep_freed_memory(device)
        if accelerator.is_main_process:
            stack.enter_context(run_log.lock(self.output_dir))
            run_log.remove_run_leftovers(self.output_dir)
            run_log.check_run_folder(config, overwrite=self.overwrite)
        saved, self.has_diverged = None, False
        if (resumed := config.resume_from_checkpoint) is not None:
            saved = checkpoint.load(resumed, self.output_dir, self.note)
            self.has_diverged = run_log.has_diverged(self.output_dir if resumed == "latest" else Path(resumed).parent)
        stack.enter_context(seeded(config.seed))

        with explain_out_of_memory("loading", lambda: LOADING_REMEDIES):
            sharding = None
            if config.fsdp:
                sharding = Sharding(
                    device,
                    reshard_after_forward=config.fsdp_reshard_after_forward,
                    offload_params=config.fsdp_offload_params,
                )
            self.labels, self.has_new_head = setup.find_labels(config)
            self.base, self.tokenizer = load_base(
                config.model,
                config.dtype,
                device,
                config.quantize,
                sharding=sharding,
                task=config.task,
                labels=self.labels,
                seed=config.seed,
            )
            base = model_fingerprint(self.base)
            embedding_rows = self.base.get_input_embeddings().weight.shape[0]
            data = self.read(config, embedding_rows, self.tokenizer, accelerator, self.labels)
            if self.held_out is not None and data.held_out is not None:
                data = replace(data, held_out=data.held_out.select(self.held_out(len(data.held_out))))
            self.data = data
            self.model = setup.attach(config, self.base, self.tokenizer, saved, sharding, self.labels)
            self.layout = setup.choose_layout(config, self.model, self.tokenizer, self.note, task=data.task)
            setup.check_layers_are_called(self.model, self.layout, data.longest, self.note)
            setup.init_from_data(self.model, data, self.layout, config.init_batches)
            self.base_fingerprint = trainable.base_fingerprint(self.model)
            recorded = None if saved is None else saved.state["run"].get("layer_kernels")
            work = Work(data.tokens(0 if saved is None else saved.state["progress"]["step"]), data.longest)
            self.kernels = choose_kernels(config, self.model, self.layout, work, recorded)
            self.cost = setup.memory_cost(self.model, self.layout, self.kernels, data.longest)
            self.layout = replace(self.layout, task=data.task)
        counts = None if data.held_out is None else self.layout.task.counts(data.held_out)
        if self.before is not None and not np.array_equal(self.before.counts, counts):  # type: ignore[arg-type]
            raise ConfigError("the held-out examples are not those of the base's evaluation: the data has changed")
        self.compiled_share = share_kept_instead(config, self.base, self.kernels)
        check_fits(self.cost, data.largest_size, len(data.longest.input_ids), device, self.compiled_share)

        groups = parameter_groups(trained_module(self.model), config, trainable.sharded_names(self.model))
        self.buffers = stack.enter_context(flattened(groups))
        send_from_first_rank(self.buffers, trained_module(self.model))
        prepared = None if config.streaming else data.prepared
        self.identity: dict[str, Any] = {  # what a checkpoint of this run must agree with
            "settings": config.model_dump(mode="json", exclude=checkpoint.FREE),
            "data": None if prepared is None else prepared.report.sha256,
            "packed": self.layout.packed,
            "dtype": str(self.base.dtype),
            "processes": accelerator.num_processes,
            "device": device.type,
            "layer_kernels": self.kernels.record,
            "base": {name: layer.model_dump(by_alias=True, exclude_defaults=True) for name, layer in base.items()},
        }
        if saved is not None:
            checkpoint.check_same_run(saved.state["run"], self.identity, diverged=self.has_diverged)
            earlier_rate = saved.state["run"]["settings"]["learning_rate"]
            if config.learning_rate < earlier_rate:
                self.note(f"the learning rate is {config.learning_rate:g} from here on; it was {earlier_rate:g}")
        self.optimizer = OPTIMIZERS[config.optim](self.buffers)
        seed_all(config.seed + rank)  # each rank draws its own dropout masks
        self.allocator = trainable.rank_allocator(self.model, self.optimizer, data.max_steps)
        self.state = TrainState()
        if saved is not None:
            before, now = saved.state["run"].get("processes", 1), accelerator.num_processes
            if before != now:
                seed_all(config.seed + rank + 1000 * saved.state["progress"]["step"])  # other masks than at the start
                masks = ", masks of dropout are not" if has_dropout(self.base) else ""
                self.note(f"{now} processes go on instead of {before}: the steps are the same{masks}")
            drawn_by = rank if before == now else None
            self.state = checkpoint.restore(saved, self.model, self.optimizer, self.buffers, drawn_by, self.allocator)
        self.state.before = self.state.before or self.before
        loss_scale = LossScale(device) if self.base.dtype == torch.float16 else None
        if loss_scale is not None and saved is not None and "loss_scale" in saved.tensors:
            loss_scale.load_state_dict(saved.tensors["loss_scale"])
        self.updates = FiniteUpdates(self.optimizer, self.buffers, loss_scale)
        self.queue: deque[QueuedStep] = deque()
        self.last_read = 0.0  # when the results of a step were last read
        self.stops = False  # True if a rank was asked to stop
        # device_placement would move buffers that are on the device already, and leave copies behind; evaluation_mode
        # leaves out DDP, and autocast stays as `accelerate launch --mixed_precision` asks for it
        self.forward = accelerator.prepare_model(
            ModelWithLoss(self.model, self.layout), device_placement=False, evaluation_mode=True
        )
        accelerator.init_trackers("tailora", config={name: str(value) for name, value in config.model_dump().items()})
        self.metrics: run_log.Metrics | None = None
        self.unproven: Path | None = None  # the checkpoint of the last step: no loss was computed with its weights yet
        if accelerator.is_main_process:
            if self.overwrite and (aside := run_log.set_aside(self.output_dir)):
                self.note(f"the earlier run is in {aside} until this one has finished")
            self.metrics = run_log.Metrics(self.output_dir, resumed_at=None if saved is None else self.state.step)
            stack.callback(self.metrics.close)

    def end_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def write_header(self) -> dict[str, Any]:
        """Writes config.yaml and the first version of run.json; returns what run.json holds, without the result."""
        config, data, summary = self.config, self.data, self.model.summary()
        header = {
            "settings": config.model_dump(mode="json"),
            "model": self.base.config.name_or_path,
            "device": str(self.accelerator.device),
            "device_name": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "base_bytes": stored_bytes(self.base),
            "packed": self.layout.packed,
            "kernels": self.kernels.description,
            "task": self.layout.task.description,
            "loss_unit": self.layout.task.loss_unit,
            "labels": None if self.labels is None else {**self.labels.to_dict(), "new_head": self.has_new_head},
            "start": setup.describe_init(config),
            "adapted_layers": len(summary.rows),
            "trainable_parameters": summary.trainable_parameters,
            "total_parameters": summary.total_parameters,
            "max_steps": data.max_steps,
            "largest_forward_tokens": data.largest_size.tokens,
            "data": None if data.prepared is None else data.prepared.report.to_dict(),
            **run_log.environment(),
            "estimated_activation_bytes": self.cost.of(data.largest_size),
            "diverged": self.has_diverged,
        }
        if self.accelerator.is_main_process:
            run_log.write_settings(self.output_dir, config)
            run_log.write_run(self.output_dir, header)
        self.report(events.Prepared(header))
        return header

    def use_kernels(self) -> Any:
        """Within the block the model computes with the chosen attention and kernels."""
        return use_kernels(self.base, self.layout, self.kernels, checkpointed=self.config.gradient_checkpointing)

    def memory_remedies(self) -> str:
        return remedies(self.cost, self.data.largest_size, len(self.data.longest.input_ids), self.compiled_share)

    # ---- A step

    @property
    def queued_steps(self) -> int:
        """Steps that were computed or, on a device, queued for it."""
        return self.state.step + len(self.queue)

    def collated_steps(self) -> AbstractContextManager[Iterator[CollatedStep]]:
        """Within the block, yields the steps that are left, as tensors on the device."""
        left = islice(self.data.steps(self.state.step), self.data.max_steps - self.state.step)
        return one_ahead(map(self.collated, left), self.accelerator.device)

    def collated(self, step: Step) -> CollatedStep:
        """Returns the step as tensors on the device."""
        device = self.accelerator.device
        batches = [
            replace(make_batch(part.examples, self.layout, device), weight=part.weight) for part in step.micro_batches
        ]
        return CollatedStep(batches, step.tokens, step.supervised, step.divisor)

    def step(self, step: CollatedStep, stop: bool = False) -> None:
        """Takes one optimizer step and reports it; on a device, queues it and reports the one before.

        stop: whether this rank was asked to stop.
        Raises DivergedError if the loss or a gradient is not finite, of this step or, on a device, of the one before.
        """
        started, updates = time.perf_counter(), self.updates
        scale = None if updates.loss_scale is None else updates.loss_scale.value.clone()  # of this step
        share = self.compute_gradients(step, scale)
        loss, stops = self.accelerator.reduce(torch.stack([share, torch.full_like(share, stop)]), reduction="sum")
        norm = clip_gradients(self.buffers, self.config.max_grad_norm, updates.loss_scale)
        rate = self.rate_at(self.queued_steps, self.data.max_steps)
        updates.step(loss, norm, rate)
        sync_parameters(self.model)
        values = (loss, norm, norm.new_ones(()) if scale is None else scale, updates.skipped, updates.diverged, stops)
        results = torch.stack([value.to(norm) for value in values])
        self.queue.append(QueuedStep(step, rate, started, AsyncCopy(results)))
        while len(self.queue) > int(copies_by_itself(norm.device)):
            self.read_step()

    def compute_gradients(self, step: CollatedStep, loss_scale: Tensor | None = None) -> Tensor:
        """Fills the buffers with the gradients of a step, of all ranks; returns this rank's share of its loss."""
        self.optimizer.zero_grad(set_to_none=False)
        batches = self.layout.task.complete_step(
            self.model, step.batches, self.layout, partial(self.accelerator.reduce, reduction="sum")
        )
        share = accumulate_gradients(self.forward, batches, step.divisor, loss_scale)
        sum_over_ranks(self.buffers)
        return share

    def read_steps(self) -> None:
        """Waits for all queued steps and reports them. Raises DivergedError."""
        while self.queue:
            self.read_step()

    def read_step(self) -> None:
        """Waits for the first of the queued steps and reports it. Raises DivergedError."""
        queued, state, max_steps = self.queue.popleft(), self.state, self.data.max_steps
        loss, norm, scale, skipped, diverged, stops = queued.results.read()
        if diverged:
            raise self.diverged_in_step(queued, loss)
        self.stops = stops > 0
        self.accept_checkpoint()
        step, now = queued.step, time.perf_counter()
        seconds = now - max(queued.started, self.last_read)
        self.last_read = now
        state.step += 1
        state.tokens += step.tokens
        state.supervised_tokens += step.supervised
        state.seconds += seconds
        event = events.Stepped(
            step=state.step,
            max_steps=max_steps,
            loss=loss,
            learning_rate=queued.rate,
            grad_norm=norm,
            tokens=step.tokens,
            supervised_tokens=step.supervised,
            seconds=seconds,
            tokens_per_second=state.tokens / state.seconds,
            eta_seconds=state.seconds / state.step * (max_steps - state.step),
            memory_bytes=peak_bytes(self.accelerator.device),
            skipped=bool(skipped),
        )
        shown_norm = None if skipped else norm  # JSON has no infinity
        values = {"loss": loss, "learning_rate": queued.rate, "grad_norm": shown_norm, "tokens": state.tokens}
        if self.updates.loss_scale is not None:
            values["loss_scale"] = scale
        if skipped:
            self.note(f"step {state.step} changes nothing: a gradient overflows float16 at the loss scale {scale:g}")
        speed = {"tokens_per_second": event.tokens_per_second, "memory_bytes": event.memory_bytes}
        self.log(state.step, {**values, **speed})
        self.report(event)

    # ---- Evaluation

    def compute_reference(self) -> None:
        """Computes what the task compares with, of the model as it is before training, and keeps it in a file."""
        task = self.layout.task
        if task.reference is None:
            return
        resumed = self.config.resume_from_checkpoint
        if resumed is not None:
            task.reference.read(self.output_dir if resumed == "latest" else Path(resumed).parent)
        parts = [part for part in (self.data.trained_on(), self.data.held_out) if part is not None]
        examples = Examples.of(example for part in parts for example in part).distinct()
        missing = task.reference.missing(examples)
        if len(missing) and resumed is not None and not self.adapter_is_new:
            raise CheckpointError(
                f"{len(missing):,} examples were not needed when this run began, and what the model was then is not "
                "known for them: keep --max-steps and --num-train-epochs, or start again in another --output-dir"
            )
        if len(missing):
            layout = replace(self.layout, task=task.without_reference())
            with self.model.disable_adapter() if self.adapter_is_new else nullcontext():
                scores = self.evaluate(missing, layout, "examples, for the reference").scores
            task.reference.add(missing, cast(Scores, scores)[:, :2])
        if self.accelerator.is_main_process:
            task.reference.write(self.output_dir)  # also what was read from another folder, for the next resume

    @property
    def adapter_is_new(self) -> bool:
        """True if the adapter changed nothing at the start of training: then the base alone is faster."""
        return isinstance(self.model, LoRAModel) and self.config.adapter is None

    def evaluate_before_training(self) -> None:
        """Evaluates the model as it is before the first step, unless that is known. Raises DivergedError."""
        state, held_out = self.state, self.data.held_out
        known = self.layout.task.evaluation_before_training(held_out) if held_out else None
        if state.before is None and known is not None:
            state.before = self.record(known, 0.0, may_be_kept=False)
        elif state.before is None:
            with self.model.disable_adapter() if self.adapter_is_new else nullcontext():
                state.before = self.held_out_loss(may_be_kept=False)
        if state.before is not None and not math.isfinite(state.before.loss):
            raise DivergedError(f"the held-out loss is {state.before.loss} before any training; {REMEDIES}")

    def evaluate_and_keep_best(self) -> None:
        """Evaluates, and keeps the adapter if it is the best so far; with AdaLoRA, if its ranks are final."""
        self.read_steps()
        may_be_kept = self.allocator is None or self.allocator.final
        evaluation = self.check_finite(self.held_out_loss(may_be_kept=may_be_kept))
        if evaluation is None or not may_be_kept:
            return
        if not self.is_best(evaluation):
            self.state.since_best += 1
            return
        parameters = trained_module(self.model).state_dict()
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}
        self.state.best, self.state.since_best = Best(self.state.step, evaluation, tensors), 0
        self.save_model()

    def held_out_loss(self, *, may_be_kept: bool) -> Evaluation | None:
        """Evaluates the held-out examples; None if there are none.

        may_be_kept: the adapter is kept if this is its best loss, which the event says.
        """
        held_out = self.data.held_out
        if held_out is None or len(held_out) == 0:
            return None
        started = time.perf_counter()
        evaluation = self.evaluate(held_out, self.layout)
        return self.record(evaluation, time.perf_counter() - started, may_be_kept=may_be_kept)

    def record(self, evaluation: Evaluation, seconds: float, *, may_be_kept: bool) -> Evaluation:
        """Logs and reports an evaluation of the held-out examples, and returns it."""
        self.state.history.append((self.state.step, evaluation.loss))
        self.log(self.state.step, {"eval_loss": evaluation.loss})
        best = may_be_kept and self.is_best(evaluation)
        self.report(events.Evaluated(self.state.step, evaluation.loss, seconds, best))
        return evaluation

    def evaluate(self, examples: Examples, layout: BatchLayout, what: str = "held-out examples") -> Evaluation:
        """Evaluates this rank's share of the examples and joins the shares. what: they are, for the progress."""
        accelerator, counts = self.accelerator, layout.task.counts(examples)
        budget, ranks = self.data.largest_size.tokens, accelerator.num_processes
        shares = [np.arange(rank, len(examples), ranks) for rank in range(min(ranks, len(examples)))]
        forwards = 0
        if self.config.fsdp:  # every forward needs all ranks
            batches = [list(batches_within(budget, examples.lengths[share], layout.packed)) for share in shares]
            forwards = max(map(len, batches))
        sums = np.zeros(len(examples))
        scores = np.zeros((int(counts.sum()), len(layout.task.score_names)))
        has_share = accelerator.process_index < len(shares)
        if has_share or forwards:
            share = shares[accelerator.process_index if has_share else 0]
            part = evaluate(
                self.model,
                examples.select(share),
                layout=layout,
                token_budget=budget,
                forwards=forwards,
                progress=lambda done, total: self.report(events.EvaluationProgress(done, total, what)),
            )
            if has_share:
                sums[share] = part.sums
                if part.scores is not None:
                    scores[np.isin(np.repeat(np.arange(len(examples)), counts), share)] = part.scores
        if accelerator.num_processes > 1:
            wide = wide_dtype(accelerator.device)
            numbers = torch.from_numpy(np.concatenate([sums, scores.ravel()])).to(accelerator.device, wide)
            joined = accelerator.reduce(numbers, reduction="sum").cpu().double().numpy()
            sums, scores = joined[: len(sums)], joined[len(sums) :].reshape(scores.shape)
        return layout.task.evaluation(examples, sums, scores if scores.size else None)

    def is_best(self, evaluation: Evaluation) -> bool:
        return self.state.best is None or evaluation.loss < self.state.best.evaluation.loss

    def is_out_of_patience(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.state.since_best

    # ---- Saving

    def save_checkpoint(self) -> Path:
        """Writes checkpoint-N and returns its folder. Raises DivergedError for values that are not finite."""
        self.read_steps()
        state, loss_scale = self.state, self.updates.loss_scale
        folder = self.output_dir / f"checkpoint-{state.step}"
        tensors = {
            "adapter": trained_module(self.model).state_dict(),
            "optimizer": checkpoint.moments(self.optimizer, self.buffers),
            **({"evaluations": evaluations} if (evaluations := state.evaluations()) else {}),
            **({"best": state.best.tensors} if state.best else {}),
            **({"allocation": self.allocator.state_dict()} if self.allocator else {}),
            **({"loss_scale": loss_scale.state_dict()} if loss_scale else {}),
        }
        for file in checkpoint.BY_PARAMETER:
            if file in tensors:
                tensors[file] = trainable.gather_tensors(self.model, tensors[file])
        if broken := broadcast_object_list([checkpoint.not_finite(tensors)])[0]:
            raise self.diverged(f"in step {state.step}: it left values that are not finite ({'; '.join(broken)})")
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            tensors |= {f"random-{rank}": states for rank, states in enumerate(random_states)}
            content = {"progress": state.counters(), "run": self.identity, **trainable.adapter_settings(self.model)}
            checkpoint.save(folder, Checkpoint(content, tensors))
        self.unproven = folder
        self.accelerator.wait_for_everyone()
        self.report(events.Saved(state.step, folder))
        return folder

    def accept_checkpoint(self) -> None:
        """Deletes the oldest checkpoints beyond the limit, now that the weights of the newest gave a finite loss."""
        if self.unproven is not None and self.accelerator.is_main_process:
            for old in checkpoints_in(self.output_dir)[: -self.config.save_total_limit]:
                shutil.rmtree(old)
        self.unproven = None

    def restore_best(self) -> Evaluation | None:
        """Restores the best parameters, or checks and evaluates the last; returns their held-out loss."""
        self.read_steps()
        if not all(gather_object([bool(buffer.parameter.isfinite().all()) for buffer in self.buffers])):
            raise self.diverged(f"in step {self.state.step}: it left weights that are not finite")
        if self.is_out_of_patience():
            self.note(f"stopped early: {self.state.since_best} evaluations in a row without improvement")
        best = self.state.best
        if best is None:
            return self.check_finite(self.held_out_loss(may_be_kept=False))
        checkpoint.set_parameters(trained_module(self.model), best.tensors)
        sync_parameters(self.model)
        return best.evaluation

    def save_trained(self) -> Path:
        """Writes the adapter or the model, reads it back and returns its folder. Raises CheckpointError."""
        folder = trainable.folder_of(self.model, self.output_dir)
        if isinstance(self.model, LoRAModel):
            self.model.settle_ranks()  # removes those that AdaLoRA has switched off
        self.save_model(compare=True)
        return folder

    def save_model(self, *, compare: bool = False) -> None:
        """Writes the adapter or the model, in the main process. compare: reads it back, or raises CheckpointError.

        Reading back takes all ranks of a sharded base, as does writing weights of which each has a part: the others
        do the same in a folder of their own, which is deleted.
        """
        with ExitStack() as stack:
            folder = self.output_dir
            if not self.accelerator.is_main_process:
                if not (self.config.fsdp and (compare or trainable.sharded_names(self.model))):
                    return
                folder = Path(stack.enter_context(TemporaryDirectory()))
            written = trainable.save(self.model, folder, self.base_fingerprint)
            if compare and (different := trainable.differences(self.model, written)):
                names = ", ".join(different[:3])
                raise CheckpointError(f"{written} reads back different in {names}; is the disk failing?")

    def result(self, after: Evaluation | None, seconds: float) -> events.TrainResult:
        state, summary = self.state, self.model.summary()
        return events.TrainResult(
            output_dir=str(self.output_dir),
            steps=state.step,
            train_tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
            tokens_per_second=state.tokens / state.seconds,
            eval_loss_before=state.before.loss if state.before else None,
            eval_loss_after=after.loss if after else None,
            best_step=state.best.step if state.best else state.step,
            trainable_parameters=summary.trainable_parameters,
            total_parameters=summary.total_parameters,
            peak_memory_bytes=peak_bytes(self.accelerator.device),
            seconds=seconds,
            model=self.model,
            tokenizer=self.tokenizer,
            data=self.data.prepared,
            before=state.before,
            after=after,
            hits_before=self.hits(state.before),
            hits_after=self.hits(after),
        )

    def hits(self, evaluation: Evaluation | None) -> Sums | None:
        """Returns how many predictions of each held-out example are right, if the task predicts labels."""
        held_out = self.data.held_out
        return None if evaluation is None or held_out is None else self.layout.task.hits(held_out, evaluation)

    # ---- Reporting

    def report(self, event: events.Event) -> None:
        """Calls the listener, in the main process."""
        if self.on_event is not None and self.accelerator.is_main_process:
            self.on_event(event)

    def note(self, text: str) -> None:
        self.report(events.Note(text))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Writes numbers to metrics.jsonl and to the trackers."""
        if self.metrics is not None:
            self.metrics.write(step=step, **values)
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    # ---- Divergence

    def check_finite(self, evaluation: Evaluation | None) -> Evaluation | None:
        """Returns the evaluation. Raises DivergedError if its loss is not finite."""
        if evaluation is None or math.isfinite(evaluation.loss):
            return evaluation
        raise self.diverged(f"in step {self.state.step}: the held-out loss after it is {evaluation.loss}")

    def diverged_in_step(self, queued: QueuedStep, loss: float) -> DivergedError:
        """Returns the error for a step whose loss or gradient is not finite, with the module where that began."""
        where = f"in step {self.state.step + 1} (learning rate {queued.rate:.3g})"
        if not math.isfinite(loss):
            cause = broken_loss(self.base, queued.step.batches, self.layout)
            return self.diverged(f"{where}: {cause}")
        if self.queue:  # the gradients are those of a later step by now; the parameters are still the same
            self.compute_gradients(queued.step)
        parameters = {name: p for buffer in self.buffers for name, p in buffer.parameters.items()}
        return self.diverged(f"{where}: {broken_gradients(parameters)}", parameters_are_good=True)

    def diverged(self, cause: str, *, parameters_are_good: bool = False) -> DivergedError:
        """Restores the last good parameters, saves them unless a best adapter is kept, and returns the error.

        parameters_are_good: those before the step gave a finite loss.
        """
        self.updates.restore_last_good()
        sync_parameters(self.model)
        folder = trainable.folder_of(self.model, self.output_dir)
        saved = f"{folder} keeps the best adapter so far"
        is_main = self.accelerator.is_main_process
        if not broadcast_object_list([folder.exists()])[0]:
            saved = f"{folder} keeps the last weights with a finite loss"
            self.save_model()
        if is_main and self.unproven and not parameters_are_good:
            shutil.rmtree(self.unproven)
        if is_main:
            self.header["diverged"] = True  # allows a resume with a lower learning rate
            run_log.write_run(self.output_dir, self.header)
        self.accelerator.wait_for_everyone()  # all ranks see the same checkpoints
        good = checkpoints_in(self.output_dir)
        resume = ""
        if good:
            lower = ("--learning-rate", f"{self.config.learning_rate / 10:g}")
            command = launch.how_to_resume(good[-1], *lower, purpose="to resume it with a lower rate")
            resume = f"\nthe last good checkpoint is {good[-1]}; {command}"
        return DivergedError(f"training diverged {cause}. {saved}; {REMEDIES}{resume}")


def accumulate_gradients(
    forward: nn.Module, batches: Sequence[Batch], divisor: float, loss_scale: Tensor | None = None
) -> Tensor:
    """Runs forward and backward of a rank's micro-batches; returns its share of the step's loss, 0-dimensional.

    forward: `ModelWithLoss`, as accelerate prepared it.
    divisor: of the summed loss of the whole step: for language models its supervised tokens, each times the weight of
        its row, on all ranks.
    loss_scale: what the gradients are multiplied by, 0-dimensional; nothing if it is None.
    """
    factor = 1.0 if loss_scale is None else loss_scale

    def backward(batch: Batch) -> Tensor:  # a function, so that no batch's graph outlives it
        scale = batch.weight / divisor
        losses = forward(replace(batch, expected_gradient=scale * factor if batch.weight else 1.0))
        weighted = losses if batch.loss_weights is None else losses * batch.loss_weights
        share: Tensor = weighted.sum() * scale
        torch.autograd.backward(share * factor)
        return share.detach()

    return torch.stack([backward(batch) for batch in batches]).sum()
