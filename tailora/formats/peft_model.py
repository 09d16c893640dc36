"""Adapters of a PEFT model in memory, read before it is taken apart.

The base is read through a shadow: the module tree without PEFT's wrappers, around the same parameters. So everything
is checked while the model is still whole.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailora.core.adapter import Adapter
from tailora.errors import FormatError, TargetError, listing
from tailora.formats.load import restore
from tailora.formats.metadata import Notes
from tailora.formats.peft import PREFIX, StoredAdapter

WRAPPED = ".base_layer"  # what a wrapper puts into the paths below it


@dataclass(frozen=True)
class Live:
    """adapters: name -> what it is here.    active: names; () where PEFT has all adapters switched off."""

    adapters: dict[str, Adapter]
    active: tuple[str, ...]


def read_live(peft_model: Any) -> Live:
    """All adapters of a `peft.PeftModel`, as copies, with their scales as they are now.

    Raises TargetError for what is no PeftModel or is merged; FormatError with all that cannot be taken over.
    """
    _check_is_peft(peft_model)
    model = peft_model.get_base_model()
    layers = _tuner_layers(model)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise TargetError(
            f"adapters are merged at {', '.join(merged[:3])} ({len(merged)} in all); call unmerge_adapter() first"
        )
    adapters, problems = (
        {},
        [
            f"adapter {name!r}: peft_type = {config.peft_type.value!r}; this reads 'LORA'"
            for name, config in peft_model.peft_config.items()
            if config.peft_type != "LORA"
        ],
    )
    shadow = _unwrapped(model)
    for name in () if problems else peft_model.peft_config:
        try:
            adapters[name] = _read(peft_model, name, shadow, layers)
        except FormatError as error:
            problems.append(str(error))
    if problems:
        raise FormatError(f"this PEFT model is not taken over: {listing(problems)}")
    off = any(layer.disable_adapters for layer in layers.values())
    return Live(adapters, () if off else tuple(peft_model.active_adapters))


def release(peft_model: Any) -> nn.Module:
    """The base model without PEFT; its weights are what they are now."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = peft_model.get_base_model()
    originals = {path: each for path, each in inner.named_modules() if isinstance(each, AuxiliaryTrainingWrapper)}
    base: nn.Module = peft_model.unload()
    for path, wrapper in originals.items():  # PEFT leaves the trained copy in their places
        base.set_submodule(path, wrapper.original_module)
    if hasattr(base, "peft_config"):  # older versions leave it
        del base.peft_config
    return base


def _check_is_peft(model: Any) -> None:
    try:
        from peft import PeftModel
    except ImportError:
        raise TargetError("PEFT is not installed, so there is no PEFT model to take over") from None
    if not isinstance(model, PeftModel):
        raise TargetError(f"a {type(model).__name__} is no PeftModel: give what peft.get_peft_model returned")


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> PEFT's layer, where there is one; for a parameter, the path ends in its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            plain = f".{path}".replace(WRAPPED, "").removeprefix(".")
            parameter: Any = getattr(layer, "parameter_name", None)
            found[f"{plain}.{parameter}" if parameter else plain] = layer
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    """The tree without the wrappers: other module objects, the same parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        wrapper: Any = module
        module = wrapper.base_layer if isinstance(module, BaseTunerLayer) else wrapper.original_module
    shadow = copy.copy(module)
    shadow.__dict__["_modules"] = {
        name: None if child is None else _unwrapped(child) for name, child in module._modules.items()
    }
    return shadow


def _read(peft_model: Any, name: str, shadow: nn.Module, layers: Mapping[str, Any]) -> Adapter:
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    stored = StoredAdapter(
        Path(f"adapter {name!r}"),
        dict(_settings(peft_model.peft_config[name])),
        {key.removeprefix(PREFIX): tensor.detach().clone() for key, tensor in tensors.items()},
        Notes(),
    )
    adapter = restore(stored, shadow)
    for path, layer in adapter.low_rank.items():
        theirs = layers[path] if path in layers else layers[path.rpartition(".")[0]]  # parts are scaled together
        scaling = torch.tensor(float(theirs.scaling[name])).to(layer.scaling)
        if scaling != layer.scaling:  # set_scale and scale_layer change it
            layer.scaling = scaling
    return adapter


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """As adapter_config.json has them. A start that moved the base has done so: this base is the moved one."""
    for key, value in config.to_dict().items():
        yield key, True if key == "init_lora_weights" else sorted(value) if isinstance(value, set) else value
