"""A LoRAModel in trainers of transformers and TRL: `adapting(SFTTrainer)(model=lora_model, args=..., ...)`.

The trainer is initialized with the base model, whose class and signature it inspects, and then trains the LoRAModel. It
saves the adapter only: checkpoints hold the PEFT folder, optimizer, scheduler and random states, and no base weights.

Losses that compare with a reference model (DPO, KTO; GRPO and RLOO with beta) get a `ReferenceModel`, where TRL would
load the base a second time: its own way to switch an adapter off is for PEFT's classes only.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.attach import evaluating
from tailora.core.layer_types import layer_path_of
from tailora.data.collate import collate_packed, collate_padded
from tailora.errors import ConfigError, FormatError, TailoraWarning
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import CHUNKED, FORMS, OWN, Batch, LossForm
from tailora.model import LoRAModel
from tailora.patches import attention_of
from tailora.train.kernel_choice import choose_form, choose_packing
from tailora.train.kernel_comparison import short_examples, tolerance
from tailora.train.loss import next_tokens_of

if TYPE_CHECKING:
    from transformers import Trainer

SPARE = "read from the checkpoint"
REFERENCE = "{}_reference"  # the adapter that keeps the values that the one of this name starts from
MASKED = {"sdpa", "eager"}  # attention that keeps packed documents apart by a mask of all pairs of tokens
OF_TEXT = {"input_ids", "attention_mask", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"}
OF_TEXT |= {"max_length_q", "max_length_k"}
LOADS_REFERENCE = {"GRPOTrainer", "RLOOTrainer"}  # have no argument `ref_model`, and load one if beta is not 0


class ReferenceModel(nn.Module):
    """The model before training, on the same base: an adapter that changes nothing yet is off, others are copied."""

    def __init__(self, model: LoRAModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.names: list[str] = []
        for name in model.active_adapters:
            adapter = model.adapter(name)
            if not _changes_nothing(adapter):
                self.names.append(REFERENCE.format(name))
                model._adapter_set.add(self.names[-1], copy.deepcopy(adapter))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of `forward`, which TRL replaces by one that calls parts of the model."""
        with self.model._activated(self.names), evaluating(self.model):
            return self.model(*args, **kwargs)


def _changes_nothing(adapter: Adapter) -> bool:
    """True if it is plain LoRA with a factor of zeros. False is right for every adapter."""
    if adapter.saved or adapter.extras or adapter.has_start:
        return False
    return all(
        not (layer.lora_A.any() and layer.lora_B.any())
        and all(part is None for part in (layer.lora_magnitude_vector, layer.lora_bias, layer.bias))
        for layer in adapter.low_rank.values()
    )


