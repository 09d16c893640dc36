"""What a run trains: a `LoRAModel`, or a `FullModel` for `--method full`, and what the trainer asks of both.

Full fine-tuning uses the same training loop as LoRA, so that the two can be compared. In 16 bits most steps of a small
learning rate would be rounded away, so the optimizer works on float32 masters of the weights (arXiv:1710.03740,
sec. 3.1):

    16-bit gradient -> added to the master's gradient -> AdamW changes the master -> rounded into the weight

A float32 model is its own master.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.adalora import RankAllocator
from tailora.core.adapter import Summary, SummaryRow, adapter_dtype, parameter_count
from tailora.formats import peft
from tailora.formats.io import replace_folder
from tailora.formats.metadata import LayerFingerprint
from tailora.formats.run_folder import ADAPTER, MODEL
from tailora.model import LoRAModel
from tailora.quiet import quiet_transformers


class FullModel(nn.Module):
    """A base model, all of whose weights are trained. Calls, `generate` and other attributes are the base model's.

    trained: float32 masters by name, with / for the dots; of a float32 base, its own parameters.
    load_original: loads the base again, for comparison.
    """

    base_model: nn.Module
    trained: nn.ParameterDict

    def __init__(
        self, base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, load_original: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.base_model = base_model.requires_grad_()
        self._tokenizer, self._load_original = tokenizer, load_original
        self._weights = dict(base_model.named_parameters())
        self.trained = nn.ParameterDict()
        for name, weight in self._weights.items():
            wide = adapter_dtype(weight.dtype)
            self.trained[_key(name)] = weight if weight.dtype == wide else nn.Parameter(weight.detach().to(wide))
        for weight, master in self._pairs():
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

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Returns each 16-bit weight and its master."""
        pairs = [(weight, self.trained[_key(name)]) for name, weight in self._weights.items()]
        return [(weight, master) for weight, master in pairs if weight is not master]

    @torch.no_grad()
    def sync_parameters(self) -> None:
        """Rounds the masters into the weights; to be called after every change of the masters."""
        for weight, master in self._pairs():
            weight.copy_(master)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the weights are those before training, loaded again. Named like `LoRAModel`'s method."""
        original = dict(self._load_original().to(next(iter(self._weights.values())).device).named_parameters())

        def exchange() -> None:
            for name, weight in self._weights.items():
                weight.data, original[name].data = original[name].data, weight.data

        exchange()
        try:
            yield
        finally:
            exchange()

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder in the base's precision, with its tokenizer, atomically. Raises WriteError."""
        with replace_folder(folder) as fresh, quiet_transformers():
            cast(PreTrainedModel, self.base_model).save_pretrained(fresh)
            self._tokenizer.save_pretrained(fresh)

    def differences(self, folder: Path) -> list[str]:
        """Returns the names of the weights that differ in the folder."""
        own: dict[str, Tensor] = self.base_model.state_dict()
        stored = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        return [name for name in self._weights if name not in stored or not torch.equal(stored[name], own[name].cpu())]

    def summary(self) -> Summary:
        count = parameter_count(self.base_model)
        return Summary([SummaryRow("", type(self.base_model).__name__, (), None, None, count)], count, count)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _move_gradient(master: nn.Parameter, weight: Tensor) -> None:
    """Adds the gradient of a weight to its master's."""
    gradient = cast(Tensor, weight.grad)
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


def adapter_settings(model: Trainable) -> dict[str, Any]:
    """Returns what a checkpoint records about the adapter, whose ranks may depend on data; {} without an adapter."""
    return {} if isinstance(model, FullModel) else {"adapter": model.adapters["default"].model_dump(mode="json")}


def rank_allocator(model: Trainable, optimizer: torch.optim.Optimizer, steps: int) -> RankAllocator | None:
    """Returns what changes the ranks during training (AdaLoRA); None if ranks are fixed. Raises ConfigError."""
    if isinstance(model, FullModel) or model.adapters["default"].adalora is None:
        return None
    return model.allocate_ranks(optimizer, steps)


def sync_parameters(model: Trainable) -> None:
    """Copies changed masters into the weights that the model computes with, in full fine-tuning."""
    if isinstance(model, FullModel):
        model.sync_parameters()


def folder_of(model: Trainable, output_dir: Path) -> Path:
    """Returns the folder that `save` writes."""
    return output_dir / (MODEL if isinstance(model, FullModel) else ADAPTER)


def base_fingerprint(model: Trainable) -> dict[str, LayerFingerprint]:
    """Returns what the files of an adapter say about its base; {} without an adapter. All ranks must call it."""
    return {} if isinstance(model, FullModel) else peft.base_fingerprint(model.adapter(), model.base_model)


def save(model: Trainable, output_dir: Path, base: Mapping[str, LayerFingerprint]) -> Path:
    """Writes the adapter's or the model's folder atomically and returns it. Raises WriteError.

    base: `base_fingerprint`, which does not change: with it, nothing of a sharded base is gathered.
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
