"""LoRAModel: a base model, the adapters around it, and which of them is active.

    base_model    the user's model: its parameters, state dict and save_pretrained are what they were
    lora_layers   the active adapter's layers, by path: all that is trained

This file ties the core to the files that adapters live in; the work is done in those two rooms.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, create
from tailora.core.attach import (
    Adapted,
    Substituted,
    Swapped,
    attach,
    close_fast_path,
    detach,
    encoders_around,
)
from tailora.core.config import LoRAConfig
from tailora.core.merge import MergeReport, folded, tied, untie
from tailora.core.summary import Summary, summarise
from tailora.core.targets import default_config, select
from tailora.errors import AdapterError, FormatError, MergeError, TargetError, nearest
from tailora.formats.peft import read_adapter, write_adapter
from tailora.formats.restore import restore


class LoRAModel(nn.Module):
    """Any `nn.Module` with LoRA adapters. Calls, `generate` and other attributes are the base model's.

    The base is frozen; what trains is `lora_layers.parameters()`. Adapters are added, loaded and switched by name;
    one called `adapter_name` is made from `config` (default: every linear layer but the output head) and is active.

    Raises TargetError when the config names what the model lacks or what cannot be adapted, and when the base
    has adapters already.
    """

    base_model: nn.Module
    lora_layers: nn.ModuleDict

    def __init__(self, base_model: nn.Module, config: LoRAConfig | None = None, adapter_name: str = "default") -> None:
        super().__init__()
        self._wrap(base_model)
        try:
            self.add_adapter(adapter_name, config or default_config(base_model))
        except Exception:
            self.unload()
            raise
        self.set_adapter(adapter_name)

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        folder: str | Path,
        adapter_name: str = "default",
        *,
        allow_base_mismatch: bool = False,
    ) -> Self:
        """The base with the adapter of `folder` active. Raises as `load_adapter`."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._wrap(base_model)
        try:
            model.load_adapter(folder, adapter_name, allow_base_mismatch=allow_base_mismatch)
        except Exception:
            model.unload()
            raise
        model.set_adapter(adapter_name)
        return model

    def _wrap(self, base_model: nn.Module) -> None:
        if any(isinstance(module, Swapped) for module in base_model.modules()):
            raise TargetError("this model has tailora adapters already; use add_adapter, or unload() the other first")
        if hasattr(base_model, "peft_config"):
            raise TargetError("this model carries PEFT adapters; unload or merge them first")
        self.base_model = base_model
        self.lora_layers = nn.ModuleDict()
        self._adapters: dict[str, Adapter] = {}
        self._active: tuple[str, ...] = ()
        self._originals: dict[str, Tensor] = {}  # weights before a merge
        self._trained_before = [parameter.requires_grad for parameter in base_model.parameters()]
        base_model.requires_grad_(False)

    # ---- calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `cuda`, `float`... reach the adapters that are not active, too."""
        active = {id(module) for module in self.lora_layers.modules()}
        for module in self._parts():
            if id(module) not in active:
                module._apply(fn, recurse)
        self._originals = {path: fn(weight) for path, weight in self._originals.items()}
        return super()._apply(fn, recurse)

    def _parts(self) -> Iterator[nn.Module]:
        return (part for adapter in self._adapters.values() for part in adapter.parts.values())

    # ---- adapters by name

    @property
    def adapters(self) -> dict[str, LoRAConfig]:
        """Name -> config of every adapter, active or not."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def active_adapters(self) -> tuple[str, ...]:
        return self._active

    def add_adapter(self, name: str, config: LoRAConfig) -> None:
        """A fresh adapter beside the others; the active ones stay active. Raises AdapterError, TargetError."""
        self._check_new(name)
        self._check_unmerged("add an adapter")
        self._install(name, create(select(self.base_model, config), config))

    def load_adapter(self, folder: str | Path, name: str = "default", *, allow_base_mismatch: bool = False) -> None:
        """Read an adapter folder of tailora or PEFT; the active adapters stay active.

        Everything is checked before the model changes. Raises FormatError with all missing, unexpected, misshapen
        and non-finite tensors, BaseMismatchError when it was made for another base, AdapterError for a taken name.
        """
        self._check_new(name)
        self._check_unmerged("load an adapter")
        stored = read_adapter(Path(folder))
        self._install(name, restore(stored, self.base_model, allow_base_mismatch=allow_base_mismatch))

    def save_adapter(self, folder: str | Path, name: str = "default") -> Path:
        """Write the PEFT folder, atomically; an adapter not called "default" goes into a subfolder of its name.

        Returns the folder written. The strength dial is not saved; a learned or assigned scale is.
        """
        adapter = self._find(name)
        self._check_unmerged("save an adapter")
        if name in (".", "..") or Path(name).name != name:
            raise FormatError(f"adapter name {name!r} cannot name a folder; add it under a plain name")
        target = Path(folder) if name == "default" else Path(folder) / name
        write_adapter(target, adapter, self.base_model)
        return target

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter. If it was active, the others that were stay so."""
        self._find(name)
        self._check_unmerged("delete an adapter")
        self.set_adapter([other for other in self._active if other != name])
        gone = self._adapters.pop(name).parts
        for path in gone.keys() - {path for adapter in self._adapters.values() for path in adapter.parts}:
            detach(self.base_model.get_submodule(path))

    def set_adapter(self, name: str | Iterable[str] | None) -> None:
        """Make this adapter the active one; several add up; None leaves the plain base."""
        names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name or ()))
        active = [self._find(each) for each in names]
        self._check_unmerged("switch adapters")
        for path in {path for adapter in self._adapters.values() for path in adapter.parts}:
            parts = tuple(adapter.parts[path] for adapter in active if path in adapter.parts)
            self._layer(path).__dict__["active_adapters"] = parts
        self._active = names
        self.lora_layers = _registered(active).train(self.training)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The plain base model within the block."""
        active = self._active
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(active)

    def set_scale(self, name: str, strength: float) -> None:
        """Dial one adapter up or down: 1 is as trained, 0 is off. Holds until set again; is merged, not saved."""
        for layer in self._find(name).low_rank.values():
            layer.strength.fill_(strength)

    def _install(self, name: str, adapter: Adapter) -> None:
        for path in adapter.low_rank:
            self._attach(path, Adapted)
        for path in adapter.saved:
            self._attach(path, Substituted)
        for encoder in encoders_around(self.base_model, map(self._layer, adapter.parts)):
            close_fast_path(encoder)
        self._adapters[name] = adapter

    def _attach(self, path: str, mixin: type[Swapped]) -> None:
        layer = self._layer(path)
        if not isinstance(layer, Swapped):
            attach(layer, (), mixin)
        elif not isinstance(layer, mixin):
            raise TargetError(f"{path} is adapted by one adapter and trained whole by another; use two models")

    def _layer(self, path: str) -> nn.Module:
        return self.base_model.get_submodule(path)

    def _find(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise AdapterError(
                f"no adapter is called {name!r}; there are: {', '.join(self._adapters) or 'none'}"
                f"{nearest(name, self._adapters)}"
            )
        return self._adapters[name]

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a non-empty string; got {name!r}")
        if name in self._adapters:
            raise AdapterError(f"an adapter is called {name!r} already; delete_adapter({name!r}) or take another name")

    # ---- merging

    @property
    def is_merged(self) -> bool:
        return bool(self._originals)

    def merge(self, *, untie_weights: bool = False) -> MergeReport:
        """Fold the active adapters into the base's weights, keeping the originals for `unmerge`.

        All merged weights are computed and found finite before the first is written. Raises MergeError; also for
        a weight that another layer shares, unless `untie_weights` gives the adapted layer its own.
        Returns the rounding error of every layer relative to its update.
        """
        self._check_unmerged("merge")
        layers = {path: (self._layer(path), parts) for path, parts in self._active_low_rank().items()}
        if not layers and not any(self._adapters[name].saved for name in self._active):
            raise MergeError("no adapter is active; set_adapter(name) first")
        self._settle_ties({path: layer for path, (layer, _) in layers.items()}, untie_weights)
        weights, report = folded(layers)
        for path, (layer, _) in layers.items():
            weight: Any = layer.weight
            self._originals[path] = weight.data
            weight.data = weights[path]
            layer.__dict__["active_adapters"] = ()
        return report

    def unmerge(self) -> None:
        """The base's weights as they were, bit for bit, and the adapters beside them again."""
        if not self._originals:
            raise MergeError("nothing is merged")
        for path, original in self._originals.items():
            weight: Any = self._layer(path).weight
            weight.data = original
        self._originals = {}
        self.set_adapter(self._active)

    @contextmanager
    def merged(self) -> Iterator[MergeReport]:
        """Merged within the block."""
        report = self.merge()
        try:
            yield report
        finally:
            self.unmerge()

    def merge_and_unload(self, *, untie_weights: bool = False) -> nn.Module:
        """The base model with the active adapters in its weights, and nothing of tailora left."""
        if not self._originals:
            self.merge(untie_weights=untie_weights)
        for name in self._active:
            for path, module in self._adapters[name].saved.items():
                self._layer(path).load_state_dict(module.state_dict())
        self._originals = {}
        return self._release()

    def unload(self) -> nn.Module:
        """The base model as it came: classes, weights and requires_grad."""
        if self._originals:
            self.unmerge()
        return self._release()

    def _release(self) -> nn.Module:
        for module in self.base_model.modules():
            detach(module)
        for parameter, trained in zip(self.base_model.parameters(), self._trained_before, strict=False):
            parameter.requires_grad = trained
        self._adapters, self._active, self.lora_layers = {}, (), nn.ModuleDict()
        return self.base_model

    def _active_low_rank(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name in self._active:
            for path, layer in self._adapters[name].low_rank.items():
                found.setdefault(path, []).append(layer)
        return found

    def _settle_ties(self, layers: dict[str, nn.Module], untie_weights: bool) -> None:
        shared = tied(self.base_model, layers)
        if shared and not untie_weights:
            pairs = ", ".join(f"{path} = {' = '.join(others)}" for path, others in shared.items())
            raise MergeError(
                f"merging would change a weight that another layer shares ({pairs}); pass untie_weights=True"
            )
        for path in shared:
            untie(layers[path])
        config = getattr(self.base_model, "config", None)
        if shared and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]

    def _check_unmerged(self, action: str) -> None:
        if self._originals:
            raise MergeError(f"cannot {action} while merged; unmerge() first")

    def summary(self) -> Summary:
        """Path, kind, shape, r, alpha and parameters of what the active adapters adapt."""
        return summarise(self.base_model, [self._adapters[name] for name in self._active])


def layer_key(path: str) -> str:
    """The key of a base layer in `lora_layers`: its path with / for the dots, which ModuleDict does not take."""
    key = path.replace(".", "/")
    return f"/{key}" if not key or hasattr(nn.ModuleDict, key) else key


def _registered(active: list[Adapter]) -> nn.ModuleDict:
    """One entry per adapted layer: its part, or the list of its parts when several adapters are active."""
    found: dict[str, list[nn.Module]] = {}
    for adapter in active:
        for path, part in adapter.parts.items():
            found.setdefault(layer_key(path), []).append(part)
    return nn.ModuleDict({key: parts[0] if len(parts) == 1 else nn.ModuleList(parts) for key, parts in found.items()})
