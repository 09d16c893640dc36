"""The functions that `Trainer.setup` calls, in the order in which it calls them."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.adapter_set import layer_calls
from tailora.core.attach import evaluating
from tailora.core.config import LoRAConfig
from tailora.core.device import choose_device
from tailora.core.init import DATA_INITS, GRADIENT_INITS
from tailora.core.layer_calls import last_names, not_called_message
from tailora.data.dataset import Example
from tailora.data.labels import LABEL_TASKS, Labels, read_labels
from tailora.errors import ConfigError, TargetError, listing, nearest
from tailora.kernels.loss import choose_form, own_form
from tailora.model import LoRAModel
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.dataloader import TrainingData, resolved_sources
from tailora.train.failures import fail_together
from tailora.train.kernel_choice import PLAIN, Kernels, use_kernels
from tailora.train.launch import check_all_started, device_asked_for, world_size
from tailora.train.loss import CAUSAL_LM, BatchLayout, Task, make_batch
from tailora.train.memory import Cost, measure_cost
from tailora.train.model_loading import (
    fitted_labels,
    labels_of_adapter,
    labels_of_config,
    load_base,
    pad_id,
    read_config,
)
from tailora.train.packing import choose_packing
from tailora.train.parallel import Sharding, first_of_ranks, forget_forward, own_process_group
from tailora.train.random_state import seed_all
from tailora.train.trainable import FullModel, Trainable

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
HEAD = "from the model's own outputs"
PROBE_TOKENS = 128  # memory is measured on at most so many tokens of the longest example


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Returns accelerate on the device and with the trackers asked for. Raises ConfigError if one is not here."""
    check_launch()
    check_all_started()
    problems = []
    for name in config.report_to:
        if name not in TRACKERS:
            problems.append(f"report_to {name!r} is unknown; there are {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        elif not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            problems.append(f"report_to {name!r} is not installed: pip install {TRACKERS[name][0]}")
    if problems:
        raise ConfigError(listing(problems))
    accelerator = Accelerator(
        cpu=start_on_device(config.device).type == "cpu",
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # or the environment's would scale ours
    )
    if accelerator.scaler is not None:
        raise ConfigError(
            f"accelerate's mixed_precision {accelerator.mixed_precision} scales losses, which is not supported: launch "
            "with --mixed_precision no; --dtype sets the precision of the base, and adapters are float32"
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise ConfigError(
            "--fsdp shards the base model over several processes, and this is one: leave it out, or start several with "
            "--nproc-per-node gpu"
        )
    check_can_be_offloaded(config, accelerator.device.type)
    return accelerator


def check_can_be_offloaded(config: TrainConfig, device_type: str) -> None:
    """Raises ConfigError if the settings offload weights from a CPU."""
    if config.fsdp_offload_params and device_type == "cpu":
        raise ConfigError(
            "--fsdp-offload-params keeps weights in host memory, where they are on a CPU in any case: leave it out"
        )


LAUNCHED_WITH = {  # variables of `accelerate launch` -> what to do instead
    "ACCELERATE_USE_FSDP": (
        "FSDP, whose settings would not be followed: launch without --use_fsdp and give tailora --fsdp, which is FSDP2"
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed, whose engine would take the place of the training loop: launch without --use_deepspeed, and give "
        "tailora --fsdp to shard the base model over the processes"
    ),
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which trains models of its own: launch without --use_megatron_lm",
}


def check_launch() -> None:
    """Raises ConfigError if `accelerate launch` asks for an engine that does not train here."""
    if problems := [text for name, text in LAUNCHED_WITH.items() if parse_flag_from_env(name)]:
        raise ConfigError(f"accelerate was launched with {listing(problems)}")


def start_on_device(name: str) -> torch.device:
    """Makes accelerate use a device, and returns it; of several processes each has the one of its rank.

    Raises ConfigError.
    """
    name = device_asked_for(name)
    device = choose_device(name)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes == 1:
        state.device = device  # it would keep that of an earlier run in this process
    elif ":" in name or state.device.type != device.type:
        raise ConfigError(
            f"--device {name}: each of the {state.num_processes} processes takes the device of its own rank, here "
            f"{state.device}; give --device {state.device.type}, or start one process"
        )
    return torch.device(state.device)


@contextmanager
def launched_ranks(device: str) -> Iterator[PartialState | None]:
    """Yields the place of this process among those that torchrun has started; None if it was started alone.

    The ranks get a device each, and if one fails all do.
    """
    if world_size() == 1:
        yield None
        return
    with own_process_group():
        start_on_device(device)
        state = PartialState()
        with fail_together(state):
            yield state


def find_labels(config: TrainConfig) -> tuple[Labels | None, bool]:
    """Returns what the model's head is to predict, and whether the head is new; None for tasks without labels.

    The labels are those of the adapter or the model, if it knows all of the data; else those of the data.
    Raises DataError, ConfigError.
    """
    if config.task not in LABEL_TASKS:
        return None, False
    if config.adapter is not None:
        if (labels := labels_of_adapter(Path(config.adapter))) is None:
            raise ConfigError(
                f"--adapter {config.adapter} predicts no labels, as --task {config.task} does: leave --adapter out"
            )
        return labels, False
    labels = read_labels([source.name for source in resolved_sources(config, "data")], config.field, config.task)
    model_config = read_config(config.model)
    labels = fitted_labels(labels, model_config)
    return labels, labels != labels_of_config(model_config)


def attach(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saved: Checkpoint | None = None,
    sharding: Sharding | None = None,
    labels: Labels | None = None,
) -> Trainable:
    """Returns the base with its adapter, or wrapped for full fine-tuning, in training mode.

    saved: the checkpoint to continue from; its adapter's settings are used, its tensors are restored later.
    sharding, labels: of the base, for the original weights that full fine-tuning is compared with.
    Raises TargetError.
    """
    seed_all(config.seed)
    if config.method == "full":
        device = base.device
        load = partial(
            load_base,
            config.model,
            config.dtype,
            device,
            sharding=sharding,
            task=config.task,
            labels=labels,
            seed=config.seed,
        )
        return FullModel(base, tokenizer, lambda: load()[0]).train()
    if config.adapter:
        model = LoRAModel.from_pretrained(base, config.adapter)
    else:
        settings = adapter_of_checkpoint(config, saved)
        model = LoRAModel(base, settings or config.lora(), fresh=settings is None)
    return model.train()


def adapter_of_checkpoint(config: TrainConfig, saved: Checkpoint | None) -> LoRAConfig | None:
    """Returns the settings of the checkpoint's adapter, whose ranks may differ from those of `config`.

    Returns None without a checkpoint, and also if `config` asks for another adapter: then `check_same_run` refuses the
    checkpoint and names all differences.
    """
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
    first = data.first_batches(batches)
    task, divisor = layout.task, sum(layout.task.divisor(example) for batch in first for example in batch)

    def loss(model: Any, examples: Sequence[Example]) -> Tensor:
        batch = make_batch(examples, layout, next(model.parameters()).device)
        return task.outputs(model, batch, layout).losses.sum() / divisor

    with use_kernels(cast(PreTrainedModel, model.base_model), layout, Kernels(PLAIN, "")):
        model.start_from_data(first, loss)


def check_layers_are_called(
    model: Trainable, layout: BatchLayout, example: Example, note: Callable[[str], None]
) -> None:
    """Runs the start of one example through the model, and looks which adapted layers are called.

    note: called with the layers that were not called although the module around them was.
    Raises TargetError if the weight of such a layer is read by another module, or if no layer was called at all.
    """
    if not isinstance(model, LoRAModel):
        return
    device, task = next(model.parameters()).device, layout.task
    batch = make_batch([task.start_of(example, PROBE_TOKENS)], replace(layout, packed=False), device)
    calls = layer_calls(model)
    with torch.no_grad(), evaluating(model), calls.reads():
        calls.start()
        try:
            task.call(model, batch)
        finally:
            calls.stop()
    if read := calls.read_elsewhere:
        raise TargetError(
            f"the model reads the weights of {', '.join(read[:5])} ({len(read)} in all) without calling these layers: "
            f"adapters there would do nothing. Leave them out: --exclude-modules {' '.join(last_names(read))}"
        )
    if calls.none_called:
        raise TargetError(f"the model calls none of the adapted layers for text: {', '.join([*calls.layers][:5])}")
    if paths := calls.not_called:
        note(not_called_message(paths))


def describe_init(config: TrainConfig) -> str:
    """Returns how the adapter is initialized, for the run's header."""
    name = config.init_lora_weights
    if config.adapter:
        return f"from {config.adapter}"
    if name not in DATA_INITS:
        source = {"pissa": "leading directions of each weight", "olora": "QR of each weight"}.get(name)
        return f"{name}: {source}, subtracted again at run time" if source else f"{name}: random A, zero B"
    examples = f"up to {config.init_batches * config.per_device_train_batch_size} examples"
    source = "the gradient" if name in GRADIENT_INITS else "principal components of the inputs"
    return f"{name}: {source} over {examples}"


def choose_layout(
    config: TrainConfig,
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase | None,
    note: Callable[[str], None],
    *,
    compare: bool = True,
    task: Task = CAUSAL_LM,
) -> BatchLayout:
    """Returns packed or padded batches, and how the loss is computed; both are tried on the model itself.

    All ranks of a run choose the same.
    note: called with the reason if the model cannot do what is fastest.
    compare: False for a model without contents, whose structure alone decides.
    task: for one that `is_plain` nothing is tried.
    Raises ConfigError for packing = 'on' if it would change results.
    """
    base = cast(PreTrainedModel, model.base_model)
    if task.is_plain:
        if config.packing == "on":
            raise ConfigError(f"--packing on: rows are padded, each for itself, for {task.description}; leave it out")
        return BatchLayout(packed=False, loss=HEAD, pad_id=pad_id(tokenizer), task=task)
    with evaluating(model):
        attention, packing_note = choose_packing(base, config.packing, compare=compare)
        packed, own = attention is not None, own_form(base)
        layout = BatchLayout(packed, own, pad_id(tokenizer), attention)
        with layout.used_by(base):
            batch = make_batch(short_examples(base), layout, base.device)
            loss, obstacle = own, None
            if config.fast != "off":
                agree = {"agree": first_of_ranks} if compare else {}  # the structure is the same on every rank
                loss, obstacle = choose_form(base, batch, compare, **agree)
    if packing_note:
        note(packing_note)
    if obstacle:
        note(f"the loss is computed {loss}, which takes more memory: {obstacle}")
    return replace(layout, loss=loss)


def short_examples(base: PreTrainedModel) -> list[Example]:
    """Returns two short examples of random tokens, of different lengths, partly supervised."""
    ids = np.random.default_rng(0).integers(base.config.get_text_config().vocab_size, size=24).astype(np.int32)
    return [Example.of_text(part, np.arange(len(part)) % 3 > 0) for part in (ids[:10], ids[10:])]


def memory_cost(model: Trainable, layout: BatchLayout, kernels: Kernels, example: Example) -> Cost:
    """Returns the bytes that a forward keeps for its backward, measured on the start of one example."""
    base = cast(PreTrainedModel, model.base_model)

    def forward(tokens: int, supervised: bool) -> Tensor:
        part = layout.task.start_of(example, tokens, supervised=supervised)
        batch = make_batch([part], layout, base.device)
        return layout.task.outputs(model, batch, layout).losses.sum()

    with use_kernels(base, layout, kernels):
        cost = measure_cost(forward, min(len(example.input_ids), PROBE_TOKENS), base)
    forget_forward(base)
    return cost
