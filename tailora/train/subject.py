"""What a run trains: an adapter around a base, or the base itself. The loop asks here and needs not know which."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailora.core.adalora import RankAllocator
from tailora.model import LoRAModel
from tailora.train.trainable import FullModel

Subject = LoRAModel | FullModel
ADAPTER, MODEL = "adapter", "model"  # what a run leaves in its folder


def trained(model: Subject) -> nn.Module:
    """The module whose parameters are all that is trained."""
    return model.trained if isinstance(model, FullModel) else model.lora_layers


def settings_of(model: Subject) -> dict[str, Any]:
    """What a checkpoint says about the adapter, whose ranks the data may have moved."""
    return {} if isinstance(model, FullModel) else {"adapter": model.adapters["default"].model_dump(mode="json")}


def allocating(model: Subject, optimizer: torch.optim.Optimizer, steps: int) -> RankAllocator | None:
    """What moves the adapter's ranks while it trains (AdaLoRA); None where they are fixed. Raises ConfigError."""
    if isinstance(model, FullModel) or model.adapters["default"].adalora is None:
        return None
    return model.allocate_ranks(optimizer, steps)


def settle(model: Subject) -> None:
    """Training is over: ranks that AdaLoRA has switched off go."""
    if not isinstance(model, FullModel):
        model.settle_ranks()


def publish(model: Subject) -> None:
    """Let the model compute with parameters that were changed."""
    if isinstance(model, FullModel):
        model.publish()


def folder_of(model: Subject, output_dir: Path) -> Path:
    return output_dir / (MODEL if isinstance(model, FullModel) else ADAPTER)


def save(model: Subject, output_dir: Path) -> Path:
    """Write the adapter's or the model's folder, atomically. Raises WriteError."""
    folder = folder_of(model, output_dir)
    if isinstance(model, FullModel):
        model.save(folder)
    else:
        model.save_adapter(folder)
    return folder


def differences(model: Subject, folder: Path) -> list[str]:
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
