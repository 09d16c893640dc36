"""What a run trains with: `set_up` makes it from the settings.

tokenizer -> data -> model -> adapter -> batch layout -> kernels -> memory -> optimizer -> state of the checkpoint
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.adapter_set import layer_calls
from tailora.core.attach import evaluating
from tailora.core.config import LoRAConfig
from tailora.core.device import as_current, choose_device, device_name
from tailora.core.layer_calls import last_names
from tailora.core.quantization import inner_tensors, stored_bytes, stored_tensors
from tailora.data.dataset import Example
from tailora.data.labels import LABEL_TASKS, Labels, read_labels
from tailora.errors import ConfigError, TailoraWarning, TargetError, listing, nearest
from tailora.formats import peft
from tailora.formats.fingerprint import LayerFingerprint, model_fingerprint
from tailora.kernels.flat_parameters import flattened
from tailora.model import LoRAModel
from tailora.train import checkpoint, events, launch, run_log
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.dataloader import ChooseHeldOut, ReadData, TrainingData, read_data, resolved_sources
from tailora.train.defaults import RunConfig, describe, numbers_of
from tailora.train.divergence import FiniteUpdates
from tailora.train.failures import fail_together
from tailora.train.kernel_choice import (
    PLAIN,
    Kernels,
    choose_kernels,
    choose_layout,
    use_kernels,
)
from tailora.train.kernel_comparison import has_dropout
from tailora.train.loss import BatchLayout, ModelWithLoss, Task, make_batch
from tailora.train.memory import available_bytes, explain_out_of_memory, keep_freed_memory, reset_peak
from tailora.train.memory_estimate import check_fits, remedies, saves_memory
from tailora.train.model_loading import (
    fitted_labels,
    labels_of_adapter,
    labels_of_config,
    load_base,
    load_tokenizer,
    read_config,
    set_labels,
)
from tailora.train.optimizer import LossScale, adamw, parameter_groups
from tailora.train.parallel import Sharding, forget_forward, own_process_group, send_from_first_rank
from tailora.train.quantize import check_full_training, dequantization_note, stored_quantization
from tailora.train.rollouts import Rollouts
from tailora.train.sampler import ADVICE
from tailora.train.state import TrainState, seed_all, seeded
from tailora.train.trainable import FullModel, Trainable, sharded_names, trained_module, trained_parts

PROBE_TOKENS = 32  # most tokens of the longest example to try the model on
PEAK_PER_SAVED = 4  # a step never takes more than this, times what autograd saves by itself: temporaries, padding


@dataclass(frozen=True, eq=False)
class Run:
    """What a run trains with. What changes while it trains is in `TrainState`."""

    config: RunConfig
    output_dir: Path
    accelerator: Accelerator
    report: events.Listener  # does nothing in all processes but the first
    labels: dict[str, Any] | None  # what the head of the model predicts, for run.json
    base: PreTrainedModel
    weights: dict[str, LayerFingerprint]  # of the base
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    rollouts: Rollouts | None  # what samples the steps from the model in training
    task: Task
    model: Trainable  # the adapter around the base, or the base trained in full
    layout: BatchLayout  # packed or padded batches
    kernels: Kernels
    memory_remedies: Callable[[], str]  # returns what helps if memory runs out, which takes seconds
    base_fingerprint: dict[str, LayerFingerprint]  # of the adapted weights
    updates: FiniteUpdates  # the trained parameters, their optimizer, and the last good values
    forward: nn.Module  # the model with its loss, as accelerate prepared it

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def note(self, text: str) -> None:
        self.report(events.Note(text))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run must agree with."""
        prepared = None if self.config.streaming else self.data.prepared
        return {
            "settings": self.config.model_dump(mode="json", exclude=checkpoint.FREE),
            "data": None if prepared is None else prepared.report.sha256,
            "packed": self.layout.packed,
            "dtype": str(self.base.dtype),
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "kernels": {"layers": self.kernels.layers},
            "float32_from": self.layout.float32_from,
            "base": {name: layer.model_dump(exclude_defaults=True) for name, layer in self.weights.items()},
        }

    @cached_property
    def header(self) -> dict[str, Any]:
        """What run.json holds besides the result and whether the run diverged."""
        config, data, summary = self.config, self.data, self.model.summary()
        return {
            "settings": config.model_dump(mode="json"),
            "model": self.base.config.name_or_path,
            "device": str(self.accelerator.device),
            "device_name": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "base_bytes": stored_bytes(self.base),
            "stored_as": stored_quantization(self.base.config).get("quant_method"),
            "packed": self.layout.packed,
            "kernels": self.kernels.description,
            "task": self.task.description,
            "loss_unit": self.task.loss_unit,
            "labels": self.labels,
            "rewards": None if data.prompts is None else data.prompts.names,
            "start": f"from {config.adapter}" if config.adapter else config.init_lora_weights,
            "adapted_layers": len(summary.rows),
            "parts": trained_parts(self.model),
            "trainable_parameters": summary.trainable_parameters,
            "total_parameters": summary.total_parameters,
            "max_steps": data.max_steps,
            "largest_forward_tokens": data.largest_tokens,
            "data": None if data.prepared is None else data.prepared.report.to_dict(),
            **run_log.environment(),
        }


