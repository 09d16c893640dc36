"""Exports an adapter: writes a temporary folder, reads it back, compares it with the live model, then renames it.

    peft       the folder that tailora, PEFT and most of the ecosystem read
    portable   a PEFT folder for servers that ignore many of its settings: vLLM, SGLang, LMDeploy
    gguf       llama.cpp and Ollama: gguf.py
    mlx        mlx-lm: mlx.py
    diffusers  pipelines of diffusers: kohya_diffusers.py
    merged     a Hugging Face folder of the full model, without an adapter

fold_scale.py puts the scale into B.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, group_by_path
from tailora.core.attach import Change, Swapped, attached, evaluating
from tailora.core.device import wide_dtype
from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, layer_path_of
from tailora.core.merge import MergeState
from tailora.core.quantization import common_dtype, dequantize_to_linear, quantized_layers, storage_of
from tailora.errors import ConfigError, FormatError, MergeError, nearest
from tailora.formats import fold_scale, gguf, kohya_diffusers, mlx, peft
from tailora.formats.fingerprint import fingerprint, vocabulary_size
from tailora.formats.fold_scale import ExportSource
from tailora.formats.io import replace_folder
from tailora.formats.load import restore
from tailora.formats.peft_config import to_peft_config
from tailora.formats.peft_keys import EMBEDDING_SUFFIXES, SUFFIXES, peft_layers
from tailora.formats.run_folder import DIFFUSERS_WEIGHTS, EXPORTED_FILES, check_result_folder
from tailora.patches import attention_of


@dataclass(frozen=True)
class ExportReport:
    folder: Path
    format: str
    files: dict[str, int]  # name -> size in bytes
    changes: list[str]  # what differs from the adapter as trained, in words
    logits: "LogitComparison"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def export(
    source: ExportSource,
    folder: Path,
    to: str,
    *,
    overwrite: bool = False,
    write_more: Callable[[Path], None] = lambda _: None,
) -> ExportReport:
    """Writes a new `folder` completely or not at all, after reading it back and comparing its logits with the model's.

    Of models of diffusers, whose inputs differ, the updates are compared instead.
    overwrite: as in `run_folder.check_result_folder`.
    write_more: writes other files into the folder.
    Raises ConfigError for an unknown format or a folder that is not empty, FormatError with everything that the format
    does not support and for a difference above the tolerance, MergeError, WriteError.
    """
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; available: {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    check_result_folder(folder, EXPORTED_FILES, overwrite=overwrite)
    export_format = FORMATS[to]
    fold_scale.raise_problems(f"cannot export this adapter to {to}", export_format.problems(source))
    with replace_folder(folder) as temporary:
        changes = export_format.write(temporary, source)
        content = export_format.read(temporary, source)
        compare = _compare_updates if to == "diffusers" else _compare_with_live
        comparison = compare(source, content, f"{folder} ({to})")
        write_more(temporary)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    return ExportReport(folder, to, files, changes, comparison)


Content = peft.StoredAdapter | nn.Module


def _compare_with_live(source: ExportSource, content: Any, exported: str) -> "LogitComparison":
    """Compares the logits of the exported content with the live model's."""
    ids = comparison_ids(source.base_model)

    def logits_with(adapter: Adapter | None) -> Tensor:
        with with_only_adapter(source.base_model, adapter) as model:
            return float32_logits(model, ids)

    live, base = logits_with(source.adapter), logits_with(None)
    if not isinstance(content, nn.Module):
        return compare_logits(live, base, logits_with(restore(content, source.base_model)), exported, rounded=False)
    rounded = common_dtype(source.base_model).itemsize == 2
    return compare_logits(live, base, float32_logits(content, ids), exported, rounded=rounded)


def _compare_updates(source: ExportSource, content: Any, exported: str) -> "LogitComparison":
    """Compares the updates of all layers, B A, with the live model's."""
    reloaded = fold_scale.fold_scale(ExportSource(restore(content, source.base_model), source.base_model))
    squares, difference = 0.0, 0.0
    for path, (A, B) in fold_scale.fold_scale(source).items():
        update, read_back = B @ A.flatten(1), reloaded[path][1] @ reloaded[path][0].flatten(1)
        squares += float(update.square().sum())
        difference += float((read_back - update).square().sum())
    if not difference <= TOLERANCE**2 * squares:  # or not a number
        raise FormatError(f"{exported}: the exported updates differ from the live model's; please report this bug")
    return LogitComparison(math.sqrt(difference / squares) if squares else 0.0, 1.0, TOLERANCE)


