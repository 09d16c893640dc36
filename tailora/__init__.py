"""tailora: adapt a model with LoRA, know whether it worked, take the adapter anywhere."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailora.core.config import LoRAConfig
    from tailora.core.layer import LoRALayer, loraplus_groups
    from tailora.core.layer_types import register_layer_type, unregister_layer_type
    from tailora.model import LoRAModel

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig",
    "LoRALayer",
    "LoRAModel",
    "__version__",
    "loraplus_groups",
    "register_layer_type",
    "unregister_layer_type",
]

_HOMES = {
    "LoRAConfig": "tailora.core.config",
    "LoRALayer": "tailora.core.layer",
    "LoRAModel": "tailora.model",
    "loraplus_groups": "tailora.core.layer",
    "register_layer_type": "tailora.core.layer_types",
    "unregister_layer_type": "tailora.core.layer_types",
}


def __getattr__(name: str) -> Any:  # PEP 562: `import tailora` loads nothing heavy
    if name not in _HOMES:
        raise AttributeError(f"module 'tailora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