def set_up(
    config: TrainConfig,
    stack: ExitStack,
    on_event: events.Listener | None = None,
    *,
    read: ReadData = read_data,
    held_out: ChooseHeldOut | None = None,
    overwrite: bool = False,
) -> tuple[Run, TrainState]:
    """Makes all ready for the first step; leaving `stack` restores the caller's state. For arguments, see `Trainer`."""
    output_dir, resumed = Path(config.output_dir), config.resume_from_checkpoint
    accelerator = start_processes(config, stack)
    device, is_main = accelerator.device, accelerator.is_main_process
    report: events.Listener = on_event if on_event is not None and is_main else lambda _event: None

    def note(text: str) -> None:
        report(events.Note(text))

    if is_main:
        stack.enter_context(run_log.lock(output_dir))
        run_log.check_run_folder(config, overwrite=overwrite)
    saved = None if resumed is None else checkpoint.load(resumed, output_dir, note)
    if saved is not None:
        config = numbers_of(config, saved.state["run"]["settings"])
    stack.enter_context(seeded(config.seed))
    with explain_out_of_memory("loading", partial(loading_advice, config, device)):
        labels, has_new_head = find_labels(config)
        sharding = Sharding(device) if config.fsdp else None
        place = (config.model, config.dtype, device, config.quantize)
        tokenizer = load_tokenizer(config.model, labels)
        shape = shape_of(config, labels, tokenizer)
        data = read(config, tokenizer, accelerator, labels)  # before the model, which takes longer to load
        chosen = data.prepared and describe(config, data.config, len(data.known), data.max_steps)
        config = data.config
        if chosen and not config.streaming:
            note(chosen)
        head: Any = {"task": config.task, "labels": labels, "seed": config.seed}
        load = partial(load_base, *place, sharding=sharding, tokenizer=tokenizer, **head)
        base, _ = load()
        if dequantized := dequantization_note(shape, config.model):
            note(dequantized)
        weights = model_fingerprint(base)
        if held_out is not None and data.held_out is not None:
            data = replace(data, held_out=data.held_out.select(held_out(len(data.held_out))))
        model = attach(config, base, tokenizer, saved, load)
        layout = choose_layout(config, model, tokenizer, note, task=data.tried_task)
        if saved is not None:
            layout = replace(layout, float32_from=saved.state["run"].get("float32_from"))
        bytes_per_token = try_forward(model, data.longest, data.tried_task, layout)
        init_from_data(model, data, layout, config.init_batches)
        kernels = kernels_for(config, model, layout, data, saved)
        advice = check_memory(config, shape, data, device, bytes_per_token)
    updates = start_updates(config, model, device, stack)
    seed_all(config.seed + accelerator.process_index)  # each rank draws its own dropout masks
    rollouts: Rollouts | None = None
    if data.prompts is not None:
        rollouts = Rollouts(data.prompts, model, tokenizer, layout, note, stack)
        data = replace(data, steps=rollouts.steps)
    run = Run(
        config=config,
        output_dir=output_dir,
        accelerator=accelerator,
        report=report,
        labels=None if labels is None else {**labels.to_dict(), "new_head": has_new_head},
        base=base,
        weights=weights,
        tokenizer=tokenizer,
        data=data,
        rollouts=rollouts,
        task=data.task,
        model=model,
        layout=layout,
        kernels=kernels,
        memory_remedies=advice,
        base_fingerprint=peft.base_fingerprint(model.adapter(), base) if isinstance(model, LoRAModel) else {},
        updates=updates,
        # device_placement would move buffers that are on the device already, and leave copies behind; evaluation_mode
        # leaves out DDP, and autocast stays as `accelerate launch --mixed_precision` asks for it
        forward=accelerator.prepare_model(
            ModelWithLoss(model, layout, data.task), device_placement=False, evaluation_mode=True
        ),
    )
    state = TrainState() if saved is None else resume(run, saved)
    start_logs(run, state, overwrite=overwrite)
    return run, state


