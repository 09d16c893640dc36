"""A merged model as a Hugging Face folder: config, generation config, safetensors, tokenizer, chat template.

The base stays as it is. Merged weights are written to a temporary file as they are computed, and transformers reads
them from there, so a second copy of the model is never in memory.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tailora.core.adapter import group_by_path
from tailora.core.dequantize import Change, TensorChange, common_dtype
from tailora.core.layer_types import layer_path_of
from tailora.core.merge import MergeReport, check_ties, merge_changes, replace_by_copy
from tailora.errors import FormatError, MergeError
from tailora.formats.low_rank_export import ExportSource

SHARD = "2GB"  # largest safetensors file
SPILL = ".merged"
LARGE_ERROR = 0.1  # of an update, by rounding: more is worth a remedy
ROUNDING_REMEDY = "leave the adapter unmerged, or merge it into a base in float32 (--dtype float32)"
KEY_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")

# ---- Writing


def problems(source: ExportSource) -> list[str]:
    """Returns a message for each part of the adapter that the format cannot hold."""
    base: Any = source.base_model
    if hasattr(base, "save_pretrained"):
        return []
    return [f"a {type(base).__name__} is no transformers model; merge_and_unload() it and save its state dict"]


def write(folder: Path, source: ExportSource) -> list[str]:
    """Writes the model into `folder`. Returns what differs from the base with the adapter, in words.

    Raises FormatError with all layers that cannot be merged.
    """
    base: Any = source.base_model
    spill = folder / SPILL
    parts = {**source.adapter.low_rank, **source.adapter.extras}
    parts_of_layers = group_by_path((layer_path_of(base, path), part) for path, part in parts.items())
    layers = {path: (base.get_submodule(path), layer_parts) for path, layer_parts in parts_of_layers.items()}
    report = MergeReport({})
    try:
        changes = list(_on_disk(merge_changes(base, layers, report), spill))
    except MergeError as error:
        raise FormatError(f"merging: {error}") from None
    parameters: dict[int, nn.Parameter] = {}
    for path, trained in source.adapter.saved.items():
        changes += replace_by_copy(base.get_submodule(path), trained, parameters)
    untied = check_ties(base, changes, untie_weights=True)
    with _apply(changes, base.config, untied):
        base.save_pretrained(folder, max_shard_size=SHARD)
    # rope_theta where transformers 4 and mlx-lm look for it; without it they silently take 10,000
    config_file = folder / "config.json"
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    theta = (settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in settings:
        config_file.write_text(json.dumps({**settings, "rope_theta": theta}, indent=2) + "\n", encoding="utf-8")
    del changes
    spill.unlink(missing_ok=True)
    dtype = str(common_dtype(base)).removeprefix("torch.")
    notes = [f"rounding to {dtype} changes the update by at most {report.worst:.2g} of its size in the worst layer"]
    if report.worst > LARGE_ERROR:
        notes[0] += f". To keep all of it, {ROUNDING_REMEDY}"
    if errors := sorted(report.quantization_error.values()):
        notes.append(
            f"the whole base is dequantised, to {dtype}: what quantising had rounded off stays lost. Quantising "
            f"the merged weights again would err by {errors[0]:.2g} to {errors[-1]:.2g} times the update"
        )
    if source.tokenizer is None:
        notes.append("no tokenizer was given, so none is in the folder")
    else:
        source.tokenizer.save_pretrained(folder)
    return notes + (["tied weights are untied: tie_word_embeddings is false"] if untied else [])


def _on_disk(changes: Iterable[Change], file: Path) -> Iterator[Change]:
    """The same changes, with their new tensors at the end of `file`, in pages that the system can drop from memory."""
    for change in changes:
        if not isinstance(change, TensorChange):
            yield change
            continue
        tensor = change.tensor
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        start = file.stat().st_size if file.exists() else 0
        with file.open("ab") as out:
            out.write(raw.numpy().data)
        mapped = torch.from_numpy(np.memmap(file, np.uint8, "c", start, raw.shape))
        parameter = nn.Parameter(mapped.view(tensor.dtype).view(tensor.shape), requires_grad=False)
        yield TensorChange(change.module, change.name, parameter)


@contextmanager
def _apply(changes: Iterable[Change], config: Any, untied: bool) -> Iterator[None]:
    """In the block, the base is the merged model, and its config says so if weights are `untied`."""
    undo: list[Change] = []
    tied_before = getattr(config, "tie_word_embeddings", False)
    try:
        undo += (change.make() for change in changes)
        if untied:
            config.tie_word_embeddings = False
        yield
    finally:
        for change in reversed(undo):
            change.make()
        if untied:
            config.tie_word_embeddings = tied_before


# ---- Reading


def load(folder: Path, source: ExportSource) -> nn.Module:
    """Loads the folder with transformers. Raises FormatError if weights or the chat template are missing."""
    from transformers import AutoTokenizer

    base: Any = source.base_model
    settings = {
        "dtype": base.dtype,
        "device_map": {"": base.device},
        "attn_implementation": base.config._attn_implementation,
    }
    model, report = type(base).from_pretrained(folder, output_loading_info=True, use_safetensors=True, **settings)
    problems = [f"{name}: {', '.join(sorted(report[name])[:3])}" for name in KEY_PROBLEMS if report[name]]
    if source.tokenizer is not None:
        template = AutoTokenizer.from_pretrained(folder).chat_template
        problems += ["the chat template did not survive"] if template != source.tokenizer.chat_template else []
    if problems:
        raise FormatError(f"the merged model does not load as it was saved: {'; '.join(problems)}")
    loaded: nn.Module = model
    return loaded
