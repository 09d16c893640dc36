"""Migration from PEFT: adapters of a `peft.PeftModel` in memory, and replacements for its methods.

The base is read through a copy of its module tree without PEFT's wrappers, around the same parameters. So everything
is checked before the PEFT model changes; then `release_base` removes its wrappers.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tailora.core.adapter import Adapter
from tailora.errors import AdapterError, FormatError, TargetError, listing
from tailora.formats.load import restore
from tailora.formats.peft import AdapterMetadata, StoredAdapter
from tailora.formats.peft_config import changes_the_base
from tailora.formats.peft_keys import KEY_PREFIX

PEFT_NAMES = {  # attribute of a PeftModel -> its replacement in a LoRAModel
    "peft_config": "adapters (name -> LoRAConfig)",
    "get_base_model": "base_model",
    "active_adapter": "active_adapters",
    "merge_adapter": "merge()",
    "unmerge_adapter": "unmerge()",
    "add_weighted_adapter": "combine({name: weight}, new_name)",
    "get_model_status": "summary()",
    "get_layer_status": "summary()",
    "enable_adapters": "set_adapter(name)",
    "disable_adapters": "set_adapter(None), or `with disable_adapter():`",
    "enable_adapter_layers": "set_adapter(name)",
    "disable_adapter_layers": "set_adapter(None), or `with disable_adapter():`",
}


def check_no_adapter_names(arguments: Mapping[str, Any]) -> None:
    """Raises AdapterError for PEFT's argument of a forward, which many base models would accept and ignore."""
    if "adapter_names" in arguments:
        raise AdapterError(
            "adapter_names is an argument of PEFT; call the model within `with model.adapter_rows(names):`, "
            "with None for PEFT's '__base__'"
        )


def read_peft_model(peft_model: Any) -> tuple[dict[str, Adapter], tuple[str, ...]]:
    """Returns copies of all adapters of a `peft.PeftModel` by name, with their current scales.

    Also returns the names of the active ones; () if all adapters are disabled.
    Raises TargetError if it is not a PeftModel or is merged; FormatError with everything that is not supported.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise TargetError("a PeftModel can only be converted if PEFT is installed: pip install peft") from None
    if not isinstance(peft_model, PeftModel):
        raise TargetError(f"expected a PeftModel from peft.get_peft_model, got {type(peft_model).__name__}")
    model = peft_model.get_base_model()
    layers = _tuner_layers(model)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise TargetError(
            f"adapters are merged at {', '.join(merged[:3])} ({len(merged)} in total); call unmerge_adapter() first"
        )
    problems = [
        f"adapter {name!r}: expected peft_type = 'LORA', got {config.peft_type.value!r}; delete this adapter first"
        for name, config in peft_model.peft_config.items()
        if config.peft_type != "LORA"
    ]
    adapters = {}
    base = _without_wrappers(model)
    for name in () if problems else peft_model.peft_config:
        try:
            adapters[name] = _read_adapter(peft_model, name, base, layers)
        except FormatError as error:
            problems.append(str(error))
    if problems:
        raise FormatError(f"cannot convert this PEFT model: {listing(problems)}")
    disabled = any(layer.disable_adapters for layer in layers.values())
    return adapters, () if disabled else tuple(peft_model.active_adapters)


def release_base(peft_model: Any) -> nn.Module:
    """Removes PEFT from its base model and returns the base. The base's weights do not change."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = peft_model.get_base_model()
    wrappers = {path: module for path, module in inner.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    base: nn.Module = peft_model.unload()
    for path, wrapper in wrappers.items():  # PEFT leaves the trained copy there
        base.set_submodule(path, wrapper.original_module)
    if hasattr(base, "peft_config"):  # older versions of PEFT leave it
        del base.peft_config
    return base


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Returns path in the base -> PEFT's layer. For an adapted parameter, the path ends in the parameter's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for wrapped_path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            path = f".{wrapped_path}".replace(".base_layer", "").removeprefix(".")
            parameter: Any = getattr(layer, "parameter_name", None)
            layers[f"{path}.{parameter}" if parameter else path] = layer
    return layers


def _without_wrappers(module: nn.Module) -> nn.Module:
    """Returns a copy of the module tree without PEFT's wrappers: other module objects, the same parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        wrapper: Any = module
        module = wrapper.base_layer if isinstance(module, BaseTunerLayer) else wrapper.original_module
    clone = copy.copy(module)
    clone.__dict__["_modules"] = {
        name: None if child is None else _without_wrappers(child) for name, child in module._modules.items()
    }
    return clone


def _read_adapter(peft_model: Any, name: str, base: nn.Module, layers: Mapping[str, Any]) -> Adapter:
    from peft import get_peft_model_state_dict

    settings = {  # as in adapter_config.json
        key: sorted(value) if isinstance(value, set) else value
        for key, value in peft_model.peft_config[name].to_dict().items()
    }
    if changes_the_base(settings["init_lora_weights"]):
        settings["init_lora_weights"] = True  # the base has changed already
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    stored = StoredAdapter(
        Path(f"adapter {name!r}"),
        settings,
        {key.removeprefix(KEY_PREFIX): tensor.detach().clone() for key, tensor in tensors.items()},
        AdapterMetadata(),
    )
    adapter = restore(stored, base)
    for path, layer in adapter.low_rank.items():
        # PEFT may adapt a layer by the name of its weight, and has one scale for all parts of a fused layer
        names = (path, f"{path}.weight", path.rpartition(".")[0])
        peft_layer = next(layers[name] for name in names if name in layers)
        scaling = layer.scaling.new_tensor(float(peft_layer.scaling[name]))
        if scaling != layer.scaling:  # set_scale and scale_layer change it
            layer.scaling = scaling
    return adapter
