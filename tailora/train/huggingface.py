"""A LoRAModel in trainers of transformers and TRL: `adapting(SFTTrainer)(model=lora_model, args=..., ...)`.

The trainer is initialized with the base model, whose class and signature it inspects, and then trains the LoRAModel. It
saves the adapter only: checkpoints hold the PEFT folder, optimizer, scheduler and random states, and no base weights.

Losses that compare with a reference model (DPO, KTO; GRPO and RLOO with beta) get a `ReferenceModel`, where TRL would
load the base a second time: its own way to switch an adapter off is for PEFT's classes only.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tailora.core.adapter import Adapter
from tailora.core.attach import evaluating
from tailora.core.layer_types import layer_path_of
from tailora.errors import ConfigError, FormatError
from tailora.model import LoRAModel

if TYPE_CHECKING:
    from transformers import Trainer

SPARE = "read from the checkpoint"
REFERENCE = "{}_reference"  # the adapter that keeps the values that the one of this name starts from
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
