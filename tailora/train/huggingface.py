"""A LoRAModel in trainers of transformers and TRL: `adapting(SFTTrainer)(model=lora_model, args=..., ...)`.

The trainer is initialized with the base model, whose class and signature it inspects, and then trains the LoRAModel. It
saves the adapter only: checkpoints hold the PEFT folder, optimizer, scheduler and random states, and no base weights.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from tailora.errors import ConfigError, FormatError
from tailora.model import LoRAModel

if TYPE_CHECKING:
    from transformers import Trainer

SPARE = "read from the checkpoint"


class AdapterTraining:
    """Comes before a `Trainer` class in the bases and overrides its methods that save and load a model."""

    def __init__(self, model: LoRAModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, LoRAModel):
            raise ConfigError(f"model is a {type(model).__name__}; give LoRAModel(base_model, LoRAConfig(...))")
        if not model.active_adapters or model.is_merged:
            raise ConfigError("no adapter to train: set_adapter(name), and unmerge() what is merged")
        trainer = cast(Any, super())
        trainer.__init__(model.base_model, *args, **kwargs)
        me = cast("Trainer", self)
        if me.is_fsdp_enabled or me.is_deepspeed_enabled:
            raise ConfigError("adapter checkpoints are not written under FSDP or DeepSpeed: use DDP or `tailora train`")
        if me.args.n_gpu > 1:
            raise ConfigError(
                f"the trainer would split batches over {me.args.n_gpu} GPUs by nn.DataParallel, whose copies do not "
                "take adapters along: start it with torchrun, a process for each GPU, or set CUDA_VISIBLE_DEVICES=0"
            )
        me._set_signature_columns_if_needed()  # of the base's forward
        me.model = me.model_wrapped = model.to(me.args.device)
        if (me.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()  # or reentrant blocks would compute no gradients

    def _adapted(self) -> LoRAModel:
        me = cast("Trainer", self)
        return cast(LoRAModel, me.accelerator.unwrap_model(me.model, keep_torch_compile=False))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the active adapters, each in a PEFT folder, and the other files that the trainer saves."""
        import torch
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
            raise FormatError("there is no best checkpoint to load")
        self._read_back(folder)

    def _read_back(self, folder: str) -> None:
        """Copies the checkpoint's tensors into the trained parameters, which stay the same objects."""
        from pathlib import Path

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


def _adapting(trainer: type[Any]) -> type[Any]:
    return type(f"Adapter{trainer.__name__}", (AdapterTraining, trainer), {"__module__": __name__})


# Returns the class `trainer` (of transformers, TRL or your own) made to train a LoRAModel; cached by class.
adapting: Callable[[type[Any]], type[Any]] = cast(Any, cache(_adapting))