def start_logs(run: Run, state: TrainState, *, overwrite: bool) -> None:
    """Starts the trackers and the logs of the output folder, from which an earlier run is moved away."""
    config, output_dir = run.config, run.output_dir
    settings = {name: str(value) for name, value in config.model_dump().items()}
    run.accelerator.init_trackers("tailora", config=settings)
    if run.is_main:
        if overwrite and (aside := run_log.set_aside(output_dir)):
            run.note(f"the earlier run is kept in {aside} until this one has finished")
        evaluated = {step for step, _ in state.history}
        resumed_at = None if config.resume_from_checkpoint is None else state.step
        run_log.start_metrics(output_dir, resumed_at=resumed_at, evaluated=evaluated)


def kernels_for(
    config: TrainConfig, model: Trainable, layout: BatchLayout, data: TrainingData, saved: Checkpoint | None
) -> Kernels:
    """Compares kernels on the longest example. saved: a checkpoint, whose kernels are used again."""
    recorded = None if saved is None else saved.state["run"]["kernels"]["layers"]
    step = 0 if saved is None else saved.state["progress"]["step"]
    return choose_kernels(config, model, layout, data.tokens(step), data.longest, recorded)


def loading_advice(config: TrainConfig, device: torch.device) -> str:
    """Returns what helps if memory runs out while the base is loaded."""
    shape = read_config(config.model)
    changes = {"--quantize nf4": {"quantize": "nf4"}, "--dtype bfloat16": {"dtype": "bfloat16"}}
    saving = [flag for flag, change in changes.items() if saves_memory(config, shape, device, **change)]
    return f"try {', '.join([*saving, 'a smaller --model'])}, or close other programs"


def check_memory(
    config: RunConfig, shape: PretrainedConfig, data: TrainingData, device: torch.device, bytes_per_token: float
) -> Callable[[], str]:
    """Returns a function that says, after some seconds, what helps if memory runs out.

    Raises MemoryLimitError if the largest step needs more than is free. The estimate of that step takes seconds, so a
    generous bound comes first.

    bytes_per_token: see `try_forward`.
    """

    def advice() -> str:
        if data.prompts is not None:
            return ADVICE
        smaller, can_shard = config.per_device_train_batch_size // 2, launch.world_size() > 1 and not config.fsdp
        return "\n  - ".join(["what helps:", *remedies(config, shape, smaller, device, can_shard=can_shard)])

    if PEAK_PER_SAVED * bytes_per_token * data.largest_tokens > available_bytes(device):
        check_fits(config, shape, data.task.without_reference(), data.largest, device, advice())
    return advice


