"""LoRAModel: a base model, the adapters around it, and which of them is active.

    base_model    the user's model: its parameters, state dict and save_pretrained are what they were
    lora_layers   the active adapter's layers, by path: all that is trained

This file ties the core to the files that adapters live in; the work is done in those two rooms.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

import torch
from torch import Tensor, nn

from tailora.core import combine as algebra
from tailora.core import compress as shrinking
from tailora.core.adalora import RankAllocator, settled
from tailora.core.adapter import Adapter, Summary, by_host, check_compatible, create, parts_by_path, register, summarise
from tailora.core.attach import (
    Adapted,
    Substituted,
    Swapped,
    attach,
    become,
    detach,
    encoders_around,
    evaluating,
    fast_path_mixin,
    mixin_for,
)
from tailora.core.compress import Extraction, extract
from tailora.core.config import LoRAConfig
from tailora.core.data_init import Loss, passes, started
from tailora.core.dequantize import Change, Recast, common_dtype, whole_plain
from tailora.core.inference import generating
from tailora.core.init import DATA_STARTS
from tailora.core.layer_types import host_path
from tailora.core.merge import MergeReport, fit_in_place, fold_in_place, folded, moved_in, settle_ties
from tailora.core.mixed_batch import Batch, by_rows, check_names, repeats
from tailora.core.quantization import is_quantized, keep_as_stored, may_repack
from tailora.core.targets import default_config, select
from tailora.errors import AdapterError, ConfigError, FormatError, MergeError, RowsError, TargetError, nearest
from tailora.formats.load import read_any_format, restore
from tailora.formats.peft import write_peft_folder
from tailora.formats.peft_model import read_peft_model, release_base

if TYPE_CHECKING:
    from tailora.formats.export import ExportReport


class LoRAModel(nn.Module):
    """Any `nn.Module` with LoRA adapters. Calls, `generate` and other attributes are the base model's.

    The base is frozen; what trains is `lora_layers.parameters()`. Adapters are added, loaded and switched by name;
    one called `adapter_name` is made from `config` (default: every linear layer but the output head) and is active.

    Raises TargetError when the config names what the model lacks or what cannot be adapted, and when the base
    has adapters already.
    """

    base_model: nn.Module
    lora_layers: nn.ModuleDict

    def __init__(
        self,
        base_model: nn.Module,
        config: LoRAConfig | None = None,
        adapter_name: str = "default",
        *,
        fresh: bool = True,
    ) -> None:
        super().__init__()
        _refuse_adapted(base_model)
        if not isinstance(config, LoRAConfig | None):
            raise ConfigError(f"config is a {type(config).__name__}; take a LoRAConfig, such as LoRAConfig(r=16)")
        config = config or default_config(base_model)
        self._wrap(base_model, adapter_name, create(select(base_model, config), config, fresh=fresh))

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
        _refuse_adapted(base_model)
        adapter = restore(
            read_any_format(Path(folder), base_model), base_model, allow_base_mismatch=allow_base_mismatch
        )
        return cls._around(base_model, adapter_name, adapter)

    @classmethod
    def from_difference(
        cls,
        base_model: nn.Module,
        tuned_model: nn.Module,
        config: LoRAConfig | None = None,
        adapter_name: str = "default",
        *,
        r: int | None = None,
        energy: float | None = None,
    ) -> tuple[Self, Extraction]:
        """The base with the adapter that comes nearest to a fully tuned copy of it; see `core.compress.extract`."""
        _refuse_adapted(base_model)
        _refuse_adapted(tuned_model)
        adapter, report = extract(base_model, tuned_model, r=r, energy=energy, config=config or LoRAConfig())
        return cls._around(base_model, adapter_name, adapter), report

    @classmethod
    def from_peft(cls, peft_model: Any) -> Self:
        """Take over a `peft.PeftModel`: its base, freed of PEFT, with all its LoRA adapters and the active ones.

        The outputs stay the same; `peft_model` is not to be used again. Scales are those that PEFT computes with now.
        A base whose weights PEFT has changed (PiSSA, OLoRA, trained biases) stays as changed. Everything is checked
        before anything changes. Raises TargetError, FormatError with all that cannot be taken over.
        """
        taken = read_peft_model(peft_model)
        base = release_base(peft_model)
        (first, adapter), *others = taken.adapters.items()
        model = cls._around(base, first, adapter)
        for name, adapter in others:
            model._install(name, adapter)
        model.training = base.training
        model.set_adapter(taken.active)
        return model

    @classmethod
    def _around(cls, base_model: nn.Module, name: str, adapter: Adapter) -> Self:
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._wrap(base_model, name, adapter)
        return model

    def _wrap(self, base_model: nn.Module, name: str, adapter: Adapter) -> None:
        """All checks are done: from here on the base changes."""
        self.base_model = base_model
        self.lora_layers = nn.ModuleDict()
        self._adapters: dict[str, Adapter] = {}
        self._active: tuple[str, ...] = ()
        self._hosts: dict[str, str] = {}  # path of an adapter's part -> that of the layer of the base that runs it
        self._attached: dict[str, nn.Module] = {}  # the latter -> layer, for every adapter
        self._registers: dict[str, nn.ModuleDict] = {}  # name -> what lora_layers is while it alone is active
        self._merged: list[Change] = []  # what puts the weights before a merge back
        self._would_repack: list[nn.Module] = []
        self._retie = False
        self._allocated: set[str] = set()  # adapters whose ranks an optimizer moves
        self._waiting = ""  # why the active adapters cannot be trained yet
        self._rows: Batch | None = None  # within adapter_rows
        self._trained_before = {name: p.requires_grad for name, p in _all_parameters(base_model)}
        self._check_new(name)
        base_model.requires_grad_(False)
        self._would_repack = keep_as_stored(base_model)
        self._install(name, adapter)
        self.set_adapter(name)

    # ---- calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._waiting and self.training:
            raise AdapterError(self._waiting)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's own. Within `adapter_rows` all beams and sequences of a prompt have the prompt's adapter."""
        if self._rows is None:
            with generating(self.base_model, self._attached):
                return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]
        with self._rows.generation(repeats(self.base_model, args, kwargs)):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `cuda`, `float`... reach the adapters that are not active, too."""
        if any(isinstance(change, Recast) for change in self._merged):
            raise MergeError("a quantised base cannot move or change its precision while merged; unmerge() first")
        active = {id(module) for module in self.lora_layers.modules()}
        for module in self._parts():
            if id(module) not in active:
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for change in self._merged:
            if not isinstance(change, Recast):
                change.tensor.data = fn(change.tensor.data)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter in [] if self._merged else self._adapters.values():
            for path, layer in adapter.low_rank.items():
                if layer.row_norms is not None:
                    layer.row_norms.refresh(self._attached[self._hosts[path]])
        if self._rows is not None:
            self._rows.epoch += 1
        return self

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

    def adapter(self, name: str = "default") -> Adapter:
        """Settings and layers of one adapter by path: its own, not copies. Raises AdapterError."""
        return self._find(name)

    def add_adapter(self, name: str, config: LoRAConfig) -> None:
        """A fresh adapter beside the others; the active ones stay active. Raises AdapterError, TargetError."""
        self._check_new(name)
        self._check_unmerged("add an adapter")
        self._install(name, create(select(self.base_model, config), config))

    def load_adapter(self, folder: str | Path, name: str = "default", *, allow_base_mismatch: bool = False) -> None:
        """Read an adapter of tailora, PEFT, mlx-lm, Kohya's tools or diffusers; the active adapters stay active.

        Everything is checked before the model changes. Raises FormatError with all missing, unexpected, misshapen
        and non-finite tensors, BaseMismatchError when it was made for another base, AdapterError for a taken name.
        """
        self._check_new(name)
        self._check_unmerged("load an adapter")
        stored = read_any_format(Path(folder), self.base_model)
        self._install(name, restore(stored, self.base_model, allow_base_mismatch=allow_base_mismatch))

    def save_adapter(self, folder: str | Path, name: str = "default") -> Path:
        """Write the PEFT folder, atomically; an adapter not called "default" goes into a subfolder of its name.

        Returns the folder written. The strength dial is not saved; a learned or assigned scale is.
        """
        adapter = self._find(name)
        self._check_unmerged("save an adapter")
        if adapter.waits:
            raise AdapterError(_waiting({name: adapter}))
        if adapter.config.adalora is not None and name not in self._allocated:
            raise AdapterError(f"the ranks of {name!r} were never moved: allocate_ranks(optimizer, steps) and train")
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            raise FormatError(f"adapter name {name!r} cannot name a folder; add it under a plain name")
        target = Path(folder) if name == "default" else Path(folder) / name
        write_peft_folder(target, settled(adapter), self.base_model)
        return target

    @property
    def waits_for_data(self) -> bool:
        """Whether an active adapter starts from data and has not seen any: `start_from_data`."""
        return bool(self._waiting)

    def start_from_data(
        self, batches: Iterable[Any], loss: Loss | None = None, *, name: str = "default", rho: float = 2.0
    ) -> None:
        """Start an adapter of init_lora_weights "lora_ga", "lora_one" or "eva" from a few batches of your data.

        batches: tensors or mappings of the model's arguments, or anything that `loss` takes; all are held in memory.
        loss: (model, batch) -> one number; without it, the `.loss` of the model's output. EVA needs none.
        rho: EVA gives a layer up to rho times its rank, as many ranks in all, written as `rank_pattern`.

        Costs 4 forwards and backwards of every batch (EVA: 3 forwards), in evaluation mode and with no adapter active,
        and the memory of training at rank 2r + 16: full gradients are never held. Call it before making the optimizer.
        Raises AdapterError for another start, DataError where the batches give no loss or do not reach a layer.
        """
        adapter = self._find(name)
        self._check_unmerged("start from data")
        if adapter.config.init_lora_weights not in DATA_STARTS:
            raise AdapterError(
                f"{name!r} starts from {adapter.config.init_lora_weights!r}, which needs no data; "
                f"those that do: {', '.join(DATA_STARTS)}"
            )
        run = passes(self, batches, loss, adapter.config)
        with self.disable_adapter(), evaluating(self):
            fresh = started(adapter, self.base_model, run, rho)
        self._exchange_adapter(name, fresh)

    def allocate_ranks(
        self, optimizer: torch.optim.Optimizer, total_steps: int, *, name: str = "default"
    ) -> RankAllocator:
        """AdaLoRA's one call: from here on the optimizer's steps move the ranks of this adapter.

        total_steps: optimizer steps of the whole training. `save_adapter` writes plain LoRA of the ranks that are
        left. Raises AdapterError without `adalora` in the config, ConfigError where the schedule leaves no steps.
        """
        adapter = self._find(name)
        if adapter.config.adalora is None:
            raise AdapterError(f"{name!r} has fixed ranks: make it with LoRAConfig(adalora=AdaLoRA(target_r=...))")
        allocator = RankAllocator(adapter.low_rank, optimizer, adapter.config.adalora, total_steps)
        self._allocated.add(name)
        return allocator

    def settle_ranks(self, name: str = "default") -> None:
        """After training with AdaLoRA: the adapter becomes plain LoRA of the ranks that are left, as its file is."""
        self._exchange_adapter(name, settled(self._find(name)))

    def _exchange_adapter(self, name: str, adapter: Adapter) -> None:
        self._adapters[name] = adapter
        self._registers[name] = register(parts_by_path([adapter]))
        self.set_adapter(self._active)

    def export(self, folder: str | Path, to: str, name: str = "default", *, tokenizer: Any = None) -> "ExportReport":
        """Write an adapter for others into a new folder: "peft", "portable", "gguf", "mlx" or "merged".

        What was written is read back, and its logits are compared with this model's; where they differ nothing is
        left. `tokenizer` goes with a merged model. Raises as `formats.export.export`.
        """
        from tailora.formats.export import export  # with the formats that only this needs
        from tailora.formats.low_rank_export import ExportSource

        adapter = self._find(name)
        self._check_unmerged("export an adapter")
        return export(ExportSource(settled(adapter), self.base_model, tokenizer), Path(folder), to)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter. If it was active, the others that were stay so."""
        self._find(name)
        self._check_unmerged("delete an adapter")
        self._check_no_rows("delete an adapter")
        self.set_adapter([other for other in self._active if other != name])
        del self._adapters[name], self._registers[name]
        for path in self._attached.keys() - self._hosts_of(self._adapters):
            detach(self._attached.pop(path))

    def set_adapter(self, name: str | Iterable[str] | None) -> None:
        """Make this adapter the active one; several add up; None leaves the plain base."""
        if not isinstance(name, str | Iterable | None):
            raise AdapterError(f"set_adapter takes a name, several names, or None for the plain base; got {name!r}")
        names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name or ()))
        active = {each: self._find(each) for each in names}
        self._check_unmerged("switch adapters")
        self._check_no_rows("switch adapters")
        check_compatible(active)
        parts = parts_by_path(list(active.values()))
        changed = by_host(self._hosts, parts)
        for path in self._hosts_of(self._active) - changed.keys():
            attach(self._attached[path], ())
        for path, chosen in changed.items():
            attach(self._attached[path], chosen)
        self._active = names
        self._waiting = _waiting(active)
        self.lora_layers = self._registers[names[0]] if len(names) == 1 else register(parts)
        if any(part.training != self.training for each in parts.values() for part in each):
            self.lora_layers.train(self.training)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The plain base model within the block."""
        active = self._active
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(active)

    @contextmanager
    def adapter_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, every row of a batch (its first dimension) has the adapter named for it, None for none.

        In training and inference; what was active before is active again afterwards, and `lora_layers` stays what it
        is: `set_adapter` the names first to have all their parameters in it. With gradient checkpointing, call
        backward within the block. In inference the factors are put together once per block, and again when a
        parameter changes in a way that torch counts: not through `.data` in place, and not in torch.inference_mode.

        Raises AdapterError for names that there are none of, MergeError while merged, RowsError within another such
        block; and at the call RowsError where a layer gets another number of rows, or where rows cannot be known.
        """
        chosen = check_names(names, tuple(self._adapters))
        self._check_unmerged("choose adapters by row")
        self._check_no_rows("choose adapters by row")
        used = {name: self._adapters[name] for name in dict.fromkeys(chosen) if name is not None}
        check_compatible(used, by_row=True)
        batch = Batch(chosen, tuple(self._adapters), next(self.base_model.parameters()).device)
        before, waiting = {path: layer.active_adapters for path, layer in self._attached.items()}, self._waiting
        parts = by_rows(batch, self._adapters, self._hosts, self._attached)
        for path, layer in self._attached.items():
            attach(layer, parts.get(path, ()))
        self._rows, self._waiting = batch, _waiting(used)
        try:
            yield
        finally:
            self._rows, self._waiting = None, waiting
            for path, active in before.items():
                attach(self._attached[path], active)  # type: ignore[arg-type]

    def set_scale(self, name: str, strength: float) -> None:
        """Dial one adapter up or down: 1 is as trained, 0 is off. Holds until set again; is merged, not saved."""
        adapter = self._find(name)
        self._check_unmerged("change a strength")
        if not isinstance(strength, SupportsFloat) or not math.isfinite(strength):
            raise ConfigError(f"strength = {strength!r}; take a finite number, 1 is as trained")
        for part in (*adapter.low_rank.values(), *adapter.extras.values()):
            if isinstance(dial := getattr(part, "strength", None), Tensor):
                dial.fill_(strength)
        if self._rows is not None:
            self._rows.epoch += 1

    def _install(self, name: str, adapter: Adapter) -> None:
        self._hosts |= {path: host_path(self.base_model, path) for path in adapter.parts}
        parts = by_host(self._hosts, parts_by_path([adapter]))
        layers = {path: self.base_model.get_submodule(path) for path in parts}
        wanted = {path: mixin_for(each[0]) for path, each in parts.items()}
        if clash := [
            path for path in layers if isinstance(layers[path], Swapped) and not isinstance(layers[path], wanted[path])
        ]:
            raise TargetError(
                f"adapted by one adapter and trained whole by another: {', '.join(clash)}; use two models"
            )
        for path in layers.keys() - self._attached.keys():
            become(layers[path], wanted[path])
        for encoder in encoders_around(self.base_model, layers.values()):
            become(encoder, fast_path_mixin(encoder))
        self._attached |= layers
        self._adapters[name] = adapter
        self._registers[name] = register(parts_by_path([adapter]))

    def _hosts_of(self, names: Iterable[str]) -> set[str]:
        """Paths of the modules that these adapters change."""
        return {self._hosts[path] for name in names for path in self._adapters[name].parts}

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

    # ---- adapters out of adapters

    def combine(
        self,
        weights: Mapping[str, float],
        name: str,
        method: str = "cat",
        *,
        r: int | None = None,
        density: float | None = None,
        drop: float | None = None,
        seed: int | None = None,
    ) -> algebra.Truncation:
        """Add the adapter `name`: the weighted sum of others' updates, strengths included; the active ones stay active.

        method: "cat" is exact and its ranks add up; "svd" is the nearest of rank `r`; "ties" (`density`) and "dare"
        (`drop`, `seed`) thin out the dense updates first. Defaults and sources: `core.combine.Combination`.
        Returns rank and relative error by layer. Raises ConfigError; AdapterError with all that cannot be combined.
        """
        self._check_new(name)
        self._check_unmerged("combine adapters")
        if not isinstance(weights, Mapping):
            raise ConfigError(f"weights = {weights!r}; take a mapping from name to weight, such as {{'legal': 0.7}}")
        how = algebra.Combination(method, r, density, drop, seed)
        sources = {each: self._find(each) for each in weights}
        adapter, report = algebra.combine(sources, weights, self.base_model, how)
        self._install(name, adapter)
        return report

    def shrink(
        self,
        source: str,
        name: str,
        *,
        r: int | None = None,
        energy: float | None = None,
        loss: Callable[[Self], float] | None = None,
        budget: float | None = None,
    ) -> algebra.Truncation:
        """Add the adapter `name`: `source` at a lower rank, by its singular values; the active ones stay active.

        r: highest rank of a layer.    energy: share of the squared singular values to keep in every layer, such as .99.
        loss, budget: `loss(model)` may rise by `budget`; it is called some log2(number of singular values) times while
        `source` (alone, if it is not active) computes with some of them, in the mode that the model is in.
        Returns rank and relative error by layer. Raises ConfigError, AdapterError; DivergedError for a loss that is
        not finite.
        """
        shrinking.check(r, energy, loss, budget)
        adapter = self._find(source)
        self._check_new(name)
        self._check_unmerged("shrink an adapter")
        spectra = shrinking.spectra_of(adapter)
        if loss is None or budget is None:
            ranks = shrinking.ranks_of(adapter, spectra, r, energy)
        else:
            ranks = self._ranks_by_loss(source, spectra, loss, budget)
        smaller, report = shrinking.shrunk(adapter, spectra, ranks, self.base_model)
        self._install(name, smaller)
        return report

    def _ranks_by_loss(
        self, source: str, spectra: shrinking.Spectra, loss: Callable[[Self], float], budget: float
    ) -> dict[str, int]:
        adapter, active = self._adapters[source], self._active

        def measured(ranks: shrinking.Ranks) -> float:
            with shrinking.leading_only(adapter, spectra, ranks):
                return loss(self)

        try:
            self.set_adapter(active if source in active else source)
            return shrinking.ranks_by_loss(spectra, measured, budget)
        finally:
            self.set_adapter(active)

    # ---- merging

    @property
    def is_merged(self) -> bool:
        return bool(self._merged)

    def merge(self, *, untie_weights: bool = False) -> MergeReport:
        """Put the active adapters into the base's weights, keeping the originals for `unmerge`.

        All merged weights are computed and found finite before the first is written. Raises MergeError; also for
        a weight that another layer shares, unless `untie_weights` gives the adapted layer its own.
        Returns the rounding error of every layer relative to its update. A quantised base becomes a plain one as a
        whole: its weights dequantised, its layers of the plain class, its config without a quantization_config.
        """
        return self._merge(untie_weights, in_place=False)

    def _merge(self, untie_weights: bool, *, in_place: bool) -> MergeReport:
        self._check_unmerged("merge")
        self._check_no_rows("merge")
        if not self._active:
            raise MergeError("no adapter is active; set_adapter(name) first")
        layers = {path: layer for path, layer in self._attached.items() if layer.active_adapters}
        adapted = {path: (layer, layer.active_adapters) for path, layer in layers.items() if isinstance(layer, Adapted)}
        others = common_dtype(self.base_model)
        here = fit_in_place(self.base_model, adapted) if in_place else {}
        changes, report = folded({path: each for path, each in adapted.items() if path not in here}, others)
        if quantized := [layer for layer, _ in adapted.values() if is_quantized(layer)]:
            changes += whole_plain(self.base_model, quantized, others)
        made: dict[int, nn.Parameter] = {}
        for layer in layers.values():
            if isinstance(layer, Substituted):
                changes += moved_in(layer, layer.active_adapters[0], made)
        untied = settle_ties(self.base_model, changes, untie_weights)
        for layer, updates in here.values():
            fold_in_place(layer, updates)
        self._merged = [change.make() for change in changes]
        if untied and getattr(self._config(), "tie_word_embeddings", False):
            self._config().tie_word_embeddings, self._retie = False, True
        for layer in layers.values():
            attach(layer, ())
        return report

    def unmerge(self) -> None:
        """The base's weights as they were, bit for bit, and the adapters beside them again."""
        if not self._merged:
            raise MergeError("nothing is merged")
        for change in reversed(self._merged):
            change.make()
        if self._retie:
            self._config().tie_word_embeddings = True
        self._merged, self._retie = [], False
        self.set_adapter(self._active)

    @contextmanager
    def merged(self) -> Iterator[MergeReport]:
        """Merged within the block."""
        report = self.merge()
        try:
            yield report
        finally:
            self.unmerge()

    def merge_and_unload(self, *, untie_weights: bool = False, in_place: bool = False) -> nn.Module:
        """The base model with the active adapters in its weights, and nothing of tailora left.

        in_place: write into the weights themselves where that is possible, without a second copy of them. Whoever else
            holds these tensors sees it, and an interruption leaves some layers merged.
        """
        if not self._merged:
            self._merge(untie_weights, in_place=in_place)
        self._merged = []
        return self._release()

    def unload(self) -> nn.Module:
        """The base model as it came: classes, weights and requires_grad."""
        if self._merged:
            self.unmerge()
        return self._release()

    def _release(self) -> nn.Module:
        self._check_no_rows("unload")
        for module in self.base_model.modules():
            detach(module)
        may_repack(self._would_repack)
        for name, parameter in _all_parameters(self.base_model):
            parameter.requires_grad = self._trained_before[name]
        self._adapters, self._active, self._attached, self._registers = {}, (), {}, {}
        self.lora_layers = nn.ModuleDict()
        return self.base_model

    def _config(self) -> Any:
        return getattr(self.base_model, "config", None)

    def _check_unmerged(self, action: str) -> None:
        if self._merged:
            raise MergeError(f"cannot {action} while merged; unmerge() first")

    def _check_no_rows(self, action: str) -> None:
        if self._rows is not None:
            raise RowsError(f"cannot {action} within adapter_rows; leave its block first")

    def summary(self) -> Summary:
        """Path, kind, shape, r, alpha and parameters of what the active adapters adapt."""
        return summarise(self.base_model, [self._adapters[name] for name in self._active])


