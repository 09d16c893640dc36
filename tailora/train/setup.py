"""The parts of a run, each made from the settings and the parts before it."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.attach import evaluating
from tailora.core.config import LoRAConfig
from tailora.core.init import DATA_INITS, GRADIENT_INITS
from tailora.data.dataset import IGNORED, Example
from tailora.errors import ConfigError, listing, nearest
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import choose_form, own_form
from tailora.model import LoRAModel
from tailora.train.checkpoint import Checkpoint, seed_all
from tailora.train.config import TrainConfig
from tailora.train.dataloader import Feed, HeldOut, Reader, feed
from tailora.train.kernel_choice import Kernels, choose_kernels, running
from tailora.train.loss import BatchLayout, as_batch, token_losses
from tailora.train.memory import Cost, explained, measure
from tailora.train.model_loading import load_base
from tailora.train.packing import choose
from tailora.train.trainable import FullModel, Trainable

# ---- How a run's adapter starts: from the weights by itself, from the run's own data here.


PLAIN = Kernels(False, "")


def from_data(model: Trainable, feed: Feed, rows: BatchLayout, device: torch.device, batches: int) -> None:
    """Start an adapter that waits for data from the first batches of the run, the same on every rank."""
    if not isinstance(model, LoRAModel) or not model.waits_for_data:
        return
    opening = feed.opening(batches)
    supervised = sum(example.supervised for batch in opening for example in batch)

    def loss(model: Any, examples: Sequence[Example]) -> Tensor:
        return token_losses(model, examples, rows, device)[0].sum() / supervised

    with running(cast(PreTrainedModel, model.base_model), rows, PLAIN):
        model.start_from_data(opening, loss)


def words(config: TrainConfig) -> str:
    """The start, for the run's header."""
    name = config.init_lora_weights
    if config.adapter:
        return f"from {config.adapter}"
    if name not in DATA_INITS:
        source = {"pissa": "leading directions of each weight", "olora": "QR of each weight"}.get(name)
        return f"{name}: {source}, taken off again at run time" if source else f"{name}: random A, zero B"
    seen = f"up to {config.init_batches * config.per_device_train_batch_size} examples"
    return f"{name}: {'gradient' if name in GRADIENT_INITS else 'principal components of the inputs'} over {seen}"


def resumed(config: TrainConfig, saved: Checkpoint | None) -> LoRAConfig | None:
    """The settings of the checkpoint's adapter, whose ranks may differ from those asked for; None without one.

    None, too, where the run asks for another adapter: then the two are compared, and refused, as a whole.
    """
    if saved is None or config.adapter or "adapter" not in saved.state:
        return None
    asked, then = config.model_dump(mode="json"), saved.state["run"]["settings"]
    if any(asked[name] != then.get(name) for name in ("model", *(LoRAConfig.model_fields.keys() & asked.keys()))):
        return None
    return LoRAConfig(**saved.state["adapter"])


# ----


TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
PROBE_TOKENS = 128  # memory is measured on so much of the longest example
LIGHTER = (
    "what helps: --quantize nf4 (a quarter of bfloat16's bytes), --dtype bfloat16 (half the bytes of float32), "
    "a smaller --model, closing other programs"
)


