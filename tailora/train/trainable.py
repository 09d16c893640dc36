"""Full fine-tuning: every weight of the base trains, by the same loop, so that LoRA has an honest control.

In 16 bits most steps of a small learning rate would vanish, so the optimiser works on float32 masters of the weights
(arXiv:1710.03740, sec. 3.1):  16-bit gradient -> added to the master's -> AdamW -> rounded into the weight.
A float32 model is its own master.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.adalora import RankAllocator
from tailora.core.adapter import Summary, SummaryRow, adapter_dtype, parameter_count
from tailora.formats.io import replace_folder
from tailora.model import LoRAModel
from tailora.quiet import quiet_transformers


class FullModel(nn.Module):
    """A base model, all of whose weights train. Calls, `generate` and other attributes are the base model's.

    trained: float32 masters by name, with / for the dots; of a float32 base, its own parameters.
    original: loads the base anew, to compare with.
    """

    base_model: nn.Module
    trained: nn.ParameterDict

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        original: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.base_model = base_model.requires_grad_()
        self._tokenizer, self._original = tokenizer, original
        self._weights = dict(base_model.named_parameters())
        self.trained = nn.ParameterDict({_key(name): _master(weight) for name, weight in self._weights.items()})
        for weight, master in self._pairs():
            cast(Any, weight).register_post_accumulate_grad_hook(_into(master))

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
        """Each 16-bit weight and its master."""
        pairs = [(weight, self.trained[_key(name)]) for name, weight in self._weights.items()]
        return [(weight, master) for weight, master in pairs if weight is not master]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights, after every change of them."""
        for weight, master in self._pairs():
            weight.copy_(master)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model before training, read again, within the block; named as `LoRAModel`'s."""
        original = dict(self._original().to(next(iter(self._weights.values())).device).named_parameters())
        self._exchange(original)
        try:
            yield
        finally:
            self._exchange(original)

    def _exchange(self, original: dict[str, nn.Parameter]) -> None:
        for name, weight in self._weights.items():
            weight.data, original[name].data = original[name].data, weight.data

    def save(self, folder: Path) -> None:
        """A Hugging Face folder in the base's precision, with its tokenizer; atomically. Raises WriteError."""
        with replace_folder(folder) as fresh, quiet_transformers():
            cast(PreTrainedModel, self.base_model).save_pretrained(fresh)
            self._tokenizer.save_pretrained(fresh)

    def differences(self, folder: Path) -> list[str]:
        """Names of the weights that the folder gives back otherwise."""
        own: dict[str, Tensor] = self.base_model.state_dict()
        stored = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        return [name for name in self._weights if name not in stored or not torch.equal(stored[name], own[name].cpu())]

    def summary(self) -> Summary:
        count = parameter_count(self.base_model)
        return Summary([SummaryRow("", type(self.base_model).__name__, (), None, None, count)], count, count)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _master(weight: nn.Parameter) -> nn.Parameter:
    wide = adapter_dtype(weight.dtype)
    return weight if weight.dtype == wide else nn.Parameter(weight.detach().to(wide))


def _into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Moves a gradient that is complete to the master's."""

    def move(weight: Tensor) -> None:
        gradient = cast(Tensor, weight.grad)
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)
        weight.grad = None

    return move


# ---- What a run trains: an adapter around a base, or the base itself. The loop asks here and needs not know which.


Trainable = LoRAModel | FullModel
ADAPTER, MODEL = "adapter", "model"  # what a run leaves in its folder


def trained(model: Trainable) -> nn.Module:
    """The module whose parameters are all that is trained."""
    return model.trained if isinstance(model, FullModel) else model.lora_layers


def settings_of(model: Trainable) -> dict[str, Any]:
    """What a checkpoint says about the adapter, whose ranks the data may have moved."""
    return {} if isinstance(model, FullModel) else {"adapter": model.adapters["default"].model_dump(mode="json")}


def allocating(model: Trainable, optimizer: torch.optim.Optimizer, steps: int) -> RankAllocator | None:
    """What moves the adapter's ranks while it trains (AdaLoRA); None where they are fixed. Raises ConfigError."""
    if isinstance(model, FullModel) or model.adapters["default"].adalora is None:
        return None
    return model.allocate_ranks(optimizer, steps)


def settle(model: Trainable) -> None:
    """Training is over: ranks that AdaLoRA has switched off go."""
    if not isinstance(model, FullModel):
        model.settle_ranks()


def publish(model: Trainable) -> None:
    """Let the model compute with parameters that were changed."""
    if isinstance(model, FullModel):
        model.publish()


def folder_of(model: Trainable, output_dir: Path) -> Path:
    return output_dir / (MODEL if isinstance(model, FullModel) else ADAPTER)


def save(model: Trainable, output_dir: Path) -> Path:
    """Write the adapter's or the model's folder, atomically. Raises WriteError."""
    folder = folder_of(model, output_dir)
    if isinstance(model, FullModel):
        model.save(folder)
    else:
        model.save_adapter(folder)
    return folder


def differences(model: Trainable, folder: Path) -> list[str]:
    """Names of the tensors that the folder, read again, gives back otherwise."""
    return model.differences(folder) if isinstance(model, FullModel) else _adapter_differences(model, folder)


def _adapter_differences(model: LoRAModel, folder: Path) -> list[str]:
    copy = "read back"
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
    return different
