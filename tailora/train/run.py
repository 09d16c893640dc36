"""A whole run: settings -> output folder -> model -> data -> adapter -> loop -> files."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.data.prepare import Prepared
from tailora.errors import CheckpointError
from tailora.fast.attention import packed_rows
from tailora.model import LoRAModel
from tailora.train import checkpoint, record
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.evaluate import Evaluation
from tailora.train.events import Event, Finished, Listener, Note, Saved
from tailora.train.events import Prepared as Ready
from tailora.train.load import load_base
from tailora.train.loop import Bench, train
from tailora.train.loss import Rows
from tailora.train.memory import check_fits, explained, peak_bytes, remedies
from tailora.train.optim import adamw
from tailora.train.resume import check_same_run, identity, take_up
from tailora.train.rng import seed_all, seeded
from tailora.train.setup import Feed, attach, checkpointed_layers, choose_rows, feed, memory_cost, start_accelerator
from tailora.train.state import State
from tailora.train.stop import stop_signal

IN_MEMORY = {"in_memory": True}
OnReady = Callable[[LoRAModel, PreTrainedTokenizerBase, Prepared | None], None]


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The numbers of a run, and the objects that it leaves in memory, which `to_dict` leaves out."""

    output_dir: str
    steps: int
    train_tokens: int
    supervised_tokens: int
    tokens_per_second: float
    eval_loss_before: float | None  # None without held-out examples
    eval_loss_after: float | None
    best_step: int  # the step whose adapter was kept
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float
    model: LoRAModel = field(metadata=IN_MEMORY)
    tokenizer: PreTrainedTokenizerBase = field(metadata=IN_MEMORY)
    data: Prepared | None = field(metadata=IN_MEMORY)  # None when streaming without eval_data
    before: Evaluation | None = field(metadata=IN_MEMORY)
    after: Evaluation | None = field(metadata=IN_MEMORY)

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata}


def run(config: TrainConfig, on_event: Listener | None = None, on_ready: OnReady | None = None) -> TrainResult:
    """Fine-tune as `config` says. `on_event` hears what happens; `on_ready` is called before the first step.

    Raises ConfigError, DataError, TargetError and CheckpointError before anything is trained; DivergedError,
    MemoryLimitError and Interrupted while it is.
    """
    started = time.perf_counter()
    output_dir = record.claim(config)
    saved = _checkpoint(config, output_dir)
    accelerator = start_accelerator(config)
    emit = _speaker(accelerator, on_event)
    with ExitStack() as stack:
        stack.enter_context(seeded(config.seed))
        base, tokenizer, data, model = _load(config, accelerator)
        rows = choose_rows(config, base, tokenizer, lambda text: emit(Note(text)))
        stack.enter_context(packed_rows(base) if rows.packed else nullcontext())
        cost = memory_cost(model, rows, data.sample, accelerator.device)
        keeps = check_fits(cost, data.largest, data.longest, accelerator.device)
        stack.enter_context(checkpointed_layers(base) if config.gradient_checkpointing else nullcontext())
        bench, state = _bench(config, output_dir, accelerator, model, rows, data, saved, emit)
        stack.callback(bench.metrics.close)
        header = _header(bench, data, keeps)
        _announce(bench, header)
        if on_ready is not None:
            on_ready(model, tokenizer, data.prepared)
        with explained("training", lambda: remedies(cost, data.largest, data.longest)), stop_signal() as wish:
            after = train(bench, state, wish)
        folder = _save(bench)
    result = _result(bench, state, after, tokenizer, data, time.perf_counter() - started)
    if accelerator.is_main_process:
        record.write_run(output_dir, header, result.to_dict())
    accelerator.end_training()
    emit(Saved(result.best_step, folder))
    emit(Finished(result.to_dict()))
    return result


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


def _load(
    config: TrainConfig, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Feed, LoRAModel]:
    advice = "what helps: --dtype bfloat16 (half of float32's weights), a smaller --model, closing other programs"
    with explained("loading", lambda: advice):
        base, tokenizer = load_base(config.model, config.dtype, accelerator.device.type)
        data = feed(config, base, tokenizer, accelerator)
        return base, tokenizer, data, attach(config, base, accelerator.device)