@dataclass(frozen=True, eq=False)
class Kit:
    """Everything that training needs, loaded, checked and tried."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    feed: Feed
    model: Trainable
    rows: BatchLayout
    kernels: Kernels
    cost: Cost
    start: str  # of the adapter, for the run's header


def start_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate, with the trackers asked for. Raises ConfigError for those it would pass over in silence."""
    problems = []
    for name in config.report_to:
        if name not in TRACKERS:
            problems.append(f"report_to {name!r} is unknown; there are {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        elif not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            problems.append(f"report_to {name!r} is not installed: pip install {TRACKERS[name][0]}")
    if problems:
        raise ConfigError(listing(problems))
    ours = GradientAccumulationPlugin(num_steps=1)  # or an environment variable would scale our gradients
    found = Accelerator(
        log_with=config.report_to or None, project_dir=config.output_dir, gradient_accumulation_plugin=ours
    )
    if found.scaler is not None:
        raise ConfigError(
            f"accelerate's mixed_precision {found.mixed_precision} scales losses, which is not supported: launch with "
            "--mixed_precision no; --dtype sets the precision of the base, and adapters are float32"
        )
    return found


def assemble(
    config: TrainConfig,
    accelerator: Accelerator,
    note: Callable[[str], None],
    saved: Checkpoint | None = None,
    held_out: HeldOut | None = None,
    read: Reader = feed,
) -> Kit:
    """Model, data, adapter, form of the batches, start, memory: in this order. `note` hears what was decided.

    saved: the checkpoint of the run that goes on, for what was decided then; its tensors come later.
    held_out: which of the held-out examples are evaluated; all.    read: where the data comes from.
    Raises ConfigError, DataError, TargetError; MemoryLimitError when the model alone is too large.
    """
    device = accelerator.device
    with explained("loading", lambda: LIGHTER):
        base, tokenizer = load_base(config.model, config.dtype, device.type, config.quantize)
        data = read(config, base.get_input_embeddings().weight.shape[0], tokenizer, accelerator).judged_by(held_out)
        model = subject(config, base, tokenizer, accelerator, resumed(config, saved))
        rows = choose_rows(config, model, tokenizer, note)
        from_data(model, data, rows, device, config.init_batches)
        recorded = None if saved is None else saved.state["run"]
        before = None if recorded is None else recorded.get("layer_kernels")
        kernels = choose_kernels(config.fast, model, rows, data.sample, device, before)
        cost = memory_cost(model, rows, kernels, data.sample, device)
        return Kit(base, tokenizer, data, model, rows, kernels, cost, words(config))


def subject(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    adapter: LoRAConfig | None,
) -> Trainable:
    """What trains, in training mode. Raises ConfigError for full fine-tuning on several ranks."""
    if config.method == "lora":
        return attach(config, base, accelerator.device, adapter)
    if accelerator.num_processes > 1:
        raise ConfigError("--method full trains in one process only; start it without torchrun")
    seed_all(config.seed)
    base = base.to(accelerator.device)
    return FullModel(base, tokenizer, lambda: load_base(config.model, config.dtype, base.device.type)[0]).train()


def attach(
    config: TrainConfig, base: PreTrainedModel, device: torch.device, adapter: LoRAConfig | None = None
) -> LoRAModel:
    """The base with a fresh adapter, or with the one to go on from, in training mode.

    adapter: settings of a checkpoint's adapter, whose tensors are still to be filled in.
    """
    seed_all(config.seed)
    if config.adapter:
        model = LoRAModel.from_pretrained(base, config.adapter)
    else:
        model = LoRAModel(base, adapter or config.lora(), fresh=adapter is None)
    return model.to(device).train()


def choose_rows(
    config: TrainConfig, model: Trainable, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]
) -> BatchLayout:
    """Packed or padded, and the form of the loss, tried on the model itself.

    Raises ConfigError for packing = 'on' where it changes results.
    """
    base = cast(PreTrainedModel, model.base_model)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(token for token in known if token is not None)
    with evaluating(model):
        packing = choose(base, config.packing)
        with packed_rows(base) if packing.on else nullcontext():
            few, _ = as_batch(some_examples(base), packing.on, pad_id, base.device)
            loss, obstacle = choose_form(base, few) if config.fast == "auto" else (own_form(base), None)
    if packing.note:
        note(packing.note)
    if obstacle:
        note(f"the loss is computed {loss}, which takes more memory: {obstacle}")
    return BatchLayout(packing.on, loss, pad_id)


def some_examples(base: PreTrainedModel) -> list[Example]:
    """Two short ones of random tokens, of different lengths, partly supervised."""
    ids = np.random.default_rng(0).integers(base.config.get_text_config().vocab_size, size=24).astype(np.int32)
    labels = np.where(np.arange(24) % 3 == 0, IGNORED, ids).astype(np.int32)
    return [Example(ids[part], labels[part]) for part in (slice(0, 10), slice(10, 24))]


def memory_cost(model: Trainable, rows: BatchLayout, kernels: Kernels, sample: Example, device: torch.device) -> Cost:
    """Bytes that a forward keeps, measured on the start of one example."""
    base = cast(PreTrainedModel, model.base_model)

    def forward(tokens: int, supervised: bool) -> Tensor:
        ids = sample.input_ids[:tokens]
        part = Example(ids, ids if supervised else np.full_like(ids, IGNORED))
        return token_losses(model, [part], rows, device)[0].sum()

    with running(base, rows, kernels):
        return measure(forward, min(len(sample.input_ids), PROBE_TOKENS), base)
