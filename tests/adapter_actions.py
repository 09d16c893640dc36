"""What one does with adapters, each on a device of choice; tests compare the tensors that come out."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import chat_model, stir
from torch import Tensor
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.evaluation.forgetting import forgetting
from tailora.study.inspect import InspectOptions, inspect_model

Tensors = Mapping[str, Tensor]
WIDE = {"hidden_size": 288, "intermediate_size": 320, "head_dim": 8}  # too wide for an exact decomposition


def base(device: torch.device, **settings: Any) -> LlamaForCausalLM:
    with torch.device("cpu"):
        model = chat_model(**{"num_hidden_layers": 1, **settings})
    return model.to(device)  # type: ignore[arg-type]


def batch(device: torch.device) -> dict[str, Any]:
    ids = torch.arange(12, device=device).view(2, 6)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def stirred(device: torch.device, **settings: Any) -> LoRAModel:
    model = LoRAModel(base(torch.device("cpu")), LoRAConfig(**{"r": 4, **settings}))
    with torch.device("cpu"):
        stir(model)
    return model.to(device)


def loaded(device: torch.device, folder: Path, **settings: Any) -> LoRAModel:
    stirred(device, **settings).save_adapter(folder / "adapter")
    return LoRAModel.from_pretrained(base(device), folder / "adapter")


def step(model: LoRAModel) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), foreach=False)
    model.train()
    model(**batch(model.device)).loss.backward()
    with torch.device("cpu"):  # torch's optimizers make their counters on the default device
        optimizer.step()
    return optimizer


def started(init: str, device: torch.device, _: Path) -> Tensors:
    config = LoRAConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "up_proj"])
    model = LoRAModel(base(device, **WIDE), config)
    if init == "eva":
        model.start_from_data([batch(device)])
    return {path: layer.lora_B @ layer.lora_A for path, layer in model.lora_layers.items()}


def trained(device: torch.device, _: Path) -> Tensors:
    model = stirred(device, use_dora=True, trainable_token_indices=[3], modules_to_save=["lm_head"])
    step(model)
    return model.lora_layers.state_dict()


def products(model: LoRAModel, name: str) -> Tensors:
    return {path: layer.lora_B @ layer.lora_A for path, layer in model.adapter(name).low_rank.items()}


def shrunk(device: torch.device, folder: Path) -> Tensors:
    model = loaded(device, folder, init_lora_weights="pissa")
    model.shrink("default", "small", energy=0.9)
    return products(model, "small")


def combined(device: torch.device, folder: Path) -> Tensors:
    model = loaded(device, folder)
    model.combine({"default": 0.5}, "dropped", "dare", r=2)
    model.combine({"default": 0.5, "dropped": 1.0}, "sum", "svd", r=2)
    return products(model, "sum")


def extracted(device: torch.device, _: Path) -> Tensors:
    model, tuned = base(device), base(device)
    for parameter in tuned.parameters():
        parameter.data *= 1.5
    result, report = LoRAModel.from_difference(model, tuned, LoRAConfig(), energy=0.5)
    assert report.left_over
    return products(result, "default")


def merged(device: torch.device, folder: Path) -> Tensors:
    model = loaded(device, folder, use_dora=True)
    model.merge()
    return model.base_model.state_dict()


def exported(device: torch.device, folder: Path) -> Tensors:
    report = loaded(device, folder).export(folder / "out", "peft")
    return {"effect": torch.tensor(report.logits.effect, device="cpu")}


def inspected(device: torch.device, folder: Path) -> Tensors:
    inspection = inspect_model(loaded(device, folder), options=InspectOptions())
    return {module.path: torch.tensor(module.singular_values, device="cpu") for module in inspection.modules}


def forgotten(device: torch.device, folder: Path) -> Tensors:
    return {"kl": torch.tensor(forgetting(loaded(device, folder), [[1, 2, 3]]).kl, device="cpu")}


INITS = ("pissa", "olora", "eva")
ACTIONS: dict[str, Callable[[torch.device, Path], Tensors]] = {
    **{init: partial(started, init) for init in INITS},
    **{
        action.__name__: action
        for action in (trained, shrunk, combined, extracted, merged, exported, inspected, forgotten)
    },
}
