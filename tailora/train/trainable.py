"""What a run trains: a `LoRAModel`, or a `FullModel` for `--method full`, and what the trainer asks of both.

In 16 bits most steps of a small learning rate would be rounded away, so full fine-tuning optimizes float32 masters of
the weights (arXiv:1710.03740, sec. 3.1); a float32 model is its own master:

    16-bit gradient -> added to the master's gradient -> AdamW changes the master -> rounded into the weight

If FSDP2 has sharded the base, masters belong to this rank's shards. `FullModel.gather` turns the shards that the
optimizer has into the whole tensors that files have, and `local` turns them back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.adapter import Summary, SummaryRow, adapter_dtype, parameter_count
from tailora.core.layer_types import gather_shards, whole_tensor
from tailora.core.model_parts import LANGUAGE_PART, parts_of
from tailora.formats.fingerprint import LayerFingerprint
from tailora.formats.io import replace_folder
from tailora.formats.run_folder import ADAPTER, MODEL
from tailora.model import LoRAModel
from tailora.quiet import quiet_transformers
from tailora.train.parallel import free_gathered, is_first_rank, local_shard, local_tensor


class FullModel(nn.Module):
    """A base model, all of whose weights are trained. Calls, `generate` and other attributes are the base model's.

    sharded: the sharded weights by the same names (FSDP2).
    load_original: loads the base again, for comparison.
    """

    base_model: nn.Module
    trained: nn.ParameterDict  # float32 masters by name, with / for the dots; of a float32 base, its own parameters

    def __init__(
        self, base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, load_original: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.base_model = base_model.requires_grad_()
        self._tokenizer, self._load_original = tokenizer, load_original
        self._weights = dict(base_model.named_parameters())
        self.trained = nn.ParameterDict()
        self.sharded = {_key(name): weight for name, weight in self._weights.items() if isinstance(weight, DTensor)}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # each weight that is not its own master; its master
        for name, weight in self._weights.items():
            key, wide = _key(name), adapter_dtype(weight.dtype)
            if weight.dtype == wide and key not in self.sharded:
                self.trained[key] = weight
                continue
            self.trained[key] = master = nn.Parameter(local_tensor(weight.detach()).to(wide, copy=True))
            self._pairs.append((weight, master))
            cast(Any, weight).register_post_accumulate_grad_hook(partial(_move_gradient, master))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @torch.no_grad()
    def sync_parameters(self) -> None:
        """Rounds the masters into the weights; to be called after every change of the masters."""
        free_gathered(self.base_model)
        for weight, master in self._pairs:
            local_tensor(weight).copy_(master)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the weights are those before training, loaded again. Named like `LoRAModel`'s method."""
        original = dict(self._load_original().named_parameters())

        @torch.no_grad()
        def exchange() -> None:
            free_gathered(self.base_model)
            for name, weight in self._weights.items():
                now, other = local_tensor(weight), local_tensor(original[name])
                kept = now.clone()
                now.copy_(other)
                other.copy_(kept)

        exchange()
        try:
            yield
        finally:
            exchange()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tensors by parameter or `parameter|key`, on the first rank's CPU. All ranks must call it."""
        result = {}
        for name, tensor in tensors.items():
            weight = self._sharded_weight(name, tensor)
            whole = tensor if weight is None else gather_shards(tensor, weight)
            if is_first_rank():
                result[name] = whole.cpu()
        return result

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this rank's shards of what `gather` has returned on the first."""
        return {
            name: tensor if (weight := self._sharded_weight(name, tensor)) is None else local_shard(tensor, weight)
            for name, tensor in tensors.items()
        }

    def _sharded_weight(self, name: str, tensor: Tensor) -> DTensor | None:
        """Returns the weight of whose shard this is a tensor; None for numbers, such as AdamW's step."""
        return self.sharded.get(name.partition("|")[0]) if tensor.ndim else None

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder atomically; all ranks must call it, only the first writes. Raises WriteError."""
        weights = self._whole_weights(self.base_model.state_dict())
        if not is_first_rank():
            return
        with replace_folder(folder) as fresh, quiet_transformers():
            cast(PreTrainedModel, self.base_model).save_pretrained(fresh, state_dict=weights)
            self._tokenizer.save_pretrained(fresh)

    def differences(self, folder: Path) -> list[str]:
        """Returns the names of the weights that differ in the folder; as `save`, for the first rank."""
        own, base = self._whole_weights(self._weights), cast(PreTrainedModel, self.base_model)
        if not own:
            return []
        with quiet_transformers():  # which renames weights for files
            read = (
                type(base)
                .from_pretrained(folder, dtype=base.dtype, use_safetensors=True, use_kernels=False)
                .state_dict()
            )
        return [name for name, tensor in own.items() if not torch.equal(read[name].cpu(), tensor.cpu())]

    def _whole_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights on the first rank, and {} on the others."""
        whole = {}
        for name, weight in weights.items():
            gathered = whole_tensor(weight.detach()).cpu() if isinstance(weight, DTensor) else weight
            if is_first_rank():
                whole[name] = gathered
        return whole

    def summary(self) -> Summary:
        count = parameter_count(self.base_model)
        return Summary([SummaryRow("", type(self.base_model).__name__, (), None, None, count)], count, count)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _move_gradient(master: nn.Parameter, weight: Tensor) -> None:
    """Adds the gradient of a weight to its master's."""
    gradient = local_tensor(cast(Tensor, weight.grad))
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
    weight.grad = None


