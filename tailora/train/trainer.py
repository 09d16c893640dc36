"""A fine-tuning run, from its settings to the files that it leaves.

`Trainer.train` is the run, from top to bottom:

    setup     `train.setup.set_up` makes everything that stays as it is (`Run`) and what changes (`TrainState`)
    loop      forward and backward of each micro-batch -> clip -> AdamW -> evaluate -> save a checkpoint
    finish    best adapter -> write it, read it back -> run.json

The loss of a step is the summed loss of all micro-batches and ranks, divided by the number of supervised tokens (or by
what the task counts). Ranks add up their gradients once a step (`train.parallel`).

On a device the host submits a step before it reads the loss of the one before, so that the device never waits. What
depends on numbers is decided there (`FiniteUpdates`). No step is unread whenever something is evaluated or saved.

On a CPU, a resumed run gives bitwise the same result as an uninterrupted one. On a GPU the backward of attention
adds gradients in no fixed order.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
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

from tailora.core.device import AsyncCopy, copies_by_itself
from tailora.data.dataset import Examples
from tailora.data.prepare import PreparedData
from tailora.errors import CheckpointError, ConfigError, DivergedError, WriteError
from tailora.formats.run_folder import checkpoints_in, write_system_message
from tailora.kernels.loss import Batch
from tailora.model import LoRAModel
from tailora.train import checkpoint, events, launch, run_log, trainable
from tailora.train.best_step import StepChoice
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.dataloader import ChooseHeldOut, ReadData, read_data, stream_notes
from tailora.train.divergence import REMEDIES, broken_loss
from tailora.train.failures import Interrupted, StopSignals
from tailora.train.kernel_choice import use_kernels
from tailora.train.loss import Evaluation, Sums, Task, TaskScores, batches_within, evaluate, make_batch, repeat_forward
from tailora.train.memory import explain_out_of_memory, peak_bytes
from tailora.train.optimizer import clip_gradients, learning_rate
from tailora.train.parallel import sum_over_ranks
from tailora.train.setup import resumed_folder, set_up
from tailora.train.state import Best, StepResults, SubmittedStep, random_state
from tailora.train.step import Step
from tailora.train.trainable import FullModel, Trainable, sync_parameters, trained_module

SECONDS_BETWEEN_CHECKPOINTS = 600.0  # unless --save-steps says otherwise

OnReady = Callable[[Trainable, PreTrainedTokenizerBase, PreparedData | None], None]


def run(
    config: TrainConfig, on_event: events.Listener | None = None, on_ready: OnReady | None = None, **options: Any
) -> events.TrainResult:
    """Fine-tunes as `config` says. options: see `Trainer`.

    on_ready: called with the model, the tokenizer and the data before the first step.
    """
    with ExitStack() as stack:
        return Trainer(config, stack, on_event, **options).train(on_ready)


class Trainer:
    """One fine-tuning run, ready for its first step. `train()` runs it; `step()` alone measures what a few steps take.

    stack: restores the caller's state and the model when it is left.
    on_event: called with every event of `train.events`, in the main process.
    read: reads the data.
    held_out: number of held-out examples -> indices of those to evaluate; by default all.
    before: the losses of the base model on them, if known; then they are not computed again.
    overwrite: replaces an earlier run in the output folder. It is moved to earlier-run in that folder when everything
        is loaded, and deleted when the new adapter is complete.
    """

    def __init__(
        self,
        config: TrainConfig,
        stack: ExitStack,
        on_event: events.Listener | None = None,
        *,
        read: ReadData = read_data,
        held_out: ChooseHeldOut | None = None,
        before: Evaluation | None = None,
        overwrite: bool = False,
    ) -> None:
        """Raises ConfigError, DataError, TargetError and CheckpointError."""
        self.started, self.stack = time.perf_counter(), stack
        self.signals = stack.enter_context(StopSignals(launch.world_size()))
        self.run, self.state = set_up(config, stack, on_event, read=read, held_out=held_out, overwrite=overwrite)
        self.config, examples = self.run.config, self.run.data.held_out
        counts = None if examples is None else self.run.task.counts(examples)
        if before is not None and (counts is None or not np.array_equal(before.counts, counts)):
            raise ConfigError("held-out examples changed since the base was evaluated; use a different --output-dir")
        self.state.before = self.state.before or before
        self.choice = StepChoice.of(self.run, stack, is_halved=held_out is not None)

    def train(self, on_ready: OnReady | None = None) -> events.TrainResult:
        """Runs until the last step or until evaluations stop improving.

        Raises DivergedError if a loss or gradient is not finite, MemoryLimitError, and Interrupted after a signal.
        """
        config, run, state, stack, signals = self.config, self.run, self.state, self.stack, self.signals
        header = {**run.header, "diverged": state.diverged}
        if run.is_main:
            run_log.write_settings(run.output_dir, config)
            run_log.write_run(run.output_dir, header)
            if run.data.prepared is not None and not config.streaming:
                run_log.write_rows(run.output_dir, config, run.data.prepared)
        run.report(events.Prepared(header))
        if on_ready is not None:
            on_ready(run.model, run.tokenizer, run.data.prepared)
        stack.enter_context(explain_out_of_memory("training", run.memory_remedies))
        with use_kernels(run.base, run.layout, run.kernels, checkpointed=config.gradient_checkpointing):
            self.compute_reference()
            signals.handle()  # until here there is nothing to save, and Ctrl-C ends the run at once
            self.evaluate_before_training()
            left = islice(run.data.steps(state.step), run.data.max_steps - state.step)
            steps = map(self.collated, left)
            while self.submitted_steps < run.data.max_steps and not self.is_out_of_patience():
                is_stopped = state.stop_requested if run.accelerator.num_processes > 1 else signals.stop.is_set()
                if is_stopped and self.can_be_resumed:
                    raise Interrupted(self.save_checkpoint())
                step_started = time.perf_counter()  # sampling completions belongs to the time of their step
                with self.sampling():
                    step = next(steps)
                self.step(step, step_started, signals.stop.is_set())
                done = self.submitted_steps
                if done in self.choice.steps or done in self.choice.curve:
                    self.evaluate_and_keep_best()
                is_due = state.checkpoint_is_due and self.can_be_resumed
                if is_due or (config.save_steps and done % config.save_steps == 0):
                    self.save_checkpoint()
            after = self.restore_best()
            self.accept_checkpoint()
        signals.restore()
        self.save_model(compare=True)
        if run.is_main:
            run_log.delete_earlier(run.output_dir)
        run.accelerator.wait_for_everyone()  # the files exist when any rank returns
        result = self.result(after)
        self.write_result(result)
        run.report(events.Saved(result.best_step, trainable.folder_of(run.model, run.output_dir)))
        return result

    # ---- A step

    @property
    def submitted_steps(self) -> int:
        """Steps that were computed or, on a device, are under way."""
        return self.state.step + (self.state.unread is not None)

    def collated(self, step: Step) -> Step:
        layout, device, task = self.run.layout, self.run.accelerator.device, self.run.task
        batches = [make_batch(examples, layout, device, task) for examples in step.micro_batches]
        counted = len(batches) - step.idle
        return replace(step, batches=batches[:counted] + [replace(batch, weight=0.0) for batch in batches[counted:]])

    def step(self, step: Step, started: float, stop: bool = False) -> None:
        """Takes one optimizer step and reports it. On a device, the host waits for neither: it reports the one before.

        started: by time.perf_counter.
        stop: whether this rank was asked to stop.

        Raises DivergedError if the loss or a gradient of the reported step is not finite.
        """
        run, updates, config = self.run, self.run.updates, self.config
        scale = None if updates.loss_scale is None else updates.loss_scale.value.clone()  # of this step
        share = self.compute_gradients(step, scale)
        if run.rollouts is not None:
            step = replace(step, metrics=step.metrics | run.rollouts.task.drift.read())
        requests = [torch.full_like(share, is_asked) for is_asked in (stop, self.is_time_to_save())]
        loss, stops, due = run.accelerator.reduce(torch.stack([share, *requests]), reduction="sum")
        norm = clip_gradients(updates.buffers, config.max_grad_norm, updates.loss_scale)
        number, total = self.submitted_steps, run.data.max_steps
        rate = learning_rate(number, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type)
        updates.step(loss, norm, rate)
        sync_parameters(run.model)
        results = StepResults(
            loss=loss,
            grad_norm=norm,
            loss_scale=norm.new_ones(()) if scale is None else scale,
            skipped=updates.skipped,
            diverged=updates.diverged,
            stop_requests=stops,
            checkpoint_is_due=due,
        )
        numbers = AsyncCopy(torch.stack([result.to(norm) for result in results]))
        submitted: SubmittedStep | None = SubmittedStep(step, rate, started, numbers)
        if copies_by_itself(run.accelerator.device):
            submitted, self.state.unread = self.state.unread, submitted
        if submitted is not None:
            self.read_step(submitted)

    def compute_gradients(self, step: Step, loss_scale: Tensor | None = None) -> Tensor:
        """Fills the buffers with the gradients of a step, of all ranks; returns this rank's share of its loss."""
        run = self.run
        run.updates.optimizer.zero_grad(set_to_none=False)
        sum_of = partial(run.accelerator.reduce, reduction="sum")
        batches = run.task.complete_step(run.model, step.batches, run.layout, sum_of)
        share = accumulate_gradients(run.forward, batches, step.divisor or 1.0, loss_scale)
        sum_over_ranks(run.updates.buffers)
        return share

    def read_last_step(self) -> None:
        """Reads the last step, if that was not done, so that all steps are counted. Raises DivergedError."""
        if (unread := self.state.unread) is not None:
            self.state.unread = None
            self.read_step(unread)

    def read_step(self, submitted: SubmittedStep) -> None:
        """Waits for a step, counts and reports it. Raises DivergedError."""
        run, state, max_steps, step = self.run, self.state, self.run.data.max_steps, submitted.step
        results = StepResults(*submitted.results.read())
        if results.diverged:
            raise self.diverged_in_step(submitted, results.loss)
        state.stop_requested, state.checkpoint_is_due = results.stop_requests > 0, results.checkpoint_is_due > 0
        self.accept_checkpoint()
        now = time.perf_counter()
        seconds = now - max(submitted.started, state.last_read)
        state.last_read = now
        state.step += 1
        state.tokens += step.tokens
        state.supervised_tokens += step.supervised
        state.seconds += seconds
        event = events.Stepped(
            step=state.step,
            max_steps=max_steps,
            loss=results.loss,
            learning_rate=submitted.rate,
            grad_norm=results.grad_norm,
            tokens=step.tokens,
            supervised_tokens=step.supervised,
            seconds=seconds,
            tokens_per_second=state.tokens / state.seconds,
            eta_seconds=state.seconds / state.step * (max_steps - state.step),
            memory_bytes=peak_bytes(run.accelerator.device),
            skipped=bool(results.skipped),
            reward=step.metrics.get("reward"),
        )
        if event.skipped:
            scale = f"{results.loss_scale:g}"
            run.note(f"step {state.step} was skipped: a gradient overflowed float16 at loss scale {scale}")
        self.log(
            loss=event.loss,
            learning_rate=event.learning_rate,
            grad_norm=None if event.skipped else event.grad_norm,  # JSON has no infinity
            tokens=state.tokens,
            **({} if run.updates.loss_scale is None else {"loss_scale": results.loss_scale}),
            tokens_per_second=event.tokens_per_second,
            memory_bytes=event.memory_bytes,
            **step.metrics,
        )
        run.report(event)

    # ---- Evaluation

    def compute_reference(self) -> None:
        """Computes what the task compares with, of the model as it is before training, and keeps it in a file."""
        run, task, resumed = self.run, self.run.task, self.config.resume_from_checkpoint is not None
        if task.reference is None:
            return
        if resumed:
            task.reference.read(resumed_folder(self.config))
        parts = [part for part in (run.data.trained_on(), run.data.held_out) if part is not None]
        examples = Examples.of(example for part in parts for example in part).distinct()
        missing = task.reference.missing(examples)
        if len(missing) and resumed and not self.adapter_is_new:
            raise CheckpointError(
                f"{len(missing):,} examples were not needed when this run began, so their reference values are "
                "missing; keep --max-steps and --num-train-epochs unchanged, or start over in a different --output-dir"
            )
        if len(missing):
            with run.model.disable_adapter() if self.adapter_is_new else nullcontext():
                scores = self.evaluate(missing, task.without_reference(), "examples, for the reference").scores
            task.reference.add(missing, cast(TaskScores, scores)[:, :2])
        if run.is_main:
            task.reference.write(run.output_dir)  # also what was read from another folder, for the next resume

    @property
    def adapter_is_new(self) -> bool:
        """True if the adapter changed nothing at the start of training: then the base alone is faster."""
        return isinstance(self.run.model, LoRAModel) and self.config.adapter is None

    def evaluate_before_training(self) -> None:
        """Evaluates the model as it is before the first step, unless that is known. Raises DivergedError."""
        run, state, held_out = self.run, self.state, self.run.data.held_out
        if state.before is None:
            known = run.task.evaluation_before_training(held_out) if held_out else None
            with run.model.disable_adapter() if self.adapter_is_new and known is None else nullcontext():
                state.before = self.held_out_loss(may_be_kept=False, known=known)
        if state.before is not None and not math.isfinite(state.before.loss):
            raise DivergedError(f"the held-out loss is {state.before.loss} before any training; {REMEDIES}")

    def evaluate_and_keep_best(self) -> None:
        """Evaluates, and keeps the adapter if it is the best so far, unless only the curve needs this step."""
        self.read_last_step()
        may_be_kept = self.state.step in self.choice.steps
        evaluation = self.check_finite(self.held_out_loss(may_be_kept=may_be_kept))
        if evaluation is None or not may_be_kept:
            return
        if not self.choice.is_best(evaluation, self.state.best):
            self.state.since_best += 1
            return
        parameters = trained_module(self.run.model).state_dict()
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}
        self.state.best, self.state.since_best = Best(self.state.step, evaluation, tensors), 0
        self.save_model()

    def held_out_loss(self, *, may_be_kept: bool, known: Evaluation | None = None) -> Evaluation | None:
        """Evaluates the held-out examples, logs and reports their loss; None if there are none.

        may_be_kept: the adapter is kept if this is the best evaluation, which the event says.
        known: the evaluation, which then is not computed.
        """
        run, held_out = self.run, self.run.data.held_out
        if not held_out:
            return None
        started = time.perf_counter()
        evaluation = known or self.evaluate(held_out, run.task)
        seconds = time.perf_counter() - started
        self.state.history.append((self.state.step, evaluation.loss))
        if may_be_kept:
            with self.sampling():
                evaluation = self.choice.with_metric(evaluation, run.report)
        metrics = {} if run.rollouts is None else run.rollouts.metrics_of(evaluation)
        metric = self.choice.metric_of(evaluation)
        self.log(eval_loss=evaluation.loss, **metrics, **{f"eval_{name}": score for name, score in metric.items()})
        best, reward = may_be_kept and self.choice.is_best(evaluation, self.state.best), metrics.get("eval_reward")
        run.report(events.Evaluated(self.state.step, evaluation.loss, seconds, best, reward, metric))
        return evaluation

    def evaluate(self, examples: Examples, task: Task, what: str = "held-out examples") -> Evaluation:
        """Evaluates this rank's share of the examples and joins the shares. what: the examples, for the progress."""
        if (rollouts := self.run.rollouts) is not None:
            with self.sampling():
                return rollouts.evaluate(
                    examples,
                    self.state.step,
                    lambda done, total: self.run.report(events.EvaluationProgress(done, total, "held-out prompts")),
                )
        run, accelerator, counts = self.run, self.run.accelerator, task.counts(examples)
        budget, ranks, rank = run.data.largest_tokens, accelerator.num_processes, accelerator.process_index
        shares = [np.arange(first, len(examples), ranks) for first in range(ranks)]
        share, part = shares[rank], None
        if len(share):
            part = evaluate(
                run.model,
                examples.select(share),
                layout=run.layout,
                token_budget=budget,
                task=task,
                progress=lambda done, total: run.report(events.EvaluationProgress(done, total, what)),
            )
        if self.config.fsdp:  # every forward needs all ranks
            forwards = [len([*batches_within(budget, examples.select(own), run.layout)]) for own in shares]
            repeat_forward(run.model, examples[0], run.layout, task, max(forwards) - forwards[rank])
        sums, scores = np.zeros(len(examples)), np.zeros((int(counts.sum()), len(task.score_names)))
        for own, of_rank in zip(shares, gather_object([part]), strict=True):
            if of_rank is not None:
                sums[own] = of_rank.sums
            if of_rank is not None and of_rank.scores is not None:
                scores[np.isin(np.repeat(np.arange(len(examples)), counts), own)] = of_rank.scores
        return task.evaluation(examples, sums, scores if scores.size else None)

    def is_out_of_patience(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.state.since_best

    # ---- Saving

    @property
    def can_be_resumed(self) -> bool:
        """False between steps that use the same completions, which no checkpoint contains."""
        return self.submitted_steps % self.config.num_iterations == 0

    def is_time_to_save(self) -> bool:
        """True if this rank asks for a checkpoint by its clock; all save it after the same step.

        Checkpoints of full fine-tuning are several times the model's size, so they need --save-steps.
        """
        by_time = self.config.save_steps is None and self.config.method == "lora" and self.run.is_main
        return by_time and time.monotonic() - self.state.last_saved >= SECONDS_BETWEEN_CHECKPOINTS

    def save_checkpoint(self) -> Path:
        """Writes checkpoint-N and returns its folder. Raises DivergedError for values that are not finite."""
        self.read_last_step()
        run, state, loss_scale = self.run, self.state, self.run.updates.loss_scale
        folder = run.output_dir / f"checkpoint-{state.step}"
        tensors = {
            "adapter": trained_module(run.model).state_dict(),
            "optimizer": checkpoint.moments(run.updates.optimizer, run.updates.buffers),
            **({"evaluations": evaluations} if (evaluations := state.evaluations()) else {}),
            **({"best": state.best.tensors} if state.best else {}),
            **({"loss_scale": loss_scale.state_dict()} if loss_scale else {}),
        }
        if isinstance(run.model, FullModel):
            tensors |= {file: run.model.gather(tensors[file]) for file in checkpoint.BY_PARAMETER if file in tensors}
        numbers = {file: content for file, content in tensors.items() if file != "evaluations"}  # NaN: not known
        if broken := broadcast_object_list([checkpoint.not_finite(numbers)])[0]:
            raise self.diverged(f"in step {state.step}: values became NaN or infinite ({'; '.join(broken)})")
        random_states = gather_object([random_state()])
        if run.is_main:
            tensors |= {f"random-{rank}": states for rank, states in enumerate(random_states)}
            content = {"progress": state.counters(), "run": run.identity}
            if isinstance(run.model, LoRAModel):
                content["adapter"] = run.model.adapters["default"].model_dump(mode="json")
            checkpoint.save(folder, Checkpoint(content, tensors))
            saved = checkpoints_in(run.output_dir)
            for later in saved[saved.index(folder) + 1 :]:  # the run was resumed before them
                shutil.rmtree(later)
        state.unproven = folder
        run.accelerator.wait_for_everyone()
        state.checkpoint_is_due, state.last_saved = False, time.monotonic()
        run.report(events.Saved(state.step, folder))
        return folder

    def accept_checkpoint(self) -> None:
        """Deletes the oldest checkpoints beyond the limit, now that the weights of the newest gave a finite loss."""
        if self.state.unproven is not None and self.run.is_main:
            for old in checkpoints_in(self.run.output_dir)[: -self.config.save_total_limit]:
                shutil.rmtree(old)
        self.state.unproven = None

    def restore_best(self) -> Evaluation | None:
        """Restores the best parameters, or checks and evaluates the last; returns their held-out loss."""
        self.read_last_step()
        run, state = self.run, self.state
        if not all(gather_object([bool(buffer.parameter.isfinite().all()) for buffer in run.updates.buffers])):
            raise self.diverged(f"in step {state.step}: the weights became NaN or infinite")
        if self.is_out_of_patience():
            run.note(f"stopped early: no improvement in {state.since_best} evaluations in a row")
        if state.best is None:
            return self.check_finite(self.held_out_loss(may_be_kept=False))
        checkpoint.set_parameters(trained_module(run.model), state.best.tensors)
        sync_parameters(run.model)
        return state.best.evaluation

    def save_model(self, *, compare: bool = False) -> None:
        """Writes the adapter or the model, in the main process.

        compare: reads it back, and raises CheckpointError if it differs.
        Where a sharded base or its weights are gathered, the other ranks do the same in a temporary folder.
        """
        model, folder = self.run.model, self.run.output_dir
        with ExitStack() as stack:
            if not self.run.is_main:
                if not (self.config.fsdp and (compare or trainable.sharded_names(model))):
                    return
                folder = Path(stack.enter_context(TemporaryDirectory()))
            written = trainable.save(model, folder, self.run.base_fingerprint)
            if self.run.is_main:
                write_system_message(written, self.run.data.system)
            if compare and (different := trainable.differences(model, written)):
                names = ", ".join(different[:3])
                raise CheckpointError(f"{written} was not written correctly: {names} differ; the disk may be failing")

    def result(self, after: Evaluation | None) -> events.TrainResult:
        run, state, summary = self.run, self.state, self.run.model.summary()

        def hits(evaluation: Evaluation | None) -> Sums | None:
            return None if evaluation is None else run.task.hits(cast(Examples, run.data.held_out), evaluation)

        return events.TrainResult(
            output_dir=str(run.output_dir),
            steps=state.step,
            train_tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
            tokens_per_second=state.tokens / state.seconds,
            eval_loss_before=state.before.loss if state.before else None,
            eval_loss_after=after.loss if after else None,
            best_step=state.best.step if state.best else state.step,
            trainable_parameters=summary.trainable_parameters,
            total_parameters=summary.total_parameters,
            peak_memory_bytes=peak_bytes(run.accelerator.device),
            seconds=time.perf_counter() - self.started,
            model=run.model,
            tokenizer=run.tokenizer,
            data=run.data.prepared,
            before=state.before,
            after=after,
            selection=self.choice.examples,
            hits_before=hits(state.before),
            hits_after=hits(after),
        )

    # ---- Records

    def write_result(self, result: events.TrainResult) -> None:
        run, held_out = self.run, self.run.data.held_out
        if run.is_main:
            try:
                run_log.write_run(run.output_dir, {**run.header, "diverged": False}, result.to_dict())
                targets, names = None if held_out is None else run.task.targets(held_out), run.task.score_names
                texts = (run.tokenizer.decode(example.sequences[0].input_ids) for example in held_out or ())
                run_log.write_examples(
                    run.output_dir, result.before, result.after, names, targets, texts, result.selection
                )
            except WriteError as error:  # what was trained is complete, so the run has not failed
                run.note(str(error))
        for text in stream_notes(run.data, self.config.max_length):
            run.note(text)

    def log(self, **values: float | None) -> None:
        step = self.state.step
        if self.run.is_main:
            run_log.add_metrics(self.run.output_dir, run_log.METRICS, step=step, **values)
        self.run.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    # ---- Divergence

    def check_finite(self, evaluation: Evaluation | None) -> Evaluation | None:
        """Returns the evaluation. Raises DivergedError if its loss is not finite."""
        if evaluation is None or math.isfinite(evaluation.loss):
            return evaluation
        raise self.diverged(f"in step {self.state.step}: the held-out loss became {evaluation.loss}")

    def diverged_in_step(self, submitted: SubmittedStep, loss: float) -> DivergedError:
        """Returns the error for a step whose loss or gradient is not finite. It names the module where a loss broke."""
        run, where = self.run, f"in step {self.state.step + 1} (learning rate {submitted.rate:.3g})"
        if not math.isfinite(loss):
            cause = broken_loss(run.base, submitted.step.batches, run.task, run.layout)
            return self.diverged(f"{where}: {cause}")
        return self.diverged(f"{where}: the gradients are not finite, although the loss is", parameters_are_good=True)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Saves the last good parameters if training has made sampling fail."""
        try:
            yield
        except DivergedError as error:
            self.read_last_step()
            if not self.state.step:
                raise DivergedError(f"{error}, before any training; {REMEDIES}") from None
            raise self.diverged(f"after step {self.state.step}: {error}") from None

    def diverged(self, cause: str, *, parameters_are_good: bool = False) -> DivergedError:
        """Restores the last good parameters, saves them unless a best adapter is kept, and returns the error.

        parameters_are_good: those before the step gave a finite loss.
        """
        run, state = self.run, self.state
        run.updates.restore_last_good()
        sync_parameters(run.model)
        folder = trainable.folder_of(run.model, run.output_dir)
        saved = f"{'the best' if state.best else 'an earlier'} adapter is in {folder}"
        if not broadcast_object_list([folder.exists()])[0]:
            saved = f"the last weights with a finite loss are in {folder}"
            self.save_model()
        state.diverged = True
        if run.is_main:
            if state.unproven and not parameters_are_good:
                shutil.rmtree(state.unproven)
            run_log.write_run(run.output_dir, {**run.header, "diverged": True})  # allows a resume with a lower rate
        run.accelerator.wait_for_everyone()  # all ranks see the same checkpoints
        resume = ""
        if good := checkpoints_in(run.output_dir):
            lower = ("--learning-rate", f"{self.config.learning_rate / 10:g}")
            command = launch.how_to_resume(good[-1], *lower, purpose="to resume it with a lower learning rate")
            resume = f"\nthe last good checkpoint is {good[-1]}; {command}"
        return DivergedError(f"training diverged {cause}. {saved}; {REMEDIES}{resume}")


def accumulate_gradients(
    forward: nn.Module, batches: Sequence[Batch], divisor: float, loss_scale: Tensor | None = None
) -> Tensor:
    """Runs forward and backward of a rank's micro-batches; returns its share of the step's loss, 0-dimensional.

    forward: `ModelWithLoss`, as accelerate prepared it.
    divisor: of the summed loss of the whole step, on all ranks; for language models its weighted supervised tokens.
    loss_scale: what the gradients are multiplied by, 0-dimensional.
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
