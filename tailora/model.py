"""LoRAModel: a base model with adapters.

    base_model    the user's model, with its parameters, state dict and save_pretrained unchanged
    lora_layers   the parts of the active adapters, by path; contains everything that is trained
An `AdapterSet` contains the adapters and tracks which ones are active; a `MergeState` tracks whether they are merged.
Each method checks that both allow the operation and calls the function of `core` or `formats` that implements it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn

from tailora.core import compress, data_init
from tailora.core.adapter import Adapter, Summary, create, summarize
from tailora.core.adapter_set import AdapterSet, check_base
from tailora.core.attach import evaluating
from tailora.core.combine import Combination, Truncation, combine_adapters
from tailora.core.config import LoRAConfig
from tailora.core.merge import MergeReport, MergeState
from tailora.core.targets import select
from tailora.errors import AdapterError, ConfigError
from tailora.formats.fingerprint import LayerFingerprint
from tailora.formats.fold_scale import ExportSource
from tailora.formats.load import LoadOptions, load
from tailora.formats.peft import write_peft_folder
from tailora.formats.run_folder import ADAPTER_CONFIG
from tailora.formats.upload import UPLOAD_OPTIONS, make_public, upload

if TYPE_CHECKING:
    from tailora.formats.export import ExportReport
    from tailora.formats.serving_targets import ServingExport, ServingSettings

TRAINER = (
    "trainers of transformers and TRL would not save a LoRAModel as an adapter; wrap the trainer's class with "
    "tailora.train.huggingface.adapting: adapting(Trainer)(model=lora_model, ...)"
)
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


class LoRAModel(nn.Module):
    """An `nn.Module` with LoRA adapters. Calls, `generate` and other attributes are forwarded to the base model.

    The base model is frozen; train `lora_layers.parameters()`. Adapters have names. The first one, `adapter_name`, is
    created from `config` (default: adapts every linear layer except the output head) and is active.
    Raises TargetError if the config names layers that are missing or cannot be adapted, or if the base already has
    adapters.
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
        check_base(base_model)
        selection = select(base_model, LoRAConfig() if config is None else config, fit=True)
        self._wrap(base_model, {adapter_name: create(selection, fresh=fresh)})

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module, folder: str | Path, adapter_name: str = "default", **options: Unpack[LoadOptions]
    ) -> Self:
        """Returns the base model with the adapter in `folder` active. For options and errors, see `load_adapter`.

        transformers loads models in evaluation mode, and the adapter gets the same mode: call `train()` before you
        train it.
        """
        check_base(base_model)
        adapter = load(folder, base_model, **options)
        model = cls.__new__(cls)._wrap(base_model, {adapter_name: adapter})
        model.training = base_model.training and options.get("is_trainable", True)
        model.lora_layers.train(model.training)
        return model

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
    ) -> tuple[Self, compress.Extraction]:
        """Returns the base model with the adapter that best approximates `tuned_model`; see `compress.extract`."""
        check_base(base_model)
        check_base(tuned_model)
        adapter, report = compress.extract(base_model, tuned_model, r=r, energy=energy, config=config or LoRAConfig())
        return cls.__new__(cls)._wrap(base_model, {adapter_name: adapter}), report

    def _wrap(self, base_model: nn.Module, adapters: Mapping[str, Adapter]) -> Self:
        """Freezes the base model and attaches adapters that fit it. The first one is active."""
        super().__init__()
        self._adapter_set = AdapterSet(base_model, adapters)
        self._merge_state = MergeState(base_model)
        self.base_model = base_model
        self.set_adapter(next(iter(adapters)))
        return self

    # ---- Calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_no_adapter_names(kwargs)
        with self.forward_context():
            return self.base_model(*args, **kwargs)

    def forward_context(self) -> AbstractContextManager[None]:
        """Returns the context of a forward pass, also for code that calls parts of the base directly.

        Raises AdapterError if an active adapter cannot be trained yet. The first training forward pass warns about
        layers that it does not call.
        """
        if self.training and self._adapter_set.training_obstacle:
            raise AdapterError(self._adapter_set.training_obstacle)
        is_watched = self.training and not torch.compiler.is_compiling()
        return self._adapter_set.first_forward() if is_watched else nullcontext()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base's `generate`. Within `adapter_rows`, all beams and sequences of a prompt use its adapter."""
        check_no_adapter_names(kwargs)
        with self._adapter_set.generation(args, kwargs):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base's method. Raises AdapterError if an adapter's tensors depend on the size of the embeddings."""
        base: Any = self.base_model
        self._adapter_set.check_not_adapted((base.get_input_embeddings(), base.get_output_embeddings()), "resize")
        return base.resize_token_embeddings(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        if name in PEFT_NAMES:
            raise AttributeError(f"LoRAModel does not have PEFT's {name}; use {PEFT_NAMES[name]}")
        if name == "accepts_loss_kwargs":  # only transformers' Trainer reads it, first of all
            raise ConfigError(TRAINER)
        return getattr(self.base_model, name)

    def __repr__(self) -> str:
        names = ", ".join(f"{name!r}{' (active)' * (name in self.active_adapters)}" for name in self.adapters)
        layers = f"{type(self.base_model).__name__}, {len(self.lora_layers)} layers adapted"
        return f"LoRAModel({layers}, adapters: {names or 'none'}; summary() lists the layers)"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Extends `to`, `cuda`, `float`, ... to inactive adapters and to the original weights kept by a merge."""
        self._merge_state.apply(fn)
        self._adapter_set.apply_to_inactive(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.is_merged:
            self._adapter_set.measure_row_norms()
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the numbers of trainable parameters and of all parameters, as if nothing were quantized."""
        trained = sum(parameter.numel() for parameter in self.lora_layers.parameters() if parameter.requires_grad)
        return trained, self.summary().total_parameters

    def print_trainable_parameters(self) -> None:
        """Prints the numbers of trainable and of all parameters, and their ratio, in PEFT's format."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def summary(self) -> Summary:
        """Returns path, layer type, shape, r, alpha and number of parameters for each adapted layer."""
        return summarize(self.base_model, [self._adapter_set[name] for name in self.active_adapters])

    # ---- Adapters by name

    @property
    def adapters(self) -> dict[str, LoRAConfig]:
        """The config of each adapter by name, whether the adapter is active or not."""
        return {name: adapter.config for name, adapter in self._adapter_set.adapters.items()}

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the active adapters."""
        return self._adapter_set.active

    def adapter(self, name: str = "default") -> Adapter:
        """Returns an adapter: its config and its layers by path (not copies). Raises AdapterError."""
        return self._adapter_set[name]

    def add_adapter(self, name: str, config: LoRAConfig) -> None:
        """Adds a new adapter without activating it. Raises AdapterError, TargetError."""
        self._adapter_set.check_new(name)
        self._merge_state.check_unmerged("add an adapter")
        self._adapter_set.add(name, create(select(self.base_model, config, fit=True)))

    def load_adapter(self, folder: str | Path, name: str = "default", **options: Unpack[LoadOptions]) -> None:
        """Adds an adapter written by tailora, PEFT, mlx-lm, Kohya's tools or diffusers, without activating it.

        folder: a folder or file; if it does not exist, "owner/name" on the Hub.
        options: revision, token and subfolder of a repository; is_trainable=False freezes the adapter;
            allow_base_mismatch=True loads an adapter for a different base model. See `LoadOptions`.
        Everything is checked before the model changes. Raises FormatError with all missing, unexpected, misshapen
        and non-finite tensors, BaseMismatchError for a different base model, AdapterError if the name exists, and
        FetchError if the Hub has no such adapter or cannot be reached.
        """
        self._adapter_set.check_new(name)
        self._merge_state.check_unmerged("load an adapter")
        self._adapter_set.add(name, load(folder, self.base_model, **options))

    def save_adapter(
        self, folder: str | Path, name: str = "default", *, base: Mapping[str, LayerFingerprint] | None = None
    ) -> Path:
        """Writes a PEFT folder atomically; an adapter with a name other than "default" gets a subfolder.

        base: the adapter's `formats.peft.base_fingerprint`; computed from the base model by default.
        Returns the folder of the adapter. Saves learned and assigned scales, but not the strength (`set_scale`).
        """
        adapter = self._adapter_set[name]
        self._merge_state.check_unmerged("save an adapter")
        adapter.check_can_be_saved(name)
        target = Path(folder) if name == "default" else Path(folder) / name
        write_peft_folder(target, adapter, self.base_model, base)
        return target

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
    ) -> None:
        """Saves the selected adapters (default: all) with `save_adapter`, like PEFT's method of the same name.

        To save the base model, use `base_model.save_pretrained`. Does nothing unless `is_main_process`. Raises
        ConfigError for safe_serialization=False, because adapters are never pickled, and the errors of `save_adapter`.
        """
        if not safe_serialization:
            raise ConfigError("adapters are only written as safetensors; remove safe_serialization=False")
        names = [*self.adapters] if selected_adapters is None else selected_adapters
        if not names:
            raise AdapterError("no adapter to save; to save the base model, use base_model.save_pretrained")
        self._merge_state.check_unmerged("save an adapter")
        for name in names:
            self.adapter(name).check_can_be_saved(name)
        for name in names if is_main_process else ():
            self.save_adapter(save_directory, name)

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] = (), **options: Any) -> str:
        """Uploads the files of `save_pretrained` to a repository on the Hub; returns the URL of the commit.

        If the base model is a local folder, only the folder's name is uploaded, not its path.
        options: private, token, revision, create_pr, commit_message, commit_description, as in transformers, and the
        options of `save_pretrained`.
        Does nothing and returns "" unless `is_main_process`. Raises WriteError if the Hub rejects the files.
        """
        of_upload = {name: options.pop(name) for name in UPLOAD_OPTIONS & options.keys()}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            if not options.get("is_main_process", True):
                return ""
            for config in Path(folder).rglob(ADAPTER_CONFIG):
                make_public(config.parent)
            return str(upload(Path(folder), repo_id, tags=tags, **of_upload).commit)

    def export(
        self, folder: str | Path, to: str, name: str = "default", *, tokenizer: Any = None, overwrite: bool = False
    ) -> "ExportReport":
        """Writes an adapter for other tools into a new folder.

        to: "peft", "portable", "gguf", "mlx", "merged" or, for models of diffusers, "diffusers".
        tokenizer: saved with a merged model.
        overwrite: replace the folder of an earlier export.
        The files are read back and compared with this model. If the results differ, the files are deleted.
        """
        from tailora.formats.export import export  # imported here because nothing else needs these formats

        return export(self._export_source(name, tokenizer), Path(folder), to, overwrite=overwrite)

    def export_for(
        self,
        folder: str | Path,
        target: str,
        name: str = "default",
        *,
        settings: "ServingSettings | None" = None,
        tokenizer: Any = None,
        overwrite: bool = False,
    ) -> "ServingExport":
        """Exports an adapter for a server ("vllm", "llama-server", "ollama", "mlx"), with a script that starts it.

        An adapter that the server cannot load is merged into the base model. Everything else is as in `export`.
        """
        from tailora.formats.serving_targets import ServingSettings, export_for

        source = self._export_source(name, tokenizer)
        return export_for(source, Path(folder), target, settings or ServingSettings(), overwrite=overwrite)

    def _export_source(self, name: str, tokenizer: Any) -> ExportSource:
        self._merge_state.check_unmerged("export an adapter")
        return ExportSource(self.adapter(name), self.base_model, tokenizer)

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter. Other active adapters stay active."""
        self._merge_state.check_unmerged("delete an adapter")
        self._adapter_set.check_no_batch("delete an adapter")
        self.set_adapter([active for active in self.active_adapters if active != name])
        self._adapter_set.remove(name)

    def set_adapter(self, name: str | Iterable[str] | None) -> None:
        """Activates one adapter, or several adapters, whose updates are summed. None deactivates all adapters."""
        self._merge_state.check_unmerged("switch adapters")
        self.lora_layers = self._adapter_set.activate(name, self.training)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within the block, no adapter is active."""
        return self._activated(None)

    @contextmanager
    def _activated(self, name: str | Iterable[str] | None) -> Iterator[None]:
        active = self.active_adapters
        self.set_adapter(name)
        try:
            yield
        finally:
            self.set_adapter(active)

    def adapter_rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Within the block, each batch row (first dimension) uses the adapter listed for it; None means no adapter.

        Works for training and inference; afterwards, the previous adapters are active again. `lora_layers` does not
        change. To train all these adapters, first call `set_adapter` with all their names. With gradient checkpointing,
        call backward within the block. For inference, the factors are cached within the block until torch registers a
        change of a parameter. torch does not register in-place changes of `.data`, or changes in torch.inference_mode.
        If a layer gets the tokens of all rows in one dimension, as shared experts do, the first forward pass calls the
        base model once more to see whether they are in order, and hooks on its layers see that call.
        Raises AdapterError for unknown names, and MergeError while merged. Raises RowsError within another such block,
        or if a layer gets a different number of rows or cannot separate the rows.
        """
        self._merge_state.check_unmerged("choose adapters by row")
        return self._adapter_set.activated_by_row(names)

    def set_scale(self, name: str, strength: float) -> None:
        """Sets the strength of an adapter's updates: 1 is as trained, 0 is off. Merging uses it, but it is not saved.

        Modules trained in full (`modules_to_save`) keep their full strength.
        """
        self._merge_state.check_unmerged("change a strength")
        self._adapter_set.set_strength(name, strength)

    # ---- Initial values from data

    @property
    def waits_for_data(self) -> bool:
        """True if an active adapter needs `start_from_data` before training."""
        return bool(self._adapter_set.training_obstacle)

    def start_from_data(
        self, batches: Iterable[Any], loss: data_init.Loss | None = None, *, name: str = "default", rho: float = 2.0
    ) -> None:
        """Initializes an adapter with init_lora_weights "eva" from a few batches of your data.

        batches: tensors or mappings of the model's arguments, or arguments of `loss`; all are kept in memory.
        loss: a function that calls the model on a batch of any other type; its result is ignored.
        rho: a layer can get up to rho times its rank, with the total unchanged; the ranks go into `rank_pattern`.
        Runs 3 forward passes per batch, in evaluation mode without adapters. Call it before creating the optimizer.
        Raises AdapterError for a different init, DataError if the inputs of a layer do not vary.
        """
        adapter = self._adapter_set[name]
        self._merge_state.check_unmerged("start from data")
        run = data_init.passes(self, batches, loss, name, adapter.config)
        with self.disable_adapter(), evaluating(self):
            initialized = data_init.start_from_data(adapter, self.base_model, run, rho)
        self._adapter_set.replace(name, initialized)
        self.set_adapter(self.active_adapters)

    # ---- New adapters from existing ones

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
    ) -> Truncation:
        """Adds the adapter `name`: the weighted sum of other adapters' updates, including their strengths.

        method: "cat" is exact, and its ranks add up; "svd" is the best approximation of rank `r`; "ties" (`density`)
        and "dare" (`drop`, `seed`) drop entries of the dense updates first. Defaults: `core.combine.Combination`.
        The active adapters stay active. Returns rank and relative error by layer. Raises ConfigError, or AdapterError
        listing everything that cannot be combined.
        """
        self._adapter_set.check_new(name)
        self._merge_state.check_unmerged("combine adapters")
        settings = Combination(method=method, r=r, density=density, drop=drop, seed=seed)
        adapter, report = combine_adapters(self.adapter, weights, self.base_model, settings)
        self._adapter_set.add(name, adapter)
        return report

    def shrink(
        self,
        source: str,
        name: str,
        *,
        r: int | None = None,
        energy: float | None = None,
    ) -> Truncation:
        """Adds the adapter `name`: `source` reduced to a lower rank, with its largest singular values.

        r: maximum rank per layer.
        energy: share of the squared singular values to keep in each layer, such as 0.99.
        Returns rank and error by layer. Raises ConfigError, AdapterError.
        """
        compress.check(r, energy)
        self._adapter_set.check_new(name)
        self._merge_state.check_unmerged("shrink an adapter")
        smaller, report = compress.shrink(self.adapter(source), self.base_model, r, energy)
        self._adapter_set.add(name, smaller)
        return report

    # ---- Merging

    @property
    def is_merged(self) -> bool:
        """True while the active adapters are merged into the base model's weights."""
        return self._merge_state.is_merged

    def merge(self, *, untie_weights: bool = False) -> MergeReport:
        """Merges the active adapters into the base model's weights, keeping the originals for `unmerge`.

        All merged weights are computed and checked to be finite before any weight is written. A quantized base is
        fully dequantized. Raises MergeError, for example if several layers share a weight; `untie_weights` gives the
        adapted layer its own copy instead. Returns the rounding error of each layer relative to its update.
        """
        self._adapter_set.check_no_batch("merge")
        return self._merge_state.merge(self._adapter_set.layers, untie_weights=untie_weights)

    def unmerge(self) -> None:
        """Restores the base model's weights bit for bit and activates the adapters again."""
        self._merge_state.unmerge()
        self.set_adapter(self.active_adapters)

    @contextmanager
    def merged(self) -> Iterator[MergeReport]:
        """Within the block, the active adapters are merged."""
        report = self.merge()
        try:
            yield report
        finally:
            self.unmerge()

    def merge_and_unload(self, *, untie_weights: bool = False, in_place: bool = False) -> nn.Module:
        """Returns the base model with the active adapters merged into its weights, in its original classes.

        in_place: modify the weights in place where possible, to avoid a second copy. Other references to these tensors
            see the change, and an interruption leaves some layers merged.
        """
        self._adapter_set.check_no_batch("merge")
        if not self.is_merged:
            self._merge_state.merge(self._adapter_set.layers, untie_weights=untie_weights, in_place=in_place)
        self._merge_state = MergeState(self.base_model)  # without the original weights
        return self.unload()

    def unload(self) -> nn.Module:
        """Returns the base model in its original state: classes, weights and requires_grad."""
        if self.is_merged:
            self.unmerge()
        self._adapter_set.check_no_batch("unload")
        self._adapter_set.clear()
        self.lora_layers = nn.ModuleDict()
        return self.base_model


def check_no_adapter_names(arguments: Mapping[str, Any]) -> None:
    """Raises AdapterError for PEFT's argument of a forward, which many base models would accept and ignore."""
    if "adapter_names" in arguments:
        raise AdapterError(
            "adapter_names is an argument of PEFT; call the model within `with model.adapter_rows(names):`, "
            "with None for PEFT's '__base__'"
        )