def _waiting(adapters: Mapping[str, Adapter]) -> str:
    """Why the first of these that has no start yet cannot be trained or saved, or ""."""
    reasons = (
        f"adapter {name!r} starts from data (init_lora_weights={adapter.config.init_lora_weights!r}): "
        "start_from_data(batches) first"
        for name, adapter in adapters.items()
        if adapter.waits
    )
    return next(reasons, "")


def _refuse_adapted(base_model: Any) -> None:
    if not isinstance(base_model, nn.Module):
        loaded = "; load it first: AutoModelForCausalLM.from_pretrained(...)" if isinstance(base_model, str) else ""
        raise TargetError(f"base_model is a {type(base_model).__name__}, not a torch.nn.Module{loaded}")
    if isinstance(base_model, LoRAModel) or any(isinstance(module, Swapped) for module in base_model.modules()):
        raise TargetError("this model has tailora adapters already; use its add_adapter, or unload() it first")
    if hasattr(base_model, "peft_config"):
        raise TargetError("this model carries PEFT adapters; unload or merge them first")


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Tied ones under each of their names, since a merge may untie them."""
    return model.named_parameters(remove_duplicate=False)


def from_peft(peft_model: Any) -> LoRAModel:
    """`LoRAModel.from_peft`."""
    return LoRAModel.from_peft(peft_model)