# ---- Comparing the logits of the exported files with the live model's
#
# In float32, whatever the weights' dtype. A bfloat16 forward of the demo's model is 3% (text) to 8% (random tokens) off
# its float32 one, and one of 4 bits on a CPU rounds more, which would hide errors in a file. The weights of a layer are
# float32 only while it runs; a quantized layer is a plain one with the dequantized weight while its parent runs.

TOLERANCE = 1e-4  # of the logits' size: float32 sums in another order
BATCH, LENGTH = 2, 16


@dataclass(frozen=True)
class LogitComparison:
    """Root mean squares over all logits of a small batch, or all updates, relative to the live model's."""

    difference: float  # between the file and the live model
    effect: float  # between the live model and its base
    tolerance: float


def compare_logits(live: Tensor, base: Tensor, reloaded: Tensor, exported: str, *, rounded: bool) -> LogitComparison:
    """Raises FormatError for logits that are not finite, and for a difference above the tolerance.

    exported: name of the folder and format, for the error.
    rounded: the update was added to 16-bit weights, so up to half of its effect may be lost.
    """
    size = _root_mean_square(live)
    if not 0 < size < math.inf:
        raise FormatError(f"the live model's logits must be finite and not all zero, but their size is {size}")
    effect = _root_mean_square(live - base) / size
    difference, tolerance = _root_mean_square(reloaded - live) / size, max(TOLERANCE, effect / 2 if rounded else 0)
    if not difference <= tolerance:  # or not a number
        raise FormatError(
            f"{exported}: the exported logits differ from the live model's by {difference:.2g} of their size; the "
            f"limit is {tolerance:.2g}, and the adapter's own effect is {effect:.2g}. Nothing was written; "
            f"{ROUNDING_REMEDY if rounded else 'please report this bug'}"
        )
    return LogitComparison(difference, effect, tolerance)


def _root_mean_square(values: Tensor) -> float:
    return float(values.to(wide_dtype(values.device)).square().mean().sqrt())