def _bench(
    config: TrainConfig,
    output_dir: Path,
    accelerator: Accelerator,
    model: LoRAModel,
    rows: Rows,
    data: Feed,
    saved: Checkpoint | None,
    emit: Listener,
) -> tuple[Bench, State]:
    """The loop's bench, and the state to start from: fresh, or the checkpoint's."""
    run_identity = identity(
        config,
        data=None if config.streaming or data.prepared is None else data.prepared.report.sha256,
        packed=rows.packed,
        dtype=str(model.base_model.dtype),
        processes=accelerator.num_processes,
    )
    if saved is not None:
        check_same_run(saved.state["run"], run_identity)
    parameters = dict(model.lora_layers.named_parameters())
    optimizer = adamw(list(parameters.values()), config.weight_decay)
    seed_all(config.seed + accelerator.process_index)  # each rank drops out other activations
    state = State() if saved is None else take_up(saved, model, optimizer, parameters, accelerator.process_index)
    accelerator.init_trackers("tailora", config={name: str(value) for name, value in config.model_dump().items()})
    bench = Bench(
        config=config,
        accelerator=accelerator,
        model=model,
        forward=accelerator.prepare_model(model),
        parameters=parameters,
        optimizer=optimizer,
        rows=rows,
        steps=data.steps,
        max_steps=data.max_steps,
        held_out=data.held_out,
        token_budget=data.largest.tokens,
        output_dir=output_dir,
        identity=run_identity,
        metrics=record.Metrics(output_dir, resumed_at=None if saved is None else state.step),
        emit=emit,
    )
    return bench, state


def _header(bench: Bench, data: Feed, keeps: int) -> dict[str, Any]:
    """What run.json says about the run before it starts; the same goes to the listener."""
    summary = bench.model.summary()
    return {
        "settings": bench.config.model_dump(mode="json"),
        "model": getattr(bench.model.base_model.config, "name_or_path", bench.config.model),
        "device": str(bench.accelerator.device),
        "processes": bench.accelerator.num_processes,
        "dtype": str(bench.model.base_model.dtype).removeprefix("torch."),
        "packed": bench.rows.packed,
        "adapted_layers": len(summary.rows),
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
        "max_steps": bench.max_steps,
        "largest_micro_batch_tokens": data.largest.tokens,
        "estimated_activation_bytes": keeps,
        "data": None if data.prepared is None else data.prepared.report.to_dict(),
        **record.environment(),
    }


def _announce(bench: Bench, header: dict[str, Any]) -> None:
    if bench.accelerator.is_main_process:
        record.write_settings(bench.output_dir, bench.config)
        record.write_run(bench.output_dir, header)
    bench.emit(Ready(header))


def _save(bench: Bench) -> Path:
    """Write the adapter, load it again beside itself and compare. Raises CheckpointError when they differ."""
    folder = bench.output_dir / record.ADAPTER
    if not bench.accelerator.is_main_process:
        return folder
    model, copy = bench.model, "read back"
    model.save_adapter(folder)
    model.load_adapter(folder, copy)
    written = {path: layer.state_dict() for path, layer in model.lora_layers.items()}
    model.set_adapter(copy)
    different = [
        f"{path}.{name}"
        for path, layer in model.lora_layers.items()
        for name, tensor in layer.state_dict().items()
        if not torch.allclose(tensor, written[path][name], rtol=1e-5)  # a learned scale goes through B
    ]
    model.set_adapter("default")
    model.delete_adapter(copy)
    if different:
        raise CheckpointError(f"{folder} reads back different in {', '.join(different[:3])}; the disk may be failing")
    return folder


def _result(
    bench: Bench,
    state: State,
    after: Evaluation | None,
    tokenizer: PreTrainedTokenizerBase,
    data: Feed,
    seconds: float,
) -> TrainResult:
    summary = bench.model.summary()
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
        model=bench.model,
        tokenizer=tokenizer,
        data=data.prepared,
        before=state.before,
        after=after,
    )