def shape_of(config: TrainConfig, labels: Labels | None, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Returns config.json of the model, with the labels of the data if there are any."""
    shape = read_config(config.model)
    if labels is not None:
        set_labels(shape, labels, tokenizer)
    return shape


def start_updates(config: TrainConfig, model: Trainable, device: torch.device, stack: ExitStack) -> FiniteUpdates:
    """Returns the optimizer of what is trained, whose parameters are views of flat buffers until `stack` is left."""
    buffers = stack.enter_context(flattened(parameter_groups(trained_module(model), config, sharded_names(model))))
    send_from_first_rank(buffers, trained_module(model))
    loss_scale = LossScale(device) if model.base_model.dtype == torch.float16 else None
    return FiniteUpdates(adamw(buffers), buffers, loss_scale)


def resume(run: Run, saved: Checkpoint) -> TrainState:
    """Restores a checkpoint and returns its state. Raises CheckpointError if it belongs to a different run."""
    config, earlier, progress = run.config, saved.state["run"], saved.state["progress"]
    diverged = run_log.has_diverged(resumed_folder(config))
    checkpoint.check_same_run(earlier, run.identity, diverged=diverged)
    if config.learning_rate < (earlier_rate := earlier["settings"]["learning_rate"]):
        run.note(f"from here on, the learning rate is {config.learning_rate:g} instead of {earlier_rate:g}")
    before, now = earlier.get("processes", 1), run.accelerator.num_processes
    rank: int | None = run.accelerator.process_index  # whose random states are restored
    if before != now:
        seed_all(config.seed + run.accelerator.process_index + 1000 * progress["step"])
        masks = ", but dropout masks differ" if has_dropout(run.base) else ""
        run.note(f"resuming with {now} processes instead of {before}: the steps are the same{masks}")
        rank = None
    return replace(checkpoint.restore(saved, run.model, run.updates, rank), diverged=diverged)


def resumed_folder(config: TrainConfig) -> Path:
    """Returns the folder of the run whose checkpoint `config` names."""
    resumed = config.resume_from_checkpoint
    return Path(config.output_dir) if resumed in (None, "latest") else Path(str(resumed)).parent


# ---- Processes and devices


def start_processes(config: TrainConfig, stack: ExitStack) -> Accelerator:
    """Returns accelerate on this process's device. Within `stack` an error of one process ends all of the run."""
    stack.enter_context(own_process_group(until_exit=True))
    accelerator = start_accelerator(config)
    stack.callback(lambda: [tracker.finish() for tracker in accelerator.trackers])
    stack.enter_context(fail_together(accelerator, partial(launch.how_to_go_on, Path(config.output_dir))))
    stack.enter_context(as_current(accelerator.device))
    reset_peak(accelerator.device)
    keep_freed_memory(accelerator.device)
    return accelerator


ENGINES = ("fsdp", "deepspeed", "megatron_lm")  # that `accelerate launch --use_ENGINE` would train with
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Returns accelerate on the device and with the trackers asked for. Raises ConfigError if one is not here."""
    problems = [
        f"accelerate's engines are not supported; launch without --use_{name} and use tailora's --fsdp instead"
        for name in ENGINES
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")
    ]
    for name in config.report_to:
        if name not in TRACKERS:
            problems.append(f"--report-to {name!r}: expected one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        elif not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            problems.append(f"--report-to {name} needs a package: pip install {TRACKERS[name][0]}")
    if problems:
        raise ConfigError(listing(problems))
    accelerator = Accelerator(
        cpu=start_on_device(config.device, config.ddp_timeout).type == "cpu",
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # or the environment's would scale ours
    )
    if accelerator.scaler is not None:
        raise ConfigError(
            f"accelerate's mixed_precision {accelerator.mixed_precision} scales losses, which is not supported; launch "
            "with --mixed_precision no. --dtype sets the precision of the base model; adapters are float32"
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise ConfigError(
            "--fsdp shards the base model across processes, but only one runs; start several with --nproc-per-node"
        )
    return accelerator


def start_on_device(name: str, seconds: int = 600) -> torch.device:
    """Makes accelerate use a device, for several processes the one of each rank; returns it. Raises ConfigError.

    seconds: how long the processes wait for each other.
    """
    name = launch.device_asked_for(name)
    device = choose_device(name)
    try:
        state = PartialState(cpu=device.type == "cpu", timeout=timedelta(seconds=seconds))
    except RuntimeError as error:  # of torch.distributed
        cause = str(error).splitlines()[0]
        raise ConfigError(f"the processes of this run cannot connect ({cause}); {launch.SET_INTERFACE}") from error
    if state.num_processes == 1:
        state.device = device  # it would keep the device of an earlier run in this process
    elif ":" in name or state.device.type != device.type:
        raise ConfigError(
            f"--device {name}: each of {state.num_processes} processes uses the device of its rank, here "
            f"{state.device}; use --device {state.device.type}, or a single process"
        )
    return torch.device(state.device)


@contextmanager
def launched_ranks(device: str) -> Iterator[PartialState | None]:
    """Yields this process's place among torchrun's ranks, which fail together; None if it was started alone."""
    if launch.world_size() == 1:
        yield None
        return
    with own_process_group():
        start_on_device(device)
        state = PartialState()
        with fail_together(state):
            yield state


# ---- Model and adapter


def find_labels(config: TrainConfig) -> tuple[Labels | None, bool]:
    """Returns the labels of adapter, model or data (or None), and if the head is new. Raises DataError, ConfigError."""
    if config.task not in LABEL_TASKS:
        return None, False
    if config.adapter is not None:
        if (labels := labels_of_adapter(Path(config.adapter))) is None:
            raise ConfigError(
                f"--task {config.task} needs an adapter with labels, but {config.adapter} has none; remove --adapter"
            )
        return labels, False
    names = [source.name for source in resolved_sources(config, "data")]
    labels = read_labels(names, config.field, config.task, skip_bad_rows=config.skip_bad_rows)
    model_config = read_config(config.model)
    labels = fitted_labels(labels, model_config)
    return labels, labels != labels_of_config(model_config)


def attach(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saved: Checkpoint | None = None,
    load: Callable[[], tuple[PreTrainedModel, Any]] | None = None,
) -> Trainable:
    """Returns the base with its adapter, or wrapped for full fine-tuning, in training mode.

    saved: the checkpoint to continue from; its adapter's settings are used, its tensors are restored later.
    load: loads the base again, for the original weights that full fine-tuning is compared with.
    Raises TargetError.
    """
    seed_all(config.seed)
    if config.method == "full":
        assert load is not None
        check_full_training(base.config, config.model)
        return FullModel(base, tokenizer, lambda: load()[0]).train()
    if config.adapter:
        model = LoRAModel.from_pretrained(base, config.adapter)
    else:
        settings = adapter_of_checkpoint(config, saved)
        model = LoRAModel(base, settings or config.lora(), fresh=settings is None)
    return model.train()


def adapter_of_checkpoint(config: TrainConfig, saved: Checkpoint | None) -> LoRAConfig | None:
    """Returns the settings of the checkpoint's adapter; None without one, or if `config` asks for another."""
    if saved is None or config.adapter or "adapter" not in saved.state:
        return None
    now, then = config.model_dump(mode="json"), saved.state["run"]["settings"]
    if any(now[name] != then.get(name) for name in ("model", *(LoRAConfig.model_fields.keys() & now.keys()))):
        return None
    return LoRAConfig(**saved.state["adapter"])


def init_from_data(model: Trainable, data: TrainingData, layout: BatchLayout, batches: int) -> None:
    """Initializes an adapter that waits for data from the first batches of the run, the same on every rank."""
    if not isinstance(model, LoRAModel) or not model.waits_for_data:
        return
    task = data.tried_task
    layout = replace(layout, shares_beginnings=False)  # what an init measures counts every token

    def loss(model: Any, examples: Sequence[Example]) -> Tensor:
        batch = make_batch(examples, layout, next(model.parameters()).device, task)
        return task.outputs(model, batch, layout).losses.sum()

    with use_kernels(cast(PreTrainedModel, model.base_model), layout, Kernels(PLAIN, "")):
        model.start_from_data(data.first_batches(batches), loss)


def try_forward(model: Trainable, example: Example, task: Task, layout: BatchLayout) -> float:
    """Returns the bytes that a forward saves for its backward, per token; at most, as it counts some of them twice.

    Raises TargetError if the forward calls no adapted layer, or reads the weight of one without calling it. Warns about
    other layers that the example does not train.
    """
    device = next(model.parameters()).device
    part = example if example.images else task.start_of(example, PROBE_TOKENS)  # towers run only for images
    batch = make_batch([part], replace(layout, packed=False), device, task)
    calls = layer_calls(model) if isinstance(model, LoRAModel) else None
    weights = {_address(part) for tensor in stored_tensors(model) for part in inner_tensors(tensor)}
    saved = 0

    def count(tensor: Tensor) -> None:  # the graph is only looked at, so nothing is kept
        nonlocal saved
        saved += sum(part.nbytes for part in inner_tensors(tensor) if _address(part) not in weights)

    def forward() -> Tensor:
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda _: torch.empty(0))
        with evaluating(model), nullcontext() if calls is None else calls.recorded(), hooks:
            output: Tensor = task.call(model, batch).logits
        forget_forward(model.base_model)
        return output

    output, bytes_per_token = forward(), saved / len(part.input_ids)
    if calls is None:
        return bytes_per_token
    if calls.ran.isdisjoint(calls.layers.values()):
        raise TargetError(
            f"the model uses none of the adapted layers for text ({', '.join([*calls.layers][:5])}); change "
            "--target-modules"
        )
    if calls.not_called and (paths := calls.read_by(forward)):
        raise TargetError(
            f"the model only reads the weights of {', '.join(paths[:5])} ({len(paths)} in total), so adapters there "
            f"would have no effect; exclude them with --exclude-modules {' '.join(last_names(paths))}"
        )
    if paths := calls.not_trained_by(output):
        warnings.warn(
            f"{', '.join(paths[:3])} ({len(paths)} adapted layers in total) get no gradient from "
            f"{'' if part is example else f'the first {PROBE_TOKENS} tokens of '}the longest example: the model does "
            "not reach them, or they have no differentiable effect on its output. Adapters there stay untrained "
            "unless other examples train them",
            TailoraWarning,
            stacklevel=2,
        )
    return bytes_per_token


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