# ---- What the trainer asks of both


Trainable = LoRAModel | FullModel


def trained_module(model: Trainable) -> nn.Module:
    """Returns the module whose parameters are all that is trained."""
    return model.trained if isinstance(model, FullModel) else model.lora_layers


def trained_parts(model: Trainable) -> list[str]:
    """Returns which parts of a vision-language model are trained; [] for other models."""
    if isinstance(model, FullModel):
        return parts_of(model.base_model, [name for name, _ in model.base_model.named_parameters()])
    return parts_of(model.base_model, [row.path for row in model.summary().rows])


def trains_on_pixels(model: Trainable) -> bool:
    """Returns whether more than the language model of a vision-language model is trained."""
    return trained_parts(model) not in ([], [LANGUAGE_PART])


def sharded_names(model: Trainable) -> set[str]:
    """Returns the names of the sharded trained parameters; an adapter has none."""
    return set(model.sharded) if isinstance(model, FullModel) else set()


def sync_parameters(model: Trainable) -> None:
    """Copies changed masters into the weights that the model computes with, in full fine-tuning."""
    if isinstance(model, FullModel):
        model.sync_parameters()


def folder_of(model: Trainable, output_dir: Path) -> Path:
    """Returns the folder that `save` writes."""
    return output_dir / (MODEL if isinstance(model, FullModel) else ADAPTER)


def save(model: Trainable, output_dir: Path, base: Mapping[str, LayerFingerprint]) -> Path:
    """Writes the adapter's or the model's folder atomically and returns it. Raises WriteError.

    base: the adapter's `peft.base_fingerprint`, so that nothing of a sharded base is gathered again.
    If the base is sharded, all ranks must call it for a model, and only the first writes.
    """
    folder = folder_of(model, output_dir)
    if isinstance(model, FullModel):
        model.save(folder)
    else:
        model.save_adapter(folder, base=base)
    return folder


def differences(model: Trainable, folder: Path) -> list[str]:
    """Reads the folder again and returns the names of the tensors that differ from the model's."""
    if isinstance(model, FullModel):
        return model.differences(folder)
    copy = "read back"
    model.load_adapter(folder, copy)
    written = {path: layer.state_dict() for path, layer in model.lora_layers.items()}
    model.set_adapter(copy)
    different = [
        f"{path}.{name}"
        for path, layer in model.lora_layers.items()
        for name, tensor in layer.state_dict().items()
        if not torch.allclose(tensor, written[path][name], rtol=1e-5)  # a learned scale is multiplied into B
    ]
    model.set_adapter("default")
    model.delete_adapter(copy)
    return different