def comparison_ids(base_model: Any) -> Tensor:
    """Returns ids from all over the vocabulary, (BATCH, LENGTH). Raises FormatError for a model that takes no ids."""
    config: Any = getattr(base_model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a model that reads images
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        name = type(base_model).__name__
        raise FormatError(f"{name} has no config.vocab_size to check its export with; use save_adapter or merge")
    ids = torch.arange(1, BATCH * LENGTH + 1, device="cpu") * 7919 % vocabulary  # a prime: no pattern
    ids = ids.view(BATCH, LENGTH)
    if getattr(config, "is_encoder_decoder", False) and isinstance(config.eos_token_id, int):
        ids[:, -1] = config.eos_token_id  # where classifiers of such models read
    return ids.to(next(base_model.parameters()).device)


@torch.no_grad()
def float32_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logits, or the first output of a model without a head, in evaluation mode. ids: (batch, length).

    The model is left as it was.
    """
    handles = []
    quantized = {id(layer) for layer in quantized_layers(model).values()}
    for module in model.modules():
        parameters = {name: value for name, value in module._parameters.items() if value is not None}
        if id(module) in quantized:
            parameters.pop(storage_of(module).weight_name, None)
        children = [child for child in module.children() if id(child) in quantized]
        if children or any(parameter.dtype != torch.float32 for parameter in parameters.values()):
            undo: list[Change] = []
            handles.append(module.register_forward_pre_hook(partial(_to_float32, parameters, children, undo)))
            handles.append(module.register_forward_hook(partial(_undo, parameters, undo), always_call=True))
    try:
        with evaluating(model):
            config: Any = getattr(model, "config", None)
            inputs = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
            output = model(input_ids=ids, use_cache=False, **inputs)
            logits: Tensor = output["logits"] if "logits" in output else output[0]  # of a model without a head
    finally:
        for handle in handles:
            handle.remove()
    return logits.float()


def _to_float32(
    parameters: dict[str, nn.Parameter], children: list[nn.Module], undo: list[Change], module: nn.Module, _: Any
) -> None:
    module._parameters.update({name: nn.Parameter(value.float(), False) for name, value in parameters.items()})
    for child in children:
        undo += [change.make() for change in dequantize_to_linear(child)]


def _undo(parameters: dict[str, nn.Parameter], undo: list[Change], module: nn.Module, *_: Any) -> None:
    module._parameters.update(parameters)
    while undo:
        undo.pop().make()


@contextmanager
def with_only_adapter(base_model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """In the block only `adapter` is active, or none. The base must have an adapter with the same layers."""
    parts = adapter.parts if adapter else {}
    active: dict[nn.Module, tuple[nn.Module, ...]] = {
        module: () for module in base_model.modules() if isinstance(module, Swapped)
    }
    parts_of_layers = group_by_path((layer_path_of(base_model, path), part) for path, part in parts.items())
    for path, layer_parts in parts_of_layers.items():
        active[base_model.get_submodule(path)] = layer_parts
    with attached(active), evaluating(nn.ModuleList(parts.values())):
        yield base_model


# ---- Format peft


def peft_problems(source: ExportSource) -> list[str]:
    problems = []
    if changed := [path for path, layer in source.adapter.low_rank.items() if layer.strength != 1]:
        remedy = "call set_scale(name, 1), or export to 'portable', which includes the strength"
        problems.append(f"{len(changed)} layers have a strength other than 1; {remedy}")
    if reason := peft.unreadable_by_peft(peft_layers(source.base_model, source.adapter.low_rank).values()):
        problems.append(f"PEFT cannot load this adapter: {reason}; export to 'merged', or use save_adapter")
    return problems


def write_peft(folder: Path, source: ExportSource) -> list[str]:
    peft.write_peft_folder(folder, source.adapter, source.base_model)
    learned = any(layer.learns_scaling for layer in source.adapter.low_rank.values())
    return ["learned scales are multiplied into B, and stored in the metadata for tailora"] if learned else []


# ---- Format portable: a PEFT folder with one rank that vLLM allows and alpha = r
#
# vLLM ignores rank_pattern and alpha_pattern, SGLang and LMDeploy ignore rsLoRA; here the scale is 1 and is in B.

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of its --max-lora-rank


def portable_rank(highest: int) -> int:
    """Returns the rank of a portable folder whose layers have at most this one."""
    return next(rank for rank in VLLM_RANKS if rank >= highest)


def portable_problems(source: ExportSource) -> list[str]:
    problems = fold_scale.low_rank_problems(source, (LINEAR, CONV1D, EMBEDDING))
    highest = 0 if problems else max(len(A) for A, _ in fold_scale.fold_scale(source).values())
    if highest > VLLM_RANKS[-1]:
        problems.append(f"rank {highest} is above {VLLM_RANKS[-1]}, vLLM's maximum; export to 'gguf' or 'merged'")
    return problems


def write_portable(folder: Path, source: ExportSource) -> list[str]:
    factors, layer_types = fold_scale.fold_scale(source), fold_scale.exported_layer_types(source)
    r = portable_rank(max(len(A) for A, _ in factors.values()))
    factors, padding = fold_scale.pad_ranks(factors, r)
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        suffixes = EMBEDDING_SUFFIXES if layer_types[path] is EMBEDDING else SUFFIXES
        tensors |= {path + suffixes["A"]: A, path + suffixes["B"]: B}
    metadata = peft.AdapterMetadata(
        base=fingerprint(source.base_model, layer_types),
        vocabulary=vocabulary_size(source.base_model),
        base_folder=peft.relative_base_folder(source.base_model),
    )
    plain = {"lora_dropout": 0, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = source.adapter.config.replaced(r=r, lora_alpha=r, init_lora_weights="kaiming", **plain)
    layers = peft_layers(source.base_model, source.adapter.low_rank).values()
    settings = to_peft_config(config, layers, source.base_model)
    about = (
        f"Plain LoRA adapter of {len(factors)} layers, r = alpha = {r}: the scale is in B.\n"
        "For PEFT, and for servers that only read r and alpha: vLLM, SGLang, LMDeploy."
    )
    peft.write_files(folder, tensors, metadata, settings, about)
    return [*fold_scale.fold_changes(source), *padding]


# ---- Format merged: config, generation config, safetensors, tokenizer and chat template of a Hugging Face model
# The base model does not change.

SHARD = "2GB"  # largest safetensors file
LARGE_ERROR = 0.1  # of an update, by rounding; above it, the message has a remedy
ROUNDING_REMEDY = "use the adapter unmerged, or merge it into a base in float32 (--dtype float32)"


def merged_problems(source: ExportSource) -> list[str]:
    base: Any = source.base_model
    if hasattr(base, "save_pretrained"):
        return []
    return [f"{type(base).__name__} is not a transformers model; use merge_and_unload() and save the state dict"]


def write_merged(folder: Path, source: ExportSource) -> list[str]:
    """Raises FormatError with all layers that cannot be merged."""
    base: Any = source.base_model
    parts = {**source.adapter.low_rank, **source.adapter.extras, **source.adapter.saved}
    paths = dict.fromkeys(layer_path_of(base, path) for path in parts)
    state = MergeState(base)
    with with_only_adapter(base, source.adapter):
        try:
            report = state.merge({path: base.get_submodule(path) for path in paths}, untie_weights=True)
        except MergeError as error:
            raise FormatError(f"cannot merge the adapter: {error}") from None
        try:
            base.save_pretrained(folder, max_shard_size=SHARD)
        finally:
            untied = state.config_untied
            state.unmerge()
    # rope_theta where transformers 4 and mlx-lm look for it; without it they silently take 10,000
    config_file = folder / "config.json"
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    theta = (settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in settings:
        config_file.write_text(json.dumps({**settings, "rope_theta": theta}, indent=2) + "\n", encoding="utf-8")
    dtype = str(common_dtype(base)).removeprefix("torch.")
    notes = [f"rounding to {dtype} changes the update by at most {report.worst:.2g} of its size in the worst layer"]
    if report.worst > LARGE_ERROR:
        notes[0] += f". To keep all of it, {ROUNDING_REMEDY}"
    if quantized_layers(base):
        notes.append(f"the base is dequantized to {dtype}; quantizing it again would lose some or all of the update")
    if source.tokenizer is None:
        notes.append("the folder has no tokenizer, because none was passed")
    else:
        source.tokenizer.save_pretrained(folder)
    return notes + (["tied weights are untied: tie_word_embeddings is false"] if untied else [])


def load_merged(folder: Path, source: ExportSource) -> nn.Module:
    """Loads the folder with transformers. Raises FormatError if weights or the chat template are missing."""
    from transformers import AutoTokenizer

    base: Any = source.base_model
    like_base = {"dtype": base.dtype, "device_map": {"": base.device}}
    like_base["attn_implementation"] = attention_of(base.config)
    model, report = type(base).from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, use_kernels=False, **like_base
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = [f"{kind}: {', '.join(sorted(report[kind])[:3])}" for kind in kinds if report[kind]]
    if source.tokenizer is not None:
        template = AutoTokenizer.from_pretrained(folder).chat_template
        problems += ["the chat template has changed"] if template != source.tokenizer.chat_template else []
    if problems:
        raise FormatError(f"the merged model does not load back as it was saved: {'; '.join(problems)}")
    return cast(nn.Module, model)


# ---- All formats


@dataclass(frozen=True)
class Format:
    problems: Callable[[ExportSource], list[str]]  # a message for each part of the adapter that it does not support
    write: Callable[[Path, ExportSource], list[str]]  # fills a folder, and returns what differs from the adapter
    read: Callable[[Path, ExportSource], Content]  # the adapter in the folder, or the model


FORMATS = {
    "peft": Format(peft_problems, write_peft, lambda folder, _: peft.read_peft_folder(folder)),
    "portable": Format(portable_problems, write_portable, lambda folder, _: peft.read_peft_folder(folder)),
    "gguf": Format(gguf.problems, gguf.write, lambda folder, source: gguf.read(folder, source.base_model)),
    "mlx": Format(mlx.problems, mlx.write, lambda folder, _: mlx.read(folder)),
    "merged": Format(merged_problems, write_merged, load_merged),
    "diffusers": Format(
        kohya_diffusers.problems,
        kohya_diffusers.write,
        lambda folder, source: kohya_diffusers.read(folder / DIFFUSERS_WEIGHTS, source.base_model),
    ),
}