class AdapterTraining:
    """Comes before a `Trainer` class in the bases and overrides its methods that save and load a model."""

    _packing: tuple[str | None, str | None] | None = None  # what `choose_packing` returned
    _loss_form: LossForm | None = None  # what `_choose_loss` returned; None before the first batch

    def __init__(self, model: LoRAModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, LoRAModel):
            raise ConfigError(f"model: expected LoRAModel(base_model, LoRAConfig(...)), got {type(model).__name__}")
        if not model.active_adapters or model.is_merged:
            raise ConfigError("no adapter to train; call set_adapter(name), and unmerge() if adapters are merged")
        trainer = cast(Any, super())
        names = _argument_names(type(self))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        _check_arguments(given)
        if "ref_model" in names and given.get("ref_model") is None:
            given["ref_model"] = ReferenceModel(model)
        with self._without_reference(model, given.get("args")):
            trainer.__init__(model.base_model, **given)
        me = cast("Trainer", self)
        if me.is_fsdp_enabled or me.is_deepspeed_enabled:
            raise ConfigError("FSDP and DeepSpeed do not support adapter checkpoints; use DDP or `tailora train`")
        if me.args.n_gpu > 1:
            raise ConfigError(
                f"the trainer would split batches over {me.args.n_gpu} GPUs with nn.DataParallel, whose replicas lack "
                "the adapters; start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"
            )
        _check_output_head(model)
        if getattr(me.args, "disable_dropout", False):  # the trainer has done it for modules of the class Dropout
            for name in model.active_adapters:
                for layer in model.adapter(name).low_rank.values():
                    layer.lora_dropout = 0.0
        me._set_signature_columns_if_needed()  # of the base's forward
        me.model = me.model_wrapped = model.to(me.args.device)
        if hasattr(super(), "override_model_in_loss"):  # sentence-transformers: the optimizer has the loss's parameters
            losses: Any = cast(Any, self).loss
            for loss in losses.values() if isinstance(losses, dict) else [losses]:
                self.override_model_in_loss(loss, model)
        if (me.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()  # or reentrant blocks would compute no gradients

    @contextmanager
    def _without_reference(self, model: LoRAModel, args: Any) -> Iterator[None]:
        """Within the block a trainer of LOADS_REFERENCE is initialized as if beta were 0; then it gets a reference."""
        beta = getattr(args, "beta", 0.0)
        if not beta or LOADS_REFERENCE.isdisjoint(base.__name__ for base in type(self).__mro__):
            yield
            return
        args.beta = 0.0
        try:
            yield
        finally:
            args.beta = beta
        me: Any = self
        me.beta, me.ref_model = beta, ReferenceModel(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError for an optimizer that would train nothing of the adapter."""
        optimizer = cast(Any, super()).create_optimizer(*args, **kwargs)
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if given.isdisjoint(id(parameter) for parameter in self._adapted().lora_layers.parameters()):
            raise ConfigError(
                "the optimizer contains none of the adapter's parameters; create it from model.lora_layers.parameters()"
            )
        return optimizer

    def override_model_in_loss(self, loss: nn.Module, model: nn.Module) -> nn.Module:
        """Lets a loss of sentence-transformers call `model`: the LoRAModel, or what wraps it (DDP)."""
        for name, child in loss.named_children():
            if isinstance(child, LoRAModel) or child is self._adapted().base_model:
                for method in ("preprocess", "get_embedding_dimension"):  # that losses call, and wrappers lack
                    if hasattr(child, method) and not hasattr(model, method):
                        setattr(model, method, getattr(child, method))
                setattr(loss, name, model)
            else:
                self.override_model_in_loss(child, model)
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._attention(inputs):
            return cast(Any, super()).training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._attention(inputs):
            return cast(Any, super()).prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of a causal language model in chunks of tokens, where that gives what the trainer would."""
        me = cast("Trainer", self)
        if not return_outputs and isinstance(model, LoRAModel) and self._has_own_loss(inputs):
            if self._loss_form is None:
                self._loss_form = _choose_loss(model, packed="cu_seq_lens_q" in inputs)
            batch = _batch_of(inputs) if self._loss_form in CHUNKED else None
            if batch is not None and len(batch.targets):
                count = num_items_in_batch if me.model_accepts_loss_kwargs else None
                count = len(batch.targets) if count is None else count
                with model.forward_context():
                    losses = FORMS[self._loss_form](model, replace(batch, expected_gradient=1 / count))
                return losses.sum() / count
        return cast(Any, super()).compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _has_own_loss(self, inputs: dict[str, Any]) -> bool:
        """True if the trainer takes the loss that the model returns for its labels, in the model's own precision."""
        from transformers import Trainer

        me = cast(Trainer, self)
        return (
            cast(Any, super()).compute_loss.__func__ is Trainer.compute_loss
            and "labels" in inputs
            and inputs.keys() <= OF_TEXT
            and me.label_smoother is None
            and me.compute_loss_func is None
            and not me.accelerator.native_amp
        )

    def _attention(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Gives packed rows the attention of `kernels.attention` in place of masks, tried at the first such batch."""
        model = self._adapted()
        base: Any = model.base_model
        if "cu_seq_lens_q" not in inputs or attention_of(base.config) not in MASKED:
            return nullcontext()
        if self._packing is None:
            with evaluating(model):
                self._packing = choose_packing(base, "auto")
            if self._packing[1]:
                warnings.warn(self._packing[1], TailoraWarning, stacklevel=2)
        provider, _ = self._packing
        return nullcontext() if provider is None else packed_rows(base, provider)

    def _adapted(self) -> LoRAModel:
        me = cast("Trainer", self)
        return cast(LoRAModel, me.accelerator.unwrap_model(me.model, keep_torch_compile=False))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the active adapters, each in a PEFT folder, and the other files that the trainer saves."""
        from transformers.trainer import TRAINING_ARGS_NAME

        del state_dict
        me, model = cast("Trainer", self), self._adapted()
        if not me.args.should_save:
            return
        folder = output_dir or me.args.output_dir
        for name in model.active_adapters:
            model.save_adapter(folder, name)
        tokenizer = me.processing_class or getattr(me.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(me.args, f"{folder}/{TRAINING_ARGS_NAME}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        self._read_back(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        folder = cast("Trainer", self).state.best_model_checkpoint
        if folder is None:
            raise FormatError("no best checkpoint to load; evaluate and save at least once before training ends")
        self._read_back(folder)

    def _read_back(self, folder: str) -> None:
        """Copies the checkpoint's tensors into the trained parameters, which stay the same objects."""
        model = self._adapted()
        active = model.active_adapters
        for name in active:
            model.load_adapter(Path(folder) if name == "default" else Path(folder) / name, SPARE)
            model.set_adapter(SPARE)
            saved = {key: value.clone() for key, value in model.lora_layers.state_dict().items()}
            model.set_adapter(name)
            model.delete_adapter(SPARE)
            model.lora_layers.load_state_dict(saved)
        model.set_adapter(active)


def _choose_loss(model: LoRAModel, *, packed: bool) -> LossForm:
    """Returns the form of the loss; one of CHUNKED only if it gives the loss that the model returns."""
    base: Any = model.base_model
    if getattr(base, "loss_type", None) != "ForCausalLM":
        return OWN
    examples = short_examples(base)
    example_batch = collate_packed(examples) if packed else collate_padded(examples, 0)
    inputs = {
        name: value.to(base.device) if isinstance(value, Tensor) else value for name, value in example_batch.items()
    }
    batch = _batch_of(inputs)
    with evaluating(model):
        form, _ = choose_form(base, batch)
        if form not in CHUNKED:
            return OWN
        with torch.no_grad():
            own, chunked = base(**inputs, use_cache=False).loss.float(), FORMS[form](base, batch).mean()
    allowed = tolerance("loss", base.dtype) * abs(own)
    return form if abs(chunked - own) <= allowed else OWN  # others add a loss of their experts


def _batch_of(inputs: dict[str, Any]) -> Batch:
    labels = inputs["labels"].cpu().numpy()
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return Batch.of(others, next_tokens_of(labels), np.zeros_like(labels)).to(inputs["labels"].device)


def _argument_names(trainer: type[AdapterTraining]) -> list[str]:
    """Returns the arguments after `model`, of the first class in the bases that names them."""
    for base in trainer.__mro__[trainer.__mro__.index(AdapterTraining) + 1 :]:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        if parameters and not any(part.kind is part.VAR_POSITIONAL for part in parameters.values()):
            return [name for name, part in parameters.items() if part.kind is not part.VAR_KEYWORD][2:]
    return []


def _check_arguments(given: dict[str, Any]) -> None:
    """Raises ConfigError for what a trainer of TRL would do wrong, since it knows adapters of PEFT only."""
    args = given.get("args")
    if given.get("peft_config") is not None:
        raise ConfigError("the model already has an adapter; remove peft_config, and pass the LoRAConfig to LoRAModel")
    if getattr(args, "use_vllm", False):
        raise ConfigError("TRL does not send the adapter to vLLM, so vLLM would not use it; remove use_vllm")
    if getattr(args, "sync_ref_model", False):
        raise ConfigError(
            "sync_ref_model = True needs a separate reference model, but here the reference shares the base "
            "model; pass ref_model, or remove sync_ref_model"
        )


def _check_output_head(model: LoRAModel) -> None:
    """Raises ConfigError if a trainer of TRL multiplies by the output head's weight and the head is adapted."""
    base: Any = model.base_model
    if "fused_lm_head" not in inspect.signature(base.forward, follow_wrapped=False).parameters:
        return
    head = base.get_output_embeddings()
    adapted = {layer_path_of(base, path) for name in model.active_adapters for path in model.adapter(name).parts}
    if heads := [path for path in adapted if base.get_submodule(path) is head]:
        raise ConfigError(
            f"{heads[0]} has an adapter, but this trainer bypasses it for log-probabilities, so it would never "
            f"be trained; remove {heads[0]} from target_modules, modules_to_save and trainable_token_indices"
        )


@cache
def adapting(trainer: type[Any]) -> type[Any]:
    """Returns the class `trainer` (of transformers, TRL or your own) made to train a LoRAModel; cached by class."""
    return type(f"Adapter{trainer.__name__}", (AdapterTraining, trainer), {"__module__": __name__})
